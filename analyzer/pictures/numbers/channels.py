"""The channels of a site by how far they reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quambase.schema.sites import SiteKey
from quambase.schema.sql.database import StatsDB

OUTLIER = 5.0
"""From this ratio on a channel is one of the view `outlier_channels`."""


@dataclass(frozen=True)
class Channel:
    """One channel of a site (at the recurrent states: one state index of one group).

    amax   largest absolute value
    mean   NaN without values
    ratio  amax over the median of the site's channels; None where that is 0
    """

    channel: int
    group_name: str
    amax: float
    mean: float
    ratio: float | None

    @property
    def outlier(self) -> bool:
        """Whether the view `outlier_channels` has it."""
        return self.ratio is not None and self.ratio >= OUTLIER


def channels_by_reach(database: StatsDB, run: str, layer: int, site: str) -> list[Channel]:
    """Every channel of a site, the farthest first; ties by group and number. Empty where a run has none of the site."""
    return _channels(database, {"run": run, "layer": layer, "site": site}).get((layer, site), [])


def channels_of_every_site(database: StatsDB, run: str) -> dict[SiteKey, list[Channel]]:
    """`channels_by_reach` of every site of a run, from one query."""
    return _channels(database, {"run": run, "layer": None, "site": None})


def _channels(database: StatsDB, wanted: dict[str, object]) -> dict[SiteKey, list[Channel]]:
    found: dict[SiteKey, list[Channel]] = {}
    for row in database.query("channels_by_reach", wanted).to_pylist():
        mean = math.nan if row["mean"] is None else row["mean"]
        channel = Channel(row["channel"], row["group_name"], row["amax"], mean, row["ratio"])
        found.setdefault((row["layer"], row["site"]), []).append(channel)
    return found
