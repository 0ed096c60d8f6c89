"""The compiled counter against the CPU's, on the same tensors: every table. Kernels run on CUDA, and on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import torch
from counted import KEY, counted, new_statistics
from cuda_kernels_on_host import COMPILER, HostKernels
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

from quambase.collector.cuda import counter as cuda_counter
from quambase.collector.cuda.counter import CudaCounter, choose_counter
from quambase.collector.cuda.transfer import to_device
from quambase.collector.host.counter import HostCounter
from quambase.collector.statistics import ENCODINGS, PROBABILITIES, SUMMARY_COLUMNS, BlockStatistics, RunStatistics

SMALL = list(small_cases())
WHOLE, HALF, EIGHTH = 131072, 65536, 16384
"""Bytes of shared memory: for a table, and for parts of it."""

FEW, MANY = 3, 132
"""Blocks that count at a time: with few a large case brings each table far more than 65,536 of a value."""

NewCounter = Callable[..., CudaCounter]


@pytest.fixture(scope="module", params=["cuda", "host"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the kernels run; on the host as `cuda_kernels_on_host` runs them."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        yield torch.device("cuda", torch.cuda.current_device())
        return
    if COMPILER is None:
        pytest.skip("needs g++")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_counter, "Kernels", HostKernels)
        yield torch.device("cpu")


@pytest.fixture(scope="module")
def counter(device: torch.device) -> NewCounter:
    """A counter for an encoding, shared memory and number of blocks, made once."""

    @cache
    def made(encoding: str = "float16", shared: int = WHOLE, blocks: int = FEW) -> CudaCounter:
        return CudaCounter(ENCODINGS[encoding], MOST, device, shared=shared, blocks=blocks)

    return made


SIZES = {"cuda": (WHOLE, HALF, EIGHTH), "cpu": (WHOLE, HALF)}
"""For each of them a source is compiled, which on the host takes seconds."""

LARGE = {"cuda": 6_000_000, "cpu": 450_000}
"""Values of a large case."""


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_table_equals_the_hosts(case: Case, counter: NewCounter, device: torch.device) -> None:
    wanted = count_on_host(case)
    for shared in SIZES[device.type]:
        assert_same(count_on_device(counter(case.encoding, shared), case, device), wanted, case.encoding)


@pytest.mark.parametrize("name", [case.name for case in large_cases(96)])
def test_counters_that_fill_up_and_values_that_queue(name: str, counter: NewCounter, device: torch.device) -> None:
    (case,) = (case for case in large_cases(LARGE[device.type]) if case.name == name)
    wanted = count_on_host(case)
    for shared, blocks in ((WHOLE, FEW), (WHOLE, MANY), (HALF, FEW), (HALF, MANY)):
        assert_same(count_on_device(counter(case.encoding, shared, blocks), case, device), wanted, case.encoding)


@pytest.mark.parametrize("encoding", list(ENCODINGS))
def test_sites_are_counted_together(encoding: str, counter: NewCounter, device: torch.device) -> None:
    """Every small case and a large one added before the first flush: as each of them alone."""
    cases = [*SMALL, next(large_cases(2_000_000 if device.type == "cuda" else 100_000))]
    cases = sorted((c for c in cases if c.encoding == encoding), key=lambda c: str(c.x.dtype))
    for most in (len(cases), 3):
        statistics = new_statistics({(i, "site"): c.layout for i, c in enumerate(cases)}, MOST, device)
        block = BlockStatistics(statistics)
        counts, summaries = counter(encoding), []
        with torch.inference_mode():
            for i, case in enumerate(cases):
                shape = (len(case.lengths), len(case.layout.names) + 1, len(SUMMARY_COLUMNS))
                summaries.append(torch.full(shape, -1.0, device=device))
                offsets = np.cumsum([0, *case.lengths])
                counts.add(block.sites[i, "site"], case.x.to(device), offsets, 0, summaries[i])
                if i % most == most - 1:
                    counts.flush()
            counts.flush()
            block.fold(np.arange(10))
        for i, case in enumerate(cases):
            found = counted(statistics, (i, "site"))
            assert_same((found, summaries[i].cpu().numpy()), count_on_host(case), encoding)


def test_quantiles_of_documents_are_torchs(counter: NewCounter, device: torch.device) -> None:
    """float32 rank and interpolation as torch.quantile's kernel on the same device has them: bit for bit."""
    case = Case("quantiles", wild(4096, 33, 5, special=0).clamp(-6e4, 6e4).half(), [4000, 1, 95], plain_layout(0, 33))
    _, summaries = count_on_device(counter(), case, device)
    probabilities = torch.from_numpy(PROBABILITIES).to(device)
    for document, part in enumerate(case.x.to(device).float().abs().split(case.lengths)):
        wanted = torch.quantile(part.flatten(), probabilities).cpu().numpy()
        assert summaries[document, 0, 1:].tobytes() == wanted.tobytes(), document
        assert summaries[document, 0, 0] == part.max().item()


