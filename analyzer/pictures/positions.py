"""Picture of a site by position: quantiles of |x| against the tokens read, and where scales clip."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
from matplotlib.figure import Figure

from quambase.analyzer.pictures import frame
from quambase.analyzer.pictures.asked import Asked
from quambase.analyzer.pictures.numbers.marks import Mark
from quambase.analyzer.pictures.numbers.positions import Positions, positions_of_group
from quambase.analyzer.site.one_site import place
from quambase.schema.errors import DatabaseInvalid
from quambase.schema.pictures import logarithmic

LINES = {"amax": "largest", "q9999": "99.99 %", "q999": "99.9 %", "q99": "99 %", "q50": "median"}
"""The columns of `position_stats` that are drawn, and what they are called."""

UPSTREAM = "quamba"
"""Its clipping point is drawn, too, unless strategies are asked for."""


@dataclass(frozen=True)
class PositionsPicture:
    """The numbers of the picture: ``found`` of one scale group, and where its scales clip."""

    found: Positions
    model: str
    marks: list[Mark]
    notes: list[str]

    @classmethod
    def of(cls, asked: Asked) -> PositionsPicture:
        """Read it. DatabaseInvalid: the run does not divide its counts by position; errors of `Asked`."""
        with asked.open() as database:
            group, run = asked.chosen_group(database), database.runs[0]
            found = positions_of_group(database, run.run, group.layer, group.site, group.group_name)
            if found is None:
                raise DatabaseInvalid(f"run {run.run} has no counts by position; collect again with --by-position")
            marks = asked.marks(database, group)
            if not asked.strategies:
                marks = [mark for mark in marks if mark.selected or mark.label == UPSTREAM]
            return cls(found, run.model.name, marks, database.notes)

    def table(self) -> pa.Table:
        """A row for each bucket of positions."""
        return self.found.rows

    def words(self) -> list[str]:
        """How far the values reach at the first and at the last positions."""
        return [self.found.words()]

    @frame.styled
    def draw(self, columns: int) -> Figure:
        """A line for each quantile against the position; a horizontal one where each strategy clips."""
        found = self.found
        where = place(found.layer, found.site, found.group_name)
        figure, axes = frame.one_panel(columns, 2.6, f"{where} of {self.model}")
        ends = found.rows["tokens_to"].to_pylist()
        # In greys: the colours are the strategies'.
        for (column, name), marker, grey in zip(LINES.items(), "os^Dv", (0.0, 0.2, 0.35, 0.5, 0.65), strict=True):
            axes.plot(ends, found.rows[column].to_pylist(), marker=marker, color=str(grey), label=name)
        look = frame.looks(mark.label for mark in self.marks)
        for mark in self.marks:
            style = look[mark.label]
            axes.axhline(mark.clips_at, color=style.color, linestyle="--", linewidth=0.9, label=f"{mark.label} clips")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ends)
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
        axes.minorticks_off()
        axes.set_xlabel("tokens read, up to")
        axes.set_ylabel("|x|")
        if any(value > 0 for value in found.rows["amax"].to_pylist()):
            logarithmic(axes, "y")
        frame.legend_outside(figure, axes, columns)
        return figure
