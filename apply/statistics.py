"""Paired statistics over documents: bootstrap intervals, McNemar's exact test, Holm's correction.

All of it is paired: the same resampled documents are used for every strategy, so what documents have in
common cancels in a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

CONFIDENCE = 0.95

POWER_FACTOR = 1.959964 + 0.841621
"""Standard errors of a true difference that is found with power 0.8 at the two-sided 5 % level."""

_CHUNK_CELLS = 4_000_000
"""Resampled documents held at once; bounds memory to about 100 MB."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A paired difference.

    estimate    with its 95 % interval
    p_value     two-sided: of the bootstrap, or exact (McNemar)
    detectable  the smallest true difference that this many documents show with power 0.8
    """

    estimate: Estimate
    p_value: float
    detectable: float


def resampled_sums(columns: Float64, resamples: int, seed: int) -> Float64:
    """Sums of per-document columns over bootstrap samples of documents: (n, m) -> (resamples, m) float64.

    Row i is the same sample of n documents (with replacement) for every column. The samples depend on
    ``seed``, n and ``resamples`` alone.
    """
    documents = columns.shape[0]
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_CELLS // max(1, documents))
    sums = np.empty((resamples, columns.shape[1]))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(0, documents, (rows, documents))
        drawn += np.arange(rows)[:, None] * documents
        times = np.bincount(drawn.ravel(), minlength=rows * documents).reshape(rows, documents)
        sums[start : start + rows] = times @ columns
    return sums


def interval(value: float, resampled: Float64) -> Estimate:
    """The percentile interval: ``value`` with the 2.5 % and 97.5 % quantiles of its resampled values."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def difference(value: float, resampled: Float64) -> Difference:
    """A difference from its resampled values.

    p = 2 min(share <= 0, share >= 0), each share with one sample added so that it is never 0 (Davison and
    Hinkley, Bootstrap Methods, 4.2).
    """
    count = resampled.size
    below = (1 + int((resampled <= 0).sum())) / (count + 1)
    above = (1 + int((resampled >= 0).sum())) / (count + 1)
    error = float(np.std(resampled, ddof=1)) if count > 1 else math.nan
    p_value = float(min(1.0, 2 * min(below, above)))
    return Difference(interval(value, resampled), p_value, POWER_FACTOR * error)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided p: discordant pairs split as a fair coin (1 where there are none)."""
    total = only_first + only_second
    fewer = min(only_first, only_second)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**total))


def least_discordant() -> int:
    """How many discordant pairs, all in one direction, McNemar's exact test needs before it can say anything.

    Fewer cannot be significant, so no difference below this many documents can be shown, however alike the rest are.
    """
    pairs = 1
    while mcnemar_exact(pairs, 0) > 1 - CONFIDENCE:
        pairs += 1
    return pairs


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(estimate: Estimate, adjusted_p: float, *, smaller_is_better: bool) -> str:
    """Better, worse, or not distinguishable: the interval contains zero or the corrected p exceeds 5 %."""
    certain = not (estimate.low <= 0 <= estimate.high) and adjusted_p <= 1 - CONFIDENCE
    if not certain or math.isnan(estimate.value):
        return "not distinguishable"
    return "better" if (estimate.value < 0) == smaller_is_better else "worse"
