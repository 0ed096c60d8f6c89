"""Compiled CPU kernels: counting 16-bit patterns per document and group, and moments per channel.

Rows of a packed tensor belong to documents through ``offsets`` as in `quambase.model.packed_batch`.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from quambase.schema.compiled import kept_njit
from quambase.schema.values.arrays import Float32, Float64, Int64
from quambase.schema.values.quantile_rules import interpolate_torch, rank_torch

UInt16 = npt.NDArray[np.uint16]
UInt32 = npt.NDArray[np.uint32]

PATTERNS = 65536
SIGN = 32768
"""Patterns below it are non-negative; adding it negates a value. Magnitudes are ordered as their patterns."""

WIDEST = 2048
"""Largest number of channels per piece of the moments: longer runs of a row are read faster, but the accumulators of
one piece have to fit in the nearer caches.
"""

FEW = 16384
"""With fewer values of a document in a group, its table is cleared value by value, not over all 65,536 bins."""


_rank_torch = kept_njit()(rank_torch)
_interpolate_torch = kept_njit()(interpolate_torch)


@kept_njit()
def _insert(
    top: Int64, size: int, most: int, magnitude: np.int64, pattern: int, document: int, row: int, channel: int
) -> int:
    """Insert into ``top`` (most, 5), ordered by descending magnitude, equal ones in order of arrival; the new size."""
    place = size if size < most else most - 1
    while place > 0 and top[place - 1, 0] < magnitude:
        for k in range(5):
            top[place, k] = top[place - 1, k]
        place -= 1
    top[place, 0] = magnitude
    top[place, 1] = pattern
    top[place, 2] = document
    top[place, 3] = row
    top[place, 4] = channel
    return min(size + 1, most)


@kept_njit()
def _walk_down(tables: UInt32, magnitude: int, seen: int, wanted: int) -> tuple[int, int]:
    """The next smaller magnitude pattern from which on ``wanted`` values are seen, and how many then are.

    tables (groups, PATTERNS), added up; ``seen`` values have a magnitude pattern of at least ``magnitude``.
    """
    while seen < wanted:
        magnitude -= 1
        for g in range(tables.shape[0]):
            seen += tables[g, magnitude] + tables[g, magnitude + SIGN]
    return magnitude, seen


@kept_njit()
def _amax_and_quantiles(
    tables: UInt32, highest: int, total: int, magnitudes: Float32, probabilities: Float32, out: Float32
) -> None:
    """Amax and quantiles of the absolute value of one document, from its counts, by torch.quantile's rule.

    tables (groups, PATTERNS), added up; ``highest`` bounds the magnitude patterns present; ``total`` finite values;
    probabilities (q,) descending; out (1 + q,): amax, then the quantiles in the order of ``probabilities``.
    """
    if total == 0:
        for i in range(out.size):
            out[i] = np.nan
        return
    # Walk down from the largest value: the one of ascending rank r is reached when seen >= total - r.
    last_rank = total - 1
    magnitude, seen = _walk_down(tables, highest + 1, 0, 1)
    out[0] = magnitudes[magnitude]
    above = out[0]
    for wanted in range(probabilities.size):
        below_rank, above_rank, weight = _rank_torch(probabilities[wanted], total)
        # Neighbouring probabilities may need the same upper value, which the walk has already passed.
        if above_rank < last_rank:
            magnitude, seen = _walk_down(tables, magnitude, seen, total - above_rank)
            above = magnitudes[magnitude]
            last_rank = above_rank
        magnitude, seen = _walk_down(tables, magnitude, seen, total - below_rank)
        below = magnitudes[magnitude]
        out[1 + wanted] = _interpolate_torch(below, above, weight)


@kept_njit(parallel=True)
def count_documents(
    bits: UInt16,
    offsets: Int64,
    first: int,
    bounds: Int64,
    runs: Int64,
    firsts: Int64,
    infinity: int,
    magnitudes: Float32,
    probabilities: Float32,
    counts: UInt32,
    scratch: UInt32,
    summaries: Float32,
    top: Int64,
    top_sizes: Int64,
) -> None:
    """Count every value of every document.

    bits          (rows, channels) patterns of float16 or bfloat16 values
    first         number of the first of these documents in its block
    bounds        (workers + 1,) document numbers: worker w counts documents bounds[w]:bounds[w + 1]
    runs          (runs, 2) channel numbers: run r is channels runs[r, 0]:runs[r, 1]
    firsts        (groups + 1,) run numbers: group g is runs firsts[g]:firsts[g + 1], ascending
    infinity      pattern of +infinity: patterns above it are NaN
    magnitudes    (SIGN,) the value of each non-negative pattern
    counts        (workers, groups, PATTERNS), added to
    scratch       (workers, groups, PATTERNS), zero on entry and on return
    summaries     (documents, groups + 1, 1 + q), written: amax and quantiles, the whole site last
    top           (workers, groups, most, 5), added to: magnitude, pattern, document, row in document, place in group
    top_sizes     (workers, groups), added to
    """
    groups = firsts.size - 1
    most = top.shape[2]
    widths = np.zeros(groups, np.int64)
    for g in range(groups):
        for run in range(firsts[g], firsts[g + 1]):
            widths[g] += runs[run, 1] - runs[run, 0]
    for worker in numba.prange(bounds.size - 1):
        finite = np.empty(groups, np.int64)
        highest = np.empty(groups, np.int64)
        for document in range(bounds[worker], bounds[worker + 1]):
            start, stop = offsets[document], offsets[document + 1]
            for g in range(groups):
                table = scratch[worker, g]
                best = top[worker, g]
                size = top_sizes[worker, g]
                bar = best[most - 1, 0] if size == most else np.int64(-1)
                # Only a value above the bar can be an outlier or not finite; if there is
                # none, the bar itself bounds the document's magnitudes.
                largest = max(bar, np.int64(0))
                for row in range(start, stop):
                    before = 0
                    for run in range(firsts[g], firsts[g + 1]):
                        line = bits[row, runs[run, 0] : runs[run, 1]]
                        for i in range(line.size):
                            pattern = line[i]
                            table[pattern] += np.uint32(1)
                            magnitude = np.int64(pattern & np.uint16(SIGN - 1))
                            if magnitude > bar:
                                largest = max(largest, magnitude)
                                if magnitude < infinity:
                                    size = _insert(
                                        best, size, most, magnitude, pattern, first + document, row - start, before + i
                                    )
                                    if size == most:
                                        bar = best[most - 1, 0]
                        before += line.size
                top_sizes[worker, g] = size
                finite[g] = (stop - start) * widths[g]
                if largest >= infinity:
                    for pattern in range(infinity, SIGN):
                        finite[g] -= table[pattern] + table[pattern + SIGN]
                    largest = np.int64(infinity - 1)
                highest[g] = largest
            for g in range(groups):
                _amax_and_quantiles(
                    scratch[worker, g : g + 1], highest[g], finite[g], magnitudes, probabilities, summaries[document, g]
                )
            _amax_and_quantiles(
                scratch[worker], highest.max(), finite.sum(), magnitudes, probabilities, summaries[document, groups]
            )
            for g in range(groups):
                table = scratch[worker, g]
                into = counts[worker, g]
                if (stop - start) * widths[g] < FEW:
                    for row in range(start, stop):
                        for run in range(firsts[g], firsts[g + 1]):
                            for channel in range(runs[run, 0], runs[run, 1]):
                                pattern = bits[row, channel]
                                into[pattern] += 1
                                table[pattern] = 0
                else:
                    for pattern in range(PATTERNS):
                        into[pattern] += table[pattern]
                        table[pattern] = 0


TAKEN = 4096
"""Patterns per piece of work of `take_counts`."""

NEIGHBOURS = 64
"""Neighbouring patterns that `take_counts` looks at together: most have no value, since most exponents have none."""


@kept_njit(parallel=True)
def take_counts(counts: UInt32, into: Int64) -> None:
    """Add counts (workers, groups, PATTERNS) to ``into`` (groups, PATTERNS), and set them to zero.

    Most are zero, so memory is mainly read, and the memory of ``into`` is not touched where all neighbours are.
    """
    workers, groups, _ = counts.shape
    pieces = PATTERNS // TAKEN
    for piece in numba.prange(groups * pieces):
        group, first = piece // pieces, piece % pieces * TAKEN
        for start in range(first, first + TAKEN, NEIGHBOURS):
            total = into[group, start : start + NEIGHBOURS]
            for worker in range(workers):
                part = counts[worker, group, start : start + NEIGHBOURS]
                any_bit = part[0] & 0
                for i in range(NEIGHBOURS):  # without a branch, so that it is vectorized
                    any_bit |= part[i]
                if any_bit:
                    for i in range(NEIGHBOURS):
                        total[i] += part[i]
                        part[i] = 0


@numba.njit(inline="always")
def _smaller(a: np.float32, b: np.float32) -> np.float32:
    return a if a < b else b  # one machine instruction, which Python's min is not, because of NaN


@numba.njit(inline="always")
def _larger(a: np.float32, b: np.float32) -> np.float32:
    return a if a > b else b


@numba.njit(inline="always")
def _smallest(a: np.float32, b: np.float32, c: np.float32, d: np.float32) -> np.float32:
    return _smaller(_smaller(a, b), _smaller(c, d))


@numba.njit(inline="always")
def _largest(a: np.float32, b: np.float32, c: np.float32, d: np.float32) -> np.float32:
    return _larger(_larger(a, b), _larger(c, d))


@kept_njit(parallel=True)
def channel_moments(
    x: Float32,
    offsets: Int64,
    limit: np.float32,
    block: int,
    count: Int64,
    lowest: Float32,
    highest: Float32,
    total: Float64,
    squares: Float64,
    mean_abs_max: Float64,
    nonfinite: Int64,
    overflow: Int64,
) -> None:
    """Add every document of x (rows, channels) to the accumulators (channels,), documents and rows in order.

    A document's sums are formed first and then added, channel by channel, so results depend neither on the thread
    count nor on ``block``, the channels of a piece of work. ``limit`` is the smallest float32 that rounds to infinity
    in 16 bits; NaN and infinity are counted and left out of the rest.
    """
    channels = x.shape[1]
    for piece in numba.prange((channels + block - 1) // block):
        first = piece * block
        width = min(block, channels - first)
        low = np.empty(block, np.float32)
        high = np.empty(block, np.float32)
        added = np.empty(block, np.float64)
        squared = np.empty(block, np.float64)
        absolute = np.empty(block, np.float64)
        used = np.empty(block, np.int64)
        for document in range(offsets.size - 1):
            start, stop = offsets[document], offsets[document + 1]
            if start == stop:
                continue
            for i in range(width):
                low[i], high[i], added[i], squared[i], absolute[i] = np.inf, -np.inf, 0.0, 0.0, 0.0
                used[i] = stop - start
            # Eight rows at a time, so that the accumulators are read and written an eighth as often.
            whole = start + (stop - start) // 8 * 8
            for row in range(start, whole, 8):
                for i in range(width):
                    c = first + i
                    v0, v1, v2, v3 = x[row, c], x[row + 1, c], x[row + 2, c], x[row + 3, c]
                    v4, v5, v6, v7 = x[row + 4, c], x[row + 5, c], x[row + 6, c], x[row + 7, c]
                    w0, w1, w2, w3 = np.float64(v0), np.float64(v1), np.float64(v2), np.float64(v3)
                    w4, w5, w6, w7 = np.float64(v4), np.float64(v5), np.float64(v6), np.float64(v7)
                    low[i] = _smaller(_smaller(_smallest(v0, v1, v2, v3), _smallest(v4, v5, v6, v7)), low[i])
                    high[i] = _larger(_larger(_largest(v0, v1, v2, v3), _largest(v4, v5, v6, v7)), high[i])
                    added[i] += ((w0 + w1) + (w2 + w3)) + ((w4 + w5) + (w6 + w7))
                    squared[i] += ((w0 * w0 + w1 * w1) + (w2 * w2 + w3 * w3)) + (
                        (w4 * w4 + w5 * w5) + (w6 * w6 + w7 * w7)
                    )
                    absolute[i] += ((abs(w0) + abs(w1)) + (abs(w2) + abs(w3))) + (
                        (abs(w4) + abs(w5)) + (abs(w6) + abs(w7))
                    )
            for row in range(whole, stop):
                for i in range(width):
                    value = x[row, first + i]
                    wide = np.float64(value)
                    low[i] = _smaller(value, low[i])
                    high[i] = _larger(value, high[i])
                    added[i] += wide
                    squared[i] += wide * wide
                    absolute[i] += abs(wide)
            for i in range(width):
                c = first + i
                # The sum of magnitudes is finite exactly when every value is: float64
                # cannot overflow on float32 values. Only then is the careful pass skipped.
                if not (absolute[i] < np.inf) or high[i] >= limit or low[i] <= -limit:
                    low[i], high[i], added[i], squared[i], absolute[i] = np.inf, -np.inf, 0.0, 0.0, 0.0
                    for row in range(start, stop):
                        value = x[row, c]
                        if not abs(value) < np.inf:
                            nonfinite[c] += 1
                            used[i] -= 1
                            continue
                        if abs(value) >= limit:
                            overflow[c] += 1
                        wide = np.float64(value)
                        low[i] = min(low[i], value)
                        high[i] = max(high[i], value)
                        added[i] += wide
                        squared[i] += wide * wide
                        absolute[i] += abs(wide)
                if used[i] == 0:
                    continue
                count[c] += used[i]
                lowest[c] = min(lowest[c], low[i])
                highest[c] = max(highest[c], high[i])
                total[c] += added[i]
                squares[c] += squared[i]
                mean_abs_max[c] = max(mean_abs_max[c], absolute[i] / used[i])


@kept_njit(nogil=True)
def add_gradients(patterns: UInt16, gradients: Float32, group_of: Int64, counts: Int64, gradient_sq: Float64) -> None:
    """Count each 16-bit pattern and add its squared gradient, in float64 and in the order of rows.

    patterns, gradients (t, c); group_of (c,); counts, gradient_sq (groups, PATTERNS), added to.
    """
    for row in range(patterns.shape[0]):
        for channel in range(patterns.shape[1]):
            pattern = patterns[row, channel]
            group = group_of[channel]
            slope = np.float64(gradients[row, channel])
            counts[group, pattern] += 1
            gradient_sq[group, pattern] += slope * slope
