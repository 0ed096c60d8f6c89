"""Counts and sums of squares by the compiled kernel, on a CUDA device or thread by thread on the host, against plain
PyTorch's.
"""

from __future__ import annotations

import pytest
import torch
from cuda_kernels_on_host import cuda_or_host

from quambase.collector.cuda import squares
from quambase.collector.cuda.squares import CudaSquares
from quambase.collector.sensitivity import SensitivitySums, fixed_point_sums
from quambase.model.cuda.compiler import CompilationFailed
from quambase.model.operators import choice
from quambase.model.operators.differentiable import DifferentiableOperators, HostDifferentiableOperators
from quambase.model.operators.interface import OperatorSizes


@pytest.fixture(params=["cuda", "host"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device, or the host, whose threads then run the kernels."""
    return cuda_or_host(request, monkeypatch, squares)


def check(values: torch.Tensor, gradient: torch.Tensor, group_of: torch.Tensor, device: torch.device) -> None:
    """The same bytes as `fixed_point_sums`, added twice to sums that are not zero."""
    groups = int(group_of.max()) + 1
    counts, total = fixed_point_sums(values.to(torch.float16), gradient, group_of, groups)
    found = SensitivitySums.zeros(groups, device)
    found.counts.fill_(3)
    found.gradient_sq.fill_(0.5)
    kernels, there = CudaSquares(device), [part.to(device) for part in (values, gradient, group_of)]
    for _ in range(2):
        kernels.add(found.counts, found.gradient_sq, *there)
    assert torch.equal(found.counts.cpu(), counts + counts + 3)
    assert torch.equal(found.gradient_sq.cpu(), 0.5 + total + total)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 33), (700, 24), (37, 300), (1200, 7)])
def test_sums_are_those_of_plain_pytorch(rows: int, width: int, device: torch.device) -> None:
    """Slices of longer rows, values alike and apart, gradients of many magnitudes, groups in any order."""
    random = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, width + 5, generator=random)[:, 5:]
    values[: rows // 3] = 0.0  # whole warps alike
    values[rows // 3 : rows // 2, ::2] = -0.25  # some threads of a warp
    values[-1, -1] = 1e9  # infinity in float16
    exponents = torch.randint(-18, 3, (rows, width + 5), generator=random)
    gradient = (torch.randn(rows, width + 5, generator=random) * 10.0**exponents)[:, :-5]
    group_of = torch.randint(3, (width,), generator=random)
    group_of[0] = 2
    check(values, gradient, group_of, device)


def test_values_that_are_not_contiguous(device: torch.device) -> None:
    random = torch.Generator().manual_seed(0)
    values, gradient = (torch.randn(8, 70, generator=random).T for _ in range(2))
    check(values, gradient, torch.zeros(8, dtype=torch.int64), device)


def test_gradients_of_zero_and_tiny_ones(device: torch.device) -> None:
    values, group_of = torch.ones(5, 40), torch.zeros(40, dtype=torch.int64)
    check(values, torch.zeros(5, 40), group_of, device)
    check(values, torch.full((5, 40), 2.0**-149), group_of, device)
    check(values, torch.full((5, 40), 3e38), group_of, device)


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_makes_the_site_s_sums_nan(wrong: float, device: torch.device) -> None:
    gradient = torch.ones(5, 40)
    gradient[3, 7] = wrong
    found = SensitivitySums.zeros(1, device)
    there = [part.to(device) for part in (torch.ones(5, 40), gradient, torch.zeros(40, dtype=torch.int64))]
    CudaSquares(device).add(found.counts, found.gradient_sq, *there)
    assert found.gradient_sq.isnan().all() and found.counts.sum() == 200


def test_no_values(device: torch.device) -> None:
    found = SensitivitySums.zeros(1, device)
    nothing = torch.empty(0, 4, device=device)
    CudaSquares(device).add(found.counts, found.gradient_sq, nothing, nothing, torch.zeros(4, device=device).long())
    assert found.counts.sum() == 0


def test_where_nothing_compiles_plain_pytorch_differentiates_and_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CompilationFailed("no compiler here")

    there, sizes = torch.device("cuda"), OperatorSizes(16, 24, 4, 4)
    monkeypatch.setattr(squares, "CudaSquares", fail)
    monkeypatch.setattr(choice, "CudaDifferentiableOperators", fail)
    squares.choose_squares.cache_clear()
    assert squares.choose_squares(there) is None
    squares.choose_squares.cache_clear()
    assert type(choice.choose_differentiable_operators(sizes, there)) is DifferentiableOperators
    assert squares.choose_squares(torch.device("cpu")) is None
    assert type(choice.choose_differentiable_operators(sizes, torch.device("cpu"))) is HostDifferentiableOperators
