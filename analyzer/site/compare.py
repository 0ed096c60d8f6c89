"""The strategies side by side at one site: what each scale does to the values, and to the errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from quambase.analyzer.quantization_error import Figures, piecewise_codes
from quambase.analyzer.scale_groups import ScaleGroup, group_of_values
from quambase.analyzer.site.one_site import chosen_group, one_run, place
from quambase.analyzer.strategies import Choice, Scale, parse_labels
from quambase.schema.errors import UnknownName
from quambase.schema.files import refuse_foreign_picture
from quambase.schema.sites import WHOLE
from quambase.schema.sql.answer import PrintsAsTable
from quambase.schema.sql.database import StatsDB
from quambase.schema.values.arrays import Float32, Float64, Int64
from quambase.schema.values.number_format import INT8, Affine, multipliers

MAGNITUDES = (2.0, 4.5, 5.0, 8.0, 10.0, 12.0)
"""The seed's example values."""

WORTH_PERCENT = -10.0
"""The seed's rule: a mean squared error this much below that of absmax is worth integrating."""

SYNTHETIC_SHAPE = (512, 1536)
"""Tokens x d_inner of mamba-130m."""


@dataclass(frozen=True, repr=False)
class Comparison(PrintsAsTable):
    """What `compare` found.

    title       what was compared
    group       the values
    statistics  one row: shape, count, min, max, mean, std, amax, beyond_3_sigma, beyond_5_sigma
    strategies  a row per strategy, least error first: scale, mse, mse_change_percent (against absmax), worth,
                overflow (clipped) count and share, values with |code| <= 120 and beyond, distinct codes beyond 120
    values      a row per strategy and magnitude: code, reconstruction, error
    scales      label to scale(s)
    summary     lines that say which strategy has the least error
    picture     the file saved, None if none was
    notes       which run it is, and what else a user should know
    """

    title: str
    group: ScaleGroup
    statistics: pa.Table
    strategies: pa.Table
    values: pa.Table
    scales: dict[str, Scale]
    summary: list[str]
    picture: Path | None
    notes: list[str]

    def shown(self) -> pa.Table:
        """Each strategy in one row."""
        return self.strategies


def compare(
    db: str | Path = Path("quambase-db"),
    site: str | None = None,
    layer: int | None = None,
    group: str = WHOLE,
    run: str | None = None,
    strategies: Sequence[str] | None = None,
    values: Sequence[float] = MAGNITUDES,
    picture: str | Path | None = None,
    synthetic: bool = False,
    seed: int = 0,
    force: bool = False,
) -> Comparison:
    """Compare ``strategies`` (None: the default ones) at one site of a run.

    site, layer  None: the one with the largest outlier ratio among those that remain
    group        ``all``, or a slice of a divided site (x, z; dt, B, C)
    values       magnitudes whose code, reconstruction and error are shown
    picture      file to save a picture to (its suffix says the format); None saves none
    synthetic    no database: a tensor of (512, 1536) values from Student's t with 3 degrees of freedom, from ``seed``
    force        replace ``picture`` even if it is no picture of quambase's

    UnknownName: a site, layer, group or strategy that does not exist, or no strategy that needs neither sensitivities
    nor what the run does not store. OutputRefused.
    """
    picture = None if picture is None else Path(picture)
    if picture is not None:
        refuse_foreign_picture(picture, force=force)
    notes: list[str] = []
    choices = [c for c in parse_labels(list(strategies) if strategies else None) if not c.strategy.needs_sensitivity]
    if synthetic:
        title = f"synthetic tensor (Student's t, 3 degrees of freedom, seed {seed})"
        drawn = np.random.default_rng(seed).standard_t(3, SYNTHETIC_SHAPE).astype(np.float32)
        chosen, shape = group_of_values(drawn, "synthetic"), " x ".join(map(str, SYNTHETIC_SHAPE))
    else:
        title, chosen, shape, notes = _site_of_run(Path(db), run, site, layer, group)
    choices = [choice for choice in choices if choice.fits(chosen)]
    if not choices:
        raise UnknownName(
            f"{', '.join(strategies or ())}: nothing compare can compute at one site; name another strategy"
        )
    scales = {choice.label: choice.scale(chosen) for choice in choices}
    figures = {label: chosen.figures(scale) for label, scale in scales.items()}
    table = _strategies_table(chosen, choices, scales, figures)
    statistics, coded = _statistics_table(chosen, shape), _values_table(scales, values)
    comparison = Comparison(title, chosen, statistics, table, coded, scales, _summary(table), picture, notes)
    if picture is not None:
        _draw(comparison, picture)
    return comparison


