"""Compiled CPU kernels that make the rows of tables: each processes many arrays in one call, without Python's lock.

A thread that calls a kernel per array waits for the lock after each, which with sixteen threads took most of the time
of writing a run.
"""

from __future__ import annotations

import numpy as np

from quambase.collector.host.kernels import PATTERNS, SIGN
from quambase.schema.compiled import kept_njit
from quambase.schema.values.arrays import Float32, Float64, Int32, Int64
from quambase.schema.values.quantile_rules import interpolate, rank

_rank = kept_njit(nogil=True)(rank)
_interpolate = kept_njit(nogil=True)(interpolate)


@kept_njit(nogil=True)
def repeat(values: Int32, rows: Int64, out: Int32) -> None:
    """As numpy.repeat of each column: values (columns, n), of which values[:, i] is repeated rows[i] times; rows (n,).

    out (columns, all rows), written.
    """
    for column in range(values.shape[0]):
        start = 0
        for i in range(rows.size):
            out[column, start : start + rows[i]] = values[column, i]
            start += rows[i]


@kept_njit(nogil=True)
def gather_rows(
    values: Float32, bases: Int64, firsts: Int64, sizes: Int64, columns: Int32, starts: Int32, out: Float32
) -> None:
    """Gather: out[starts[i] : starts[i] + sizes[i]] is values[bases[i] + columns[firsts[i] : firsts[i] + sizes[i]]].

    values, out flat; bases, firsts, sizes, starts (rows,); columns flat, ascending within a row; out is written.
    """
    for i in range(bases.size):
        base, first, size, place = bases[i], firsts[i], sizes[i], starts[i]
        if size and columns[first + size - 1] - columns[first] == size - 1:  # consecutive
            start = base + columns[first]
            out[place : place + size] = values[start : start + size]
        else:
            for j in range(size):
                out[place + j] = values[base + columns[first + j]]


@kept_njit(nogil=True)
def present_sizes(counts: Int64, groups: Int64, infinity: int, sizes: Int64) -> None:
    """The number of rows of `counts` of some groups.

    counts (all groups, PATTERNS); groups (n,): rows of it; ``infinity``: its pattern; sizes (n,), written.
    """
    for i in range(groups.size):
        mine = counts[groups[i]]
        size = np.int64(mine[0] != 0 or mine[SIGN] != 0)
        nans = False
        for pattern in range(1, SIGN):
            if pattern <= infinity:
                size += (mine[pattern] != 0) + (mine[SIGN + pattern] != 0)
            else:
                nans |= mine[pattern] != 0 or mine[SIGN + pattern] != 0
        sizes[i] = size + nans


@kept_njit(nogil=True)
def present_counts(
    counts: Int64, groups: Int64, infinity: int, magnitudes: Float32, values: Float32, found: Int64
) -> None:
    """The rows of `counts` of some groups, in order: values that occur, ascending, and how often.

    -0 joins 0 and all NaN join one, which is last. counts, groups, ``infinity`` as in `present_sizes`; magnitudes
    (SIGN,) of non-negative patterns; values and found (all sizes,): written.
    """
    size = 0
    for i in range(groups.size):
        mine = counts[groups[i]]
        for pattern in range(infinity, 0, -1):
            if mine[SIGN + pattern] != 0:
                values[size], found[size] = -magnitudes[pattern], mine[SIGN + pattern]
                size += 1
        zeros = mine[0] + mine[SIGN]
        if zeros != 0:
            values[size], found[size] = 0, zeros
            size += 1
        for pattern in range(1, infinity + 1):
            if mine[pattern] != 0:
                values[size], found[size] = magnitudes[pattern], mine[pattern]
                size += 1
        nans = np.int64(0)
        for pattern in range(infinity + 1, SIGN):
            nans += mine[pattern] + mine[SIGN + pattern]
        if nans != 0:
            values[size], found[size] = np.nan, nans
            size += 1


@kept_njit(nogil=True)
def _added(total: float, lost: float, term: float) -> tuple[float, float]:
    """``total`` + ``term``, and ``lost`` + its rounding error: a step of Neumaier's summation (ZAMM 54, 1974)."""
    found = total + term
    if abs(total) >= abs(term):
        return found, lost + ((total - found) + term)
    return found, lost + ((term - found) + total)


