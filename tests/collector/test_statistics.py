# mypy: disable-error-code="attr-defined, truthy-function"
"""Counting and moments against tallies, torch.quantile and NumPy; folding in any split."""

import itertools

import numba
import numpy as np
import pytest
import torch
from counted import KEY, Counted, count_site, counted
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.collector.host import counter as host_counter
from quambase.collector.host.counter import HostCounter
from quambase.collector.host.kernels import PATTERNS, take_counts
from quambase.collector.statistics import (
    ENCODINGS,
    SUMMARY_COLUMNS,
    BlockStatistics,
    RunStatistics,
    SiteLayout,
    largest,
)
from quambase.schema.tables import DOCUMENT_QUANTILES
from quambase.schema.values.distribution import Distribution

MOST = 7


def count(
    x: torch.Tensor, lengths: list[int], edges: tuple[int, ...], encoding: str = "float16"
) -> tuple[Counted, np.ndarray]:
    layout = SiteLayout(tuple("abcd"[: len(edges) - 1]), edges)
    return count_site(HostCounter(ENCODINGS[encoding], MOST, 3), x, lengths, layout)


def tally(x: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """(65536,) counts, one value after the other."""
    counts = np.zeros(65536, np.int64)
    for pattern in x.to(dtype).contiguous().view(torch.uint16).flatten().tolist():
        counts[pattern] += 1
    return counts


def nan_joined(counts: np.ndarray, infinity: int) -> np.ndarray:
    """Counts with every NaN pattern added up under one: torch's vectorised and scalar casts write different ones, and
    which elements a cast vectorises depends on the tensor's strides.
    """
    joined = counts.copy()
    nan = np.arange(65536) & 0x7FFF > infinity
    joined[nan] = 0
    joined[infinity + 1] = counts[nan].sum()
    return joined


def assert_site_equals_its_definition(
    x: torch.Tensor, lengths: list[int], edges: tuple[int, ...], encoding: str
) -> None:
    dtype = ENCODINGS[encoding].torch_dtype
    stats, summaries = count(x, lengths, edges, encoding)
    offsets = np.cumsum([0, *lengths])
    groups = [*itertools.pairwise(edges), (0, edges[-1])]
    rounded = x.to(dtype).float()
    for g, (low, high) in enumerate(groups[:-1]):
        infinity = ENCODINGS[encoding].infinity
        expected = nan_joined(tally(x[:, low:high], dtype), infinity)
        np.testing.assert_array_equal(nan_joined(stats.counts[g], infinity), expected)
        ranked = sorted(
            (-abs(float(rounded[offsets[d] + r, c])), d, r, c - low)
            for d in range(len(lengths))
            for r in range(lengths[d])
            for c in range(low, high)
            if torch.isfinite(rounded[offsets[d] + r, c])
        )[:MOST]
        assert [tuple(row[2:]) for row in stats.top[g].tolist()] == [entry[1:] for entry in ranked]
        values = ENCODINGS[encoding].values()
        assert [-abs(float(values[row[1]])) for row in stats.top[g].tolist()] == [entry[0] for entry in ranked]
    for d, length in enumerate(lengths):
        for g, (low, high) in enumerate(groups):
            part = rounded[offsets[d] : offsets[d] + length, low:high].abs().flatten()
            part = part[part.isfinite()]
            if not part.numel():
                assert np.isnan(summaries[d, g]).all()
                continue
            assert summaries[d, g, 0] == part.max()
            for i, name in enumerate(SUMMARY_COLUMNS[1:], start=1):
                assert summaries[d, g, i] == torch.quantile(part, DOCUMENT_QUANTILES[name]).item(), (d, g, name)
    wide = x.float().double().numpy()
    for c in range(x.shape[1]):
        finite = wide[:, c][np.isfinite(wide[:, c])]
        m = stats.moments
        assert m.count[c] == finite.size
        assert m.nonfinite[c] == wide.shape[0] - finite.size
        assert m.overflow[c] == sum(abs(v) >= float(ENCODINGS[encoding].limit) for v in finite)
        assert m.lowest[c] == (finite.min() if finite.size else np.inf)
        assert m.highest[c] == (finite.max() if finite.size else -np.inf)
        # float64 sums of n terms in another order: n roundings of at most the sum of magnitudes.
        slack = 2.0**-52 * finite.size
        assert abs(m.total[c] - finite.sum()) <= slack * np.abs(finite).sum()
        assert abs(m.squares[c] - (finite**2).sum()) <= slack * (finite**2).sum()
        means = []
        for d, length in enumerate(lengths):
            part = wide[offsets[d] : offsets[d] + length, c]
            part = part[np.isfinite(part)]
            means += [np.abs(part).mean()] if part.size else []
        assert m.mean_abs_max[c] == pytest.approx(max(means, default=0), rel=slack + 2.0**-52)


SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65519.0, 65520.0, -70000.0, 6e-8, -6e-8, 1e-30]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 18), min_size=1, max_size=5),
    st.sampled_from([(0, 3), (0, 2, 5), (0, 1, 2, 140)]),
    st.sampled_from(["float16", "bfloat16"]),
    st.integers(0, 2**32 - 1),
)
def test_any_site_equals_its_definition(lengths: list[int], edges: tuple[int, ...], encoding: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Documents differ in mean and spread; a few values are special.
    spread = np.repeat(10 ** rng.uniform(-3, 3, len(lengths)), lengths)[:, None]
    x = (rng.standard_t(2, size=(sum(lengths), edges[-1])) + rng.normal()) * spread
    chosen = rng.random(x.shape) < 0.05
    x[chosen] = rng.choice(SPECIAL, int(chosen.sum()))
    with np.errstate(over="ignore"):
        assert_site_equals_its_definition(torch.from_numpy(x.astype(np.float32)), lengths, edges, encoding)


def test_long_documents_take_the_other_way_of_clearing_the_table() -> None:
    """Above kernels.FEW values a document's table is cleared by bins; the next document must start from zero."""
    x = torch.randn(600, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 30.0] * 32)
    lengths = [300, 1, 299]
    stats, summaries = count(x, lengths, (0, 64))
    np.testing.assert_array_equal(stats.counts[0], tally(x, torch.float16))
    part = x[301:].half().float().abs().flatten()
    for i, name in enumerate(SUMMARY_COLUMNS[1:], start=1):
        assert summaries[2, 0, i] == torch.quantile(part, DOCUMENT_QUANTILES[name]).item()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=6), st.data())
