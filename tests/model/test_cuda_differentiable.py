# mypy: disable-error-code="call-arg"
"""The compiled gradients on CUDA, or thread by thread on the host, against autograd through plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cuda_kernels_on_host import cuda_or_host
from device_models import PlainLoop, tiny_weights
from test_differentiable import gradients

from quambase.model.hadamard import hadamard
from quambase.model.operators import cuda, cuda_differentiable
from quambase.model.operators.cuda_differentiable import CudaDifferentiableOperators
from quambase.model.operators.interface import OperatorSizes, ScanInputs, SsdInputs
from quambase.model.operators.torch import TorchOperators
from quambase.model.packed_batch import Batch, PlacedBatch

CPU = torch.device("cpu")
LENGTHS = (17, 1, 40, 8, 33)
"""Shorter and longer than a chunk of the scan's and a thread's rows of the convolution, and whole chunks."""

Operate = Callable[[TorchOperators, PlacedBatch, list[torch.Tensor]], torch.Tensor]


@pytest.fixture(params=["cuda", "host"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device, or the host, whose threads then run the kernels."""
    cuda_or_host(request, monkeypatch, cuda)
    return cuda_or_host(request, monkeypatch, cuda_differentiable)


def check(
    operate: Operate, compiled: TorchOperators, inputs: list[torch.Tensor], lengths: tuple[int, ...] = LENGTHS
) -> None:
    """The output and every input's gradient, the compiled operators' against those of the plain loop."""
    batch, found = Batch.pack([[0] * length for length in lengths]), []
    random = torch.Generator().manual_seed(9)
    for operators in (PlainLoop(compiled.ngroups), compiled):
        leaves = [part.to(operators.device, copy=True).requires_grad_() for part in inputs]
        y = operate(operators, PlacedBatch.of(batch, operators.device), leaves)
        y.backward(torch.randn(y.shape, generator=random.manual_seed(9)).to(y.device))
        found.append([y.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])
    for wanted, mine in zip(*found, strict=True):
        # Sums over a document's tokens, the states or the channels: some hundred roundings of 2^-24 of the largest; the
        # plain loop has as many.
        assert wanted.abs().max() > 0
        assert (mine - wanted).abs().max() <= 300 * 2.0**-24 * wanted.abs().max()


def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("channels", [24, 160])
def test_convolution(channels: int, taps: int, device: torch.device) -> None:
    wide, weight, bias = drawn((sum(LENGTHS), channels + 5), (taps, channels), (channels,))

    def operate(ops: TorchOperators, batch: PlacedBatch, leaves: list[torch.Tensor]) -> torch.Tensor:
        return ops.conv_silu(leaves[0][:, 5:], weight.to(ops.device), bias.to(ops.device), batch)

    check(operate, CudaDifferentiableOperators(OperatorSizes(16, channels, 4, taps), device), [wide])


@pytest.mark.parametrize(("channels", "states"), [(24, 4), (40, 5), (160, 16), (24, 40), (24, 129)])
def test_selective_scan(channels: int, states: int, device: torch.device) -> None:
    """The last warp and block have fewer channels; states that are no power of two, more sums than lanes, and chunks
    of 8, 3 and 1 tokens."""
    t = sum(LENGTHS)
    u, delta, bc, z, d, bias = drawn(
        (t, channels), (t, channels), (t, 3 + 2 * states), (t, channels + 6), (channels,), (channels,)
    )
    delta[:5] += 25  # softplus is the identity there
    a = -torch.rand(states, channels, generator=torch.Generator().manual_seed(1)) * 8
    a[0] *= 2.0**-8  # a state that reaches far back: what comes in from the neighbouring chunks counts

    def operate(ops: TorchOperators, batch: PlacedBatch, leaves: list[torch.Tensor]) -> torch.Tensor:
        mine = (leaves[0], leaves[1], leaves[2][:, 3:], leaves[3][:, 6:])
        inputs = ScanInputs(*mine, a.to(ops.device), d.to(ops.device), bias.to(ops.device))
        return ops.selective_scan(inputs, batch)[0]

    check(operate, CudaDifferentiableOperators(OperatorSizes(16, channels, states, 4), device), [u, delta, bc, z])


@pytest.mark.parametrize(
    ("heads", "headdim", "states", "ngroups"), [(4, 8, 4, 2), (2, 64, 16, 1), (4, 12, 6, 1), (6, 4, 8, 3)]
)
def test_ssd_scan(heads: int, headdim: int, states: int, ngroups: int, device: torch.device) -> None:
    """Documents of one chunk, of several, and of whole ones."""
    lengths, e, w = (70, 1, 130, 3, 64), heads * headdim, ngroups * states
    t = sum(lengths)
    conv, dt, d, bias = drawn((t, e + 2 * w), (t, heads + 3), (heads,), (heads,))
    a = -torch.rand(heads, generator=torch.Generator().manual_seed(1)) * 8
    a[0] *= 2.0**-8  # a head whose state reaches far back
    dt[:5] += 25  # softplus is the identity there

    def operate(ops: TorchOperators, batch: PlacedBatch, leaves: list[torch.Tensor]) -> torch.Tensor:
        x, b, c = torch.split(leaves[0], [e, w, w], dim=1)
        inputs = SsdInputs(x, b, c, leaves[1][:, 3:], a.to(ops.device), d.to(ops.device), bias.to(ops.device))
        return ops.ssd_scan(inputs, batch)[0]

    check(
        operate,
        CudaDifferentiableOperators(OperatorSizes(16, e, states, 4, headdim, ngroups), device),
        [conv, dt],
        lengths,
    )


@pytest.mark.parametrize("dim", [24, 40, 56, 64, 80])
def test_the_transposed_transform(dim: int, device: torch.device) -> None:
    x, slope = drawn((7, dim), (7, dim))
    leaf = x.to(device).requires_grad_()
    y = CudaDifferentiableOperators(OperatorSizes(16, dim, 4, 4), device).hadamard(leaf)
    y.backward(slope.to(device))
    assert torch.equal(y.detach().cpu(), hadamard(x))
    assert torch.equal(leaf.grad.cpu(), hadamard(slope, transposed=True))


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_gradients_of_a_model_are_those_of_the_plain_loop(family: str, device: torch.device) -> None:
    sizes = tiny_weights(family).config.operator_sizes
    compiled = CudaDifferentiableOperators(sizes, device)
    found, wanted = gradients(family, compiled), gradients(family, PlainLoop(sizes.ngroups))
    assert set(found) == set(wanted)
    for key, gradient in found.items():
        # As in test_differentiable.py.
        assert (gradient.cpu() - wanted[key]).abs().max() <= 3000 * 2.0**-24 * wanted[key].abs().max(), key
    again = gradients(family, compiled)
    assert all(torch.equal(again[key], found[key]) for key in found), "the threads' order matters"
