"""Picture of one distribution: |x| on logarithmic axes, and where each strategy clips."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyarrow as pa
from matplotlib.figure import Figure

from quambase.analyzer.pictures import frame
from quambase.analyzer.pictures.asked import Asked
from quambase.analyzer.pictures.numbers.histogram import Histogram, histogram
from quambase.analyzer.pictures.numbers.marks import Mark
from quambase.analyzer.site.one_site import place
from quambase.schema.pictures import logarithmic


@dataclass(frozen=True)
class DistributionPicture:
    """The numbers of the picture.

    place      the scale group in words
    model      of the run
    amax       largest |x|
    q999       99.9 % of the values are within
    """

    place: str
    model: str
    amax: float
    q999: float
    histogram: Histogram
    marks: list[Mark]
    notes: list[str]

    @classmethod
    def of(cls, asked: Asked) -> DistributionPicture:
        """Read it. Errors of `Asked`."""
        with asked.open() as database:
            group = asked.chosen_group(database)
            return cls(
                place(group.layer, group.site, group.group_name),
                database.runs[0].model.name,
                group.distribution.amax,
                group.distribution.quantile(0.999),
                histogram(group.distribution),
                asked.marks(database, group),
                database.notes,
            )

    def table(self) -> pa.Table:
        """A row for each bin of |x|: its ends and how many values it has; the first is 0 alone."""
        edges, counts = self.histogram.edges.tolist(), self.histogram.counts.tolist()
        rows = [{"low": 0.0, "high": 0.0, "count": self.histogram.zeros}]
        rows += [{"low": a, "high": b, "count": n} for a, b, n in zip(edges, edges[1:], counts, strict=False)]
        return pa.Table.from_pylist(rows)

    def words(self) -> list[str]:
        """How far the values reach, and where they are clipped."""
        text = f"{self.place}: largest |x| {self.amax:.3g}, 99.9 % of values within {self.q999:.3g}"
        best = next((mark for mark in self.marks if mark.selected), self.marks[0] if self.marks else None)
        if best is None:
            return [text]
        return [f"{text}; {best.label} clips at {best.clips_at:.3g} ({_share(best.clipped_share)} of the values)"]

    @frame.styled
    def draw(self, columns: int) -> Figure:
        """The histogram, a line at each strategy's clipping point."""
        height = 1.9 + 0.3 * columns + frame.STEP * (len(self.marks) + 1) / 72
        figure, axes = frame.one_panel(columns, height, f"{self.place} of {self.model}")
        edges, shares = self.histogram.edges, self.histogram.shares
        axes.set(xlabel="|x|", ylabel=f"share of values per 1/{self.histogram.bins_per_octave} octave")
        if not shares.size:
            axes.text(0.5, 0.5, "all values are 0", ha="center", transform=axes.transAxes)
            return figure
        axes.stairs(shares, edges, fill=True, color="#56B4E9", alpha=0.5, baseline=shares[shares > 0].min() / 3)
        reach = max(self.amax, *(mark.clips_at for mark in self.marks), 0)
        axes.set(xscale="log", yscale="log", ylim=(shares[shares > 0].min() / 2, shares.max() * 2))
        axes.set_xlim(max(edges[0], self.amax / DECADES), reach * 1.3)
        logarithmic(axes, "x", "y")
        look = frame.looks(mark.label for mark in self.marks)
        marks = [
            frame.Mark(m.clips_at, m.label, f"{m.clips_at:.3g}: clips {_share(m.clipped_share)}", look[m.label])
            for m in self.marks
        ]
        frame.staircase(axes, marks)
        return figure


DECADES = 1e5
"""How far below the largest |x| the picture goes; further down every code is zero."""


def _share(share: float) -> str:
    """A share of one: 12 %, and under 0.1 % in ppm."""
    if math.isnan(share):
        return "no values"
    return f"{1e6 * share:.3g} ppm" if 0 < share < 0.001 else f"{100 * share:.3g} %"
