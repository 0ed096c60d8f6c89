"""Picture of a site's channels by how far they reach."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quambase.analyzer.pictures import frame
from quambase.analyzer.pictures.asked import Asked
from quambase.analyzer.pictures.numbers.channels import OUTLIER, Channel, channels_by_reach
from quambase.analyzer.site.one_site import place
from quambase.schema.errors import UnknownName
from quambase.schema.pictures import WIDTHS, logarithmic
from quambase.schema.sites import WHOLE

NAMED = 12
"""Largest number of channels that are labelled with their number."""


@dataclass(frozen=True)
class ChannelsPicture:
    """The numbers of the picture; ``place``: the site, or a group of it, in words."""

    place: str
    model: str
    channels: list[Channel]
    notes: list[str]

    @classmethod
    def of(cls, asked: Asked) -> ChannelsPicture:
        """Read it. UnknownName: the site has no such group; errors of `Asked`."""
        with asked.open() as database:
            layer, site = asked.chosen_site(database)
            run = database.runs[0]
            every = channels_by_reach(database, run.run, layer, site)
            found = [c for c in every if asked.group in (WHOLE, c.group_name)]
            if not found:
                groups = {WHOLE, *(c.group_name for c in every)}
                raise UnknownName.of(f"group of {site}", asked.group, groups, where=f"run {run.run}")
            return cls(place(layer, site, asked.group), run.model.name, found, database.notes)

    def table(self) -> pa.Table:
        """A row for each channel, the farthest first."""
        return pa.Table.from_pylist([dataclasses.asdict(c) | {"outlier": c.outlier} for c in self.channels])

    def words(self) -> list[str]:
        """How many channels are outliers, and which is the farthest."""
        first, outliers = self.channels[0], sum(c.outlier for c in self.channels)
        ratio = "" if first.ratio is None else f", {first.ratio:.3g} times the median channel"
        return [
            f"{self.place}: {outliers} of {len(self.channels)} channels reach {OUTLIER:g} times the median or more; "
            f"the farthest is channel {first.channel}, |x| up to {first.amax:.3g}{ratio}"
        ]

    @frame.styled
    def draw(self, columns: int) -> Figure:
        """The largest |x| against the rank, both logarithmic, groups in their own colours."""
        figure, axes = frame.one_panel(columns, 2.4, f"{self.place} of {self.model}")
        amax = np.array([c.amax for c in self.channels])
        rank = np.arange(1, amax.size + 1)
        groups = sorted({c.group_name for c in self.channels})
        for group, marker in zip(groups, "os^Dv" * len(groups), strict=False):
            mine = np.array([c.group_name == group for c in self.channels]) & (amax > 0)
            axes.plot(rank[mine], amax[mine], marker, markersize=2, label=group, linestyle="none")
        axes.set(xlabel="rank of the channel (numbers: its index)", ylabel="largest |x|")
        axes.set_xscale("log")
        axes.set_xlim(0.8, max(2, amax.size * 1.2))
        if (amax > 0).any():
            axes.set_yscale("log")
            self._thresholds(axes)
            axes.margins(y=0.15)
            logarithmic(axes, "x", "y")
        for place_, channel in self._named(columns):
            beside: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 6, "zorder": 1.5}
            white = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
            axes.annotate(str(channel.channel), (place_, channel.amax), (0, 4), bbox=white, **beside)
        if 1 < len(groups) <= 8:
            frame.legend_outside(figure, axes, columns, title="group")
        return figure

    def _named(self, columns: int) -> list[tuple[int, Channel]]:
        """Ranks and channels whose label does not overlap the one before, from the farthest channel on."""
        inches = (WIDTHS[columns] - 0.5) / math.log10(max(2, len(self.channels)) * 1.5)  # of a decade
        found: list[tuple[int, Channel]] = []
        for rank, channel in enumerate(self.channels[:NAMED], 1):
            needed = 0.02 + 0.055 * len(str(channel.channel))  # a digit of 6 points is 0.053 inches wide
            if not found or inches * math.log10(rank / found[-1][0]) >= needed:
                found.append((rank, channel))
        return found

    def _thresholds(self, axes: Axes) -> None:
        """Lines at the median of the whole site's channels, and at what makes one an outlier."""
        ratio = self.channels[0].ratio
        for factor, name in ((1.0, "median"), (OUTLIER, f"{OUTLIER:g} times the median: outlier")):
            if ratio:
                height = factor * self.channels[0].amax / ratio
                axes.axhline(height, color="0.4", linewidth=0.7, linestyle="--", zorder=1)
                where = (1.0, height), (-2, 2)
                axes.annotate(
                    name, *where, xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=6
                )
