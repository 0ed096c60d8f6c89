"""The reach of a site by the number of tokens read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa

from quambase.analyzer.site.one_site import place
from quambase.schema.sites import WHOLE, SiteKey
from quambase.schema.sql.database import StatsDB


@dataclass(frozen=True)
class Positions:
    """A scale group by position: ``rows`` of the query positions_of_group, the first tokens first; one at least."""

    layer: int
    site: str
    group_name: str
    rows: pa.Table

    @property
    def change(self) -> float | None:
        """How many times as far 99.99 % of |x| reach at the last tokens as at the first; None where those are 0, or no
        value is finite at either.
        """
        reach = self.rows["q9999"].to_pylist()
        return reach[-1] / reach[0] if reach[0] > 0 and reach[-1] >= 0 else None

    @property
    def unequal(self) -> float:
        """How much the ends differ, either way: 0 where they are equal or nothing is known."""
        change = self.change
        return 0.0 if change is None else abs(math.log(change)) if change else math.inf

    def words(self) -> str:
        """How far the values reach at the first and at the last tokens."""
        rows = self.rows.to_pylist()
        first, last = rows[0], rows[-1]
        ratio = "" if self.change is None else f", {self.change:.2g} times as far"
        return (
            f"{place(self.layer, self.site, self.group_name)}: 99.99 % of |x| within {first['q9999']:.3g} at "
            f"tokens {tokens(first)}, {last['q9999']:.3g} at tokens {tokens(last)}{ratio}"
        )


def positions_of_group(database: StatsDB, run: str, layer: int, site: str, group: str) -> Positions | None:
    """One scale group by position. None where the run has no counts by position."""
    rows = database.query("positions_of_group", {"run": run, "layer": layer, "site": site, "group": group}).table
    return Positions(layer, site, group, rows) if rows.num_rows else None


def positions_of_every_site(database: StatsDB, run: str) -> dict[SiteKey, Positions]:
    """Each site as a whole by position, from one query. Empty where the run has no counts by position."""
    rows = database.query("positions_of_every_site", {"run": run}).to_pylist()
    found = {}
    for (layer, site), mine in groupby(rows, key=lambda row: (row["layer"], row["site"])):
        table = pa.Table.from_pylist([{k: v for k, v in row.items() if k not in ("layer", "site")} for row in mine])
        found[layer, site] = Positions(layer, site, WHOLE, table)
    return found


def tokens(row: dict[str, int]) -> str:
    """The tokens of a bucket: ``9 to 16``."""
    return f"{row['tokens_from']:,} to {row['tokens_to']:,}"
