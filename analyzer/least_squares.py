"""The scale of least squared error among all positive scales.

Write the error as E(s) = sum n min_c (x - c s)^2. Holding the code of every value fixed gives a parabola with
minimum S2 - B^2 / A at s = B / A, where S2 = sum n x^2, A = sum n c^2 and B = sum n x c. E is the least of
these parabolas, so its minimum is the least of their minima, and only the code assignments that are nearest
at some s matter: those between neighbouring breakpoints |x| / (c + 1/2). `kernels.least_squares` finds it so:

1. a grid of 8 scales per octave from twice the largest magnitude (all codes zero beyond) down to where the
   clipping error alone, of what lies beyond the last code of its side, exceeds the best error so far: everything
   smaller is worse;
2. each interval is discarded when a lower bound of its error exceeds the best so far, else halved. The bound:
   fix the codes of one end; re-choosing them can gain at most what it gains at the other end. It is second
   order in the interval's width, where |RMSE(s) - RMSE(s')| <= |s - s'| rms(code) is first order;
3. an interval with few breakpoints left is swept: A and B change by one value's share at each, and B^2 / A is
   read off.

Sums come from suffix sums over the sorted distinct magnitudes, A and the counts exactly, B to a few float64
roundings. Errors closer than 2^-44 S2 count as equal, and the larger scale wins.
"""

from __future__ import annotations

import numpy as np

from quambase.analyzer import kernels
from quambase.schema.values.distribution import Distribution
from quambase.schema.values.number_format import INT8, Affine


def optimal_scale(distribution: Distribution) -> float:
    """The scale of least mean squared error, float64, the larger of tied ones; 0 when all values are zero."""
    return _search(distribution, 0)[0]


_TRIED = (-128, -127, -126, -124, -120, -112, -96, -64, 0, 64, 96, 112, 120, 124, 126, 127)
"""Zero points tried first, the closer the nearer they leave one side without codes."""


def optimal_affine(distribution: Distribution) -> Affine:
    """The scale and zero point of least mean squared error.

    The scale is the best of all for its zero point; zero points are narrowed down from some tried first by halving the
    distance to their neighbours, so that a better one may be missed where the error has several valleys. Of equal
    errors the zero point nearest to 0 wins. Scale 0 when all values are zero.
    """
    known: dict[int, tuple[float, float]] = {}

    def cost(zero_point: int) -> tuple[float, int]:
        if zero_point not in known:
            known[zero_point] = _search(distribution, zero_point)
        return known[zero_point][1], abs(zero_point)

    best = min(_TRIED, key=cost)
    place = _TRIED.index(best)
    step = max(abs(best - other) for other in _TRIED[max(0, place - 1) : place + 2]) // 2
    while step:
        best = min((z for z in (best - step, best, best + step) if INT8.qmin <= z <= INT8.qmax), key=cost)
        step //= 2
    return Affine(known[best][0], best)


def _search(distribution: Distribution, zero_point: int) -> tuple[float, float]:
    """The best scale with this zero point, and its sum of squared errors."""
    values, counts = distribution.values.astype(np.float64), distribution.counts
    below, above = values < 0, values > 0
    scale, error = kernels.least_squares(
        values[above],
        counts[above],
        np.ascontiguousarray(-values[below][::-1]),
        counts[below][::-1].copy(),
        INT8.qmax - zero_point,
    )
    return float(scale), float(error)
