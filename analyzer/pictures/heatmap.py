"""Picture of all sites: one number for each layer and site."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from quambase.analyzer.pictures import frame
from quambase.analyzer.pictures.asked import Asked
from quambase.analyzer.pictures.numbers.site_grid import (
    CLIPPED_SHARE,
    OUTLIER_RATIO,
    PREDICTED_KL,
    QUANTITIES,
    SQNR,
    SiteGrid,
    site_grid,
)
from quambase.schema.errors import DatabaseInvalid, UnknownName
from quambase.schema.pictures import logarithmic
from quambase.schema.scale_table import SELECTED
from quambase.schema.sites import HEAD_LAYER
from quambase.schema.values.arrays import Float64

NAMES = {
    OUTLIER_RATIO: "outlier ratio: largest |x| / 99.95 % quantile",
    CLIPPED_SHARE: "clipped share of the values",
    SQNR: "SQNR (dB)",
    PREDICTED_KL: "predicted KL (nats a token)",
}
"""The label of each quantity's colours."""

SMALL = (CLIPPED_SHARE, PREDICTED_KL)

MILLIONTHS = "\n(in the cells: millionths)"
"""The numbers in the cells of SMALL ones would be too long otherwise."""

CELL = 0.21
"""Inches that a cell needs for a number of three digits."""


@dataclass(frozen=True)
class HeatmapPicture:
    """The numbers of the picture."""

    model: str
    grid: SiteGrid
    quantity: str
    notes: list[str]

    @classmethod
    def of(cls, asked: Asked) -> HeatmapPicture:
        """Read it. UnknownName: no such quantity or strategy, or several strategies; DatabaseInvalid: no site has the
        quantity; errors of `Asked`.
        """
        if asked.quantity not in QUANTITIES:
            raise UnknownName.of("quantity", asked.quantity, QUANTITIES)
        if len(asked.strategies) > 1:
            raise UnknownName(f"{len(asked.strategies)} strategies were named; a heat map shows one")
        with asked.open() as database:
            run = database.runs[0].run
            label = asked.strategies[0] if asked.strategies else SELECTED
            if asked.quantity == OUTLIER_RATIO:
                grid = site_grid(database, run)
            else:
                grid = site_grid(database, run, asked.scale_table(database, f"a heat map of {asked.quantity}"), label)
            if np.isnan(grid.values(asked.quantity)).all():
                raise DatabaseInvalid(
                    f"no site of run {run} has a {asked.quantity}"
                    + ("; collect with --sensitivity and analyze again" if asked.quantity == PREDICTED_KL else "")
                )
            return cls(database.runs[0].model.name, grid, asked.quantity, database.notes)

    def table(self) -> pa.Table:
        """A row for each layer and site that has the quantity."""
        values = self.grid.values(self.quantity)
        rows = [
            {"layer": layer, "site": site, self.quantity: float(values[i, k])}
            for i, layer in enumerate(self.grid.layers)
            for k, site in enumerate(self.grid.sites)
            if not np.isnan(values[i, k])
        ]
        return pa.Table.from_pylist(rows)

    def words(self) -> list[str]:
        """The worst site, and the median."""
        values = self.grid.values(self.quantity)
        flat = np.nanargmin(values) if self.quantity == SQNR else np.nanargmax(values)
        layer, site = np.unravel_index(flat, values.shape)
        which = "least" if self.quantity == SQNR else "largest"
        where = f"layer {self.grid.layers[layer]} {self.grid.sites[site]}"
        of = "" if self.quantity == OUTLIER_RATIO else f" of {self.grid.label}"
        known = values[~np.isnan(values)]
        return [
            f"{which} {self.quantity}{of}: {values.flat[flat]:.3g} at {where}; the median of {known.size} sites is "
            f"{np.median(known):.3g}"
        ]

    @frame.styled
    def draw(self, columns: int) -> Figure:
        """Layers to the right, sites down; numbers in the cells where they fit."""
        of = "" if self.quantity == OUTLIER_RATIO else f", scales of {self.grid.label}"
        figure, axes = frame.one_panel(columns, 1.0 + 0.16 * len(self.grid.sites), f"{self.model}{of}")
        values = self.grid.values(self.quantity).T
        axes.grid(visible=False)
        image = axes.imshow(values, aspect="auto", norm=_norm(values, self.quantity))
        layers = ["head" if layer == HEAD_LAYER else str(layer) for layer in self.grid.layers]
        step = next(step for step in (1, 2, 4, 8, 16, 32) if len(layers) <= 9 * columns * step)
        ticks = [i for i, name in enumerate(layers) if name == "head" or int(name) % step == 0]
        axes.set_xticks(ticks, [layers[i] for i in ticks])
        axes.set_yticks(range(len(self.grid.sites)), [frame.drawable(site) for site in self.grid.sites])
        axes.set_xlabel("layer")
        bar = figure.colorbar(image, ax=axes, location="bottom", aspect=40 * columns, pad=0.01)
        numbers = (figure.get_figwidth() - 1.3) / len(layers) >= CELL
        bar.set_label(NAMES[self.quantity] + (MILLIONTHS if numbers and self.quantity in SMALL else ""))
        if isinstance(image.norm, LogNorm):
            logarithmic(bar.ax, "x")
        if numbers:
            _numbers(axes, image, values, self.quantity)
        return figure


def _norm(values: Float64, quantity: str) -> Normalize:
    known = values[np.isfinite(values)]
    if quantity == SQNR or not (known > 0).any():
        return Normalize(*((known.min(), known.max()) if known.size else (0, 1)))
    return LogNorm(known[known > 0].min(), max(known.max(), known[known > 0].min() * 1.01))


def _numbers(axes: Axes, image: AxesImage, values: Float64, quantity: str) -> None:
    """Each cell's number, dark on light or light on dark."""
    factor = 1e6 if quantity in SMALL else 1.0
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.to_rgba(np.array([value]))[0]
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(
                column,
                row,
                _digits(value * factor),
                ha="center",
                va="center",
                fontsize=6,
                color="white" if dark else "black",
            )


def _digits(value: float) -> str:
    """Two digits, three of a number from 100 on; thousands as 1k."""
    if value >= 999.5:
        return f"{value / 1000:.{1 if value < 9950 else 0}f}k"
    return f"{value:.1f}" if 0.995 <= value < 9.95 else f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"
