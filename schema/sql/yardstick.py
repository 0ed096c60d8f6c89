"""How bad the outliers of a site are, in a word; and which site of a run is the worst."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from quambase.schema.sites import WHOLE, find_site, is_model_site

NOTABLE, SEVERE = 3.0, 10.0
"""Ratios of amax to the 99.95 % quantile from which outliers are notable, and severe.

A scale that clips nothing spends its 127 steps up to the largest magnitude. 99.95 % of the values get 127 / ratio of
them: of 8 bits log2(ratio) are lost. Below 3 that is under 1.6 bits, and 42 steps remain, as good as 6.4 bits. From 10
on it is over 3.3 bits, and 12 steps or fewer remain, less than 5 bits: clip there, or divide the site.
"""

EVALUATED, DECODING, HEAD, UNREAD = "evaluated", "decoding", "head", "unread"
"""Which part of the INT8 model reads a site's scale: any pass; decoding only; the quantized head only; none."""


def outlier_ratio(amax: float, q9995: float) -> float:
    """amax / q9995: 1 if every value is zero, infinite if only outliers are nonzero, NaN if either is NaN."""
    if q9995 == 0:
        return 1.0 if amax == 0 else math.inf if amax > 0 else math.nan
    return amax / q9995


def outlier_word(ratio: float) -> str:
    """mild, notable or severe; unknown for NaN."""
    if math.isnan(ratio):
        return "unknown"
    return "severe" if ratio >= SEVERE else "notable" if ratio >= NOTABLE else "mild"


def reader(site: str, family: str) -> str:
    """Which part of an INT8 model of ``family`` reads the scale of ``site``; an imported tensor counts as evaluated."""
    if not is_model_site(site, family):
        return EVALUATED
    known = find_site(site, family)
    if not known.consumed:
        return UNREAD
    return DECODING if known.decode_only else HEAD if known.head else EVALUATED


def worst_site(rows: Iterable[Mapping[str, Any]], family: str, wanted: str) -> Mapping[str, Any] | None:
    """The row of site_stats with the largest ratio among whole sites that ``wanted`` reads; None if there is none.

    Ties go to the first row. The groups of a divided site are left out: their site is there as a whole.
    """
    mine = [row for row in rows if row["group_name"] == WHOLE and reader(str(row["site"]), family) == wanted]
    known = [row for row in mine if not math.isnan(outlier_ratio(row["amax"], row["q9995"]))]
    return max(known, key=lambda row: outlier_ratio(row["amax"], row["q9995"]), default=None)


def outlier_line(row: Mapping[str, Any]) -> str:
    """One row of site_stats in words: ``notable: 3.1x at layer 6 in_proj:output (largest 25.1, 99.95 % 8.2)``."""
    ratio = outlier_ratio(row["amax"], row["q9995"])
    place = f"layer {row['layer']} {row['site']}" + ("" if row["group_name"] == WHOLE else f" {row['group_name']}")
    return f"{outlier_word(ratio)}: {ratio:.3g}x at {place} (largest {row['amax']:.3g}, 99.95 % {row['q9995']:.3g})"
