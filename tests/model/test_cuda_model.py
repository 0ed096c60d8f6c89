# mypy: disable-error-code="call-arg"
"""The compiled operators on CUDA against plain PyTorch on the CPU, and whole models against the host's."""

from __future__ import annotations

import pytest
import torch
from cuda_kernels_on_host import cuda_or_host
from device_models import DOCUMENTS, shown, tiny_weights

from quambase.model.hadamard import hadamard
from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.operators import cuda as cuda_operators
from quambase.model.operators.cuda import CudaOperators
from quambase.model.operators.interface import BlockState, OperatorSizes, ScanInputs, SsdInputs
from quambase.model.operators.torch import TorchOperators
from quambase.model.packed_batch import Batch, PlacedBatch

HALF, SINGLE = torch.float16, torch.float32
LENGTHS = [17, 1, 40, 8, 33]


@pytest.fixture(params=["cuda", "host"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device, or the host, whose threads then run the kernels."""
    return cuda_or_host(request, monkeypatch, cuda_operators)


on_cuda = pytest.mark.parametrize("device", ["cuda"], indirect=True)
"""Tests of whole models, which choose their operators by the device."""


def batches(device: torch.device) -> tuple[PlacedBatch, PlacedBatch]:
    batch = Batch.pack([[0] * length for length in LENGTHS])
    return PlacedBatch.of(batch, torch.device("cpu")), PlacedBatch.of(batch, device)


def mamba1(d_inner: int, states: int = 4, d_model: int = 16) -> OperatorSizes:
    return OperatorSizes(d_model, d_inner, states, d_conv=4)


def mamba2(heads: int, headdim: int, states: int, ngroups: int) -> OperatorSizes:
    return OperatorSizes(16, heads * headdim, states, 4, headdim, ngroups)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Float32 inside: some tens of steps' and states' roundings of 2^-24, relative to what is summed; and, of a float16
    result, one of 2^-11.
    """
    unit = 2.0**-10 if wanted.dtype == HALF else 2.0**-16
    allowed = unit * wanted.float().abs() + unit * 1e-2 * wanted.float().abs().max()
    return bool(((found.cpu().float() - wanted.float()).abs() <= allowed).all())


def draw(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("channels", "states"), [(24, 4), (160, 16)])
def test_mamba1s_operators(dtype: torch.dtype, channels: int, states: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    here, there = batches(device)
    t = sum(LENGTHS)
    plain, compiled = TorchOperators(dtype), CudaOperators(device, dtype, mamba1(channels, states))
    wide = draw(generator, dtype, t, channels + 6)
    weight, bias, d = (
        draw(generator, SINGLE, 4, channels),
        draw(generator, SINGLE, channels),
        draw(generator, SINGLE, channels),
    )
    convolved = plain.conv_silu(wide[:, :channels], weight, bias, here)
    found = compiled.conv_silu(wide.to(device)[:, :channels], weight.to(device), bias.to(device), there)
    assert close(found, convolved)
    delta, bc = draw(generator, dtype, t, channels), draw(generator, dtype, t, 3 + 2 * states)
    a = -torch.rand(states, channels, generator=generator) * 8
    y, state = plain.selective_scan(ScanInputs(convolved, delta, bc[:, 3:], wide[:, 6:], a, d, bias), here)
    on_device = (convolved.to(device), delta.to(device), bc.to(device)[:, 3:], wide.to(device)[:, 6:])
    inputs = ScanInputs(*on_device, a.to(device), d.to(device), bias.to(device))
    my_y, my_state = compiled.selective_scan(inputs, there)
    assert close(my_y, y) and close(my_state, state)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(
    ("heads", "headdim", "states", "ngroups"), [(4, 8, 4, 2), (6, 64, 128, 1), (4, 64, 64, 2), (4, 12, 6, 1)]
)
def test_mamba2s_scan(
    dtype: torch.dtype, heads: int, headdim: int, states: int, ngroups: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(1)
    here, there = batches(device)
    t, e, w = sum(LENGTHS), heads * headdim, ngroups * states
    conv, dt = draw(generator, dtype, t, e + 2 * w), draw(generator, dtype, t, heads + 3)
    a, d, bias = -torch.rand(heads, generator=generator) * 8, *(draw(generator, SINGLE, heads) for _ in range(2))
    x, b, c = torch.split(conv, [e, w, w], dim=1)
    y, state = TorchOperators(dtype, ngroups).ssd_scan(SsdInputs(x, b, c, dt[:, 3:], a, d, bias), here)
    compiled = CudaOperators(device, dtype, mamba2(heads, headdim, states, ngroups))
    x, b, c = torch.split(conv.to(device), [e, w, w], dim=1)
    my = SsdInputs(x, b, c, dt.to(device)[:, 3:], a.to(device), d.to(device), bias.to(device))
    found = compiled.ssd_scan(my, there)
    assert close(found[0], y) and close(found[1], state)
    apart = my._replace(x=x.clone(), b=b.clone(), c=c.clone())  # no columns of one matrix
    again = compiled.ssd_scan(apart, there)
    assert torch.equal(again[0], found[0]) and torch.equal(again[1], found[1])


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("channels", "states", "b"), [(24, 4, 5), (160, 16, 3), (1536, 16, 1), (5120, 16, 1)])
def test_mamba1s_operators_of_one_token(
    dtype: torch.dtype, channels: int, states: int, b: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(2)
    plain, compiled = TorchOperators(dtype), CudaOperators(device, dtype, mamba1(channels, states))
    weight, bias, d = (draw(generator, SINGLE, *shape) for shape in ((4, channels), (channels,), (channels,)))
    a = -torch.rand(states, channels, generator=generator) * 8
    conv, ssm = draw(generator, dtype, b, 3, channels), draw(generator, SINGLE, b, states, channels)
    mine = BlockState(conv.clone(), ssm.clone().transpose(1, 2))
    # In the first rows of a longer one; in memory by state index, and, in the second half, by channel.
    theirs = BlockState(torch.cat([conv, conv]).to(device), torch.cat([ssm, ssm]).to(device).transpose(1, 2)).first(b)
    for step in range(4):
        here, there = (PlacedBatch.next_tokens(torch.zeros(b).long(), on) for on in (torch.device("cpu"), device))
        kept = theirs.conv, theirs.ssm
        wide, delta = draw(generator, dtype, b, channels + 6), draw(generator, dtype, b, channels)
        bc = draw(generator, dtype, b, 3 + 2 * states)
        convolved = plain.conv_silu(wide[:, :channels], weight, bias, here, mine)
        moved = wide.to(device)
        found = compiled.conv_silu(moved[:, :channels], weight.to(device), bias.to(device), there, theirs)
        assert close(found, convolved) and torch.equal(theirs.conv.cpu(), mine.conv)
        y, _ = plain.selective_scan(ScanInputs(convolved, delta, bc[:, 3:], wide[:, 6:], a, d, bias), here, mine)
        on_device = (convolved.to(device), delta.to(device), bc.to(device)[:, 3:], moved[:, 6:])
        inputs = ScanInputs(*on_device, a.to(device), d.to(device), bias.to(device))
        my_y, last = compiled.selective_scan(inputs, there, theirs)
        assert close(my_y, y) and close(theirs.ssm, mine.ssm) and last is theirs.ssm
        assert theirs.conv is kept[0] and theirs.ssm is kept[1]
        if step == 1:
            theirs.ssm = theirs.ssm.contiguous()


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(
    ("heads", "headdim", "states", "ngroups", "b"),
    [(4, 8, 4, 2, 3), (6, 64, 128, 1, 2), (4, 64, 64, 2, 1), (4, 6, 40, 1, 3), (80, 64, 128, 8, 1)],
)
def test_mamba2s_scan_of_one_token(
    dtype: torch.dtype, heads: int, headdim: int, states: int, ngroups: int, b: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(3)
    e, w = heads * headdim, ngroups * states
    plain = TorchOperators(dtype, ngroups)
    compiled = CudaOperators(device, dtype, mamba2(heads, headdim, states, ngroups))
    a, d, bias = -torch.rand(heads, generator=generator) * 8, *(draw(generator, SINGLE, heads) for _ in range(2))
    ssm, conv = draw(generator, SINGLE, b, e, states), torch.empty(0)
    mine, theirs = BlockState(conv, ssm.clone()), BlockState(conv, torch.cat([ssm, ssm]).to(device)).first(b)
    for _ in range(3):
        here, there = (PlacedBatch.next_tokens(torch.zeros(b).long(), on) for on in (torch.device("cpu"), device))
        wide, dt = draw(generator, dtype, b, e + 2 * w), draw(generator, dtype, b, heads + 3)
        x, b_in, c = torch.split(wide, [e, w, w], dim=1)
        y, _ = plain.ssd_scan(SsdInputs(x, b_in, c, dt[:, 3:], a, d, bias), here, mine)
        x, b_in, c = torch.split(wide.to(device), [e, w, w], dim=1)
        inputs = SsdInputs(x, b_in, c, dt.to(device)[:, 3:], a.to(device), d.to(device), bias.to(device))
        my_y, last = compiled.ssd_scan(inputs, there, theirs)
        assert close(my_y, y) and close(last, mine.ssm) and last is theirs.ssm


@pytest.mark.parametrize("dim", [24, 64, 768, 1536, 2560, 4096, 5120, 12288])
def test_hadamard_transforms_equal_the_hosts_bit_for_bit(dim: int, device: torch.device) -> None:
    x = draw(torch.Generator().manual_seed(2), SINGLE, 33, dim)
    for dtype in (HALF, SINGLE):
        found = CudaOperators(device, dtype, mamba1(dim)).hadamard(x.to(device, dtype))
        assert torch.equal(found.cpu(), hadamard(x.to(dtype)).to(dtype))


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("width", [16, 33, 768])
def test_norms(dtype: torch.dtype, width: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(width)
    x, residual = draw(generator, dtype, 70, width), draw(generator, SINGLE, 70, width) * 3
    weight = draw(generator, SINGLE, width)
    x[5], residual[5] = 0, 0
    moved = residual.to(device, copy=True)
    compiled = CudaOperators(device, dtype, mamba1(24, d_model=width))
    found = compiled.add_norm(x.to(device), moved, weight.to(device), 1e-5)
    assert close(found, TorchOperators(dtype).add_norm(x, residual, weight, 1e-5))
    assert found.dtype == dtype and torch.equal(moved.cpu(), residual)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("e", "ngroups"), [(24, 3), (64, 1), (1536, 1), (5120, 8)])
@pytest.mark.parametrize("rotated", [False, True])
def test_gated_norms(dtype: torch.dtype, e: int, ngroups: int, rotated: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(e)
    # An odd number of rows: a block has two.
    y, z, weight = draw(generator, dtype, 33, e), draw(generator, dtype, 33, e + 5) * 2, draw(generator, SINGLE, e)
    y[7] = 0
    wanted = TorchOperators(dtype, ngroups).gated_norm(y, z[:, 5:], weight, 1e-5, rotated=rotated)
    compiled = CudaOperators(device, dtype, mamba2(e // 8, 8, 4, ngroups))
    found = compiled.gated_norm(y.to(device), z.to(device)[:, 5:], weight.to(device), 1e-5, rotated=rotated)
    if rotated and dtype == HALF:
        # Values that were rounded to float16 the other way before they are added up: sqrt(e) of them, scaled by as
        # much, some standard deviations.
        assert ((found.cpu().float() - wanted.float()).abs() <= 2.0**-9 * wanted.float().abs().max()).all()
        assert (found.cpu() != wanted).float().mean() < 0.02
    else:
        assert close(found, wanted)


@on_cuda
@pytest.mark.parametrize("family", ["mamba1", "mamba2", "mamba2 of one group"])
def test_a_models_sites_are_the_hosts(family: str, device: torch.device) -> None:
    weights = tiny_weights(family)
    wanted = shown(floating_model(weights, rotated=True), DOCUMENTS)
    found = shown(floating_model(weights, device, SINGLE, rotated=True), DOCUMENTS)
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        # Two small float32 layers: some hundred ulps of the site's range.
        assert (found[key] - values).abs().max() <= 300 * 2.0**-24 * max(1, values.abs().max()), key


@on_cuda
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_documents_do_not_see_their_neighbours(family: str, dtype: torch.dtype, device: torch.device) -> None:
    """Documents in a batch as if alone, and the same bytes when a neighbour of the same length changes."""
    model = floating_model(tiny_weights(family), device, dtype, rotated=True)
    together = shown(model, DOCUMENTS)
    alone = [shown(model, [document]) for document in DOCUMENTS]
    unit = 2.0**-11 if dtype == HALF else 2.0**-24
    for key, values in together.items():
        apart = torch.cat([sites[key] for sites in alone])
        assert (apart - values).norm() <= 300 * unit * values.norm(), key
    changed = shown(model, [*DOCUMENTS[:-1], [1] * len(DOCUMENTS[-1])])
    rows = sum(map(len, DOCUMENTS[:-1]))
    assert torch.equal(changed[1, "out_proj:output"][:rows], together[1, "out_proj:output"][:rows])
    states = len(DOCUMENTS) - 1
    key = (1, "ssm_state_act:input")
    assert torch.equal(changed[key][:states], together[key][:states])
    assert isinstance(model, LanguageModel)


@on_cuda
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_a_changed_site_may_be_a_tensor_of_its_own(family: str, device: torch.device) -> None:
    """Copies with other strides in place of a site's values: the same bytes."""
    model = floating_model(tiny_weights(family), device, HALF, rotated=True)
    batch = Batch.pack(DOCUMENTS)
    copied = model.hidden(batch, change=lambda layer, name, values: values.clone(memory_format=torch.contiguous_format))
    assert torch.equal(copied, model.hidden(batch))
