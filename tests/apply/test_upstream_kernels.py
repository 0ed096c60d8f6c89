# mypy: disable-error-code="call-arg, misc"
"""Our INT8 operators against upstream Quamba's own CUDA kernels, compiled here from its sources.

Needs a GPU, a checkout of upstream in QUAMBA_SOURCE, and CUDA's headers (pip install nvidia-cuda-cccl
nvidia-cuda-runtime). Upstream is compiled as nvcc would, products contracted with sums; without that, where told.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quambase.apply.int8.operators.cuda import CudaInt8Operators
from quambase.apply.int8.operators.host import HostInt8Operators
from quambase.apply.int8.operators.interface import Convolution, ScanScales
from quambase.model.cuda.compiler import Kernels
from quambase.model.operators.interface import OperatorSizes, ScanInputs
from quambase.model.packed_batch import Batch, PlacedBatch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("QUAMBA_SOURCE" not in os.environ, reason="needs upstream's sources in QUAMBA_SOURCE"),
]

SOURCE = Path(__file__).parents[1] / "upstream_kernels.cu"
STUBS = ("c10/util/BFloat16.h", "c10/util/Half.h", "c10/util/complex.h", "c10/cuda/CUDAException.h")
DOCUMENTS, LENGTH, E, STATES = 3, 301, 1536, 16
SIZES = OperatorSizes(768, E, STATES, d_conv=4)

I32, U32, POINTER, F32 = ctypes.c_int32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_float


def of(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class ConvBase(ctypes.Structure):
    _fields_ = [
        *of(I32, "batch dim seqlen width"),
        ("silu_activation", ctypes.c_bool),
        *of(U32, "x_batch_stride x_c_stride x_l_stride weight_c_stride weight_width_stride"),
        *of(U32, "out_batch_stride out_c_stride out_l_stride"),
        *of(U32, "conv_state_batch_stride conv_state_c_stride conv_state_l_stride"),
        *of(POINTER, "x_ptr weight_ptr bias_ptr out_ptr conv_state_ptr seq_idx_ptr"),
        ("initial_states_ptr", POINTER),
        *of(U32, "initial_states_batch_stride initial_states_l_stride initial_states_c_stride"),
        ("final_states_ptr", POINTER),
        *of(U32, "final_states_batch_stride final_states_l_stride final_states_c_stride"),
    ]


class Conv(ConvBase):
    _fields_ = of(F32, "scale_x scale_w scale_b scale_out")


class Conv2(Conv):
    _fields_ = [
        ("xBC_ptr", POINTER),
        *of(U32, "xBC_batch_stride xBC_c_stride xBC_l_stride"),
        *of(F32, "scale_B scale_C"),
        *of(I32, "x_dim x_headdim d_state n_groups"),
        ("x_head_group_range_ptr", POINTER),
        ("x_nhead_group", I32),
        ("x_dim_group_range_ptr", POINTER),
        ("x_ndim_group", I32),
        *of(POINTER, "x_scales_ptr B_ptr"),
        *of(U32, "B_batch_stride B_c_stride B_l_stride"),
        *of(POINTER, "B_scales_ptr C_ptr"),
        *of(U32, "C_batch_stride C_c_stride C_l_stride"),
        ("C_scales_ptr", POINTER),
        *of(F32, "scale_wx scale_wB scale_wC scale_bx scale_bB scale_bC"),
    ]


class ScanBase(ctypes.Structure):
    _fields_ = [
        *of(I32, "batch dim seqlen dstate n_groups n_chunks dim_ngroups_ratio"),
        *of(ctypes.c_bool, "is_variable_B is_variable_C delta_softplus"),
        *of(U32, "A_d_stride A_dstate_stride B_batch_stride B_d_stride B_dstate_stride B_group_stride"),
        *of(U32, "C_batch_stride C_d_stride C_dstate_stride C_group_stride u_batch_stride u_d_stride"),
        *of(U32, "delta_batch_stride delta_d_stride z_batch_stride z_d_stride out_batch_stride out_d_stride"),
        *of(U32, "out_z_batch_stride out_z_d_stride"),
        *of(POINTER, "A_ptr B_ptr C_ptr D_ptr u_ptr delta_ptr delta_bias_ptr out_ptr x_ptr z_ptr out_z_ptr"),
    ]


class Scan(ScanBase):
    _fields_ = [
        *of(U32, "x_batch_stride x_d_stride x_dstate_stride"),
        *of(POINTER, "scale_A_ptr scale_B_ptr scale_C_ptr scale_D_ptr scale_u_ptr scale_z_ptr scale_ssm_state_ptr"),
        *of(POINTER, "scale_delta_ptr scale_delta_bias_ptr"),
    ]


class Hadamard(ctypes.Structure):
    _fields_ = [
        *of(I32, "batch dim log_N"),
        *of(ctypes.c_int64, "x_batch_stride out_batch_stride"),
        ("scale", F32),
        *of(POINTER, "x_ptr out_ptr"),
    ]


def words(structure: ctypes.Structure) -> ctypes.Structure:
    """The same bytes in a struct of whole words, as `Kernels.launch` takes it."""
    size = -(-ctypes.sizeof(structure) // 8) * 8

    class Words(ctypes.Structure):
        _fields_ = [("words", ctypes.c_int64 * (size // 8))]

    return Words.from_buffer_copy(bytes(structure).ljust(size, b"\0"))


Upstream = Callable[..., Kernels]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    """Compiles one of upstream's kernels: (name, number in upstream_kernels.cu, its parameters' type, contracted)."""
    folder = tmp_path_factory.mktemp("upstream")
    for path in (Path(os.environ["QUAMBA_SOURCE"]) / "csrc").rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(os.environ["QUAMBA_SOURCE"])
            copy.parent.mkdir(parents=True, exist_ok=True)
            # The launchers stay uncalled, but for one that is instantiated and cannot be here.
            copy.write_text(re.sub(r"kernel<<<.*?>>>\(params\);", "", path.read_text()))
    for stub in STUBS:
        (folder / stub).parent.mkdir(parents=True, exist_ok=True)
        (folder / stub).touch()
    csrc = folder / "csrc"
    places = [folder, csrc, *(csrc / part for part in ("causal_conv1d", "selective_scan", "hadamard"))]
    for path in map(Path, sys.path):
        places += [found.parents[2] for found in path.glob("nvidia/*/include/cccl/cub/cub.cuh")]
        places += [found.parent for found in path.glob("nvidia/*/include/cuda_fp16.h")]
    include = tuple(f"--include-path={place}" for place in places) + tuple(
        f"--include-path={place}" for place in {p / "cccl" for p in places if (p / "cccl").is_dir()}
    )

    def compiled(name: str, number: int, parameters: type[ctypes.Structure], contracted: bool, **more: int) -> Kernels:
        defines = {"KERNEL": number, "PARAMETERS": ctypes.sizeof(parameters), **more}
        flags = ("-default-device", f"-fmad={str(contracted).lower()}", *include)
        return Kernels(SOURCE, (name,), defines, torch.device("cuda", torch.cuda.current_device()), flags)

    return compiled


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def codes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def batches(device: torch.device) -> tuple[PlacedBatch, PlacedBatch]:
    batch = Batch.pack([[0] * LENGTH] * DOCUMENTS)
    return PlacedBatch.of(batch, torch.device("cpu")), PlacedBatch.of(batch, device)


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """(t, e) as upstream's (documents, e, length)."""
    return x.view(DOCUMENTS, LENGTH, -1).transpose(1, 2).contiguous()


