"""The distribution of |x| in equal parts of octaves, exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quambase.schema.values.arrays import Float64, Int64
from quambase.schema.values.distribution import Distribution

BINS_PER_OCTAVE = 8


@dataclass(frozen=True)
class Histogram:
    """How many values have an |x| in each bin ``[2^(k/b), 2^((k+1)/b))``, b bins to an octave, k from ``first`` on.

    first            k of the first bin; 0 where no value is nonzero
    counts           (bins,) int64; the first and the last are positive, bins between them may be empty
    zeros            how many values are 0
    bins_per_octave  b
    """

    first: int
    counts: Int64
    zeros: int
    bins_per_octave: int

    @property
    def total(self) -> int:
        """How many finite values."""
        return self.zeros + int(self.counts.sum())

    @property
    def edges(self) -> Float64:
        """(bins + 1,): the ends of the bins, ascending."""
        steps = self.first + np.arange(self.counts.size + 1)
        octaves, parts = np.divmod(steps, self.bins_per_octave)
        return np.ldexp(_parts(self.bins_per_octave)[parts], octaves)

    @property
    def shares(self) -> Float64:
        """(bins,): the share of all values, zeros among them, in each bin."""
        return self.counts / max(1, self.total)


def histogram(distribution: Distribution, bins_per_octave: int = BINS_PER_OCTAVE) -> Histogram:
    """Count ``distribution`` in bins of |x|.

    Exact: |x| is split into 2^e and m in [1, 2), and m is compared with 2^(j/b) in float64. No 24-bit m lies between
    2^(j/b) and its float64, and 2^(0/b) is 1, so that a power of two begins its bin.
    """
    magnitudes, counts = distribution.absolute
    positive = magnitudes > 0
    mantissa, exponent = np.frexp(magnitudes[positive].astype(np.float64))  # mantissa in [1/2, 1)
    part = np.searchsorted(_parts(bins_per_octave), 2 * mantissa, side="right") - 1
    steps = bins_per_octave * (exponent.astype(np.int64) - 1) + part
    if not steps.size:
        return Histogram(0, np.zeros(0, np.int64), distribution.total, bins_per_octave)
    first = int(steps[0])  # magnitudes ascend
    summed = np.zeros(int(steps[-1]) - first + 1, np.int64)
    np.add.at(summed, steps - first, counts[positive])
    return Histogram(first, summed, int(counts[~positive].sum()), bins_per_octave)


def _parts(bins_per_octave: int) -> Float64:
    """(b,): 2^(j/b) for j = 0..b-1."""
    parts: Float64 = 2.0 ** (np.arange(bins_per_octave) / bins_per_octave)
    return parts
