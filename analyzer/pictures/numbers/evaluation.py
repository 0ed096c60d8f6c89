"""The strategies of an evaluation, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from quambase.schema.stored.results import FLOAT, KL_DIFFERENCE


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; an end is None where there is no interval."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Evaluated:
    """One strategy on one text; a number is None where the evaluation has none.

    kl          KL from the floating-point model, nats a token
    flips, accuracy   shares of one
    kl_difference     in KL from upstream's scales, nats a token; ``verdict``: better, worse, ... of it
    """

    strategy: str
    kl: Estimate | None
    perplexity: Estimate | None
    flips: Estimate | None
    accuracy: Estimate | None
    kl_difference: Estimate | None
    verdict: str | None


@dataclass(frozen=True)
class EvaluatedText:
    """One text: the least KL first, the floating-point model before all; where there is no KL, the most accurate."""

    task: str
    data: str
    documents: int
    clusters: int
    tokens: int | None
    strategies: list[Evaluated]


def evaluated_texts(summary: pa.Table) -> list[EvaluatedText]:
    """The texts of an evaluation, in its order. ``summary``: the table that `quambase results --format parquet` and
    `quambase.apply.evaluation.summary.summarize` make.
    """
    by_text: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in summary.to_pylist():
        by_text.setdefault((row["task"], row["data"]), []).append(row)
    return [
        EvaluatedText(
            task=task,
            data=data,
            documents=rows[0]["documents"],
            clusters=rows[0]["clusters"],
            tokens=rows[0]["tokens"],
            strategies=sorted(map(_evaluated, rows), key=_order),
        )
        for (task, data), rows in by_text.items()
    ]


def _evaluated(row: dict[str, Any]) -> Evaluated:
    return Evaluated(
        strategy=row["strategy"],
        **{name: _estimate(row, name) for name in ("kl", "perplexity", "flips", "accuracy")},
        kl_difference=_estimate(row, KL_DIFFERENCE),
        verdict=row[f"{KL_DIFFERENCE}_verdict"],
    )


def _estimate(row: dict[str, Any], name: str) -> Estimate | None:
    return None if row[name] is None else Estimate(row[name], row[f"{name}_low"], row[f"{name}_high"])


def _order(row: Evaluated) -> tuple[bool, float, float]:
    kl = math.inf if row.kl is None or math.isnan(row.kl.value) else row.kl.value
    return row.strategy != FLOAT, kl, 0.0 if row.accuracy is None else -row.accuracy.value