def packed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(DOCUMENTS * LENGTH, -1).cpu()


def compare(what: str, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How far apart codes are, or float16 in last places; printed too."""
    if found.dtype == torch.float16:
        ordered = [torch.where(b < 0, -(b & 0x7FFF), b) for b in (v.view(torch.int16).int() for v in (found, wanted))]
    else:
        ordered = [found.int(), wanted.int()]
    apart = (ordered[0] - ordered[1]).abs()
    print(f"{what}: {apart.numel()} values, {int((apart == 1).sum())} one apart, {int((apart > 1).sum())} more")
    return apart


@pytest.mark.parametrize("contracted", [False, True])
def test_quamba1s_convolution(contracted: bool, upstream: Upstream, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    here, there = batches(device)
    x, weight, bias = codes(generator, len(here.tokens), E), codes(generator, E, 4), codes(generator, E)
    scale_x, scale_w, scale_b, scale_out = 0.03, 0.007, 0.01, 0.02
    x_there, weight_there, bias_there = channels_first(x).to(device), weight.to(device), bias.to(device)
    out = torch.empty_like(x_there)
    parameters = Conv(
        batch=DOCUMENTS,
        dim=E,
        seqlen=LENGTH,
        width=4,
        silu_activation=True,
        x_batch_stride=E * LENGTH,
        x_c_stride=LENGTH,
        x_l_stride=1,
        weight_c_stride=4,
        weight_width_stride=1,
        out_batch_stride=E * LENGTH,
        out_c_stride=LENGTH,
        out_l_stride=1,
        x_ptr=x_there.data_ptr(),
        weight_ptr=weight_there.data_ptr(),
        bias_ptr=bias_there.data_ptr(),
        out_ptr=out.data_ptr(),
        scale_x=scale_x,
        scale_w=scale_w,
        scale_b=scale_b,
        scale_out=scale_out,
    )
    kernels = upstream("conv", 0, Conv, contracted)
    kernels.launch("conv", (DOCUMENTS, E), 64, [words(parameters)], 32768)
    # float32 as upstream's C++ has them
    scales = torch.tensor([scale_x, scale_w, scale_b, scale_out])
    conv = Convolution(
        weight.T.float().contiguous(),
        (scales[1] * scales[0]).expand(E).contiguous(),
        bias.float() * scales[2],
        scales[3].expand(E).contiguous(),
        None,
    )
    wanted = HostInt8Operators(SIZES).conv_silu(x, conv, here)
    moved = Convolution(*(v if v is None else v.to(device) for v in conv))
    ours = CudaInt8Operators(device, SIZES).conv_silu(x.to(device), moved, there)
    for what, mine in (("CPU", wanted), ("CUDA", ours.cpu())):
        apart = compare(f"convolution, contracted {contracted}, upstream and our {what}", packed(out), mine)
        # A contracted sum is off by 2^-24 of it: one in a million falls on another code. Not contracted, the CUDA ones
        # have the same exp.
        assert apart.max() <= 1 and (apart > 0).float().mean() <= 1e-5
    assert len(wanted.unique()) > 130  # SiLU is hardly negative


@pytest.mark.parametrize("contracted", [False, True])
def test_quamba1s_scan(contracted: bool, upstream: Upstream, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    here, there = batches(device)
    t = len(here.tokens)
    u, delta, z = (codes(generator, t, E) for _ in range(3))
    b_c = codes(generator, t, 2 * STATES)
    a_log, d, bias = codes(generator, E, STATES), codes(generator, E), codes(generator, E)
    scales = {"u": 0.02, "delta": 0.03, "B": 0.01, "C": 0.01, "z": 0.04, "A": 0.02, "D": 0.01, "delta_bias": 0.02}
    scales["ssm_state"] = 0.05
    on_it = {name: torch.tensor([value], device=device) for name, value in scales.items()}
    moved = [channels_first(v).to(device) for v in (u, delta, z, b_c[:, :STATES], b_c[:, STATES:])]
    fixed = [v.to(device) for v in (a_log, d, bias)]
    out = torch.empty(DOCUMENTS, E, LENGTH, dtype=torch.float16, device=device)
    state = torch.empty(DOCUMENTS, E, 1, STATES, dtype=torch.int8, device=device)
    rows = {f"{name}_batch_stride": E * LENGTH for name in ("u", "delta", "z", "out")}
    rows |= {f"{name}_d_stride": LENGTH for name in ("u", "delta", "z", "out")}
    for name in "BC":
        rows |= {f"{name}_batch_stride": STATES * LENGTH, f"{name}_group_stride": STATES * LENGTH}
        rows[f"{name}_dstate_stride"] = LENGTH
    pointers = zip(
        ("u", "delta", "z", "B", "C", "A", "D", "delta_bias", "out", "x"), [*moved, *fixed, out, state], strict=True
    )
    parameters = Scan(
        batch=DOCUMENTS,
        dim=E,
        seqlen=LENGTH,
        dstate=STATES,
        n_groups=1,
        n_chunks=1,
        dim_ngroups_ratio=E,
        is_variable_B=True,
        is_variable_C=True,
        delta_softplus=True,
        A_d_stride=STATES,
        A_dstate_stride=1,
        **rows,
        **{f"{name}_ptr": tensor.data_ptr() for name, tensor in pointers},
        **{f"scale_{name}_ptr": tensor.data_ptr() for name, tensor in on_it.items()},
    )
    kernels = upstream("scan", 1, Scan, contracted)
    kernels.launch("scan", (DOCUMENTS, E), 32, [words(parameters)], 40000)
    s = {name: torch.tensor(value) for name, value in scales.items()}
    vectors = (-torch.exp(s["A"] * a_log.float()).T.contiguous(), s["D"] * d.float(), s["delta_bias"] * bias.float())
    our_scales = ScanScales(*(float(s[name]) for name in ("u", "delta", "B", "z")), state=1.0)
    inputs = ScanInputs(u, delta, b_c, z, *vectors)
    wanted = HostInt8Operators(SIZES).selective_scan(inputs, our_scales, here)
    there_inputs = ScanInputs(*(v.to(device) for v in inputs))
    ours = CudaInt8Operators(device, SIZES).selective_scan(there_inputs, our_scales, there)
    for what, mine in (("CPU", wanted), ("CUDA", ours.cpu())):
        # The CPU's float16 values are stored as float32.
        compare(f"scan, contracted {contracted}, upstream and our {what}, last places", packed(out), mine.half())
        difference = (packed(out).float() - mine.float()).abs()
        # Upstream's scan sums in another order (a tree), some tens of roundings of 2^-24 of what is summed.
        assert (difference <= 2.0**-10 * mine.float().abs() + 2.0**-17 * mine.float().abs().max()).all()


def test_the_hadamard_quantizer(upstream: Upstream, device: torch.device) -> None:
    """Saturation is not upstream's: a float goes to int32 and keeps its last byte, ``wrap``."""
    y = torch.randn(200, E, generator=torch.Generator().manual_seed(2)).half()
    y[1] = 1  # one output takes all of it
    y[2] = 60000 * (torch.arange(E) % 2)
    kernels = upstream("hadamard", 2, Hadamard, True)
    there = y.to(device)
    for factor in (20 / E**0.5, 30.0):
        out = torch.empty(y.shape, dtype=torch.int8, device=device)
        parameters = Hadamard(
            batch=len(y),
            dim=E,
            log_N=7,
            x_batch_stride=E,
            out_batch_stride=E,
            scale=factor,
            x_ptr=there.data_ptr(),
            out_ptr=out.data_ptr(),
        )
        kernels.launch("hadamard", (len(y), 1), 32, [words(parameters)], 4 * E)
        factor = float(torch.tensor(factor))
        wanted = HostInt8Operators(SIZES).rotate(y, factor, True)
        ours = CudaInt8Operators(device, SIZES).rotate(there, factor, True)
        assert torch.equal(ours.cpu(), wanted)
        rows = [i for i in range(len(y)) if i != 2]
        compare(f"Hadamard quantizer, factor {factor:.3g}, the row beyond int32", out.cpu()[2], wanted[2])
        # Sums of float32 in the same order, and products with a sign are exact.
        assert compare(f"Hadamard quantizer, factor {factor:.3g}", out.cpu()[rows], wanted[rows]).max() == 0


@pytest.mark.parametrize("contracted", [False, True])
def test_quamba2s_convolution(contracted: bool, upstream: Upstream, device: torch.device) -> None:
    """Of two SSD groups, each of two head groups of two channel groups of another size each."""
    generator = torch.Generator().manual_seed(3)
    here, there = batches(device)
    ngroups, headdim, states, heads = 2, 64, 128, 8
    e, w = heads * headdim, ngroups * states
    channels = e + 2 * w
    x, weight, bias = (
        codes(generator, len(here.tokens), channels),
        codes(generator, channels, 4),
        codes(generator, channels),
    )
    head_ends, channel_ends = torch.tensor([[1, 4], [3, 4]]), torch.tensor([[[16, 64], [40, 64]], [[8, 64], [60, 64]]])
    x_scales = torch.rand(2, 2, 2, generator=generator) / 50 + 0.01
    b_scales, c_scales = (torch.rand(2, generator=generator) / 50 + 0.01 for _ in "bc")
    scale_out = torch.empty(channels)
    for channel in range(e):
        group, head, place = channel // (e // 2), channel % (e // 2) // headdim, channel % headdim
        h = int((head_ends[group] <= head).sum())
        scale_out[channel] = x_scales[group, h, int((channel_ends[group, h] <= place).sum())]
    scale_out[e : e + w] = b_scales.repeat_interleave(states)
    scale_out[e + w :] = c_scales.repeat_interleave(states)
    scales = dict(scale_x=0.03, scale_B=0.02, scale_C=0.01, scale_wx=0.007, scale_wB=0.01, scale_wC=0.02)
    scales |= dict(scale_bx=0.01, scale_bB=0.02, scale_bC=0.03)
    held = [v.to(device) for v in (x, weight, bias, head_ends.int(), channel_ends.int(), x_scales, b_scales, c_scales)]
    outs = [torch.empty(len(x), width, dtype=torch.int8, device=device) for width in (e, w, w)]
    names = ("xBC", "weight", "bias", "x_head_group_range", "x_dim_group_range", "x_scales", "B_scales", "C_scales")
    pointers = {f"{n}_ptr": v.data_ptr() for n, v in zip((*names, "x", "B", "C"), [*held, *outs], strict=True)}
    strides = {"xBC_batch_stride": LENGTH * channels, "xBC_c_stride": 1, "xBC_l_stride": channels}
    for name, width in (("x", e), ("B", w), ("C", w)):
        strides |= {f"{name}_batch_stride": LENGTH * width, f"{name}_c_stride": 1, f"{name}_l_stride": width}
    parameters = Conv2(
        batch=DOCUMENTS,
        dim=channels,
        seqlen=LENGTH,
        width=4,
        silu_activation=True,
        weight_c_stride=4,
        weight_width_stride=1,
        x_dim=e,
        x_headdim=headdim,
        d_state=states,
        n_groups=ngroups,
        x_nhead_group=2,
        x_ndim_group=2,
        **scales,
        **strides,
        **pointers,
    )
    chunks = -(-LENGTH // 64)
    kernels = upstream("conv2", 3, Conv2, contracted, N_CHUNKS=chunks)
    kernels.launch("conv2", (DOCUMENTS, chunks * -(-channels // 128)), 128, [words(parameters)])
    s = {name: torch.tensor(value) for name, value in scales.items()}
    parts = [("x", e), ("B", w), ("C", w)]
    scale_wx = torch.cat([(s[f"scale_w{n}"] * s[f"scale_{n}"]).expand(width) for n, width in parts])
    bias_float = bias.float() * torch.cat([s[f"scale_b{n}"].expand(width) for n, width in parts])
    conv = Convolution(weight.T.float().contiguous(), scale_wx, bias_float, scale_out, None)
    sizes = OperatorSizes(32, e, states, 4, headdim, ngroups)
    wanted = HostInt8Operators(sizes).conv_silu(x, conv, here)
    moved = Convolution(*(v if v is None else v.to(device) for v in conv))
    ours = CudaInt8Operators(device, sizes).conv_silu(held[0], moved, there)
    found = torch.cat(outs, dim=1).cpu()
    for what, mine in (("CPU", wanted), ("CUDA", ours.cpu())):
        apart = compare(f"Quamba 2's convolution, contracted {contracted}, upstream and our {what}", found, mine)
        assert apart.max() <= 1 and (apart > 0).float().mean() <= 1e-5
