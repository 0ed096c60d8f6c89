"""The exact distribution of 16-bit values: quantiles and moments from sorted values and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from quambase.schema.tables import QUANTILES
from quambase.schema.values.arrays import Float32, Float64, Int32, Int64
from quambase.schema.values.quantile_rules import interpolate, interpolate_torch, rank, rank_torch

Amounts = TypeVar("Amounts", Int64, Float64)


@dataclass(frozen=True)
class Distribution:
    """Distinct finite values of a (scale) group and how often each occurred.

    values     (m,) float32, strictly ascending, finite, -0 folded into 0
    counts     (m,) int64, positive
    nonfinite  how many values were NaN or infinite (in neither array)
    """

    values: Float32
    counts: Int64
    nonfinite: int = 0

    @classmethod
    def of_rows(cls, values: Float32, counts: Int64) -> Distribution:
        """From rows of `counts` in any order and with repeats (several groups): sorted, added up, nonfinite apart."""
        values = np.asarray(values, np.float32) + np.float32(0)  # -0.0 + 0.0 is +0.0
        counts = np.asarray(counts, np.int64)
        finite = np.isfinite(values)
        nonfinite = int(counts[~finite].sum())
        values, counts = values[finite], counts[finite]
        if values.size and not (values[1:] > values[:-1]).all():
            values, counts = _added_up(values, counts)
        present = counts > 0
        return cls(values[present], counts[present], nonfinite)

    @classmethod
    def of_values(cls, values: npt.NDArray[np.floating]) -> Distribution:
        """Of raw values (any shape), rounded to float16 (nearest, ties to even) as a run's counts are."""
        with np.errstate(over="ignore"):
            half = np.asarray(values).astype(np.float16).ravel()
        found, counts = np.unique(half.astype(np.float32), return_counts=True)
        return cls.of_rows(found, counts.astype(np.int64))

    @cached_property
    def total(self) -> int:
        """How many finite values."""
        return int(self.counts.sum())

    @cached_property
    def absolute(self) -> tuple[Float32, Int64]:
        """Distinct absolute values, ascending, and their counts."""
        first = int(np.searchsorted(self.values, np.float32(0)))
        joined = np.concatenate([-self.values[:first][::-1], self.values[first:]])
        counts = np.concatenate([self.counts[:first][::-1], self.counts[first:]])
        order = np.argsort(joined, kind="stable")
        joined, counts = joined[order], counts[order]
        if not joined.size:
            return joined, counts
        starts = np.flatnonzero(np.concatenate([[True], joined[1:] != joined[:-1]]))
        return joined[starts], np.add.reduceat(counts, starts)

    @cached_property
    def _cumulative(self) -> Int64:
        return np.cumsum(self.absolute[1], dtype=np.int64)

    @property
    def amax(self) -> float:
        """Largest absolute value; 0 when there are no values."""
        return float(max(abs(self.values[0]), abs(self.values[-1]))) if self.values.size else 0.0

    def order_statistic(self, rank: int) -> np.float32:
        """The absolute value at 0-based ``rank`` in ascending order."""
        return np.float32(self.absolute[0][np.searchsorted(self._cumulative, rank, side="right")])

    def quantile(self, p: float) -> float:
        """Quantile of the absolute value as numpy.quantile on float64 data: rank p(n-1), linear; NaN if empty.

        >>> import numpy
        >>> Distribution.of_values(numpy.float32([-4, 1, 2, 3])).quantile(0.5)
        2.5
        """
        return self.quantiles([p])[0]

    def quantiles(self, ps: Sequence[float]) -> list[float]:
        """`quantile` of each of ``ps``."""
        if not self.values.size:
            return [float("nan")] * len(ps)
        found = []
        for p in ps:
            below, above, weight = rank(p, self.total)
            low, high = float(self.order_statistic(below)), float(self.order_statistic(above))
            found.append(float(interpolate(low, high, weight)))
        return found

    def quantile_torch(self, p: float) -> np.float32:
        """Quantile of the absolute value as torch.quantile computes it for float32 data; NaN if empty."""
        if not self.values.size:
            return np.float32("nan")
        below, above, weight = rank_torch(np.float32(p), self.total)
        return interpolate_torch(self.order_statistic(below), self.order_statistic(above), weight)

    def moments(self) -> tuple[float, float, float]:
        """Mean, population standard deviation and Pearson kurtosis m4/m2^2 (3 for a Gaussian), in float64."""
        if not self.values.size:
            return (float("nan"),) * 3
        x, c, total = self.values.astype(np.float64), self.counts.astype(np.float64), float(self.total)
        mean = float((x * c).sum() / total)
        centred = (x - mean) ** 2
        second = float((centred * c).sum() / total)
        fourth = float((centred**2 * c).sum() / total)
        return mean, second**0.5, fourth / second**2 if second > 0 else float("nan")

    def summary(self) -> dict[str, float | int]:
        """The columns of `site_stats` but the key and `overflow`.

        ``beyond_k_sigma`` is the share of values with |x - mean| > k std; ``outlier_ratio`` is amax / q9995.
        """
        mean, std, kurtosis = self.moments()
        total = self.total
        row: dict[str, float | int] = {
            "count": total,
            "amax": self.amax,
            "min": float(self.values[0]) if total else float("nan"),
            "max": float(self.values[-1]) if total else float("nan"),
            "mean": mean,
            "std": std,
            "kurtosis": kurtosis,
        }
        row |= dict(zip(QUANTILES, self.quantiles(list(QUANTILES.values())), strict=True))
        row["outlier_ratio"] = ratio(self.amax, float(row["q9995"]))
        row["outlier_ratio_q99"] = ratio(self.amax, float(row["q99"]))
        deviation = np.abs(self.values.astype(np.float64) - mean)
        for k in (3, 5):
            far = int(self.counts[deviation > k * std].sum())
            row[f"beyond_{k}_sigma"] = far / total if total else float("nan")
        zeros = int(self.counts[self.values == 0].sum())
        row["zeros"] = zeros / total if total else float("nan")
        row["nonfinite"] = self.nonfinite
        return row