def test_more_documents_and_groups_than_one_call_takes(counter: NewCounter, device: torch.device) -> None:
    case = Case("many", wild(900, 40, 1).half(), [3] * 300, plain_layout(0, 5, 10, 20, 39, 40))
    assert_same(count_on_device(counter(), case, device), count_on_host(case), "float16")


def test_slices_of_tensors_of_several_widths_follow_one_another(counter: NewCounter, device: torch.device) -> None:
    """Equal layouts and documents, other strides: what was prepared for one call must not serve the next."""
    for width in (37, 80, 200):
        case = Case(str(width), wild(23, width, width).half()[:, :37], [5, 0, 1, 17], plain_layout(0, 2, 37))
        assert_same(count_on_device(counter(), case, device), count_on_host(case), "float16")


def test_documents_may_come_in_several_calls(counter: NewCounter, device: torch.device) -> None:
    for case in (SMALL[0], SMALL[1]):
        found = count_on_device(counter(), case, device, cuts=(1, 3))
        assert_same(found, count_on_host(case), "float16")


def test_what_was_added_may_be_given_up_at_once(counter: NewCounter, device: torch.device) -> None:
    """Its memory is given out again, and written to, while kernels that read it may still wait."""
    rows, channels = (4096, 768) if device.type == "cuda" else (64, 40)
    case = Case("given up", wild(9 * rows, channels, 12).half(), [rows] * 9, plain_layout(0, 8, channels))
    statistics = new_statistics({KEY: case.layout}, MOST, device)
    block = BlockStatistics(statistics)
    site = block.sites[KEY]
    summaries = torch.full((9, 3, len(SUMMARY_COLUMNS)), -1.0, device=device)
    parts = [part.to(device) for part in case.x.split(case.lengths)]
    with torch.inference_mode():
        counter()  # made before, so that nothing below waits for a compiler
        for i, part in enumerate(parts):
            counter().add(site, part.clone(), np.array([0, rows]), i, summaries[i : i + 1])
            for _ in range(4):
                torch.full_like(part, 7.0)
        counter().flush()
        block.fold(np.arange(9))
    found = counted(statistics), summaries.cpu().numpy()
    assert_same(found, count_on_host(case), "float16")


def test_the_same_block_gives_the_same_bytes(counter: NewCounter, device: torch.device) -> None:
    case = Case(
        "again", torch.randn(4096, 200, generator=torch.Generator().manual_seed(0)), [4000, 96], plain_layout(0, 200)
    )
    first, again = (count_on_device(counter(), case, device) for _ in range(2))
    assert first[1].tobytes() == again[1].tobytes()
    for name, values in vars(first[0].moments).items():
        assert values.tobytes() == getattr(again[0].moments, name).tobytes()


def test_statistics_go_there_and_back(device: torch.device) -> None:
    case = SMALL[1]
    statistics = RunStatistics.empty({KEY: case.layout}, MOST)
    block = BlockStatistics(statistics)
    summaries = block.summaries(len(case.lengths))[1][KEY]
    counter = HostCounter(ENCODINGS[case.encoding], MOST, len(case.layout.names))
    counter.add(block.sites[KEY], case.x, np.cumsum([0, *case.lengths]), 0, summaries)
    block.fold(np.arange(len(case.lengths)))
    there = to_device(statistics, device)
    assert there.device.type == device.type and there.counts.data_ptr() != statistics.counts.data_ptr()
    back, nothing = counted(there), np.zeros(1)
    assert_same((back, nothing), (count_on_host(case)[0], nothing), "float16")
    assert_same((back, nothing), (counted(statistics), nothing), "float16")


def test_kernels_compile_here(device: torch.device, capfd: pytest.CaptureFixture[str]) -> None:
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    assert isinstance(choose_counter(ENCODINGS["float16"], 64, device), CudaCounter)
    assert capfd.readouterr().err == ""
