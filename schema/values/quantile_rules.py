"""The two rules by which quantiles are ranked and interpolated here.

Scalar functions without state: Python calls them, and Numba compiles them into the kernels of `collector`.

`site_stats` follows numpy.quantile on float64 data: rank p (n - 1) in float64, linear interpolation.
`documents` follows torch.quantile on float32 data, as upstream's observers call it: rank and interpolation in float32
(ATen/native/Sorting.cpp, quantile_compute; Lerp.h). Above 2^24 values the rank itself is rounded.
"""

from __future__ import annotations

import numpy as np


def rank(p: float, total: int) -> tuple[int, int, float]:
    """numpy's rule: the ranks (from 0) below and above the quantile ``p`` of ``total`` values, and its weight between.

    total  at least 1
    """
    position = np.float64(p) * (total - 1)
    below = int(np.floor(position))
    return below, min(below + 1, total - 1), position - below


def interpolate(low: float, high: float, weight: float) -> float:
    """numpy's rule: the value at ``weight`` between ``low`` and ``high``, computed from the nearer one, in float64."""
    step = high - low
    if weight >= 0.5:
        return high - step * (1 - weight)
    return low + step * weight


def rank_torch(p: np.float32, total: int) -> tuple[int, int, np.float32]:
    """torch's rule for `rank`; p and the weight are float32."""
    position = np.float32(p * np.float32(total - 1))
    below = int(position)
    above = min(int(np.ceil(position)), total - 1)
    return below, above, np.float32(position - np.float32(below))


def interpolate_torch(low: np.float32, high: np.float32, weight: np.float32) -> np.float32:
    """torch's rule for `interpolate`: torch.lerp on float32, whose product is not rounded before the sum.

    float64 holds a float32 product exactly, and the sum of two such numbers of near magnitude too, so that rounding
    once at the end is what a fused multiply-add does.
    """
    step = np.float64(np.float32(high - low))
    if weight < np.float32(0.5):
        return np.float32(np.float64(low) + np.float64(weight) * step)
    return np.float32(np.float64(high) + np.float64(np.float32(weight - np.float32(1))) * step)
