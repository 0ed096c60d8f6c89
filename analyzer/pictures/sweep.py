"""Picture of a sweep: what a strategy's scales lose at each value of a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from quambase.analyzer.pictures.frame import styled, title
from quambase.schema.pictures import logarithmic, new_figure


@styled
def sweep_figure(strategy: str, parameter: str, rows: Sequence[dict[str, Any]], *, falling: bool) -> Figure:
    """Predicted KL and the error of the median scale against ``parameter``.

    rows     of the table of `quambase.analyzer.sweep.Swept`
    falling  the values are near 1: their distance to it is the axis
    """
    values = [row[parameter] for row in rows]
    known = rows[0]["predicted_kl"] is not None
    figure = new_figure(1, 3.4 if known else 2.2)
    title(figure, f"{strategy}: {parameter} from {values[0]:g} to {values[-1]:g}")
    panels = figure.subplots(2 if known else 1, 1, sharex=True, squeeze=False)[:, 0]
    names = [*(["predicted_kl"] if known else []), "sqnr_db_median"]
    words = {"predicted_kl": "predicted KL\n(nats a token)", "sqnr_db_median": "SQNR of the\nmedian scale (dB)"}
    best = {"predicted_kl": min, "sqnr_db_median": max}
    x = [1 - value if falling else value for value in values]
    for axes, name in zip(panels, names, strict=True):
        drawn = [(at, row[name]) for at, row in zip(x, rows, strict=True) if row[name] is not None]
        axes.plot(*zip(*drawn, strict=True), marker="o", color="#0072B2")
        place = best[name](drawn, key=lambda pair: pair[1])
        axes.plot(*place, marker="o", markersize=8, markerfacecolor="none", color="#D55E00")
        axes.set_ylabel(words[name])
    last = panels[-1]
    if falling or values[-1] >= 10 * values[0]:
        logarithmic(last, "x")
    last.set_xlabel(f"1 - {parameter}" if falling else parameter)
    if falling:
        last.invert_xaxis()
    return figure
