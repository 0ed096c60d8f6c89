"""The compiled counter on CUDA against the CPU's, on the same tensors: every table."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from device_cases import (
    MOST,
    Case,
    assert_same,
    count_on_device,
    count_on_host,
    large_cases,
    plain_layout,
    small_cases,
    wild,
)

from quambase.collector.cuda_counter import CudaCounter, choose_counter
from quambase.collector.device_statistics import DeviceMoments, DeviceStatistics
from quambase.collector.statistics import ENCODINGS, Moments

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SMALL = list(small_cases())


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def counters(device: torch.device) -> dict[tuple[str, int | None], CudaCounter]:
    """By encoding and shared memory: whole tables, and halves and eighths of them."""
    sizes = (None, 65536, 16384)
    return {(e, s): CudaCounter(ENCODINGS[e], MOST, device, shared=s) for e in ENCODINGS for s in sizes}


@pytest.mark.parametrize("shared", [None, 65536, 16384])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_table_equals_the_hosts(case: Case, shared: int | None, counters: dict, device: torch.device) -> None:
    found = count_on_device(counters[case.encoding, shared], case, device)
    assert_same(found, count_on_host(case), case.encoding)


@pytest.mark.parametrize("case", list(large_cases(6_000_000)), ids=lambda case: case.name)
def test_counters_that_fill_up_and_values_that_queue(case: Case, counters: dict, device: torch.device) -> None:
    wanted = count_on_host(case)
    for shared in (None, 65536):
        assert_same(count_on_device(counters[case.encoding, shared], case, device), wanted, case.encoding)


def test_more_documents_and_groups_than_one_call_takes(counters: dict, device: torch.device) -> None:
    case = Case("many", wild(900, 40, 1).half(), [3] * 300, plain_layout(0, 5, 10, 20, 39, 40))
    assert_same(count_on_device(counters["float16", None], case, device), count_on_host(case), "float16")


def test_documents_may_come_in_several_calls(counters: dict, device: torch.device) -> None:
    for case in (SMALL[0], SMALL[1]):
        found = count_on_device(counters["float16", None], case, device, cuts=(1, 3))
        assert_same(found, count_on_host(case), "float16")


def test_the_same_block_gives_the_same_bytes(counters: dict, device: torch.device) -> None:
    case = Case(
        "again", torch.randn(4096, 200, generator=torch.Generator().manual_seed(0)), [4000, 96], plain_layout(0, 200)
    )
    first, again = (count_on_device(counters["float16", None], case, device) for _ in range(2))
    assert first[1].tobytes() == again[1].tobytes()
    for field in fields(Moments):
        assert getattr(first[0].moments, field.name).tobytes() == getattr(again[0].moments, field.name).tobytes()


def test_the_host_structures_go_there_and_back(device: torch.device) -> None:
    case = SMALL[1]
    stats, _ = count_on_host(case)
    there = DeviceStatistics({(0, "site"): case.layout}, MOST, device)
    there.load({(0, "site"): stats})
    nothing = np.zeros(1)
    assert_same((there.to_host()[0, "site"], nothing), (stats, nothing), "float16")
    assert isinstance(there.sites[0, "site"].moments, DeviceMoments)


def test_kernels_compile_here(device: torch.device, capfd: pytest.CaptureFixture[str]) -> None:
    assert isinstance(choose_counter(ENCODINGS["float16"], 64, device), CudaCounter)
    assert capfd.readouterr().err == ""
