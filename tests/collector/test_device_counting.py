"""What of the CUDA path a CPU can check: plain-PyTorch counting, packing, folding, the way back to the host."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from counted import counted, new_statistics
from device_cases import (
    MOST,
    Case,
    assert_same,
    count_on_device,
    count_on_host,
    large_cases,
    plain_layout,
    small_cases,
    sorted_layout,
)
from device_models import tiny_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.collector.checkpoint import load_checkpoint, save_checkpoint
from quambase.collector.cuda import counter as cuda_counter
from quambase.collector.cuda import transfer
from quambase.collector.cuda.counter import halvings
from quambase.collector.cuda.packing import FLUSH, moment_segments, pack
from quambase.collector.cuda.site_batch import item_rows
from quambase.collector.cuda.torch_counter import TorchCounter
from quambase.collector.cuda.transfer import to_device, to_host
from quambase.collector.host.counter import HostCounter
from quambase.collector.statistics import ENCODINGS, BlockStatistics, RunStatistics, SiteLayout, largest, merged_top
from quambase.model.cuda.compiler import CompilationFailed, compile_cubin
from quambase.model.operators import choice
from quambase.model.operators.torch import TorchOperators
from quambase.schema.errors import DatabaseInvalid
from quambase.schema.stored.manifest import TableFile

CPU = torch.device("cpu")
CASES = [*small_cases(), *large_cases(30_000)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_torch_counts_as_the_host_does(case: Case) -> None:
    counter = TorchCounter(ENCODINGS[case.encoding], MOST, CPU)
    assert_same(count_on_device(counter, case, CPU), count_on_host(case), case.encoding)


def test_documents_may_come_in_several_calls() -> None:
    case = next(small_cases())
    counter = TorchCounter(ENCODINGS["float16"], MOST, CPU)
    whole = count_on_device(counter, case, CPU)
    assert_same(count_on_device(counter, case, CPU, cuts=(1, 3)), whole, "float16")


# ---------------------------------------------------------------- packing


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.integers(1, 17),
    st.integers(0, 9),
)
def test_every_row_of_every_group_is_dealt_out_once(
    lengths: list[int], widths: list[int], blocks: int, start: int
) -> None:
    sites = [
        (plain_layout(*np.cumsum([0, *widths]).tolist()), np.cumsum([start, *lengths])),
        (plain_layout(0, 7), np.cumsum([0, 5, *lengths])),
    ]
    packing = pack(sites, blocks)
    assert (
        packing.block_first.tolist() == sorted(packing.block_first.tolist()) and len(packing.block_first) == blocks + 1
    )
    assert packing.block_first[0] == packing.segment_first[0] == 0
    assert packing.block_first[-1] == packing.segment_first[-1] == len(packing.items)
    segment = 0
    work = np.empty(len(packing.items))
    for site, (layout, offsets) in enumerate(sites):
        for group, width in enumerate(np.diff(layout.edges).tolist()):
            for document in range(len(offsets) - 1):
                span = slice(*packing.segment_first[segment : segment + 2])
                mine = packing.items[span].tolist()
                rows = [row for *of, first, count in mine for row in range(first, first + count) if of == [site, group]]
                assert rows == list(range(offsets[document], offsets[document + 1]))
                work[span] = packing.items[span, 3] * width
                segment += 1
    assert len(packing.segment_first) == segment + 1
    assert (packing.items[:, 3] > 0).all()
    assert len(packing.items) < segment + blocks
    shares = [work[a:b].sum() for a, b in zip(packing.block_first[:-1], packing.block_first[1:], strict=True)]
    # Borders are moved by less than a row at either end; beside values there are the segments' tables.
    assert max(shares) <= (work.sum() + segment * FLUSH) / blocks + max(7, *widths)


def test_work_is_what_groups_are_wide() -> None:
    """Of long documents, whose values outweigh what every table takes."""
    packing = pack([(plain_layout(0, 1, 2000, 2003), np.array([0, 5000, 9000]))], 7)
    work = packing.items[:, 3] * np.array([1, 1999, 3])[packing.items[:, 1]]
    shares = [work[a:b].sum() for a, b in zip(packing.block_first[:-1], packing.block_first[1:], strict=True)]
    assert max(shares) <= (work.sum() + 6 * FLUSH) / 7 + 1999


def test_items_are_told_their_groups_channels() -> None:
    """Runs of channels that lie apart, a group without any, and rows whose stride is the site's."""
    layouts = [
        SiteLayout(("a", "b", "c"), (0, 3, 3, 5), order=(0, 1, 4, 2, 3)),
        plain_layout(0, 2, 2, 7),
        SiteLayout(("a", "b"), (0, 2, 2), order=(0, 1)),
    ]
    sites = [(layout, np.array([0, 70_000, 70_003])) for layout in layouts]
    packing = pack(sites, 3)
    strides = [5, 9, 2]
    rows, spills = item_rows(packing, list(zip(layouts, strides, strict=True)))
    for (site, group, first, count), row, brought in zip(packing.items.tolist(), rows, spills, strict=True):
        assert row[:4].tolist() == [site, first, count, strides[site]]
        run, last, low, high = row[4:].tolist()
        runs = layouts[site].runs[0].tolist()
        members = [channel for of in runs[run:last] for channel in range(*of)]
        assert members == layouts[site].members(group).tolist()
        assert [low, high] == (runs[run] if members else [0, 0])
        assert brought == count * len(members) // 32768
    assert spills.max() > 1


def test_segments_of_states_are_each_groups_channels() -> None:
    layout = sorted_layout(np.array([1, 0, 0, 1, 1]), d_state=4)
    assert moment_segments(layout, np.array([0, 4, 8])).tolist() == [[0, 2], [5, 7], [2, 5], [7, 10]]