@dataclass(frozen=True)
class BlockCounts:
    """How often each distinct finite value of a (scale) group occurred in each block of documents.

    values  (m,) float32, strictly ascending, finite
    counts  (blocks, m) int64
    """

    values: Float32
    counts: Int64

    @classmethod
    def of_rows(cls, values: Float32, counts: Int64, blocks: Int32, size: int) -> BlockCounts:
        """From rows of `block_counts` of several groups, (rows,) each, of a run of ``size`` blocks: added up."""
        finite = np.isfinite(values)
        found, inverse = np.unique(values[finite], return_inverse=True)
        summed = np.zeros((size, found.size), np.int64)
        np.add.at(summed, (blocks[finite], inverse), counts[finite])
        return cls(found, summed)

    def together(self, blocks: Int64) -> Distribution:
        """The distribution of some blocks, (n,) their numbers."""
        counts = self.counts[blocks].sum(0)
        present = counts > 0
        return Distribution(self.values[present], counts[present])


@dataclass(frozen=True)
class Sensitivity:
    """How much the model's output depends on the values of a (scale) group, from a few documents.

    values       (m,) float32, strictly ascending, finite
    gradient_sq  (m,) float64: the sum over a value's occurrences of the squared gradient of the log-likelihood
    tokens       of these documents
    """

    values: Float32
    gradient_sq: Float64
    tokens: int

    @classmethod
    def of_rows(cls, values: Float32, gradient_sq: Float64, tokens: int) -> Sensitivity:
        """From rows of `sensitivities` of several groups: sorted, added up."""
        return cls(*_added_up(values, gradient_sq), tokens)

    @cached_property
    def weighted(self) -> Distribution:
        """The values with weights proportional to ``gradient_sq`` as counts, whose sum is about 2^50: what is rounded
        off each is 2^-51 of all of them together.
        """
        total = float(self.gradient_sq.sum())
        if total <= 0:
            return Distribution(self.values[:0], np.zeros(0, np.int64))
        return Distribution.of_rows(self.values, np.rint(self.gradient_sq * (2.0**50 / total)).astype(np.int64))


def _added_up(values: Float32, amounts: Amounts) -> tuple[Float32, Amounts]:
    """The distinct ``values``, ascending, and the sum of the amounts of each."""
    # With return_index numpy sorts by merging, which takes a third of the time where several ascending runs are joined.
    found, _, inverse = np.unique(values, return_index=True, return_inverse=True)
    # np.add.at keeps int64; bincount's weights would pass through float64.
    summed = np.zeros(found.size, amounts.dtype)
    np.add.at(summed, inverse, amounts)
    return found, summed


def ratio(numerator: float, denominator: float) -> float:
    """``numerator / denominator``, NaN where the denominator is zero or NaN."""
    return numerator / denominator if denominator > 0 else float("nan")
