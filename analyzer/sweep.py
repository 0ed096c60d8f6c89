"""One parameter of a strategy over a range: what its scales lose at each value, and which value is best."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from quambase.analyzer.analyze import Analysis, analyze
from quambase.analyzer.pictures.frame import styled, title
from quambase.analyzer.strategies import Choice, parse_label
from quambase.analyzer.summary import summarize
from quambase.schema.errors import DataInvalid
from quambase.schema.files import refuse_foreign_picture
from quambase.schema.pictures import check_picture_format, logarithmic, new_figure, save_picture
from quambase.schema.progress import Shown
from quambase.schema.sql.answer import PrintsAsTable

FEWEST, MOST = 2, 200
"""Values of a sweep."""

_RANGE = re.compile(r"(?P<low>[^.]*(?:\.\d+)?(?:e[-+]?\d+)?)\.\.(?P<high>.+)", re.I)

FORM = "STRATEGY:LOW..HIGH/COUNT, such as percentile:0.999..0.99999/20 or outlier_aware:0.95..0.999,120/12"


@dataclass(frozen=True)
class Sweep:
    """The choices of a sweep, in the order of ``values``.

    parameter  the name of the one that changes
    falling    the values are near 1 and fall in powers of their distance to it
    """

    parameter: str
    values: list[float]
    choices: list[Choice]
    falling: bool

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """``STRATEGY:VALUE,LOW..HIGH/COUNT``: ``COUNT`` values of the one parameter that is a range.

        Between 0.5 and 1 the distances to 1 are geometric, as quantiles are compared; elsewhere the values are where
        HIGH is ten times LOW or more, and evenly spaced otherwise. Values between the ends have four digits (of the
        distance to 1).

        DataInvalid: another form. UnknownName as `parse_label`.
        """
        head, slash, number = text.strip().rpartition("/")
        name, colon, values = head.rpartition(":")
        parts = values.split(",")
        places = [place for place, part in enumerate(parts) if ".." in part]
        found = _RANGE.fullmatch(parts[places[0]]) if len(places) == 1 else None
        if not (slash and colon and found):
            raise DataInvalid(f"the sweep is '{text}'; expected {FORM}")
        try:
            low, high, count = float(found["low"]), float(found["high"]), int(number)
        except ValueError:
            raise DataInvalid(f"the sweep is '{text}'; expected {FORM}") from None
        if not (math.isfinite(low) and math.isfinite(high) and 0 < low < high and FEWEST <= count <= MOST):
            raise DataInvalid(f"the sweep is '{text}'; expected 0 < LOW < HIGH and {FEWEST} to {MOST} values")
        falling = low >= 0.5 and high < 1
        swept = spaced(low, high, count, falling=falling)
        labels = [
            ",".join(f"{value:.12g}" if p == places[0] else part for p, part in enumerate(parts)) for value in swept
        ]
        choices = [parse_label(f"{name}:{label}") for label in labels]
        return cls(list(choices[0].params)[places[0]], swept, choices, falling)


def spaced(low: float, high: float, count: int, *, falling: bool) -> list[float]:
    """``count`` values from ``low`` to ``high``, as `Sweep.parse` says."""
    if falling:
        inner = [1 - _rounded(distance) for distance in np.geomspace(1 - low, 1 - high, count)]
    elif high >= 10 * low:
        inner = [_rounded(value) for value in np.geomspace(low, high, count)]
    else:
        inner = [_rounded(value) for value in np.linspace(low, high, count)]
    return [low, *inner[1:-1], high]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass(frozen=True, repr=False)
class Swept(PrintsAsTable):
    """What `sweep` found.

    table     a row for each value: the parameter, ``strategy`` (the label), and predicted_kl, sqnr_db_median,
              sqnr_db_least, clipped_share_mean of `quambase.analyzer.summary.summarize`
    summary   which value is best, in words
    analysis  what `analyze` returned
    picture   the file saved, None if none was
    """

    parameter: str
    table: pa.Table
    summary: list[str]
    analysis: Analysis
    picture: Path | None

    @property
    def best(self) -> dict[str, Any]:
        """The row of the least predicted loss; in a run without sensitivities, of the least error."""
        rows = self.table.to_pylist()
        known = [row for row in rows if row["predicted_kl"] is not None]
        if known:
            return min(known, key=lambda row: row["predicted_kl"])
        return max(rows, key=lambda row: -math.inf if row["sqnr_db_median"] is None else row["sqnr_db_median"])

    def shown(self) -> pa.Table:
        """A row for each value."""
        return self.table


def sweep(
    text: str,
    db: str | Path = Path("quambase-db"),
    run: str | None = None,
    out: str | Path | None = None,
    picture: str | Path | None = None,
    progress: Shown = False,
    force: bool = False,
    **options: Any,
) -> Swept:
    """Compute a strategy's scales at every site for many values of a parameter; ``text`` as `Sweep.parse` reads it.

    out      scale table to write, of all values; None writes none
    picture  file of a picture of predicted KL and error against the parameter (png, svg, pdf); None saves none

    The other arguments and errors are those of `quambase.analyze`.

    >>> found = quambase.sweep("percentile:0.9..0.999/3", "quambase-db")
    >>> found.table["alpha"].to_pylist(), found.parameter
    ([0.9, 0.99, 0.999], 'alpha')
    """
    asked = Sweep.parse(text)
    picture = None if picture is None else Path(picture)
    if picture is not None:
        check_picture_format(picture)
        refuse_foreign_picture(picture, force=force)
    labels = [choice.label for choice in asked.choices]
    found = analyze(db, run, labels, out=out, progress=progress, force=force, **options)
    by_label = {row["strategy"]: row for row in summarize(found.table).to_pylist()}
    kept = ("strategy", "predicted_kl", "sqnr_db_median", "sqnr_db_least", "clipped_share_mean")
    pairs = zip(asked.values, labels, strict=True)
    rows = [{asked.parameter: value} | {name: by_label[label][name] for name in kept} for value, label in pairs]
    table = pa.Table.from_pylist(rows)
    if picture is not None:
        save_picture(_figure(asked, rows), picture)
    return Swept(asked.parameter, table, _words(asked, rows), found, picture)


def _words(asked: Sweep, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which value is best, by the predicted loss where it is known, and by the median error."""
    lines = []
    known = [row for row in rows if row["predicted_kl"] is not None]
    if known:
        best = min(known, key=lambda row: row["predicted_kl"])
        worst = max(known, key=lambda row: row["predicted_kl"])
        lines.append(
            f"least predicted loss at {asked.parameter} = {best[asked.parameter]:.6g}: "
            f"{best['predicted_kl']:.2g} nats a token; most at {worst[asked.parameter]:.6g}: "
            f"{worst['predicted_kl']:.2g}{_at_an_end(asked, best)}"
        )
    measured = [row for row in rows if row["sqnr_db_median"] is not None]
    if measured:
        best = max(measured, key=lambda row: row["sqnr_db_median"])
        lines.append(
            f"least error of the median scale at {asked.parameter} = {best[asked.parameter]:.6g}: "
            f"{best['sqnr_db_median']:.3g} dB{_at_an_end(asked, best)}"
        )
    return lines


