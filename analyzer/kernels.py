"""Compiled inner loops: the tally of one scale, and the search for the scale of least squared error.

Everything here releases the GIL and is exact where it says so; `quambase.analyzer.quantization_error` and
`quambase.analyzer.least_squares` are the callers and say what the numbers mean. Arrays are filled element by element,
not by slices: Numba compiles the error paths of slices, which added eight seconds to the first run.
"""

from __future__ import annotations

import numpy as np

from quambase.schema.compiled import kept_njit
from quambase.schema.values.arrays import Float32, Float64, Int64
from quambase.schema.values.number_format import INT8

QMIN, QMAX = INT8.qmin, INT8.qmax

BOUNDARIES = INT8.codes - 1
"""Between neighbouring codes, at k - 0.5 scales: k = 1..highest above zero, then below it. With a zero point z values
are rounded to the integers QMIN - z .. QMAX - z, the last of which is ``highest``.
"""

LEAF = 48
"""Breakpoints below which an interval is swept instead of halved."""

STEPS_PER_OCTAVE = 8
MAX_GRID = 64 * STEPS_PER_OCTAVE
MAX_DEPTH = 60
MAX_TIES = 1024

TIE = 2.0**-44
"""Errors closer than this share of the signal's energy are one error: float64 cannot tell them apart."""


@kept_njit(nogil=True)
def tally(values: Float32, counts: Int64, scale: np.float32, lowest: int, histogram: Int64) -> tuple[float, int]:
    """Add to ``histogram`` (codes,) how many values get each code; return the summed squared error and how many clip.

    code = clamp(rint(float32(x / scale)), lowest, lowest + codes - 1), ties to even; ``lowest`` is QMIN less the zero
    point. Clipped is a code the clamp changed. The error x - code * scale is exact in float64 before it is squared (at
    most 33 significant bits).
    """
    error = 0.0
    clipped = 0
    step = np.float64(scale)
    low, high = np.float32(lowest), np.float32(lowest + histogram.size - 1)
    for i in range(values.size):
        code = np.rint(values[i] / scale)
        if code > high:
            code = high
            clipped += counts[i]
        elif code < low:
            code = low
            clipped += counts[i]
        histogram[int(code) - lowest] += counts[i]
        rest = np.float64(values[i]) - np.float64(code) * step
        error += counts[i] * (rest * rest)
    return error, clipped


@kept_njit(nogil=True)
def weighted_error(values: Float32, weights: Float64, scale: np.float32, lowest: int) -> float:
    """Sum of weight * (x - code * scale)^2, codes as in `tally`."""
    error = 0.0
    step = np.float64(scale)
    low, high = np.float32(lowest), np.float32(lowest + BOUNDARIES)
    for i in range(values.size):
        code = min(max(np.rint(values[i] / scale), low), high)
        rest = np.float64(values[i]) - np.float64(code) * step
        error += weights[i] * (rest * rest)
    return error


@kept_njit(nogil=True)
def lp_error(values: Float32, counts: Int64, scale: np.float32, power: float) -> float:
    """Sum of |x - code * scale|^power, codes as in `tally`."""
    error = 0.0
    step = np.float64(scale)
    for i in range(values.size):
        code = np.rint(values[i] / scale)
        code = min(max(code, np.float32(QMIN)), np.float32(QMAX))
        error += counts[i] * abs(np.float64(values[i]) - np.float64(code) * step) ** power
    return error


