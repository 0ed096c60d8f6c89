"""What the page opens on: the answer in words, or what is missing to give one, and the next command."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from quambase.analyzer.summary import selection
from quambase.apply.evaluation.decode_summary import base_of
from quambase.apply.evaluation.summary_text import Ranking
from quambase.report.contents import Contents
from quambase.schema.commands import of_database
from quambase.schema.scale_table import EFFECT, QUAMBASE
from quambase.schema.sites import FAMILIES


@dataclass(frozen=True)
class Answer:
    """The answer.

    measured   what each evaluated text says, a sentence or two each; empty without an evaluation
    predicted  what the scale table says; empty without one
    missing    what is missing for an answer, in words; None where nothing is
    command    what to do next
    """

    measured: list[str]
    predicted: list[str]
    missing: str | None
    command: str


def answer(contents: Contents, ranked: list[Ranking]) -> Answer:
    """The answer of a page's contents; ``ranked``: the texts of its evaluation."""
    measured = [f"{text.data}, {text.task}: {line}" for text in ranked for line in text.sentences]
    scales = contents.scales
    if scales is None:
        run = contents.manifest.run
        return Answer(
            measured,
            [],
            f"There is no scale table of this run: what each strategy does at each site is not known yet, only how "
            f"far the activations of {contents.manifest.model.name} reach.",
            f"quambase analyze --run {run}{of_database(contents.db)}",
        )
    predicted = selection(
        contents.rows,
        str(scales.provenance.get("target", QUAMBASE)),
        by_effect=scales.provenance.get("select", EFFECT) == EFFECT,
    )
    table = f" --scales {shlex.quote(str(contents.path))}"
    if contents.manifest.model.family not in FAMILIES:
        missing = "This is an imported tensor: there is no model to evaluate, only the error of its codes."
        return Answer(
            [], predicted, missing, f"quambase compare --run {contents.manifest.run}{of_database(contents.db)}"
        )
    if not measured:
        missing = "No INT8 model of this run was evaluated: what follows is predicted, not measured."
        return Answer([], predicted, missing, f"quambase evaluate{table} --strategy all{of_database(contents.db)}")
    best = best_strategy(ranked)
    chosen = f" --strategy {shlex.quote(best)}" if best else ""
    return Answer(measured, predicted, None, f"quambase apply{table}{chosen}{of_database(contents.db)}")


def best_strategy(ranked: list[Ranking]) -> str | None:
    """The strategy that is starred on the first text, as the scale table has it; None where none is."""
    rows = ranked[0].table.to_pylist()
    return next((base_of(row["strategy"]) for row in rows if row[""] == "*"), None)
