"""The strategies over all sites that act in evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from quambase.analyzer.pictures.numbers.scale_rows import SiteLoss, rows_of_sites, site_loss
from quambase.analyzer.pictures.numbers.site_grid import mean_squares, rows_of_label
from quambase.analyzer.summary import acting, summarize
from quambase.schema.sites import SiteKey
from quambase.schema.sql.database import StatsDB


@dataclass(frozen=True)
class StrategyOverSites:
    """One strategy.

    predicted_kl  over all of these sites, nats a token; None where one has none
    sites         (layer, site) to what it loses there, in the order of the scale table
    """

    label: str
    needs_decode: bool
    predicted_kl: float | None
    sites: dict[SiteKey, SiteLoss]


def strategies_over_sites(database: StatsDB, run: str, scales: pa.Table) -> list[StrategyOverSites]:
    """Each strategy of a scale table at the sites of the layers that act in evaluation (of an imported tensor at every
    site), in the order of `quambase.analyzer.summary.summarize`: the best first, those that need a decoder last.
    """
    signals = mean_squares(database, run)
    of_run = scales.filter(pc.equal(scales["run"], pa.scalar(run)))
    found = []
    for row in summarize(of_run).to_pylist() if of_run.num_rows else []:
        every = rows_of_label(of_run, run, row["strategy"])
        mine = rows_of_sites(list(acting(every)) or every)
        losses = {key: site_loss(rows, signals[key]) for key, rows in mine.items() if rows and key in signals}
        found.append(StrategyOverSites(row["strategy"], row["needs_decode"], row["predicted_kl"], losses))
    return found