@pytest.mark.parametrize(
    ("shared", "count"), [(232448, 0), (131072, 0), (101376, 1), (65536, 1), (49152, 2), (16384, 3)]
)
def test_a_table_fits_in_what_shared_memory_there_is(shared: int, count: int) -> None:
    assert halvings(shared) == count


def test_too_little_shared_memory_is_told() -> None:
    with pytest.raises(CompilationFailed, match="8192 bytes of shared memory hold no table"):
        halvings(8192)


def test_where_nothing_compiles_plain_torch_counts_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise CompilationFailed("no compiler here")

    monkeypatch.setattr(cuda_counter, "CudaCounter", fail)
    monkeypatch.setattr(cuda_counter, "TorchCounter", lambda *_: "plain")
    assert cuda_counter.choose_counter(ENCODINGS["float16"], MOST, torch.device("cuda")) == "plain"
    monkeypatch.setattr(choice, "CudaOperators", fail)
    sizes = tiny_weights("mamba1").config.operator_sizes
    chosen = choice.choose_operators(sizes, torch.device("cuda"), torch.float16)
    assert isinstance(chosen, TorchOperators)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("warning: ") and "no compiler here" in line for line in lines)


@pytest.mark.skipif(find_spec("cuda") is not None, reason="cuda-bindings is installed")
def test_missing_bindings_are_named() -> None:
    with pytest.raises(CompilationFailed, match=r"cuda-bindings is not installed .*pip install 'quambase\[cuda\]'"):
        compile_cubin(cuda_counter.SOURCE, ("--gpu-architecture=sm_90",))


# ---------------------------------------------------------------- a run's statistics


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4), max_size=9), st.lists(st.integers(0, 4), max_size=9))
def test_merging_sorted_outliers_equals_sorting_them_all(first: list[int], second: list[int]) -> None:
    def rows(magnitudes: list[int], document: int) -> np.ndarray:
        made = np.array([[m, m, document, i, 0] for i, m in enumerate(magnitudes)], np.int64).reshape(-1, 5)
        return largest(made, 6)

    def padded(top: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([top, np.full((6 - len(top), 5), -1)]))[None]

    earlier, later = rows(first, 0), rows(second, 1)
    merged = merged_top(padded(earlier), padded(later))[0].numpy()
    np.testing.assert_array_equal(merged[merged[:, 0] >= 0], largest(np.concatenate([earlier, later]), 6))


@pytest.mark.parametrize("shared", [False, True])
def test_blocks_fold_as_on_the_host_and_go_through_a_checkpoint(tmp_path: Path, shared: bool) -> None:
    """Two blocks of two sites, and one that is another's; between them the statistics leave the device and return."""
    cases = [next(c for c in CASES if c.name == name) for name in ("float16 groups", "float32 states")]
    layouts = {(1, "b"): cases[1].layout, (0, "a"): cases[0].layout}
    layouts |= {(0, "c"): cases[0].layout} if shared else {}
    files = {"documents/block-00000.parquet": TableFile(3, "0".ljust(64, "0"))}
    device, host = new_statistics(layouts, MOST, CPU), RunStatistics.empty(layouts, MOST)
    of_host = BlockStatistics(host)
    for number in range(2):
        block = BlockStatistics(device)
        sides = (
            (TorchCounter(ENCODINGS["float16"], MOST, CPU), block),
            (HostCounter(ENCODINGS["float16"], MOST, 4), of_host),
        )
        for counter, into in sides:
            for key, case in zip(((0, "a"), (1, "b")), cases, strict=True):
                summaries = torch.empty(len(case.lengths), len(case.layout.names) + 1, 8)
                offsets = np.cumsum([0, *case.lengths])
                counter.add(into.sites[key], case.x * (1 + number), offsets, 0, summaries)
            if shared:
                into.share((0, "c"), (0, "a"))
            into.fold(np.arange(4) + 10 * number)
        save_checkpoint(tmp_path, number + 1, to_host(device), files)
        blocks, stored, named = load_checkpoint(tmp_path, layouts, MOST)
        assert (blocks, named, stored.index.shared) == (number + 1, files, {(0, "c"): (0, "a")} if shared else {})
        device = to_device(stored, CPU)
    nothing = np.zeros(1)
    for key in layouts:
        assert_same((counted(device, key), nothing), (counted(host, key), nothing), "float16")
    assert counted(device, (0, "a")).counts.sum() == 2 * cases[0].x.numel()
    if shared:
        np.testing.assert_array_equal(counted(device, (0, "c")).counts, counted(device, (0, "a")).counts)


def test_a_checkpoint_of_other_sites_is_refused(tmp_path: Path) -> None:
    layouts = {(0, "a"): plain_layout(0, 3)}
    save_checkpoint(tmp_path, 1, RunStatistics.empty(layouts, MOST), {})
    for other in ({(0, "a"): plain_layout(0, 4)}, {(0, "a"): plain_layout(0, 3), (1, "a"): plain_layout(0, 3)}):
        with pytest.raises(DatabaseInvalid, match=r"checkpoint.npz is damaged .*; delete the folder .* same command"):
            load_checkpoint(tmp_path, other, MOST)
    with pytest.raises(DatabaseInvalid, match=r"checkpoint.npz is damaged"):
        load_checkpoint(tmp_path, layouts, MOST + 1)


def test_tensors_are_copied_to_the_host_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STAGED", 64)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 7), (0, 3), (8,), (1, 1))]
    tensors.append(torch.randint(-(2**60), 2**60, (3, 33), generator=generator)[1:, 5:])  # not contiguous
    for found, tensor in zip(transfer.copied_to_host(*tensors), tensors, strict=True):
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
