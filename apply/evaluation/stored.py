"""Finished evaluations of a database, found again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from quambase.apply.evaluation.decode_summary import by_position
from quambase.apply.evaluation.summary import summarize
from quambase.schema.errors import DatabaseInvalid, UnknownName
from quambase.schema.sql.answer import PrintsAsTable
from quambase.schema.stored.results import (
    EVALUATION,
    KL_DIFFERENCE,
    finished_evaluations,
    read_evaluation,
    read_results,
)


@dataclass(frozen=True, repr=False)
class Evaluation(PrintsAsTable):
    """A finished evaluation: ``results`` has the columns of `quambase.schema.tables.RESULTS`."""

    id: str
    folder: Path
    results: pa.Table
    about: dict[str, Any]
    notes: list[str]

    def summary(self) -> pa.Table:
        """A row for each strategy and text, with intervals (`quambase.apply.evaluation.summary.SUMMARY`)."""
        return summarize(self.results)

    def by_position(self) -> pa.Table:
        """KL by how many tokens were decoded (`quambase.apply.evaluation.decode_summary.BY_POSITION`); no rows if none
        were.
        """
        return by_position(self.results)

    def shown(self) -> pa.Table:
        """Each strategy on each text in one row, with its KL, flips and perplexity, and the verdict on its KL."""
        columns = ["data", "task", "strategy", "documents", "kl", "kl_low", "kl_high", KL_DIFFERENCE]
        columns += [f"{KL_DIFFERENCE}_verdict", "flips", "perplexity", "perplexity_low", "perplexity_high"]
        return self.summary().select(columns)


def find_evaluation(db: str | Path, evaluation: str | None = None) -> Evaluation:
    """A stored evaluation by (the beginning of) its id, else the newest. UnknownName, DatabaseInvalid."""
    db = Path(db)
    if evaluation is None:
        found, notes = _finished(db)
        about = found[-1]
    else:
        names = [path.parent.name for path in (db / "results").glob(f"*/{EVALUATION}")]
        matching = [name for name in names if name.startswith(evaluation)]
        if len(matching) != 1:
            raise UnknownName.of("evaluation", evaluation, names, where=str(db))
        about, notes = read_evaluation(db / "results" / matching[0]), []
    folder = db / "results" / str(about["evaluation"])
    return Evaluation(folder.name, folder, read_results(folder), about, [*about["notes"], *notes])


def _finished(db: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """`finished_evaluations`; DatabaseInvalid if there is none."""
    found, notes = finished_evaluations(db)
    if not found:
        raise DatabaseInvalid(notes[0] if notes else f"{db} holds no finished evaluation; run `evaluate`")
    return found, notes


def list_evaluations(db: str | Path) -> tuple[pa.Table, list[str]]:
    """One row per finished evaluation, oldest first: evaluation, model, strategies, texts, scales. Then a line for each
    that is damaged. DatabaseInvalid if there is none.
    """
    found, notes = _finished(Path(db))
    rows = [
        {
            "evaluation": about["evaluation"],
            "model": about["model"],
            "strategies": ", ".join(map(str, about["strategies"])),
            "texts": ", ".join(f"{t['data']} ({t['task']}, {t['documents']} documents)" for t in about["tasks"]),
            "scales": about["scales"],
        }
        for about in found
    ]
    return pa.Table.from_pylist(rows), notes
