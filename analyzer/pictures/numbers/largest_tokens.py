"""The tokens that made the largest values of a site."""

from __future__ import annotations

from dataclasses import dataclass

from quambase.schema.sites import SiteKey
from quambase.schema.sql.database import StatsDB


@dataclass(frozen=True)
class LargestToken:
    """One of the largest values, and which text made it.

    before, after  the text around the token, eight words at most; None in runs of earlier versions
    """

    value: float
    document: int
    position: int
    token_id: int
    token: str
    channel: int
    group_name: str
    before: str | None = None
    after: str | None = None

    @property
    def context(self) -> str | None:
        """The token in the text around it; None in runs of earlier versions."""
        return None if self.before is None or self.after is None else self.before + self.token + self.after


def largest_tokens(database: StatsDB, run: str, layer: int, site: str, limit: int | None = None) -> list[LargestToken]:
    """Rows of `outliers` (the 64 largest values of each group), the largest |value| first; at most ``limit``.

    Ties by document, position and channel.
    """
    return _tokens(database, {"run": run, "layer": layer, "site": site, "limit": limit}).get((layer, site), [])


def largest_tokens_of_every_site(
    database: StatsDB, run: str, limit: int | None = None
) -> dict[SiteKey, list[LargestToken]]:
    """`largest_tokens` of every site of a run, from one query."""
    return _tokens(database, {"run": run, "layer": None, "site": None, "limit": limit})


def _tokens(database: StatsDB, wanted: dict[str, object]) -> dict[SiteKey, list[LargestToken]]:
    fields = LargestToken.__dataclass_fields__
    found: dict[SiteKey, list[LargestToken]] = {}
    for row in database.query("largest_tokens", wanted).to_pylist():
        token = LargestToken(**{name: row[name] for name in fields})
        found.setdefault((row["layer"], row["site"]), []).append(token)
    return found
