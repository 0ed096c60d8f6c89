"""The kernels that make tables' rows, against NumPy, Python and `Distribution`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.collector.host.kernels import PATTERNS, SIGN
from quambase.collector.statistics import ENCODINGS
from quambase.collector.tables.table_kernels import (
    gather_rows,
    present_counts,
    present_sizes,
    repeat,
    summarize,
    summarize_sums,
)
from quambase.schema.tables import QUANTILES
from quambase.schema.values.distribution import Distribution


@pytest.mark.parametrize("encoding", list(ENCODINGS))
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_rows_of_counts_are_those_of_distinct_values(encoding: str, data: st.DataObject) -> None:
    """Signs of zero and all NaN fall together; of the patterns at the borders some are always drawn."""
    kind = ENCODINGS[encoding]
    infinity = kind.infinity
    borders = [0, 1, infinity - 1, infinity, infinity + 1, SIGN - 1]
    patterns = st.sampled_from([*borders, *(SIGN + border for border in borders)]) | st.integers(0, PATTERNS - 1)
    counts = np.zeros((2, PATTERNS), np.int64)
    for pattern, count in data.draw(st.lists(st.tuples(patterns, st.integers(1, 2**50)), max_size=40)):
        counts[1, pattern] += count
    wanted: dict[float, int] = {}
    nans = 0
    for value, count in zip(kind.values().tolist(), counts[1].tolist(), strict=True):
        if np.isnan(value):
            nans += count
        elif count:
            wanted[value] = wanted.get(value, 0) + count  # 0.0 and -0.0 are one key
    rows = sorted(wanted.items()) + [(np.nan, nans)] * (nans > 0)
    groups, sizes = np.array([1, 0, 1]), np.empty(3, np.int64)
    present_sizes(counts, groups, infinity, sizes)
    assert sizes.tolist() == [len(rows), 0, len(rows)]
    size = len(rows)
    values, found = np.empty(2 * size, np.float32), np.empty(2 * size, np.int64)
    present_counts(counts, groups, infinity, kind.values()[:SIGN], values, found)
    np.testing.assert_array_equal(values[size:], values[:size])
    assert found[size:].tolist() == found[:size].tolist()
    np.testing.assert_array_equal(values[:size], [value for value, _ in rows])
    assert found[:size].tolist() == [count for _, count in rows]
    assert not np.signbit(values[:size][values[:size] == 0]).any()


@pytest.mark.parametrize("encoding", list(ENCODINGS))
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_summaries_equal_those_of_the_distribution(encoding: str, data: st.DataObject) -> None:
    kind = ENCODINGS[encoding]
    patterns = st.sampled_from([0, SIGN, 1, kind.infinity - 1, kind.infinity, PATTERNS - 1])
    some = st.lists(st.tuples(patterns | st.integers(0, PATTERNS - 1), st.integers(1, 2**30)), max_size=30)
    counts = np.zeros(PATTERNS, np.int64)
    for pattern, count in data.draw(some):
        counts[pattern] += count
    integers, floats = np.empty(5, np.int64), np.empty(6 + len(QUANTILES))
    summarize(counts, kind.infinity, kind.values()[:SIGN], np.array(list(QUANTILES.values())), integers, floats)
    wanted = Distribution.of_rows(kind.values(), counts)
    summary = wanted.summary()
    total, nonfinite, zeros = integers[:3].tolist()
    assert (total, nonfinite) == (summary["count"], summary["nonfinite"])
    np.testing.assert_array_equal(floats[:3], [summary[name] for name in ("amax", "min", "max")])
    np.testing.assert_array_equal(floats[6:], [summary[name] for name in QUANTILES])
    if total == 0:
        assert np.isnan(floats[1:]).all() and not integers[2:].any()
        return
    assert not np.signbit(floats[:3][floats[:3] == 0]).any()
    assert zeros / total == summary["zeros"]
    mean, std, kurtosis = floats[3:6].tolist()
    # Up to 60 terms added one to another in pairs there: some eight roundings, relative to the largest value.
    assert mean == pytest.approx(summary["mean"], rel=1e-14, abs=1e-14 * summary["amax"])
    assert std == pytest.approx(summary["std"], rel=1e-14, abs=1e-14 * summary["amax"])
    if summary["std"] > 1e-3 * summary["amax"]:  # else it is of what rounding left, here and there
        assert kurtosis == pytest.approx(summary["kurtosis"], rel=1e-9)
    # By the definition, with the mean and deviation as found: of others a value at the border may lie beyond.
    apart = np.abs(wanted.values.astype(np.float64) - mean)
    assert integers[3:].tolist() == [int(wanted.counts[apart > k * std].sum()) for k in (3, 5)]


def test_summaries_of_sums_are_those_of_the_added_counts() -> None:
    counts = np.random.default_rng(0).integers(0, 3, (3, PATTERNS))
    kind = ENCODINGS["float16"]
    given = kind.infinity, kind.values()[:SIGN], np.array(list(QUANTILES.values()))
    parts = [[0, 1, 2], [1], [2, 0]]
    integers, floats = np.empty((3, 5), np.int64), np.empty((3, 6 + len(QUANTILES)))
    summarize_sums(counts, np.concatenate(parts), np.array([0, 3, 4, 6]), *given, integers, floats)
    for row, part in enumerate(parts):
        wanted_integers, wanted = np.empty(5, np.int64), np.empty(6 + len(QUANTILES))
        summarize(counts[part].sum(axis=0), *given, wanted_integers, wanted)
        assert integers[row].tolist() == wanted_integers.tolist()
        np.testing.assert_array_equal(floats[row], wanted)


def test_gathered_rows_are_those_of_numpy() -> None:
    """Columns side by side and apart, rows of no value, written to where they are told."""
    values = np.arange(40, dtype=np.float32)
    columns = np.array([0, 1, 2, 5, 9, 3, 4], np.int32)
    bases, firsts, sizes = np.array([10, 0, 20, 30]), np.array([0, 0, 2, 5]), np.array([3, 0, 3, 2])
    starts, out = np.array([5, 0, 0, 3], np.int32), np.full(9, -1, np.float32)
    gather_rows(values, bases, firsts, sizes, columns, starts, out)
    assert out.tolist() == [22, 25, 29, 33, 34, 10, 11, 12, -1]


def test_repeated_values_are_those_of_numpy() -> None:
    values, rows = np.array([[3, 1, 4, 1], [5, 9, 2, 6]], np.int32), np.array([2, 0, 5, 1])
    out = np.empty((2, 8), np.int32)
    repeat(values, rows, out)
    np.testing.assert_array_equal(out, np.repeat(values, rows, axis=1))