@kept_njit(nogil=True)
def _central_moments(counts: Int64, infinity: int, magnitudes: Float32, total: int) -> tuple[float, float, float]:
    """The mean of the finite values of counts (PATTERNS,), ``total`` of them and not 0, and the means of the second and
    fourth powers of their distances from it; magnitudes (SIGN,).
    """
    first = lost = 0.0
    for pattern in range(infinity):
        # A value and its negative cancel.
        more = counts[pattern] - counts[SIGN + pattern]
        if more != 0:
            first, lost = _added(first, lost, np.float64(magnitudes[pattern]) * more)
    mean = (first + lost) / total
    second = fourth = lost2 = lost4 = 0.0
    for pattern in range(infinity):
        x = np.float64(magnitudes[pattern])
        if counts[pattern] != 0:
            square = (x - mean) ** 2
            second, lost2 = _added(second, lost2, square * counts[pattern])
            fourth, lost4 = _added(fourth, lost4, square * square * counts[pattern])
        if counts[SIGN + pattern] != 0:
            square = (x + mean) ** 2
            second, lost2 = _added(second, lost2, square * counts[SIGN + pattern])
            fourth, lost4 = _added(fourth, lost4, square * square * counts[SIGN + pattern])
    return mean, (second + lost2) / total, (fourth + lost4) / total


@kept_njit(nogil=True)
def summarize(
    counts: Int64, infinity: int, magnitudes: Float32, probabilities: Float64, integers: Int64, floats: Float64
) -> None:
    """As `quambase.schema.values.distribution.Distribution.summary`, for one group's counts (PATTERNS,).

    ``infinity`` is its pattern; magnitudes (SIGN,); probabilities (q,) ascending. Written are integers (5,): finite
    values, others, zeros, values with |x - mean| > 3 and > 5 standard deviations; and floats (6 + q,): amax, min, max,
    mean, standard deviation, kurtosis, quantiles of |x|. Without values those are NaN, except amax, which is 0.
    """
    integers[:] = 0
    floats[:] = np.nan
    for pattern in range(infinity):
        integers[0] += counts[pattern] + counts[SIGN + pattern]
    for pattern in range(infinity, SIGN):
        integers[1] += counts[pattern] + counts[SIGN + pattern]
    integers[2] = counts[0] + counts[SIGN]
    total = integers[0]
    floats[0] = 0
    if total == 0:
        return
    floats[1], floats[2] = np.inf, -np.inf
    for pattern in range(infinity):
        x = np.float64(magnitudes[pattern])
        if counts[pattern] != 0:
            floats[1], floats[2] = min(floats[1], x), max(floats[2], x)
        if counts[SIGN + pattern] != 0:
            floats[1], floats[2] = min(floats[1], -x + 0.0), max(floats[2], -x + 0.0)
    floats[0] = max(abs(floats[1]), abs(floats[2]))
    mean, second, fourth = _central_moments(counts, infinity, magnitudes, total)
    deviation = np.sqrt(second)
    floats[3], floats[4] = mean, deviation
    if second > 0:
        floats[5] = fourth / (second * second)
    for pattern in range(infinity):
        x = np.float64(magnitudes[pattern])
        above, below = abs(x - mean), abs(x + mean)  # of x and of -x
        for i, limit in enumerate((3 * deviation, 5 * deviation)):
            if above > limit:
                integers[3 + i] += counts[pattern]
            if below > limit:
                integers[3 + i] += counts[SIGN + pattern]
    # Walk up from the smallest magnitude: rank r is reached when seen > r.
    pattern, seen = 0, counts[0] + counts[SIGN]
    for wanted in range(probabilities.size):
        lower_rank, upper_rank, weight = _rank(probabilities[wanted], total)
        while seen <= lower_rank:
            pattern += 1
            seen += counts[pattern] + counts[SIGN + pattern]
        upper, reached = pattern, seen
        while reached <= upper_rank:
            upper += 1
            reached += counts[upper] + counts[SIGN + upper]
        low, high = np.float64(magnitudes[pattern]), np.float64(magnitudes[upper])
        floats[6 + wanted] = _interpolate(low, high, weight)


@kept_njit(nogil=True)
def summarize_sums(
    counts: Int64,
    groups: Int64,
    firsts: Int64,
    infinity: int,
    magnitudes: Float32,
    probabilities: Float64,
    integers: Int64,
    floats: Float64,
) -> None:
    """`summarize` of the rows groups[firsts[i] : firsts[i + 1]] of counts (all groups, PATTERNS) together, for each i.

    integers (i, 5) and floats (i, 6 + q): written.
    """
    together = np.empty(PATTERNS, np.int64)
    for i in range(firsts.size - 1):
        mine = counts[groups[firsts[i]]]
        if firsts[i + 1] - firsts[i] > 1:
            together[:] = mine
            for j in range(firsts[i] + 1, firsts[i + 1]):
                together += counts[groups[j]]
            mine = together
        summarize(mine, infinity, magnitudes, probabilities, integers[i], floats[i])