def test_folding_blocks_equals_counting_at_once(lengths: list[int], data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = torch.from_numpy(
        np.repeat(rng.normal(size=len(lengths)) * 5, lengths)[:, None] + rng.normal(size=(sum(lengths), 4))
    )
    x = x.float()
    cut = data.draw(st.integers(0, len(lengths)))
    whole, _ = count(x, lengths, (0, 1, 4))
    folded = RunStatistics.empty({KEY: SiteLayout(("a", "b"), (0, 1, 4))}, MOST)
    block, counter = BlockStatistics(folded), HostCounter(ENCODINGS["float16"], MOST, 2)
    apart = []
    rows = sum(lengths[:cut])
    for part, mine, first in ((x[:rows], lengths[:cut], 0), (x[rows:], lengths[cut:], cut)):
        of_block = RunStatistics.empty(folded.index.layouts, MOST)
        apart.append(of_block)
        if not mine:  # no block is without documents
            continue
        for into in (block, BlockStatistics(of_block)):
            counter.add(into.sites[KEY], part, np.cumsum([0, *mine]), 0, into.summaries(len(mine))[1][KEY])
            into.fold(np.arange(len(mine)) + first)
    # What comes in order is folded; what was counted apart is added, in whatever order.
    later, earlier = reversed(apart) if data.draw(st.booleans()) else apart
    later.add(earlier)
    for found in (counted(folded), counted(later)):
        np.testing.assert_array_equal(found.counts, whole.counts)
        for ours, true in zip(found.top, whole.top, strict=True):
            np.testing.assert_array_equal(ours, true)
        for name in ("count", "lowest", "highest", "mean_abs_max", "nonfinite", "overflow"):
            np.testing.assert_array_equal(getattr(found.moments, name), getattr(whole.moments, name))
        # Sums of documents are added in the same order but from another start: float64 rounding.
        np.testing.assert_allclose(found.moments.total, whole.moments.total, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(found.moments.squares, whole.moments.squares, rtol=1e-13)


def assert_equal_to_the_bit(found: tuple[Counted, np.ndarray], wanted: tuple[Counted, np.ndarray]) -> None:
    np.testing.assert_array_equal(found[0].counts, wanted[0].counts)
    np.testing.assert_array_equal(found[1], wanted[1])
    for ours, true in zip(found[0].top, wanted[0].top, strict=True):
        np.testing.assert_array_equal(ours, true)
    for name, values in vars(wanted[0].moments).items():
        np.testing.assert_array_equal(getattr(found[0].moments, name), values)


@pytest.mark.parametrize("nearby", [1, 1000])
def test_runs_of_documents_count_as_all_at_once(nearby: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    lengths = [10, 0, 1, 40, 6, 0, 9, 17, 3, 25, 8, 2, 0]
    spread = np.repeat(10 ** rng.uniform(-2, 2, len(lengths)), lengths)[:, None]
    x = torch.from_numpy(((rng.normal(size=(sum(lengths), 9)) + rng.normal()) * spread).astype(np.float32))
    numba.set_num_threads(1)  # so that some documents a worker are few
    try:
        whole = count(x, lengths, (0, 2, 9))
        monkeypatch.setattr(host_counter, "NEARBY", nearby)
        runs = list(HostCounter(ENCODINGS["float16"], MOST, 2)._nearby(np.cumsum([0, *lengths]), 9))
        assert len(runs) > 3 and [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])]
        assert_equal_to_the_bit(count(x, lengths, (0, 2, 9)), whole)
    finally:
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def test_a_workers_table_is_emptied_before_it_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if its largest count were 200, with documents of 120 equal values, more of which are processed together."""
    most, take = 200, host_counter.take_counts
    seen: list[int] = []

    def taken(counts: np.ndarray, into: np.ndarray) -> None:
        seen.append(int(counts.max()))
        take(counts, into)

    monkeypatch.setattr(host_counter, "LARGEST_COUNT", most)
    monkeypatch.setattr(host_counter, "NEARBY", 1)
    monkeypatch.setattr(host_counter, "take_counts", taken)
    numba.set_num_threads(1)  # documents are processed two by two then
    try:
        stats, _ = count(torch.full((12 * 10, 3), 0.25), [10] * 12, (0, 3))
    finally:
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    assert len(seen) > 1 and max(seen) <= most and stats.counts.sum() == 12 * 10 * 3


@pytest.mark.parametrize("workers", [1, 3])
@given(seed=st.integers(0, 999), share=st.sampled_from([0.0, 1e-4, 0.01, 0.9]))
@settings(deadline=None, max_examples=10)
def test_tables_of_workers_are_added_and_cleared(workers: int, seed: int, share: float) -> None:
    """Beside whole neighbourhoods without a value, and values at their first and last places."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 2**32, (workers, 2, PATTERNS), dtype=np.uint32)
    counts[rng.random(counts.shape) >= share] = 0
    counts[0, 1, rng.integers(0, 1024, 3) * 64 + rng.choice([0, 63], 3)] = 2**32 - 1
    into = rng.integers(0, 2**40, (2, PATTERNS))
    wanted = into + counts.astype(np.int64).sum(0)
    take_counts(counts, into)
    np.testing.assert_array_equal(into, wanted)
    assert not counts.any()


def test_a_site_of_more_groups_than_there_are_tables_for_is_refused() -> None:
    with pytest.raises(ValueError, match="4 groups; this counter was made for 3 at most"):
        count(torch.zeros(2, 8), [2], (0, 1, 2, 3, 8))


def test_more_than_one_worker_counts_the_same() -> None:
    x = torch.randn(57, 9, generator=torch.Generator().manual_seed(2))
    lengths = [10, 0, 1, 40, 6]
    many = count(x, lengths, (0, 9))
    numba.set_num_threads(1)
    try:
        one_by_one = count(x, lengths, (0, 9))
    finally:
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    assert_equal_to_the_bit(many, one_by_one)


def test_ties_among_outliers_go_to_the_earlier_place() -> None:
    top = np.array([[5, 5, 2, 0, 0], [5, 5, 1, 3, 1], [5, 5, 1, 3, 0], [9, 9, 8, 8, 8], [5, 5, 1, 2, 9]])
    assert largest(top, 4)[:, 2:].tolist() == [[8, 8, 8], [1, 2, 9], [1, 3, 0], [1, 3, 1]]
    several = np.stack([top, top[::-1], np.full_like(top, -1)])
    assert largest(several, 4).tolist() == [largest(top, 4).tolist()] * 2 + [[[-1] * 5] * 4]


@pytest.mark.parametrize("encoding", list(ENCODINGS))
def test_values_of_patterns_are_torchs(encoding: str) -> None:
    patterns = torch.arange(PATTERNS, dtype=torch.int32).to(torch.uint16).view(ENCODINGS[encoding].torch_dtype)
    np.testing.assert_array_equal(ENCODINGS[encoding].values(), patterns.float().numpy())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-65504, 65504, width=16), min_size=1, max_size=300), st.floats(0, 1))
