"""Figures of the same documents in two results, A and B, and their paired differences B - A. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from quambase.apply.evaluation.comparisons import (
    EXPONENTIAL,
    SHARE,
    Difference,
    Units,
    difference_columns,
    differences,
    exponential,
    judged,
)
from quambase.apply.evaluation.paired_statistics import linearised
from quambase.schema.values.arrays import Float64

DIFF = pa.schema(
    [
        ("data", pa.string()),
        ("task", pa.string()),
        ("strategy_a", pa.string()),
        ("strategy_b", pa.string()),
        ("filter", pa.string()),
        ("metric", pa.string()),
        ("kind", pa.string()),
        ("documents", pa.int64()),
        ("clusters", pa.int64()),
        ("a", pa.float64()),
        ("b", pa.float64()),
        *difference_columns("difference"),
        ("higher", pa.int64()),
        ("lower", pa.int64()),
        ("flips", pa.float64()),
        ("larger_is_better", pa.bool_()),
    ]
)
"""strategy_*  labels of stored evaluations, filter the filter of a log; null where there is none
kind        of `quambase.apply.evaluation.comparisons`: SHARE (p is McNemar's), RATIO or EXPONENTIAL (p by sign flips)
clusters    as in `quambase.apply.evaluation.summary.SUMMARY`
difference  b - a; its columns are those of a difference in SUMMARY, p Holm-corrected over the filters or strategies of
            one metric on one text
higher      documents where B's value is the higher one; lower likewise
flips       share of documents whose answer is right in one only (of other kinds: null)
larger_is_better  null where it is not known: the verdict is then higher or lower"""


@dataclass(frozen=True)
class Figure:
    """What is compared: a figure of the same documents in A and in B.

    first, second  (documents,) values of A and of B; weights (documents,)
    clusters       of each document, None where it is not known
    """

    metric: str
    kind: str
    first: Float64
    second: Float64
    weights: Float64
    clusters: Sequence[str | None]
    larger_is_better: bool | None
    data: str
    task: str | None = None
    strategies: tuple[str, str] | None = None
    filter: str | None = None


@dataclass(frozen=True)
class Compared:
    """Two results compared: ``table`` has the columns of DIFF, the most important row first."""

    a: str
    b: str
    table: pa.Table
    notes: list[str] = field(default_factory=list)


def compare(figures: Sequence[Figure], seed: int) -> pa.Table:
    """The rows of DIFF."""
    rows = [_row(figure) for figure in figures]
    families: dict[tuple[str | int | None, ...], list[int]] = {}
    for place, figure in enumerate(figures):
        # What is equal in every document cannot be significant, whatever the signs: it needs no share of the 5 %
        # (Tarone 1990).
        alone = () if rows[place]["higher"] or rows[place]["lower"] else (place,)
        families.setdefault((figure.data, figure.task, figure.metric, *alone), []).append(place)
    for places in families.values():
        units = Units.of(figures[places[0]].clusters)
        smaller = figures[places[0]].larger_is_better is False
        family = {str(place): _difference(figures[place], units, seed) for place in places}
        for name, columns in judged(family, units, smaller_is_better=smaller).items():
            row = rows[int(name)]
            row |= {f"difference{end}": value for end, value in columns.items()}
            if row["larger_is_better"] is None and row.get("difference_verdict") in ("better", "worse"):
                row["difference_verdict"] = "higher" if row["difference"] > 0 else "lower"
    return pa.Table.from_pylist(rows, DIFF)


def _difference(figure: Figure, units: Units, seed: int) -> Difference:
    """B - A over the units."""
    first, second, weights = (units.summed(column) for column in (figure.first, figure.second, figure.weights))
    return differences(figure.kind, [second], first, weights, units, seed)[0]


def _row(figure: Figure) -> dict[str, Any]:
    """A row of DIFF without its difference."""
    compute = exponential if figure.kind == EXPONENTIAL else linearised
    units = Units.of(figure.clusters)
    higher, lower = int((figure.second > figure.first).sum()), int((figure.second < figure.first).sum())
    labels = figure.strategies or (None, None)
    return {
        "data": figure.data,
        "task": figure.task,
        "strategy_a": labels[0],
        "strategy_b": labels[1],
        "filter": figure.filter,
        "metric": figure.metric,
        "kind": figure.kind,
        "documents": units.documents,
        "clusters": units.clusters,
        "a": compute(figure.first, figure.weights)[0],
        "b": compute(figure.second, figure.weights)[0],
        "higher": higher,
        "lower": lower,
        "flips": (higher + lower) / units.documents if figure.kind == SHARE else None,
        "larger_is_better": figure.larger_is_better,
    }


def because(notes: Sequence[str]) -> str:
    """The end of an error: what was left out."""
    return f" ({'; '.join(notes[:3])})" if notes else ""
