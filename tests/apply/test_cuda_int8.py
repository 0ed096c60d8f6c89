# mypy: disable-error-code="call-arg, misc"
"""INT8 on CUDA: every operator against the CPU's on the same codes, and bundled models on the bundled text.

Integer products, epilogues and Hadamard transforms are exact, so their results are equal. Where float32 sums run in
another order, or exp is the device's, a value that falls between two codes may be rounded to the other one: those are
counted, and no code is further off than one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_kernels_on_host import cuda_or_host
from recorded_operators import OPERATORS, TO_CODES, padded
from test_device_int8 import host_model
from test_mixed_precision import SUBSETS, mixed

from quambase.analyzer.analyze import analyze
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.int8.arithmetic import Int8Weight
from quambase.apply.int8.build import build_model, int8_on_cuda
from quambase.apply.int8.operators import cuda as device_operators
from quambase.apply.int8.operators.cuda import CudaInt8Operators, padded_rows
from quambase.apply.int8.operators.host import HostInt8Operators
from quambase.apply.int8.operators.interface import (
    Convolution,
    Int8BlockState,
    Multipliers,
    ScanScales,
    SsdCodes,
    SsdScales,
)
from quambase.apply.int8.weights import PlacedWeights
from quambase.collector.collect import collect
from quambase.model.checkpoint import load_model
from quambase.model.inputs.text import read_documents
from quambase.model.operators.interface import OperatorSizes, ScanInputs
from quambase.model.packed_batch import Batch, PlacedBatch
from quambase.schema.scale_table import read_scales

LENGTHS = [17, 1, 40, 8, 33, 300]


@pytest.fixture(params=["cuda", "host"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device, or the host, whose threads then run the kernels."""
    return cuda_or_host(request, monkeypatch, device_operators)


on_cuda = pytest.mark.parametrize("device", ["cuda"], indirect=True)
"""Tests of what needs tensor cores."""


def mamba1(d_inner: int = 64, states: int = 16, taps: int = 4) -> OperatorSizes:
    return OperatorSizes(32, d_inner, states, taps)


def codes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def batches(device: torch.device) -> tuple[PlacedBatch, PlacedBatch]:
    batch = Batch.pack([[0] * length for length in LENGTHS])
    return PlacedBatch.of(batch, torch.device("cpu")), PlacedBatch.of(batch, device)


def on(device: torch.device, *tensors: Any) -> list[Any]:
    return [tensor.to(device) if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]


@on_cuda
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(1, 16, 8), (5, 3, 7), (128, 64, 128), (129, 65, 130), (300, 768, 3072), (257, 1536, 80), (64, 5120, 72)],
)
@pytest.mark.parametrize("hopper", [False, True])
def test_products_are_exact(rows: int, depth: int, columns: int, hopper: bool, device: torch.device) -> None:
    """Beyond 2^24 too, where float32 sums would not be: the largest row sums to 128 * 128 * 5120."""
    if hopper and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs a Hopper")
    generator = torch.Generator().manual_seed(rows)
    x, weight = codes(generator, rows, depth), codes(generator, columns, depth)
    x[0], weight[0] = -128, -128
    matrix = Int8Weight(weight, 1.0)
    here, there = HostInt8Operators(mamba1()), CudaInt8Operators(device, mamba1(), hopper=hopper)
    on_it = padded(x, device), there.matrix(matrix)
    sums = x.long() @ weight.long().T
    first, second = 1 / float(sums.abs().float().mean()), 50.0
    columns_first = torch.rand(columns, generator=generator) * first
    # The two factors one after the other: their product would round some float16 the other way.
    half = there.linear_to_half(*on_it, Multipliers(1e-3, 0.7))
    assert torch.equal(half.cpu(), (sums.int().float() * 1e-3 * 0.7).half())
    assert torch.equal(half.cpu().float(), here.linear_to_half(x, matrix, Multipliers(1e-3, 0.7)))
    for factor in (first, columns_first):
        found = there.linear_to_int8(*on_it, Multipliers(*on(device, factor, second)))
        wanted = here.linear_to_int8(x, matrix, Multipliers(factor, second))
        assert torch.equal(found.cpu(), wanted)
        assert rows * columns < 1000 or len(wanted.unique()) > 200  # clipped ones and the rest
    offset = -113 * weight.sum(1, dtype=torch.int32)
    shifted = ((x.long() + 113) @ weight.long().T).int().float()
    found = there.linear_to_int8(*on_it, Multipliers(first, second), offset.to(device))
    assert torch.equal(found.cpu(), torch.round(shifted * first * second).clamp(-128, 127).to(torch.int8))


