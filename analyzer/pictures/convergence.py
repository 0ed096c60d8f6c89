"""Picture of convergence: scales from parts of the documents against scales from all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from quambase.analyzer.converge import Convergence, converge
from quambase.analyzer.convergence import CHANGE, MSE_RATIO, TOLERANCE
from quambase.analyzer.pictures.asked import Asked
from quambase.analyzer.pictures.frame import Look, legend_outside, looks, styled, title
from quambase.schema.pictures import logarithmic, new_figure


@dataclass(frozen=True)
class ConvergencePicture:
    """What `quambase converge` measures; see there."""

    found: Convergence

    @classmethod
    def of(cls, asked: Asked) -> ConvergencePicture:
        """Measure it. Errors of `converge`."""
        return cls(
            converge(asked.db, asked.run, asked.site, asked.layer, asked.strategies or None, progress=asked.progress)
        )

    @property
    def notes(self) -> list[str]:
        """What a user should know."""
        return self.found.notes

    def table(self) -> pa.Table:
        """A row for each strategy and number of documents."""
        return self.found.sizes

    def words(self) -> list[str]:
        """Whether the documents are enough."""
        return self.found.summary[-1:]

    def draw(self, columns: int) -> Figure:
        """See `convergence_figure`."""
        return convergence_figure(self.found.title, self.found.sizes, columns)


@styled
def convergence_figure(heading: str, sizes: pa.Table, columns: int = 2) -> Figure:
    """Two panels against the number of documents, of rows of `quambase.analyzer.convergence.SIZES`: how far each
    strategy's scales are from those of all documents, and how much more error they make.
    """
    rows = sizes.to_pylist()
    labels = list(dict.fromkeys(row["strategy"] for row in rows))
    legend_lines = 0.0 if columns == 2 else 0.13 * ((len(labels) + 1) // 2)
    figure = new_figure(columns, 2.6 if columns == 2 else 3.9 + legend_lines)
    shape = (1, 2) if columns == 2 else (2, 1)
    moved, lost = figure.subplots(*shape, sharex=True)
    title(figure, heading)
    look = looks(labels)
    positive = [row[f"{CHANGE}_high"] for row in rows if row[f"{CHANGE}_high"] > 0]
    # A median may be 0, of a maximum that every half has: a log axis has no place for it but its lower edge.
    floor = min([*positive, TOLERANCE]) / 10
    for label in labels:
        mine = [row for row in rows if row["strategy"] == label]
        _draw_band(moved, mine, CHANGE, look[label], label, floor)
        _draw_band(lost, mine, MSE_RATIO, look[label], label)
    moved.axhline(TOLERANCE, color="black", linewidth=0.8, linestyle=":")
    moved.set(ylim=(floor, 2 * max([*positive, TOLERANCE])))
    logarithmic(moved, "y")
    moved.set_title(f"movement of the scales (dotted: {100 * TOLERANCE:g} %)", loc="left")
    moved.set_ylabel("|scale / scale from all - 1|")
    lost.set_title("error on all documents", loc="left")
    lost.set_ylabel("MSE / MSE from all")
    for axes in (moved, lost):
        axes.set_xscale("log")
        axes.set_xticks(_apart({row["documents"] for row in rows}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        if axes is lost or columns == 2:
            axes.set_xlabel("documents")
    legend_outside(figure, moved, columns)
    return figure


def _apart(numbers: set[int]) -> list[int]:
    """The ``numbers`` whose labels do not overlap, descending from the largest."""
    kept: list[int] = []
    for number in sorted(numbers, reverse=True):
        if not kept or kept[-1] >= 1.3 * number:
            kept.append(number)
    return kept


def _draw_band(
    axes: Axes, rows: list[dict[str, Any]], name: str, look: Look, label: str, floor: float = -np.inf
) -> None:
    """The median of a quantity and its band; what is below ``floor`` is drawn there."""
    middle, low, high = (np.maximum([row[f"{name}{end}"] for row in rows], floor) for end in ("", "_low", "_high"))
    documents = [row["documents"] for row in rows]
    axes.plot(documents, middle, marker=look.marker, label=label, color=look.color, linestyle=look.linestyle)
    axes.fill_between(documents, low, high, color=look.color, alpha=0.1, linewidth=0)
