"""Paired comparisons of two strategies, or of two models: over documents, or over whole clusters of documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from quambase.apply.evaluation.paired_statistics import (
    FEWEST,
    MOST_NEEDED,
    NOT_FINITE,
    Interval,
    can_reach_a_verdict,
    detectable,
    documents_needed,
    holm,
    least_discordant,
    linearised,
    mcnemar_exact,
    newcombe,
    sign_flip_p,
    standard_error,
    student_interval,
    verdict,
)
from quambase.schema.values.arrays import Float64


def counted_units(documents: int, clusters: int) -> int:
    """How many units so many documents of so many clusters are."""
    return clusters if clusters >= FEWEST else documents


def too_few(row: Mapping[str, Any]) -> bool:
    """Whether a row of documents and clusters has fewer units than a verdict needs: there are only values."""
    return counted_units(row["documents"], row["clusters"]) < FEWEST


@dataclass(frozen=True)
class Units:
    """What counts as independent: the clusters of a text, or its documents where there are fewer than FEWEST clusters.

    documents  how many there are
    clusters   of how many books, topics or files they come; a document whose cluster is not known is one of its own
    codes      (documents,) int64: the unit of each document, from 0
    """

    documents: int
    clusters: int
    codes: npt.NDArray[np.int64]

    @classmethod
    def of(cls, clusters: Sequence[str | None]) -> Units:
        """The units of documents whose clusters have these names, None where it is not known."""
        places: dict[object, int] = {}
        codes = [places.setdefault(i if name is None else name, len(places)) for i, name in enumerate(clusters)]
        documents = len(clusters)
        if len(places) < FEWEST:
            return cls(documents, len(places), np.arange(documents))
        return cls(documents, len(places), np.array(codes, np.int64))

    @property
    def count(self) -> int:
        """How many units there are."""
        return counted_units(self.documents, self.clusters)

    @property
    def single(self) -> bool:
        """Every unit is one document."""
        return self.count == self.documents

    def summed(self, values: Float64) -> Float64:
        """The sums over each unit's documents: (documents,) -> (count,)."""
        return np.bincount(self.codes, values, self.count).astype(np.float64)


@dataclass(frozen=True)
class Difference:
    """A paired difference of one figure.

    p_value      not corrected; NaN where the figure is not finite
    error        the standard error
    exact_pairs  p is McNemar's
    """

    value: float
    interval: Interval | None
    p_value: float
    error: float
    exact_pairs: bool = False

    def detectable(self, units: int, comparisons: int) -> float | None:
        """The smallest difference that gets a verdict with power 0.8; None: nothing varies, or none can get one."""
        if not 0 < self.error < math.inf or not can_reach_a_verdict(units, comparisons):
            return None
        found = detectable(self.error, units, comparisons)
        # McNemar's exact test needs some pairs, however small their spread.
        return max(found, least_discordant(comparisons) / units) if self.exact_pairs else found

    def needed(self, units: Units, comparisons: int) -> int | None:
        """On how many documents such a difference is detectable; None: nothing varies, or beyond MOST_NEEDED."""
        found = documents_needed(self.value, self.error, units.count, comparisons)
        if found is None:
            return None
        found = math.ceil(found * units.documents / units.count)
        return found if found <= MOST_NEEDED else None


def ratio_difference(first: Float64, second: Float64, weights: Float64, p_value: float) -> Difference:
    """sum(first) / sum(weights) - sum(second) / sum(weights), each (units,), with Student's interval."""
    with np.errstate(invalid="ignore"):  # of two infinite values nothing is known: NaN
        value, shares = linearised(first - second, weights)
    return Difference(value, student_interval(value, shares), p_value, standard_error(shares))


def exponential_difference(first: Float64, second: Float64, weights: Float64, p_value: float) -> Difference:
    """exp(sum(first) / sum(weights)) - exp(sum(second) / sum(weights)), each (units,): two perplexities.

    Its interval is Student's of the linearised difference. p is NaN where a perplexity is not finite.
    """
    (value, shares), (base, base_shares) = (exponential(column, weights) for column in (first, second))
    with np.errstate(invalid="ignore"):  # of two infinite ones nothing is known: NaN
        difference, own = value - base, shares - base_shares
    p_value = p_value if math.isfinite(difference) else math.nan
    return Difference(difference, student_interval(difference, own), p_value, standard_error(own))