def _at_an_end(asked: Sweep, best: dict[str, Any]) -> str:
    ends = asked.values[0], asked.values[-1]
    return "; that is an end of the range: widen it" if best[asked.parameter] in ends else ""


@styled
def _figure(asked: Sweep, rows: Sequence[dict[str, Any]]) -> Figure:
    """Predicted KL and the error of the median scale against the parameter."""
    known = rows[0]["predicted_kl"] is not None
    figure = new_figure(1, 3.4 if known else 2.2)
    title(
        figure, f"{asked.choices[0].strategy.name}: {asked.parameter} from {asked.values[0]:g} to {asked.values[-1]:g}"
    )
    panels = figure.subplots(2 if known else 1, 1, sharex=True, squeeze=False)[:, 0]
    names = [*(["predicted_kl"] if known else []), "sqnr_db_median"]
    words = {"predicted_kl": "predicted KL\n(nats a token)", "sqnr_db_median": "SQNR of the\nmedian scale (dB)"}
    best = {"predicted_kl": min, "sqnr_db_median": max}
    x = [1 - value if asked.falling else value for value in asked.values]
    for axes, name in zip(panels, names, strict=True):
        drawn = [(at, row[name]) for at, row in zip(x, rows, strict=True) if row[name] is not None]
        axes.plot(*zip(*drawn, strict=True), marker="o", color="#0072B2")
        place = best[name](drawn, key=lambda pair: pair[1])
        axes.plot(*place, marker="o", markersize=8, markerfacecolor="none", color="#D55E00")
        axes.set_ylabel(words[name])
    last = panels[-1]
    if asked.falling or asked.values[-1] >= 10 * asked.values[0]:
        logarithmic(last, "x")
    last.set_xlabel(f"1 - {asked.parameter}" if asked.falling else asked.parameter)
    if asked.falling:
        last.invert_xaxis()
    return figure