@on_cuda
def test_rows_that_are_not_padded_are_multiplied_too(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = codes(generator, 40, 23), Int8Weight(codes(generator, 9, 23), 1.0)
    there = CudaInt8Operators(device, mamba1())
    found = there.linear_to_int8(x.to(device)[3:], there.matrix(weight), Multipliers(1e-3, 1.0))
    assert torch.equal(found.cpu(), HostInt8Operators(mamba1()).linear_to_int8(x[3:], weight, Multipliers(1e-3, 1.0)))


@pytest.mark.parametrize("dim", [24, 64, 96, 768, 1536, 2560, 4096, 5120])
@pytest.mark.parametrize("wrap", [False, True])
def test_hadamard_codes_are_equal(dim: int, wrap: bool, device: torch.device) -> None:
    y = torch.randn(67, dim, generator=torch.Generator().manual_seed(dim)).half()
    y[1] = 1  # one output takes all of it
    y[2] = 60000 * (torch.arange(dim) % 2)  # far beyond the codes, and, wrapped, beyond int32
    for factor in (20 / dim**0.5, 30.0):
        found = CudaInt8Operators(device, mamba1(dim)).rotate(y.to(device), factor, wrap)
        assert torch.equal(found.cpu(), HostInt8Operators(mamba1(dim)).rotate(y, factor, wrap))


def close(found: torch.Tensor, wanted: torch.Tensor, share: float = 1e-3) -> bool:
    """Codes: equal but for at most ``share`` of them, off by one. Float16: within a last place and 1e-5 of all."""
    found = found.cpu()
    if wanted.dtype == torch.int8:
        apart = (found.int() - wanted.int()).abs()
        return int(apart.max()) <= 1 and float((apart > 0).float().mean()) <= share
    apart = (found.float() - wanted.float()).abs()
    # A float32 recurrence of some hundred steps, or one rounding to float16 that went the other way.
    return bool((apart <= 2.0**-10 * wanted.float().abs() + 1e-5 * wanted.float().abs().max()).all())


@pytest.mark.parametrize("width", [16, 33, 768])
def test_norms(width: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(width)
    x, residual = torch.randn(70, width, generator=generator).half(), torch.randn(70, width, generator=generator) * 3
    x[5], residual[5] = 0, 0
    here, there = HostInt8Operators(mamba1()), CudaInt8Operators(device, mamba1())
    wide = padded_rows(70, width + 24, torch.float16, device)[:, :width].copy_(x)
    kept, moved = residual.clone(), padded_rows(70, width, torch.float32, device).copy_(residual)
    assert close(there.add_norm_to_int8(wide, moved, 1e-5, 0.02), here.add_norm_to_int8(x.float(), kept, 1e-5, 0.02))
    assert torch.equal(moved.cpu(), kept)
    assert close(there.add_norm_to_half(wide, moved, 1e-5), here.add_norm_to_half(x.float(), kept, 1e-5))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("channels", "taps"), [(24, 4), (64, 2), (1536, 4)])
def test_convolution(channels: int, taps: int, affine: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(channels)
    batch, moved = batches(device)
    x, weight = codes(generator, sum(LENGTHS), channels + 20), codes(generator, taps, channels).float()
    scale_wx = torch.rand(channels, generator=generator) * 2e-4
    bias, scale_out = torch.randn(channels, generator=generator), torch.rand(channels, generator=generator) / 60 + 0.01
    zero_out = torch.randint(-128, 100, (channels,), generator=generator).float() * affine
    conv = Convolution(weight, scale_wx, bias, scale_out, zero_out if affine else None)
    sizes = mamba1(channels, taps=taps)
    wanted = HostInt8Operators(sizes).conv_silu(x[:, 4 : 4 + channels], conv, batch)
    operators = CudaInt8Operators(device, sizes)
    found = operators.conv_silu(padded(x, device)[:, 4 : 4 + channels], Convolution(*on(device, *conv)), moved)
    # Only another exp tells them apart, by some 2^-23 of a code of up to 2^7: one in a million lies that near a half.
    assert close(found, wanted, 2e-6)
    assert len(wanted.unique()) > 100


@pytest.mark.parametrize("zero_point", [0, -90])
@pytest.mark.parametrize(("channels", "states"), [(24, 4), (64, 16), (1536, 16)])
def test_selective_scan(channels: int, states: int, zero_point: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(channels)
    batch, moved = batches(device)
    t = sum(LENGTHS)
    u, delta, bc, z = (codes(generator, t, width) for width in (channels, channels, 3 + 2 * states, 2 * channels))
    a = -torch.rand(states, channels, generator=generator) * 8
    d, bias = torch.randn(channels, generator=generator), torch.randn(channels, generator=generator) - 3
    scales, sizes = ScanScales(0.02, 0.03, 0.01, 0.04, 1.0, u_zero=zero_point), mamba1(channels, states)
    mine = ScanInputs(u, delta, bc[:, 3:], z[:, channels:], a, d, bias)
    wanted = HostInt8Operators(sizes).selective_scan(mine, scales, batch)
    inputs = [padded(part, device) for part in (u, delta, bc, z)]
    inputs[2], inputs[3] = inputs[2][:, 3:], inputs[3][:, channels:]
    operators = CudaInt8Operators(device, sizes)
    found = operators.selective_scan(ScanInputs(*inputs, *on(device, a, d, bias)), scales, moved)
    assert close(found, wanted)


@pytest.mark.parametrize(
    ("heads", "headdim", "states", "ngroups"), [(4, 8, 4, 2), (6, 64, 128, 1), (4, 64, 64, 2), (3, 8, 6, 1)]
)
@pytest.mark.parametrize("affine", [False, True])
def test_mamba2s_scan_and_gated_norm(
    heads: int, headdim: int, states: int, ngroups: int, affine: bool, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(heads)
    batch, moved = batches(device)
    t, e, w = sum(LENGTHS), heads * headdim, ngroups * states
    sizes = OperatorSizes(32, e, states, 4, headdim, ngroups)
    here, there = HostInt8Operators(sizes), CudaInt8Operators(device, sizes)
    conv_out, dt, z = codes(generator, t, e + 2 * w), codes(generator, t, heads + 3), codes(generator, t, e + 5)
    conv_scales = torch.rand(e + 2 * w, generator=generator) / 50
    zeros = torch.randint(-128, 100, (e + 2 * w,), generator=generator).float()
    scales = SsdScales(conv_scales, zeros if affine else None, 0.03, torch.ones(1, states), torch.zeros(e).long())
    a, d, bias = -torch.rand(heads, generator=generator) * 8, *(torch.randn(heads, generator=generator) for _ in "db")
    wanted = here.ssd_scan(SsdCodes(conv_out, dt[:, 3:], a, d, bias), scales, batch)
    moved_scales = replace(scales, conv_out=conv_scales.to(device), zero=zeros.to(device) if affine else None)
    inputs = SsdCodes(padded(conv_out, device), padded(dt, device)[:, 3:], *on(device, a, d, bias))
    assert close(there.ssd_scan(inputs, moved_scales, moved), wanted)
    weight = torch.randn(e, generator=generator)
    rest = (0.03, weight, 1e-5, 30 / e**0.5, False)
    found = there.gated_rotate(wanted.half().to(device), padded(z, device)[:, :e], 0.03, weight.to(device), *rest[2:])
    # A norm's float16 that went the other way moves every output of its row by a little.
    assert close(found, here.gated_rotate(wanted, z[:, :e], *rest), 1e-2)


class Checked:
    """The device's operators; each result, and each state, is compared with the CPU's of the same inputs.

    ``seen``: by name the numbers of values, of those one code or last place apart, and of those further apart.
    """

    def __init__(
        self, device: CudaInt8Operators, host: HostInt8Operators, seen: dict[str, list[int]] | None = None
    ) -> None:
        self.operators, self.host = device, host
        self.seen = defaultdict(lambda: [0, 0, 0]) if seen is None else seen

    @cached_property
    def steps(self) -> Checked:
        return Checked(self.operators.decoding(), self.host.decoding(), self.seen)

    def decoding(self) -> Checked:
        return self.steps

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self.operators, name)
        if name not in OPERATORS:
            return operator

        def call(*arguments: Any) -> torch.Tensor:
            copies = [_on_host(argument) for argument in arguments]
            if name.startswith("linear"):  # there the matrix is padded
                x, weight, *factors = copies
                copies = [x, Int8Weight(weight.codes[:, : x.shape[1]].contiguous(), weight.scale), *factors]
            found: torch.Tensor = operator(*arguments)
            wanted = getattr(self.host, name)(*copies)
            got = found.cpu()
            if name in TO_CODES:
                apart = (got.int() - wanted.int()).abs()
            else:  # float16, in its last places
                apart = (_ordered(got) - _ordered(wanted.half())).abs()
            if name == "half_product":
                apart = _beyond_rounding(apart, got, wanted, *copies)
            self._count(name, apart)
            for mine, theirs in zip(arguments, copies, strict=True):
                if isinstance(theirs, Int8BlockState):
                    for part in ("conv", "ssm"):
                        codes_of = [getattr(state, part).cpu().int() for state in (mine, theirs)]
                        self._count(f"{name}: {part}", (codes_of[0] - codes_of[1]).abs())
            return found

        return call

    def _count(self, name: str, apart: torch.Tensor) -> None:
        counts = self.seen[name]
        for i, count in enumerate((apart.numel(), int((apart == 1).sum()), int((apart > 1).sum()))):
            counts[i] += count


def _beyond_rounding(
    apart: torch.Tensor, got: torch.Tensor, wanted: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """``apart``, but at most one place where rounding alone can explain more.

    Both sides sum k products in float32, each in an order of its own: a sum is at most k 2^-24 of the products' sizes
    off (Higham 2002, section 4.2), then rounded to float16. Where products cancel, that is many of its last places.
    """
    allowed = 2 * x.shape[1] * 2.0**-24 * (x.abs() @ weight.abs().T) + 2.0**-10 * wanted.abs()
    explained = (got.float() - wanted.float()).abs() <= allowed
    return torch.where(explained, apart.clamp(max=1), apart)


def _ordered(x: torch.Tensor) -> torch.Tensor:
    """float16 as integers whose differences count last places."""
    bits = x.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def _on_host(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.cpu().float() if argument.dtype == torch.float16 else argument.cpu().clone()
    if isinstance(argument, tuple):
        return type(argument)(*map(_on_host, argument))
    if is_dataclass(argument):
        return type(argument)(*(_on_host(getattr(argument, f.name)) for f in fields(argument)))
    return argument


@on_cuda
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize(
    "switches",
    [{}, {"quantize_lm_head": True, "quantize_embedding": True}, {"compat": "upstream"}, {"weight_bits": 4}],
)
def test_tiny_models_logits_are_the_hosts(family: str, switches: dict[str, Any], device: torch.device) -> None:
    host = host_model(family, **switches)
    (model,) = int8_on_cuda({"it": host}, device).values()
    generator = np.random.default_rng(0)
    batch = Batch.pack([generator.integers(0, 40, length).tolist() for length in LENGTHS])
    found, wanted = model.logits(model.hidden(batch)).float().cpu(), host.logits(host.hidden(batch))
    # A code that goes the other way is followed by others: the models are as close as that leaves them.
    assert (found - wanted).norm() <= 0.02 * wanted.norm()


@on_cuda
@pytest.mark.parametrize(("family", "kept"), SUBSETS)
def test_models_with_operators_in_16_bit_are_the_hosts(
    family: str, kept: tuple[str, ...], device: torch.device
) -> None:
    host = mixed(family, kept)
    (model,) = int8_on_cuda({"mixed": host}, device).values()
    generator = np.random.default_rng(0)
    batch = Batch.pack([generator.integers(0, 40, length).tolist() for length in LENGTHS])
    found, wanted = model.logits(model.hidden(batch)).float().cpu(), host.logits(host.hidden(batch))
    assert (found - wanted).norm() <= 0.02 * wanted.norm()  # as above


@on_cuda
@pytest.mark.parametrize("name", ["mamba-5m", "mamba2-8m"])
def test_a_bundled_models_codes_on_real_text(name: str, device: torch.device, tmp_path: Path) -> None:
    """Every operator inside the model on the bundled text, on the inputs that the device's own codes make."""
    db = tmp_path / "db"
    collect(name, samples=8, db=db, device="cpu")
    analyze(db, out=tmp_path / "scales.parquet")
    table, loaded = read_scales(tmp_path / "scales.parquet"), load_model(name)
    host = build_model(loaded.any_weights, table, table.group_scales_for("quamba"))
    sizes = host.config.operator_sizes
    checked = Checked(CudaInt8Operators(device, sizes), HostInt8Operators(sizes))
    model = host.on(PlacedWeights(host.weights, checked))
    texts = [document.text for document in read_documents("sample:evaluation", 8)]
    model.hidden(Batch.pack([tokens[:512] for tokens in loaded.tokenizer.encode_batch(texts)]))
    print({name: tuple(counts) for name, counts in checked.seen.items()})
    check_counts(checked.seen)


def check_counts(seen: dict[str, list[int]]) -> None:
    """That the device's values are the host's but for the few that a sum's order or exp moves."""
    for operator, (total, one, more) in seen.items():
        if operator in ("linear_to_int8", "linear_to_half", "rotate") or operator.endswith(": conv"):
            assert one + more == 0, operator
        elif operator in ("selective_scan", "ssd_scan"):
            # Float16 of sums that cancel: few are off, and by more than a last place only where y is small.
            assert one + more <= 0.05 * total, operator
        else:
            assert more == 0 and one <= 1e-3 * total + 1, operator


@on_cuda
def test_evaluate_on_cuda_agrees_with_the_cpu(device: torch.device, tmp_path: Path) -> None:
    db = tmp_path / "db"
    collect("mamba-5m", samples=8, db=db, device="cpu")
    analyze(db, out=tmp_path / "scales.parquet")
    options: dict[str, Any] = {
        "scales": tmp_path / "scales.parquet",
        "strategies": ["quamba", "absmax"],
        "samples": 6,
        "db": db,
    }
    found = evaluate(**options, device="cuda")
    wanted = evaluate(**options, device="cpu")
    assert found.id != wanted.id and found.about["device"] == "cuda"
    figures = {
        (e.about["device"], label, name): np.array([r[name] for r in e.results.to_pylist() if r["strategy"] == label])
        for e in (found, wanted)
        for label in ("float", "quamba", "absmax")
        for name in ("nll", "kl", "tokens")
    }
    tokens = figures["cpu", "float", "tokens"]
    # Nats a token, of float32 sums in another order.
    assert (np.abs(figures["cuda", "float", "nll"] - figures["cpu", "float", "nll"]) / tokens).max() < 1e-4
    for label in ("quamba", "absmax"):
        # A code that goes the other way is followed by others, until much of the rounding is drawn anew: documents'
        # likelihoods move as far as quantization moves them. What stays is the distance from the float model, over some
        # thousands of tokens (3 % apart when one value in a thousand of each scan is a last place off).
        mine, theirs = (figures[where, label, "kl"].sum() for where in ("cuda", "cpu"))
        assert abs(mine - theirs) < 0.1 * theirs
    again = evaluate(**options, device="cuda")
    assert again.id == found.id