@kept_njit(nogil=True)
def entropy_divergences(bins: Float64, levels: int) -> Float64:
    """KL divergence in nats of a histogram clipped at i bins from its version of ``levels`` levels, for i = levels..n.

    See strategy `entropy`. Within a level the quantized histogram is constant over its non-empty bins, so one
    logarithm per level is enough: sum ref log ref comes from a running sum, sum ref log new from the levels' sums.
    """
    n = bins.size
    total, filled, self_information = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
    for j in range(n):
        total[j + 1] = total[j] + bins[j]
        filled[j + 1] = filled[j] + (bins[j] > 0)
        self_information[j + 1] = self_information[j] + (bins[j] * np.log(bins[j]) if bins[j] > 0 else 0.0)
    divergences = np.full(n - levels + 1, np.inf)
    for i in range(levels, n + 1):
        tail = total[n] - total[i]
        last = bins[i - 1]
        if total[i] <= 0 or (tail > 0 and last <= 0):
            continue  # the reference has mass where the quantized histogram has none
        reference = self_information[i]
        if tail > 0:
            reference += (last + tail) * np.log(last + tail) - last * np.log(last)
        quantized = 0.0
        start = 0
        for level in range(levels):
            end = ((level + 1) * i + levels - 1) // levels
            mass = total[end] - total[start]
            if mass > 0:
                height = np.log(mass / (filled[end] - filled[start]))
                quantized += mass * height
                if end == i:
                    quantized += tail * height
            start = end
        divergences[i - levels] = (reference - quantized) / total[n] + np.log(total[i] / total[n])
    return divergences


@kept_njit(nogil=True)
def suffix_sums(magnitudes: Float64, counts: Int64) -> tuple[Int64, Float64, Float64]:
    """For every i, over j >= i: sum of counts, of counts * a, of counts * a^2; one entry more than
    ``magnitudes``.

    From the largest value down and compensated (Neumaier), so that short tails keep full relative precision.
    """
    n = magnitudes.size
    zeroth, first, second = np.zeros(n + 1, np.int64), np.zeros(n + 1), np.zeros(n + 1)
    high = np.zeros(2)
    low = np.zeros(2)
    for i in range(n - 1, -1, -1):
        zeroth[i] = zeroth[i + 1] + counts[i]
        term = counts[i] * magnitudes[i]
        for power in range(2):
            total = high[power] + term
            if abs(high[power]) >= abs(term):
                low[power] += (high[power] - total) + term
            else:
                low[power] += (term - total) + high[power]
            high[power] = total
            term *= magnitudes[i]
        first[i] = high[0] + low[0]
        second[i] = high[1] + low[1]
    return zeroth, first, second


@kept_njit(nogil=True)
def _place(magnitudes: Float64, threshold: float, low: int, high: int) -> int:
    """First index in low..high whose magnitude is at least ``threshold``."""
    while low < high:
        middle = (low + high) // 2
        if magnitudes[middle] < threshold:
            low = middle + 1
        else:
            high = middle
    return low


@kept_njit(nogil=True)
def _assign(
    scale: float,
    positive: Float64,
    negative: Float64,
    zeroth: tuple[Int64, Int64],
    first: tuple[Float64, Float64],
    low: Int64,
    high: Int64,
    out: Int64,
    highest: int,
) -> tuple[float, float]:
    """Boundaries of the nearest codes at ``scale`` into ``out`` (BOUNDARIES,); return A = sum n c^2 and B = sum n x
    c.

    A magnitude of code c lies above the boundaries 1..c, so A adds 2k - 1 and B adds a for each boundary k
    below it. ``low`` and ``high`` are the boundaries at a smaller and a larger scale.
    """
    energy = 0.0
    product = 0.0
    for k in range(1, highest + 1):
        place = _place(positive, (k - 0.5) * scale, low[k - 1], high[k - 1])
        out[k - 1] = place
        energy += (2 * k - 1) * np.float64(zeroth[0][place])
        product += first[0][place]
    for k in range(1, BOUNDARIES - highest + 1):
        i = highest + k - 1
        place = _place(negative, (k - 0.5) * scale, low[i], high[i])
        out[i] = place
        energy += (2 * k - 1) * np.float64(zeroth[1][place])
        product += first[1][place]
    return energy, product


