"""Picture of a comparison: reconstruction against original, and the error by magnitude."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quambase.analyzer.pictures.frame import legend_outside, looks, styled, title
from quambase.schema.pictures import logarithmic, new_figure
from quambase.schema.values.arrays import Float32, Float64
from quambase.schema.values.distribution import Distribution

Reconstructions = Mapping[str, Callable[[Float32], Float64]]
"""Label of a strategy to the function that quantizes and dequantizes values; least error first."""

SHOWN = 6
"""How many strategies are drawn: those of least error, and absmax."""

BINS_PER_OCTAVE = 4

OCTAVES = 14
"""How far below the largest magnitude the error is shown; further down every code is zero."""


@styled
def comparison_figure(heading: str, distribution: Distribution, reconstructions: Reconstructions) -> Figure:
    """Two panels: reconstruction against original, and the root mean squared error by magnitude."""
    figure = new_figure(2, 2.6)
    left, right = figure.subplots(1, 2)
    title(figure, heading)
    labels = list(reconstructions)
    shown = {name: reconstructions[name] for name in labels if name in labels[:SHOWN] or name == "absmax"}
    _draw_reconstruction(left, distribution, shown)
    _draw_error(right, distribution, shown)
    legend_outside(figure, left, 2)
    return figure


def _draw_reconstruction(axes: Axes, distribution: Distribution, shown: Reconstructions) -> None:
    low, high = (float(distribution.values[i]) for i in (0, -1)) if distribution.values.size else (-1.0, 1.0)
    original = np.linspace(low, high, 4001).astype(np.float32)
    look = looks(shown)
    for label, reconstruct in shown.items():
        style = {"color": look[label].color, "linestyle": look[label].linestyle}
        axes.plot(original, reconstruct(original), label=label, **style)  # type: ignore[arg-type]
    axes.plot([low, high], [low, high], color="0.4", linewidth=0.5, linestyle=":")
    axes.set(xlabel="original value", ylabel="reconstruction")


def _draw_error(axes: Axes, distribution: Distribution, shown: Reconstructions) -> None:
    values, counts = distribution.values, distribution.counts
    nonzero = values != 0
    magnitude = np.abs(values[nonzero].astype(np.float64))
    axes.set(xlabel="magnitude |x|", ylabel="root mean squared error")
    if not magnitude.size:
        return
    octave = np.floor(np.log2(magnitude) * BINS_PER_OCTAVE).astype(np.int64)
    bins, place = np.unique(octave, return_inverse=True)
    weight = np.bincount(place, weights=counts[nonzero].astype(np.float64))
    centre = 2.0 ** ((bins + 0.5) / BINS_PER_OCTAVE)
    look = looks(shown)
    for label, reconstruct in shown.items():
        error = (values - reconstruct(values))[nonzero]
        mean = np.bincount(place, weights=counts[nonzero] * error**2) / weight
        drawn = (mean > 0) & (centre > magnitude.max() / 2**OCTAVES)
        style = {"color": look[label].color, "linestyle": look[label].linestyle}
        axes.loglog(centre[drawn], np.sqrt(mean[drawn]), **style)
    axes.set_xlim(magnitude.max() / 2**OCTAVES, magnitude.max() * 1.2)
    logarithmic(axes, "x", "y")
