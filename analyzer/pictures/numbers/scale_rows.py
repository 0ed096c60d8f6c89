"""The rows of a scale table that stand for a site: one scale, or those of its groups together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quambase.analyzer.quantization_error import sqnr_db
from quambase.schema.scale_table import SELECTED
from quambase.schema.sites import WHOLE, SiteKey

Row = Mapping[str, Any]


@dataclass(frozen=True)
class SiteLoss:
    """What one strategy loses at one site; over all of the site's groups where each has a scale.

    label          the strategy's; of the selected rows the one selected, `SELECTED` where groups have different ones
    scales         how many
    clipped_share  of the site's values; NaN without values
    sqnr_db        infinite without error, NaN without signal
    predicted_kl   nats a token; None where a scale has none
    """

    label: str
    scales: int
    clipped_share: float
    mse: float
    sqnr_db: float
    predicted_kl: float | None


def rows_of_sites(rows: Iterable[Row]) -> dict[SiteKey, list[Row]]:
    """By (layer, site): the rows that the INT8 model reads, or of a site that it does not read that of the whole site.

    ``rows``: those of one run and one strategy (or the selected ones).
    """
    by_site: dict[SiteKey, list[Row]] = {}
    for row in rows:
        by_site.setdefault((row["layer"], row["site"]), []).append(row)
    return {
        key: [row for row in mine if row["consumed"]] or [row for row in mine if row["group_name"] == WHOLE]
        for key, mine in by_site.items()
    }


def site_loss(rows: list[Row], signal: float) -> SiteLoss:
    """The rows of one site and strategy together. ``signal``: the mean of x^2 over the site."""
    total = sum(row["count"] for row in rows)
    labels = {row["label"] for row in rows}
    kls = [row["predicted_kl"] for row in rows]
    mse = _mean(rows, "mse", total)
    return SiteLoss(
        label=labels.pop() if len(labels) == 1 else SELECTED,
        scales=len(rows),
        clipped_share=_mean(rows, "clipped_share", total),
        mse=mse,
        sqnr_db=sqnr_db(signal, mse),
        predicted_kl=None if None in kls else math.fsum(kls),
    )


def _mean(rows: list[Row], name: str, total: int) -> float:
    """The mean over all values; groups without values do not count."""
    return math.fsum(row[name] * row["count"] for row in rows if row["count"]) / total if total else math.nan
