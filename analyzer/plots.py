"""Pictures of a comparison and of groups, drawn without a screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from quambase.analyzer.channel_division import Division
from quambase.analyzer.convergence import CHANGE, MSE_RATIO, TOLERANCE
from quambase.schema.distribution import Distribution
from quambase.schema.pictures import save_picture

Reconstructions = Mapping[str, Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]]]
"""Label of a strategy to the function that quantizes and dequantizes values; least error first."""

SHOWN = 6
"""How many strategies are drawn: those of least error, and absmax."""

BINS_PER_OCTAVE = 4

OCTAVES = 14
"""How far below the largest magnitude the error is shown; further down every code is zero."""


def comparison_picture(path: Path, title: str, distribution: Distribution, reconstructions: Reconstructions) -> None:
    """Save two panels: reconstruction against original, and the root mean squared error by magnitude; see
    `save_picture`.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    labels = list(reconstructions)
    shown = {name: reconstructions[name] for name in labels if name in labels[:SHOWN] or name == "absmax"}
    _draw_reconstruction(left, distribution, shown)
    _draw_error(right, distribution, shown)
    save_picture(figure, path)


def groups_picture(path: Path, title: str, before: Division, after: Division) -> None:
    """Save two panels, the model's own order and the sorted one: each channel's largest absolute value and its
    group's; see `save_picture`.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    figure.suptitle(title)
    panels = zip(
        figure.subplots(1, 2, sharey=True), ("in the model's own order", "sorted"), (before, after), strict=True
    )
    for axes, name, division in panels:
        _draw_division(axes, name, division)
    save_picture(figure, path)


def convergence_picture(path: Path, title: str, sizes: pa.Table) -> None:
    """Save two panels against the number of documents, of rows of `quambase.analyzer.convergence.SIZES`: how far each
    strategy's scales are from those of all documents, and how much more error they make; see `save_picture`.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    figure.suptitle(title)
    rows = sizes.to_pylist()
    for number, label in enumerate(dict.fromkeys(row["strategy"] for row in rows)):
        mine = [row for row in rows if row["strategy"] == label]
        # Ten colours are told apart; further strategies have another line.
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--", "label": label}
        _draw_band(left, mine, CHANGE, style)
        _draw_band(right, mine, MSE_RATIO, style)
    left.axhline(TOLERANCE, color="black", linewidth=0.8, linestyle=":")
    # A median may be 0, of a maximum that every half has: the line then leaves the picture at the bottom.
    positive = [row[f"{CHANGE}_high"] for row in rows if row[f"{CHANGE}_high"] > 0]
    left.set(ylim=(min([*positive, TOLERANCE]) / 10, 2 * max([*positive, TOLERANCE])), yscale="log")
    left.set(ylabel="|scale / scale from all - 1|", title=f"movement of the scales (dotted: {100 * TOLERANCE:g} %)")
    right.set(ylabel="MSE / MSE of the scale from all", title="error on all documents")
    for axes in (left, right):
        axes.set(xlabel="documents", xscale="log")
        axes.set_xticks(sorted({row["documents"] for row in rows}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3, which="both")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save_picture(figure, path)


def _draw_band(axes: Axes, rows: list[dict[str, Any]], name: str, style: dict[str, str]) -> None:
    """The median of a quantity and its band."""
    middle, low, high = ([row[f"{name}{end}"] for row in rows] for end in ("", "_low", "_high"))
    documents = [row["documents"] for row in rows]
    axes.plot(documents, middle, marker=".", linewidth=1.2, **style)  # type: ignore[arg-type]
    axes.fill_between(documents, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _draw_division(axes: Axes, name: str, division: Division) -> None:
    axes.plot(division.amax, ".", markersize=3, color="tab:gray", label="channel")
    edges = np.cumsum([0, *division.sizes]) - 0.5
    axes.stairs(division.reach, edges, color="tab:red", linewidth=1.5, label="its group: 127 steps of its scale")
    axes.axhline(division.amax.max(), color="tab:blue", linewidth=0.8, linestyle="--", label="one scale for all")
    axes.set(
        xlabel="channels of x, group by group",
        ylabel="largest absolute value",
        yscale="log",
        title=f"{name}: mean step {division.mean_step:.3f} of one scale's, spread {division.spread:.3g}",
    )
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)


def _draw_reconstruction(axes: Axes, distribution: Distribution, shown: Reconstructions) -> None:
    low, high = (float(distribution.values[i]) for i in (0, -1)) if distribution.values.size else (-1.0, 1.0)
    original = np.linspace(low, high, 4001).astype(np.float32)
    for label, reconstruct in shown.items():
        axes.plot(original, reconstruct(original), label=label, linewidth=1)
    axes.plot([low, high], [low, high], color="black", linewidth=0.5, linestyle=":")
    axes.set(xlabel="original", ylabel="reconstruction", title="original against reconstruction")
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_error(axes: Axes, distribution: Distribution, shown: Reconstructions) -> None:
    values, counts = distribution.values, distribution.counts
    nonzero = values != 0
    magnitude = np.abs(values[nonzero].astype(np.float64))
    if magnitude.size:
        octave = np.floor(np.log2(magnitude) * BINS_PER_OCTAVE).astype(np.int64)
        bins, place = np.unique(octave, return_inverse=True)
        weight = np.bincount(place, weights=counts[nonzero].astype(np.float64))
        centre = 2.0 ** ((bins + 0.5) / BINS_PER_OCTAVE)
        for label, reconstruct in shown.items():
            error = (values - reconstruct(values))[nonzero]
            mean = np.bincount(place, weights=counts[nonzero] * error**2) / weight
            drawn = mean > 0
            axes.loglog(centre[drawn], np.sqrt(mean[drawn]), label=label, linewidth=1, marker=".", markersize=3)
        axes.set_xlim(magnitude.max() / 2**OCTAVES, magnitude.max() * 1.2)
        axes.legend()
    axes.set(xlabel="magnitude", ylabel="root mean squared error", title="error by magnitude")
    axes.grid(alpha=0.3, which="both")
