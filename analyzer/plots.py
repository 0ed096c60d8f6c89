"""Pictures of a comparison, drawn without a screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from quambase.schema.distribution import Distribution
from quambase.schema.errors import QuambaseError
from quambase.schema.tables import replacing

Reconstructions = Mapping[str, Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]]]
"""Label of a strategy to what makes of values their reconstructions; least error first."""

SHOWN = 6
"""Strategies drawn: those of least error, and absmax."""

BINS_PER_OCTAVE = 4

OCTAVES = 14
"""How far below the largest magnitude the error is shown: further down every code is zero."""


def comparison_picture(path: Path, title: str, distribution: Distribution, reconstructions: Reconstructions) -> None:
    """Save two panels: reconstruction against original, and the root mean squared error by magnitude.

    The suffix of ``path`` chooses the format (png, svg, pdf); the file takes its place at once.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    supported = sorted(canvas.get_supported_filetypes())
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in supported:
        raise QuambaseError(f"a picture cannot be saved as '{path.name}'; expected one of .{', .'.join(supported)}")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    labels = list(reconstructions)
    shown = {name: reconstructions[name] for name in labels if name in labels[:SHOWN] or name == "absmax"}
    _draw_reconstruction(left, distribution, shown)
    _draw_error(right, distribution, shown)
    with replacing(path) as temporary:
        # Without dates the same comparison gives the same picture.
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
        figure.savefig(temporary, format=suffix, dpi=120, metadata=metadata)


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