def exponential(values: Float64, weights: Float64) -> tuple[float, Float64]:
    """exp(sum(values) / sum(weights)), and each unit's contribution (units,) to its deviation."""
    mean, shares = linearised(values, weights)
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite exponential has no shares: they are NaN
        found = float(np.exp(mean))
        return found, found * shares


def pairs(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """How often both are right, the first alone, the second alone, and neither."""
    return (
        int((first & second).sum()),
        int((first & ~second).sum()),
        int((second & ~first).sum()),
        int((~first & ~second).sum()),
    )


def share_difference(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> Difference:
    """The difference of two shares of the same documents (documents,): Newcombe's interval, McNemar's p."""
    counts = pairs(first, second)
    _, only_first, only_second, _ = counts
    value = float(first.mean() - second.mean())
    error = standard_error((first * 1.0 - second - value) / first.size)
    return Difference(value, newcombe(*counts), mcnemar_exact(only_first, only_second), error, exact_pairs=True)


SHARE, RATIO, EXPONENTIAL = "share", "ratio", "exponential"
"""Kinds of a figure: a share of documents, a ratio of sums (of values and weights), the exponential of one."""


def differences(
    kind: str, columns: Sequence[Float64], base: Float64, weights: Float64, units: Units, seed: int
) -> list[Difference]:
    """The difference of each column from ``base``, all (units,), of figures of one kind. p is by sign flips, of a SHARE
    of single documents McNemar's; whole clusters are compared as other ratios are.
    """
    if kind == SHARE and units.single:
        return [share_difference(column > 0, base > 0) for column in columns]
    with np.errstate(invalid="ignore"):  # of two infinite values nothing is known: NaN
        p_values = sign_flip_p(np.stack([column - base for column in columns], 1), seed)
    made = exponential_difference if kind == EXPONENTIAL else ratio_difference
    return [made(column, base, weights, float(p)) for column, p in zip(columns, p_values, strict=True)]


ENDS = ("", "_low", "_high", "_p", "_detectable", "_needed", "_verdict")
"""Endings of the columns of a difference."""


def interval_columns(name: str) -> list[tuple[str, pa.DataType]]:
    """The columns of a figure and its interval."""
    return [(f"{name}{end}", pa.float64()) for end in ("", "_low", "_high")]


def difference_columns(name: str) -> list[tuple[str, pa.DataType]]:
    """The columns of a difference, ENDS."""
    kinds = {"_verdict": pa.string(), "_needed": pa.int64()}
    return [(f"{name}{end}", kinds.get(end, pa.float64())) for end in ENDS]


def ends_of(name: str, interval: Interval | None) -> dict[str, float]:
    """The values of an interval's ends by column, none where there is none."""
    return {} if interval is None else {f"{name}_low": interval[0], f"{name}_high": interval[1]}


def judged(family: Mapping[str, Difference], units: Units, *, smaller_is_better: bool) -> dict[str, dict[str, Any]]:
    """A family of comparisons: for each name the values of ENDS, p corrected by Holm over those that are finite.

    Below FEWEST units there is the value alone.
    """
    if units.count < FEWEST:
        return {name: {"": difference.value} for name, difference in family.items()}
    finite = [name for name, difference in family.items() if math.isfinite(difference.p_value)]
    adjusted = dict(zip(finite, holm([family[name].p_value for name in finite]), strict=True))
    found: dict[str, dict[str, Any]] = {}
    for name, difference in family.items():
        found[name] = {"": difference.value, "_verdict": NOT_FINITE}
        if name in adjusted:
            low, high = difference.interval or (None, None)
            found[name] |= {
                "_low": low,
                "_high": high,
                "_p": adjusted[name],
                "_detectable": difference.detectable(units.count, len(finite)),
                "_needed": difference.needed(units, len(finite)),
                "_verdict": verdict(
                    difference.value, difference.interval, adjusted[name], smaller_is_better=smaller_is_better
                ),
            }
    return found
