"""One parameter of a strategy over a range: what its scales lose at each value, and which value is best."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from quambase.analyzer.analyze import Analysis, analyze
from quambase.analyzer.strategies import Choice, parse_label
from quambase.analyzer.summary import summarize
from quambase.schema.errors import DataInvalid
from quambase.schema.files import refuse_foreign_picture
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
        return _best(rows, "predicted_kl", min) or _best(rows, "sqnr_db_median", max) or rows[0]

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
        from quambase.schema.pictures import check_picture_format  # matplotlib takes half a second to import

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
        from quambase.analyzer.pictures.sweep import sweep_figure
        from quambase.schema.pictures import save_picture

        save_picture(
            sweep_figure(asked.choices[0].strategy.name, asked.parameter, rows, falling=asked.falling), picture
        )
    return Swept(asked.parameter, table, _words(asked, rows), found, picture)


def _best(rows: Sequence[dict[str, Any]], column: str, choose: Callable[..., Any]) -> dict[str, Any] | None:
    """The row that ``choose``, min or max, takes by ``column``; None where no row has a number there."""
    found: dict[str, Any] | None = choose(
        (row for row in rows if row[column] is not None), key=itemgetter(column), default=None
    )
    return found


def _words(asked: Sweep, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which value is best, by the predicted loss where it is known, and by the median error."""
    name, lines = asked.parameter, []
    best, worst = (_best(rows, "predicted_kl", choose) for choose in (min, max))
    if best is not None and worst is not None:
        lines.append(
            f"least predicted loss at {name} = {best[name]:.6g}: {best['predicted_kl']:.2g} nats a token; most at "
            f"{worst[name]:.6g}: {worst['predicted_kl']:.2g}{_at_an_end(asked, best)}"
        )
    if (best := _best(rows, "sqnr_db_median", max)) is not None:
        lines.append(
            f"least error of the median scale at {name} = {best[name]:.6g}: {best['sqnr_db_median']:.3g} dB"
            f"{_at_an_end(asked, best)}"
        )
    return lines


def _at_an_end(asked: Sweep, best: dict[str, Any]) -> str:
    ends = asked.values[0], asked.values[-1]
    return "; that is an end of the range: widen it" if best[asked.parameter] in ends else ""