def test_distribution_quantiles_equal_numpy_and_torch(values: list[float], p: float) -> None:
    x = np.array(values, np.float16)
    found = Distribution.of_values(x)
    assert found.total == len(values)
    magnitudes = np.abs(x.astype(np.float64))
    assert found.quantile(p) == np.quantile(magnitudes, p)
    assert found.quantiles([0.5, p, 1.0]) == np.quantile(magnitudes, [0.5, p, 1.0]).tolist()
    assert found.quantile_torch(p) == torch.quantile(torch.from_numpy(magnitudes).float(), p).item()
    mean, std, kurtosis = found.moments()
    wide = x.astype(np.float64)
    # Weighted sums in another order: a few hundred float64 roundings of values up to 65504.
    assert mean == pytest.approx(wide.mean(), rel=1e-9, abs=1e-9 * magnitudes.max())
    assert std == pytest.approx(wide.std(), rel=1e-7, abs=1e-9 * magnitudes.max())
    if wide.std() > 1e-3 * magnitudes.max():
        fourth = ((wide - wide.mean()) ** 4).mean()
        assert kurtosis == pytest.approx(fourth / wide.var() ** 2, rel=1e-6)


def test_distribution_of_repeated_rows_adds_up_and_sets_nonfinite_aside() -> None:
    values = np.array([1, -0.0, np.nan, 0.0, 1, np.inf, -2], np.float32)
    found = Distribution.of_rows(values, np.array([1, 2, 3, 4, 5, 6, 7]))
    assert found.values.tolist() == [-2, 0, 1] and found.counts.tolist() == [7, 6, 6]
    assert found.nonfinite == 9 and not np.signbit(found.values[1])
    empty = Distribution.of_rows(np.array([np.nan], np.float32), np.array([3]))
    assert empty.total == 0 and empty.amax == 0 and np.isnan(empty.quantile(0.5)) and np.isnan(empty.summary()["mean"])
