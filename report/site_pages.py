"""The numbers of each site's page, short enough to lie in the page: four digits, and of the channels a curve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from quambase.analyzer.by_group import of_every
from quambase.analyzer.pictures.numbers.channels import Channel, channels_of_every_site
from quambase.analyzer.pictures.numbers.error_curve import error_curve
from quambase.analyzer.pictures.numbers.histogram import histogram
from quambase.analyzer.pictures.numbers.largest_tokens import largest_tokens_of_every_site
from quambase.analyzer.pictures.numbers.marks import marks
from quambase.analyzer.pictures.numbers.positions import Positions, tokens
from quambase.analyzer.scale_groups import ScaleGroup
from quambase.schema.progress import Progress
from quambase.schema.sites import FAMILIES, SAMPLED_STATE_SITES, STATE_SITES, WHOLE, Site, SiteKey
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.manifest import Manifest
from quambase.schema.stored.results import UPSTREAM
from quambase.schema.values.distribution import ratio

POINTS, BINS = 48, 8
"""Points of an error curve, whose picture is 400 pixels wide; bins of a histogram to an octave."""

POINTS_OF_PART, BINS_OF_PART = 20, 4
"""The same of a part of a site: a Mamba-2 has several thousand of them."""

RANKS = 160
"""Of the channels of a site, by reach: a picture shows no more."""

NUMBERS = ("scale", "clips_at", "clipped_share", "mse", "sqnr_db", "predicted_kl")
"""What is shown of a strategy at a scale group (`quambase.analyzer.pictures.numbers.marks.Mark`)."""

NAMED, TOKENS = 12, 16
"""Channels and tokens that a site's page lists at most."""

REACHES = ("amax", "q9999", "q999", "q99", "q50")
"""What is shown of |x| by position: columns of `position_stats`."""

Page = dict[str, Any]

GroupKey = tuple[int, str, str]
"""Layer, site, scale group."""


def site_pages(
    database: StatsDB,
    manifest: Manifest,
    rows: pa.Table | None,
    positions: Mapping[SiteKey, Positions],
    shown: Progress,
) -> list[Page]:
    """The page of each site, in model order; ``rows``: of the run's scale table.

    A page: ``layer``, ``site``, ``about`` (a sentence), ``groups``, ``channels``, ``tokens``, ``positions`` (null where
    the run has none). A group: ``name``, ``total``, ``zeros``, ``nonfinite``, ``amax``, ``q9995``, ``ratio``,
    ``histogram`` (``first``, ``bins``, ``counts``: `quambase.analyzer.pictures.numbers.histogram.Histogram`), ``curve``
    (``scale``, ``mse``, ``kl``, ``least_mse``, ``least_kl``; null where the INT8 model reads no scale) and ``marks``,
    columns of `quambase.analyzer.pictures.numbers.marks.Mark`.
    """
    run = manifest.run
    of_group = _by_group(rows)
    layers = database.layers(run)
    shown.start("report", len(layers), sum(layers.values()), unit="layers")
    channels, largest = channels_of_every_site(database, run), largest_tokens_of_every_site(database, run, TOKENS)
    known = {site.name: site for site in FAMILIES.get(manifest.model.family, ())}

    def described(group: ScaleGroup) -> Page:
        return _group(group, of_group.get((group.layer, group.site, group.group_name), []))

    made = of_every(described, database, run, shown)
    pages = []
    for (layer, site), members in groupby(made, key=lambda each: (each[0].layer, each[0].site)):
        found = [page for _, page in members]
        pages.append(
            {
                "layer": layer,
                "site": site,
                "about": _about(known.get(site)),
                "groups": found,
                "channels": _channels(channels.get((layer, site), [])),
                "tokens": [
                    [short(t.value), t.token, t.before, t.after, t.document, t.position, t.channel, t.group_name]
                    for t in largest.get((layer, site), [])
                ],
                "positions": _positions(positions.get((layer, site)), of_group),
            }
        )
    return pages


def _by_group(rows: pa.Table | None) -> dict[GroupKey, list[dict[str, Any]]]:
    found: dict[GroupKey, list[dict[str, Any]]] = {}
    for row in [] if rows is None else rows.to_pylist():
        found.setdefault((row["layer"], row["site"], row["group_name"]), []).append(row)
    return found