@kept_njit(nogil=True)
def _sweep(
    row_low: Int64,
    row_high: Int64,
    positive: Float64,
    negative: Float64,
    counts_positive: Int64,
    counts_negative: Int64,
    events: Float64,
    highest: int,
) -> int:
    """Collect the breakpoints between two scales into ``events`` (rows: scale, change of A, change of B),
    sorted.
    """
    found = 0
    for i in range(BOUNDARIES):
        k = i + 1 if i < highest else i - highest + 1
        for j in range(row_low[i], row_high[i]):
            a = positive[j] if i < highest else negative[j]
            n = counts_positive[j] if i < highest else counts_negative[j]
            at = a / (k - 0.5)
            slot = found
            while slot > 0 and events[slot - 1, 0] > at:
                for part in range(3):
                    events[slot, part] = events[slot - 1, part]
                slot -= 1
            events[slot, 0] = at
            events[slot, 1] = n * (2.0 * k - 1.0)
            events[slot, 2] = n * a
            found += 1
            if found == events.shape[0]:
                return found
    return found


@kept_njit(nogil=True)
def _clip_floor(
    scale: float,
    sides: tuple[Float64, Float64],
    sums: tuple[tuple[Int64, Int64], tuple[Float64, Float64], Float64, Float64],
    highest: int,
) -> float:
    """Least error possible at any scale up to ``scale``, from the values beyond the last code alone, which clip."""
    zeroth, first, second_positive, second_negative = sums
    error = 0.0
    for side in range(2):
        reach = (highest if side == 0 else BOUNDARIES - highest) * scale
        place = _place(sides[side], reach, 0, sides[side].size)
        second = second_positive[place] if side == 0 else second_negative[place]
        error += float(second - 2.0 * reach * first[side][place] + reach * reach * zeroth[side][place])
    return error


@kept_njit(nogil=True)
def _bound(energy: float, left: float, right: float, a1: float, b1: float, a2: float, b2: float) -> float:
    """A lower bound of the error everywhere between the scales ``left`` and ``right``.

    With the codes of one end held fixed the error is a parabola; choosing codes anew gains over it by an
    amount that only grows with the distance from that end (from the right end, while left > right / 2), so
    the gain at the far end bounds the gain anywhere between.
    """
    error_left = energy - 2.0 * left * b1 + left * left * a1
    error_right = energy - 2.0 * right * b2 + right * right * a2
    best = min(max(b1 / a1, left), right) if a1 > 0 else right
    gain = energy - 2.0 * right * b1 + right * right * a1 - error_right
    from_left = energy - 2.0 * best * b1 + best * best * a1 - gain
    best = min(max(b2 / a2, left), right) if a2 > 0 else left
    gain = energy - 2.0 * left * b2 + left * left * a2 - error_left
    from_right = energy - 2.0 * best * b2 + best * best * a2 - gain
    return max(from_left, from_right)


@kept_njit(nogil=True)
def _coarse_grid(
    top: float,
    signal: float,
    tie: float,
    sides: tuple[Float64, Float64],
    sums: tuple[tuple[Int64, Int64], tuple[Float64, Float64], Float64, Float64],
    grid: Float64,
    rows: Int64,
    highest: int,
    limit: float,
) -> tuple[int, float]:
    """Scales from ``top`` down to where clipping alone costs more than the best so far; how many, and the least error
    or ``limit``, if that is less.

    Written: grid (scales, 3) scale, A, B; rows (scales, BOUNDARIES) the boundaries of the codes.
    """
    positive, negative = sides
    zeroth, first, _, _ = sums
    floor_row, ceiling_row = np.zeros(BOUNDARIES, np.int64), np.empty(BOUNDARIES, np.int64)
    for i in range(BOUNDARIES):
        ceiling_row[i] = positive.size if i < highest else negative.size
    ratio = 2.0 ** (-1.0 / STEPS_PER_OCTAVE)
    least = min(signal, limit)
    size = 0
    scale = top
    while size < MAX_GRID:
        above = ceiling_row if size == 0 else rows[size - 1]
        a, b = _assign(scale, positive, negative, zeroth, first, floor_row, above, rows[size], highest)
        grid[size, 0], grid[size, 1], grid[size, 2] = scale, a, b
        if a > 0:
            least = min(least, signal - b * b / a)
        size += 1
        if _clip_floor(scale, sides, sums, highest) > least + tie:
            break
        scale *= ratio
    return size, least


