"""What a picture is asked to show, and the numbers that several pictures read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from quambase.analyzer.pictures.numbers.marks import Mark, marks, marks_of_group
from quambase.analyzer.pictures.numbers.site_grid import OUTLIER_RATIO
from quambase.analyzer.scale_groups import ScaleGroup
from quambase.analyzer.site.one_site import chosen_group, chosen_site, one_run
from quambase.analyzer.strategies import parse_labels
from quambase.schema.errors import DatabaseInvalid, ScalesInvalid, UnknownName
from quambase.schema.progress import Shown
from quambase.schema.scale_table import SELECTED
from quambase.schema.sites import WHOLE
from quambase.schema.sql.database import StatsDB

SHOWN = ("absmax", "percentile", "quamba", "mse", "effect")
"""Strategies that are drawn at one site when none is named, besides the one selected there."""


class Summarized(Protocol):
    """An evaluation, such as `quambase.evaluate` returns."""

    @property
    def id(self) -> str:
        """Its id."""

    @property
    def about(self) -> dict[str, Any]:
        """What `quambase.schema.stored.results.read_evaluation` reads: the model and more."""

    def summary(self) -> pa.Table:
        """A row for each strategy and text, with intervals (`quambase.apply.evaluation.summary.SUMMARY`)."""

    def by_position(self) -> pa.Table:
        """Rows of `quambase.apply.evaluation.decode_summary.BY_POSITION`; none if nothing was decoded."""


@dataclass(frozen=True)
class Asked:
    """The arguments of `quambase.analyzer.pictures.plot.plot`; see there."""

    db: Path
    run: str | None = None
    site: str | None = None
    layer: int | None = None
    group: str = WHOLE
    strategies: Sequence[str] = ()
    scales: Path | None = None
    evaluation: Summarized | None = None
    quantity: str = OUTLIER_RATIO
    progress: Shown = False

    def open(self) -> StatsDB:
        """The database, of one run. UnknownName: several were chosen; the errors of `StatsDB`."""
        database = StatsDB(self.db, self.run, scales=self.scales)
        one_run(database, "plot")
        return database

    def chosen_site(self, database: StatsDB) -> tuple[int, str]:
        """(layer, site): the one asked for, else that with the largest outlier ratio."""
        return chosen_site(database, self.site, self.layer)

    def chosen_group(self, database: StatsDB) -> ScaleGroup:
        """The scale group asked for, of `chosen_site`."""
        return chosen_group(database, self.site, self.layer, self.group)

    def labels(self, every: Sequence[str], where: str) -> list[str]:
        """The strategies among ``every`` that are asked for, all where none is named. UnknownName: one is not there."""
        for label in self.strategies:
            if label not in every:
                raise UnknownName.of("strategy", label, every, where=where)
        return [label for label in every if not self.strategies or label in self.strategies]

    def scale_table(self, database: StatsDB, needed_for: str) -> pa.Table:
        """The rows of the scale table of the run. ScalesInvalid: there are none."""
        (manifest,) = database.runs
        table = database.query("scales_of_run", {"run": manifest.run}).table
        if not table.num_rows:
            why = "; ".join(database.scales_notes) or "there is no scale table"
            raise ScalesInvalid(f"{needed_for} needs the scales of run {manifest.run}: {why}; run `analyze`")
        return table

    def marks(self, database: StatsDB, group: ScaleGroup) -> list[Mark]:
        """The strategies at ``group``, the least MSE first: those asked for, else SHOWN and the one selected.

        As in the scale table where it has them, else computed. DatabaseInvalid: a strategy that was asked for cannot
        be computed here; UnknownName: there is none of that name.
        """
        (manifest,) = database.runs
        key = {"run": manifest.run, "layer": group.layer, "site": group.site, "group": group.group_name}
        stored = database.query("scales_of_group", key).to_pylist()
        selected = [row["label"] for row in stored if row["selected"]]
        asked = [label for label in self.strategies if label != SELECTED or not selected]
        if not self.strategies or SELECTED in self.strategies:
            asked += selected
        labels = {choice.label for choice in parse_labels(asked or SHOWN)} | (set() if self.strategies else set(SHOWN))
        known = {row["label"] for row in stored}
        choices = parse_labels([label for label in labels if label not in known]) if labels - known else []
        computed = marks_of_group(group, choices)
        missing = {choice.label for choice in choices} - {mark.label for mark in computed}
        if self.strategies and missing:
            raise DatabaseInvalid(
                f"run {manifest.run} lacks what {min(missing)} needs at this scale (sensitivities, or quantiles of its "
                "documents); collect with --sensitivity, or name other strategies"
            )
        mine = [*marks(row for row in stored if row["label"] in labels), *computed]
        return sorted(mine, key=lambda mark: (mark.mse, -mark.scale))