def _group(group: ScaleGroup, rows: list[dict[str, Any]]) -> Page:
    whole = group.group_name == WHOLE
    counted = histogram(group.distribution, BINS if whole else BINS_OF_PART)
    found = marks(rows)
    q9995 = float(group.distribution.quantile(0.9995)) if counted.total else math.nan
    amax = float(group.distribution.amax)
    return {
        "name": group.group_name,
        "total": counted.total,
        "zeros": counted.zeros,
        "nonfinite": group.distribution.nonfinite,
        "amax": short(amax),
        "q9995": short(q9995),
        "ratio": short(ratio(amax, q9995)),
        "histogram": {"first": counted.first, "bins": counted.bins_per_octave, "counts": counted.counts.tolist()},
        "curve": _curve(group, [mark.scale for mark in found], POINTS if whole else POINTS_OF_PART),
        "marks": {
            "label": [mark.label for mark in found],
            **{name: shorts(getattr(mark, name) for mark in found) for name in NUMBERS},
            "zero_point": [mark.zero_point for mark in found],
            "needs_decode": [mark.needs_decode for mark in found],
            "selected": [mark.selected for mark in found],
        },
    }


def _curve(group: ScaleGroup, scales: Iterable[float], points: int) -> Page | None:
    """None where the INT8 model reads no scale, or every value is 0."""
    if not group.consumed or not group.distribution.amax > 0:
        return None
    curve = error_curve(group, scales, points)
    return {
        "scale": shorts(curve.scales, DIGITS_OF_SCALE),
        "mse": shorts(curve.mse),
        "kl": None if curve.predicted_kl is None else shorts(curve.predicted_kl),
        "least_mse": short(curve.least_mse_scale, DIGITS_OF_SCALE),
        "least_kl": short(curve.least_kl_scale, DIGITS_OF_SCALE),
    }


def _channels(channels: list[Channel]) -> Page:
    """``count``; ``ranks`` with ``reach``, spaced evenly in the logarithm; ``named``: the outliers, else the first."""
    count = len(channels)
    ranks = np.unique(np.geomspace(1, count, RANKS).round().astype(int)) if count else np.zeros(0, int)
    outliers = sum(channel.outlier for channel in channels)
    return {
        "count": count,
        "outliers": outliers,
        "ranks": ranks.tolist(),
        "reach": [short(channels[rank - 1].amax) for rank in ranks],
        "named": [[c.channel, c.group_name, short(c.amax), short(c.mean), short(c.ratio)] for c in channels[:NAMED]],
    }


def _positions(found: Positions | None, of_group: Mapping[GroupKey, list[dict[str, Any]]]) -> Page | None:
    """``words``, ``tokens`` (of each bucket, in words), ``to`` and REACHES, and where the scales clip: the state along
    documents is rounded at the scales of the state.
    """
    if found is None:
        return None
    read = STATE_SITES[0] if found.site in SAMPLED_STATE_SITES else found.site
    here = marks(of_group.get((found.layer, read, WHOLE), []))
    return {
        "words": found.words(),
        "tokens": [tokens(row) for row in found.rows.to_pylist()],
        "to": found.rows["tokens_to"].to_pylist(),
        **{name: shorts(found.rows[name].to_pylist()) for name in REACHES},
        "clips": [[mark.label, short(mark.clips_at)] for mark in here if mark.selected or mark.label == UPSTREAM],
    }


def _about(site: Site | None) -> str:
    """What the INT8 model does with a site, in sentences."""
    if site is None:
        return "A tensor that was imported."
    reads = f"Read by {' and '.join(site.read_by)}" if site.consumed else "Not read"
    reads += " of the INT8 model" if site.consumed else " by the INT8 model"
    reads += ", in token-by-token decoding only" * site.decode_only + ", which may take a zero point" * site.affine
    parts = [
        reads,
        *(["Upstream's kernel wraps here, so that a scale that clips is safe in ours only"] * (not site.saturates)),
        *([f"Divided into {', '.join(site.groups)}"] * (len(site.groups) > 1)),
        *(["Its channels are the indices of the recurrent state, after each document"] * (site.name in STATE_SITES)),
    ]
    return ". ".join(parts) + "."


DIGITS, DIGITS_OF_SCALE = 4, 7
"""Significant digits: one more than is shown; of a curve's scales, which must stay apart, as many as float32 has."""


def short(value: float | None, digits: int = DIGITS) -> float | None:
    """So many significant digits; None for what JSON has not."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def shorts(values: Iterable[float | None], digits: int = DIGITS) -> list[float | None]:
    """`short` of each."""
    return [short(value, digits) for value in values]
