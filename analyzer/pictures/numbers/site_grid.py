"""Layer by site: how far outliers reach, and what the scales lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from quambase.analyzer.pictures.numbers.scale_rows import rows_of_sites, site_loss
from quambase.schema.errors import UnknownName
from quambase.schema.scale_table import SELECTED, distinct
from quambase.schema.sites import HEAD_LAYER, SiteKey, site_order
from quambase.schema.sql.database import StatsDB
from quambase.schema.values.arrays import Float64

OUTLIER_RATIO, CLIPPED_SHARE, SQNR, PREDICTED_KL = QUANTITIES = (
    "outlier_ratio",
    "clipped_share",
    "sqnr_db",
    "predicted_kl",
)


@dataclass(frozen=True)
class SiteGrid:
    """One number for each layer and site; NaN where there is none.

    label   the strategy of the last three; None where no scale table was given: they are all NaN
    layers  ascending, the head's (-1) last
    sites   in model order
    outlier_ratio  (layers, sites): amax / q9995 of the whole site
    clipped_share, sqnr_db, predicted_kl  (layers, sites): of the strategy (`quambase.analyzer.pictures.numbers.
            scale_rows.SiteLoss`)
    """

    label: str | None
    layers: tuple[int, ...]
    sites: tuple[str, ...]
    outlier_ratio: Float64
    clipped_share: Float64
    sqnr_db: Float64
    predicted_kl: Float64

    def values(self, quantity: str) -> Float64:
        """The numbers of one of QUANTITIES; UnknownName."""
        if quantity not in QUANTITIES:
            raise UnknownName.of("quantity", quantity, QUANTITIES)
        values: Float64 = getattr(self, quantity)
        return values


def site_grid(database: StatsDB, run: str, scales: pa.Table | None = None, label: str = SELECTED) -> SiteGrid:
    """The grid of a run; ``scales``: rows of `quambase.schema.tables.SCALES`, of which those of ``run`` and ``label``
    are taken. UnknownName: no such label there.
    """
    stats = database.query("whole_sites", {"run": run}).to_pylist()
    layers = sorted({row["layer"] for row in stats}, key=lambda layer: (layer == HEAD_LAYER, layer))
    sites = sorted({row["site"] for row in stats}, key=site_order)
    place = {key: i for i, key in enumerate((layer, site) for layer in layers for site in sites)}
    grids = {name: np.full(len(place), np.nan) for name in QUANTITIES}
    for row in stats:
        ratio = row["outlier_ratio"]
        grids[OUTLIER_RATIO][place[row["layer"], row["site"]]] = np.nan if ratio is None else ratio
    if scales is not None:
        signals = mean_squares(database, run)
        for key, mine in rows_of_sites(rows_of_label(scales, run, label)).items():
            if mine and key in place:
                loss = site_loss(mine, signals[key])
                kl = np.nan if loss.predicted_kl is None else loss.predicted_kl
                for name, value in zip(QUANTITIES[1:], (loss.clipped_share, loss.sqnr_db, kl), strict=True):
                    grids[name][place[key]] = value
    shape = len(layers), len(sites)
    shaped = {name: grid.reshape(shape) for name, grid in grids.items()}
    return SiteGrid(None if scales is None else label, tuple(layers), tuple(sites), **shaped)


def mean_squares(database: StatsDB, run: str) -> Mapping[SiteKey, float]:
    """(layer, site) to the mean of x^2 of the whole site."""
    stats = database.query("whole_sites", {"run": run}).to_pylist()
    return {(row["layer"], row["site"]): row["mean"] ** 2 + row["std"] ** 2 for row in stats}


def rows_of_label(scales: pa.Table, run: str, label: str) -> list[dict[str, object]]:
    """The rows of a run and a strategy, or those selected. UnknownName: the table holds no such label of the run."""
    of_run = scales.filter(pc.equal(scales["run"], pa.scalar(run)))
    if label == SELECTED:
        found = of_run.filter(of_run["selected"])
    else:
        found = of_run.filter(pc.equal(of_run["label"], pa.scalar(label)))
        if not found.num_rows:
            known = [*distinct(of_run, "label"), SELECTED]
            raise UnknownName.of("strategy", label, known, where=f"the scales of run {run}")
    rows: list[dict[str, object]] = found.to_pylist()
    return rows
