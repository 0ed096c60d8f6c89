"""The channels of a site by how far they reach."""

from __future__ import annotations

from dataclasses import dataclass

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
    rows = database.query("channels_by_reach", {"run": run, "layer": layer, "site": site}).to_pylist()
    return [Channel(row["channel"], row["group_name"], row["amax"], _or_nan(row["mean"]), row["ratio"]) for row in rows]


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