def _draw(comparison: Comparison, path: Path) -> None:
    from quambase.analyzer.pictures.comparison import comparison_figure  # matplotlib takes half a second to import
    from quambase.schema.pictures import save_picture

    order = comparison.strategies["strategy"].to_pylist()
    drawn_by = {label: partial(reconstruct, scale=comparison.scales[label]) for label in order}
    save_picture(comparison_figure(comparison.title, comparison.group.distribution, drawn_by), path)


def reconstruct(values: Float32, scale: Scale) -> Float64:
    """``values`` (any shape) after quantization with ``scale`` and dequantization."""
    return _coded(values, scale)[1]


def _coded(values: Float32, scale: Scale) -> tuple[Int64, Float64]:
    if isinstance(scale, tuple):
        return piecewise_codes(values, *scale)
    if isinstance(scale, Affine):
        step = np.float32(scale.scale)
        rounded = np.clip(np.rint(values / step) + scale.zero_point, INT8.qmin, INT8.qmax)
        return rounded.astype(np.int64), (rounded - scale.zero_point) * np.float64(step)
    codes = INT8.quantize(values, scale).astype(np.int64)
    return codes, codes * np.float64(scale)


def _site_of_run(
    db: Path, run: str | None, site: str | None, layer: int | None, group: str
) -> tuple[str, ScaleGroup, str, list[str]]:
    with StatsDB(db, run) as database:
        manifest = one_run(database, "compare")
        chosen = chosen_group(database, site, layer, group)
        wanted = {"layer": chosen.layer, "site": chosen.site, "group": group}
        channels = database.query("channels_of_group", wanted)["n"].to_pylist()[0]
    total = chosen.distribution.total + chosen.distribution.nonfinite
    shape = f"{total // channels} x {channels}" if channels else str(total)
    return f"{place(chosen.layer, chosen.site, group)} of run {manifest.run}", chosen, shape, database.notes


def _statistics_table(group: ScaleGroup, shape: str) -> pa.Table:
    row = group.distribution.summary()
    names = ("count", "min", "max", "mean", "std", "amax", "beyond_3_sigma", "beyond_5_sigma", "nonfinite")
    return pa.Table.from_pylist([{"shape": shape, **{name: row[name] for name in names}}])


def _strategies_table(
    group: ScaleGroup, choices: list[Choice], scales: dict[str, Scale], figures: dict[str, Figures]
) -> pa.Table:
    # The change is against absmax even where absmax is not among the strategies compared.
    reference = group.figures(parse_labels(["absmax"])[0].scale(group)).mse
    rows: list[dict[str, Any]] = []
    for choice in choices:
        scale, found = scales[choice.label], figures[choice.label]
        change = 100 * (found.mse - reference) / reference if reference > 0 else None
        outer = found.values_above_120
        rows.append(
            {
                "strategy": choice.label,
                "scale": multipliers(scale)[0],
                "mse": found.mse,
                "mse_change_percent": change,
                "worth": change is not None and change < WORTH_PERCENT,
                "sqnr_db": found.sqnr_db,
                "overflow": found.clipped,
                "overflow_share": found.clipped_share,
                "normal_range": found.total - outer,
                "outlier_range": outer,
                "outlier_codes": found.codes_above_120,
                "needs_decode": choice.strategy.needs_decode,
            }
        )
    rows.sort(key=lambda row: (row["mse"], -row["scale"], row["strategy"]))
    return pa.Table.from_pylist(rows)


def _values_table(scales: dict[str, Scale], values: Sequence[float]) -> pa.Table:
    given = np.array(values, np.float32)
    rows = []
    for label, scale in scales.items():
        codes, rebuilt = _coded(given, scale)
        rows += [
            {"strategy": label, "value": value, "code": code, "reconstruction": back, "error": value - back}
            for value, code, back in zip(given.tolist(), codes.tolist(), rebuilt.tolist(), strict=True)
        ]
    return pa.Table.from_pylist(rows)


def _summary(strategies: pa.Table) -> list[str]:
    """Which strategy has the least error, and which among those that need no decoder."""

    def line(row: dict[str, Any]) -> str:
        change = row["mse_change_percent"]
        against = "" if change is None else f", {change:+.2f} % against absmax"
        verdict = "" if change is None else "; worth integrating" if row["worth"] else "; not worth integrating"
        return f"{row['strategy']} (MSE {row['mse']:.6g}{against}{verdict})"

    rows = strategies.to_pylist()
    tied = [row["strategy"] for row in rows[1:] if row["mse"] == rows[0]["mse"]]
    lines = [f"least MSE: {line(rows[0])}" + (f", tied with {', '.join(tied)}" if tied else "")]
    uniform = [row for row in rows if not row["needs_decode"]]
    if rows[0]["needs_decode"] and uniform:
        lines.append(f"least MSE with one INT8 scale: {line(uniform[0])}")
    return lines