@kept_njit(nogil=True)
def _halve(stack: Float64, stack_rows: Int64, at: int, middle: float, a: float, b: float, row: int) -> None:
    """Replace the interval at ``at`` by its lower half and push its upper half.

    stack (entries, 6): scale, A and B of the left end, and of the right one; stack_rows (entries, 3): the ends' rows of
    boundaries, depth. ``middle``, A, B and row are of the new end.
    """
    upper = at + 1
    for part in range(3):
        stack[upper, 3 + part] = stack[at, 3 + part]
    stack[at, 3], stack[at, 4], stack[at, 5] = middle, a, b
    stack[upper, 0], stack[upper, 1], stack[upper, 2] = middle, a, b
    row2, depth = stack_rows[at, 1], stack_rows[at, 2] + 1
    stack_rows[at, 1], stack_rows[at, 2] = row, depth
    stack_rows[upper, 0], stack_rows[upper, 1], stack_rows[upper, 2] = row, row2, depth


@kept_njit(nogil=True)
def least_squares(
    positive: Float64, counts_positive: Int64, negative: Float64, counts_negative: Int64, highest: int, limit: float
) -> tuple[float, float]:
    """The scale s > 0 of least sum n min_c (x - c s)^2 over the codes highest - BOUNDARIES..highest, the larger of tied
    ones; and that sum. 0 and 0 without signal; 0 and infinity where every sum is more than ``limit``.

    ``positive`` and ``negative`` are ascending magnitudes > 0. See analyzer/least_squares.py for why this is the
    global minimum.
    """
    p0, p1, p2 = suffix_sums(positive, counts_positive)
    n0, n1, n2 = suffix_sums(negative, counts_negative)
    zeroth, first = (p0, n0), (p1, n1)
    signal = p2[0] + n2[0]
    if signal <= 0:
        return 0.0, 0.0
    tie = TIE * signal
    top = 2.0 * max(positive[-1] if positive.size else 0.0, negative[-1] if negative.size else 0.0)

    # 1. A coarse grid.
    grid = np.empty((MAX_GRID, 3))
    rows = np.empty((MAX_GRID + MAX_DEPTH + 2, BOUNDARIES), np.int64)
    sides, sums = (positive, negative), (zeroth, first, p2, n2)
    size, least = _coarse_grid(top, signal, tie, sides, sums, grid, rows, highest, limit)

    # 2. Branch and bound within each grid interval, larger scales first.
    ties = np.empty((MAX_TIES, 2))
    held = 0
    events = np.empty((1024, 3))
    stack = np.empty((MAX_DEPTH + 2, 6))
    stack_rows = np.empty((MAX_DEPTH + 2, 3), np.int64)
    for j in range(size - 1):
        for part in range(3):
            stack[0, part], stack[0, 3 + part] = grid[j + 1, part], grid[j, part]
        stack_rows[0, 0], stack_rows[0, 1], stack_rows[0, 2] = j + 1, j, 0
        waiting = 1
        while waiting:
            waiting -= 1
            left, a1, b1 = stack[waiting, 0], stack[waiting, 1], stack[waiting, 2]
            right, a2, b2 = stack[waiting, 3], stack[waiting, 4], stack[waiting, 5]
            row1, row2, depth = stack_rows[waiting, 0], stack_rows[waiting, 1], stack_rows[waiting, 2]
            if _bound(signal, left, right, a1, b1, a2, b2) > least + tie:
                continue
            crossings = 0
            for i in range(BOUNDARIES):
                crossings += rows[row2, i] - rows[row1, i]
            if crossings > LEAF and depth < MAX_DEPTH - 1:
                middle = np.sqrt(left * right)
                row = MAX_GRID + depth
                a, b = _assign(middle, positive, negative, zeroth, first, rows[row1], rows[row2], rows[row], highest)
                if a > 0:
                    least = min(least, signal - b * b / a)
                _halve(stack, stack_rows, waiting, middle, a, b, row)
                waiting += 2
                continue
            # 3. Sweep: every piece between two breakpoints is one parabola with its own minimum at B / A.
            found = _sweep(
                rows[row1], rows[row2], positive, negative, counts_positive, counts_negative, events, highest
            )
            a, b = a1, b1
            for i in range(found + 1):
                if i:
                    a -= events[i - 1, 1]
                    b -= events[i - 1, 2]
                if a < 0.5 or b <= 0:
                    continue
                error = signal - b * b / a
                least = min(least, error)
                if error <= least + tie:
                    if held == MAX_TIES:
                        held = _keep_ties(ties, held, least + tie)
                    ties[held, 0], ties[held, 1] = error, b / a
                    held += 1
    if not held:
        return 0.0, np.inf
    best = 0.0
    for i in range(held):
        if ties[i, 0] <= least + tie:
            best = max(best, ties[i, 1])
    return best, least


