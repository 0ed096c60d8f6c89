"""The tokens that made the largest values of a site."""

from __future__ import annotations

from dataclasses import dataclass

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
    wanted = {"run": run, "layer": layer, "site": site, "limit": limit}
    fields = LargestToken.__dataclass_fields__
    rows = database.query("largest_tokens", wanted).to_pylist()
    return [LargestToken(**{name: row[name] for name in fields}) for row in rows]
