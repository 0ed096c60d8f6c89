"""Rows gathered by the compiled kernel, on a CUDA device or thread by thread on the host, and in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from cuda_kernels_on_host import cuda_or_host

from quambase.collector.cuda import gather
from quambase.collector.cuda.gather import CHUNK, PIECES, CudaGather, choose_gather
from quambase.collector.taps import Gather, TorchGather


@pytest.fixture(params=["cuda", "host"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device, or the host, whose threads then run the kernel."""
    return cuda_or_host(request, monkeypatch, gather)


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_of_any_tensor_in_order(compiled: bool, device: torch.device) -> None:
    """More tensors than a launch takes: slices, transposed ones, both types, long rows, no rows at all."""
    generator = torch.Generator().manual_seed(0)
    gatherer: Gather = CudaGather(device) if compiled else TorchGather(device)
    wanted = []
    for number in range(2 * PIECES + 3):
        width = (1, 7, 300, 2 * CHUNK, 3 * CHUNK + 5)[number % 5]
        x = torch.randn(20, width + 3, generator=generator).to(torch.float32 if number % 2 else torch.float16)[:, 3:]
        if number % 7 == 6:
            x = x.T.contiguous().T
        rows = torch.randint(20, (number % 4,), generator=generator)
        gatherer.add(x.to(device), rows.to(device))
        wanted.append(x[rows].float().reshape(-1))
    assert torch.equal(torch.cat(gatherer.gathered()).cpu(), torch.cat(wanted))
    assert gatherer.gathered() == []


def test_nothing_to_copy(device: torch.device) -> None:
    gatherer = CudaGather(device)
    gatherer.add(torch.ones(3, 5, device=device), torch.empty(0, dtype=torch.int64, device=device))
    (found,) = gatherer.gathered()
    assert found.numel() == 0


def test_where_every_row_is_kept_they_go_to_the_host(device: torch.device) -> None:
    gatherer = choose_gather(device, everything=True)
    assert isinstance(gatherer, TorchGather) and gatherer.device.type == "cpu"
    x = torch.randn(5, 4, device=device).half()
    gatherer.add(x, None)
    (found,) = gatherer.gathered()
    assert found.device.type == "cpu" and torch.equal(found, x.float().cpu().reshape(-1))
