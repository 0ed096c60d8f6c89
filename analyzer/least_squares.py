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

import math

import numpy as np

from quambase.analyzer import kernels
from quambase.schema.values.arrays import Float64, Int64
from quambase.schema.values.distribution import Distribution
from quambase.schema.values.number_format import INT8, Affine


def optimal_scale(distribution: Distribution) -> float:
    """The scale of least mean squared error, float64, the larger of tied ones; 0 when all values are zero."""
    return kernels.least_squares(*_sides(distribution), INT8.qmax, math.inf)[0]


ALIKE = 2.0**-5
"""Zero points whose errors on the finer grid are within this share of the least are compared at their best scales."""


def optimal_affine(distribution: Distribution) -> Affine:
    """The scale and zero point of least mean squared error; scale 0 when all values are zero.

    The error of every zero point is taken on a grid of scales, 8 an octave, and then on one of 128 an octave for a
    quarter of an octave on either side of the best. For those that are `ALIKE` there the best of all scales is
    searched. A better zero point could be missed only where its error is that much less than what the finer grid shows,
    which no distribution of the tests has. Of equal errors the zero point nearest to 0 wins.
    """
    sides = _sides(distribution)
    _, around = kernels.errors_by_highest(*sides, 2.0 * distribution.amax, 2.0 ** (-1 / 8), kernels.MAX_GRID)
    errors, _ = kernels.errors_by_highest(*sides, 2.0 ** (1 / 4) * around, 2.0 ** (-1 / 128), 65)
    best, least = Affine(0.0, 0), math.inf
    for highest in np.argsort(errors, kind="stable").tolist():
        if errors[highest] > errors.min() * (1 + ALIKE):
            break
        zero_point = INT8.qmax - highest
        scale, error = kernels.least_squares(*sides, highest, least)
        if (error, abs(zero_point)) < (least, abs(best.zero_point)):
            best, least = Affine(scale, zero_point), error
    return best


def _sides(distribution: Distribution) -> tuple[Float64, Int64, Float64, Int64]:
    """The positive values and their counts, and the magnitudes of the negative ones and theirs, ascending."""
    values, counts = distribution.values.astype(np.float64), distribution.counts
    below, above = values < 0, values > 0
    return values[above], counts[above], np.ascontiguousarray(-values[below][::-1]), counts[below][::-1].copy()
