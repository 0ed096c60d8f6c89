"""The strategies at one scale group: where each clips, and what it loses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quambase.analyzer.analyze import group_rows
from quambase.analyzer.scale_groups import ScaleGroup
from quambase.analyzer.strategies import Choice
from quambase.schema.values.number_format import INT8, OUTLIER_CODE


@dataclass(frozen=True)
class Mark:
    """One strategy at one scale group; the columns of `quambase.schema.tables.SCALES` that a picture shows.

    scale         of two segments the inner one's
    clips_at      the largest value with a code of its own; larger ones get its code: (127 - zero_point) * scale
    predicted_kl  nats a token; None where the run has no sensitivities
    selected      the row that `apply` takes by default
    """

    label: str
    scale: float
    zero_point: int
    clips_at: float
    clipped_share: float
    mse: float
    sqnr_db: float
    predicted_kl: float | None
    needs_decode: bool
    selected: bool


def marks(rows: Iterable[Mapping[str, Any]]) -> list[Mark]:
    """The strategies of ``rows`` (`quambase.schema.tables.SCALES`) of one scale group, the least MSE first."""
    names = Mark.__dataclass_fields__.keys() - {"zero_point", "clips_at"}
    found = [
        Mark(zero_point=row["zero_point"] or 0, clips_at=_clips_at(row), **{name: row[name] for name in names})
        for row in rows
    ]
    return sorted(found, key=lambda mark: (mark.mse, -mark.scale))


def marks_of_group(group: ScaleGroup, choices: list[Choice]) -> list[Mark]:
    """The same of ``choices``, computed here; those that need sensitivities only where ``group`` has them."""
    return marks(group_rows("", group, choices, sensitive=group.sensitivity is not None))


def _clips_at(row: Mapping[str, Any]) -> float:
    if row["needs_decode"]:
        inner, outer = row["component_scales"]
        return float(OUTLIER_CODE * inner + (INT8.qmax - OUTLIER_CODE) * outer)
    return float((INT8.qmax - (row["zero_point"] or 0)) * row["scale"])
