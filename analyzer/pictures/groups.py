"""Picture of a Mamba-2's scale groups before and after sorting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quambase.analyzer.pictures.asked import Asked
from quambase.analyzer.pictures.frame import styled, title
from quambase.analyzer.site.channel_division import Division
from quambase.analyzer.site.group_spread import SITE, GroupSpread, group_spread
from quambase.analyzer.site.one_site import place
from quambase.schema.pictures import logarithmic, new_figure


@dataclass(frozen=True)
class GroupsPicture:
    """What sorting did to the groups of one layer of a Mamba-2."""

    found: GroupSpread

    @classmethod
    def of(cls, asked: Asked) -> GroupsPicture:
        """Measure it. Errors of `group_spread`."""
        return cls(group_spread(asked.db, asked.run, asked.layer))

    @property
    def notes(self) -> list[str]:
        """What a user should know."""
        return self.found.notes

    def table(self) -> pa.Table:
        """A row for each channel of the layer: in either order, its largest |x| and its group's."""
        rows = []
        for order, division in zip(("model", "sorted"), self.found.division, strict=True):
            group = np.repeat(np.arange(len(division.sizes)), division.sizes)
            for channel, (amax, number) in enumerate(zip(division.amax.tolist(), group.tolist(), strict=True)):
                reach = float(division.reach[number])
                rows.append({"order": order, "place": channel, "amax": amax, "group": number, "group_amax": reach})
        return pa.Table.from_pylist(rows)

    def words(self) -> list[str]:
        """What sorting did in this layer."""
        before, after = self.found.division
        return [
            f"layer {self.found.layer}: sorting makes the mean step {after.mean_step:.3g} of one scale's, before "
            f"{before.mean_step:.3g}; the farthest group reaches {after.spread:.3g} times as far as the nearest"
        ]

    def draw(self, columns: int) -> Figure:
        """See `groups_figure`."""
        run = self.found.run
        return groups_figure(f"{place(self.found.layer, SITE)} of run {run}", *self.found.division, columns)


@styled
def groups_figure(heading: str, before: Division, after: Division, columns: int = 2) -> Figure:
    """Two panels, the model's own order and the sorted one: each channel's largest absolute value and its group's."""
    figure = new_figure(columns, 2.5 if columns == 2 else 3.9)
    title(figure, heading)
    shape = (1, 2) if columns == 2 else (2, 1)
    panels = figure.subplots(*shape, sharey=True, sharex=True)
    for axes, name, division in zip(panels, ("the model's order", "sorted"), (before, after), strict=True):
        _draw_division(axes, name, division)
        if axes is panels[-1] or columns == 2:
            axes.set_xlabel("channels of x, group by group")
        if axes is panels[0] or columns == 1:
            axes.set_ylabel("largest |x|")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3 if columns == 2 else 1)
    return figure


def _draw_division(axes: Axes, name: str, division: Division) -> None:
    axes.plot(division.amax, ".", markersize=1.5, color="0.55", label="channel")
    edges = np.cumsum([0, *division.sizes]) - 0.5
    axes.stairs(
        division.reach, edges, baseline=None, color="#D55E00", linewidth=1.1, label="its group: 127 steps of its scale"
    )
    axes.axhline(division.amax.max(), color="#0072B2", linewidth=0.8, linestyle="--", label="one scale for all")
    axes.set_title(f"{name}: mean step {division.mean_step:.3f}, spread {division.spread:.3g}", loc="left")
    if division.amax.max() > 0:
        logarithmic(axes, "y")