@kept_njit(nogil=True)
def errors_by_highest(
    positive: Float64,
    counts_positive: Int64,
    negative: Float64,
    counts_negative: Int64,
    top: float,
    ratio: float,
    steps: int,
) -> tuple[Float64, float]:
    """For each ``highest`` 0..BOUNDARIES (codes,) the least error at any of the scales top, top ratio, top ratio^2 ...
    and the scale of the least of all. At most ``steps`` scales; it ends before where clipping alone costs more than the
    least. Without signal: zeros, and 0.

    The other arguments are those of `least_squares`. At one scale the boundaries of the codes are the same for every
    ``highest``, which only says how many of them lie above zero.
    """
    p0, p1, p2 = suffix_sums(positive, counts_positive)
    n0, n1, n2 = suffix_sums(negative, counts_negative)
    codes = BOUNDARIES + 1
    signal = p2[0] + n2[0]
    errors = np.full(codes, signal)
    if signal <= 0:
        return errors, 0.0
    least, best = signal, top
    # Of each side, for each boundary: the first value beyond it, and A and B of the codes below it.
    places = np.empty((2, codes), np.int64)
    for k in range(codes):
        places[0, k], places[1, k] = positive.size, negative.size
    energy, product = np.zeros((2, codes)), np.zeros((2, codes))
    scale = top
    for _ in range(steps):
        for side in range(2):
            values, zeroth, first = (positive, p0, p1) if side == 0 else (negative, n0, n1)
            for k in range(codes):
                place = _place(values, (k + 0.5) * scale, 0, places[side, k])
                places[side, k] = place
                if k < BOUNDARIES:
                    energy[side, k + 1] = energy[side, k] + (2 * k + 1) * np.float64(zeroth[place])
                    product[side, k + 1] = product[side, k] + first[place]
        clipped = signal
        for highest in range(codes):
            lowest = BOUNDARIES - highest
            a, b = energy[0, highest] + energy[1, lowest], product[0, highest] + product[1, lowest]
            if a > 0:
                error = signal - b * b / a  # the best that these codes can have
                errors[highest] = min(errors[highest], error)
                if error < least:
                    least, best = error, scale
            # What lies beyond the last boundary of its side clips, there and at every smaller scale.
            i, j, above, below = places[0, highest], places[1, lowest], highest * scale, lowest * scale
            beyond = p2[i] - 2.0 * above * p1[i] + above * above * p0[i]
            beyond += n2[j] - 2.0 * below * n1[j] + below * below * n0[j]
            clipped = min(clipped, beyond)
        if clipped > least:
            break
        scale *= ratio
    return errors, best


@kept_njit(nogil=True)
def _keep_ties(ties: Float64, held: int, limit: float) -> int:
    """Drop entries above ``limit``; where none is, keep the larger half of the scales (smaller ones lose
    ties).
    """
    kept = 0
    for i in range(held):
        if ties[i, 0] <= limit:
            ties[kept, 0], ties[kept, 1] = ties[i, 0], ties[i, 1]
            kept += 1
    if kept < held:
        return kept
    order = np.argsort(-ties[:held, 1])
    before = ties[:held].copy()
    for i in range(held):
        ties[i, 0], ties[i, 1] = before[order[i], 0], before[order[i], 1]
    return held // 2
