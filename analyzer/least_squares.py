"""The scale of least squared error among all positive scales.

Write the error as E(s) = sum n min_c (x - c s)^2. Holding the code of every value fixed gives a parabola with
minimum S2 - B^2 / A at s = B / A, where S2 = sum n x^2, A = sum n c^2 and B = sum n x c. E is the least of
these parabolas, so its minimum is the least of their minima, and only the code assignments that are nearest
at some s matter: those between neighbouring breakpoints |x| / (c + 1/2). `kernels.least_squares` finds it so:

1. a grid of 8 scales per octave from twice the largest magnitude (all codes zero beyond) down to where the
   clipping error alone, sum over |x| > 128 s of (|x| - 128 s)^2, exceeds the best error so far: everything
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
from quambase.schema.distribution import Distribution


def optimal_scale(distribution: Distribution) -> float:
    """The scale of least mean squared error, float64, the larger of tied ones; 0 when all values are zero."""
    values, counts = distribution.values.astype(np.float64), distribution.counts
    below, above = values < 0, values > 0
    return float(
        kernels.least_squares(
            values[above],
            counts[above],
            np.ascontiguousarray(-values[below][::-1]),
            counts[below][::-1].copy(),
        )
    )
