"""What a strategy sees: one scale group's distribution and, for observers that depend on order, its
documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from quambase.analyzer.error import Figures, figures, signal_energy
from quambase.schema.database import DocumentSeries, StatsDB
from quambase.schema.distribution import Distribution
from quambase.schema.sites import MAMBA1, WHOLE
from quambase.schema.tables import DOCUMENT_QUANTILES


@dataclass(frozen=True)
class ScaleGroup:
    """Everything known of the values that share one scale.

    documents  per-document statistics in file order; of a group without them (an imported tensor), the pooled
               distribution as if it were one document
    family     of the model: "mamba1", "mamba2", or "tensor" for an import
    """

    layer: int
    site: str
    group_name: str
    distribution: Distribution
    documents: DocumentSeries
    family: str = MAMBA1

    @cached_property
    def signal(self) -> float:
        """Sum of x^2, float64."""
        return signal_energy(self.distribution)

    def figures(self, scale: float) -> Figures:
        """The error of ``scale`` on this group."""
        return figures(self.distribution, scale, self.signal)


def one_document(distribution: Distribution) -> DocumentSeries:
    """The whole distribution as a single document."""
    return DocumentSeries(
        np.zeros(1, np.int32),
        np.array([distribution.amax], np.float32),
        {name: np.array([distribution.quantile_torch(p)]) for name, p in DOCUMENT_QUANTILES.items()},
    )


def scale_groups(database: StatsDB, run: str, granularity: str = "tensor") -> list[ScaleGroup]:
    """Every scale group of ``run`` in model order; granularity as in `StatsDB.distributions`."""
    documents = database.documents(run)
    family = str(database.manifest(run).model.get("family"))
    found = []
    for layer, site, group_name, distribution in database.distributions(run, granularity):
        series = documents.get((layer, site, group_name))
        if series is None or not series.documents.size:
            series = one_document(distribution)
        found.append(ScaleGroup(layer, site, group_name, distribution, series, family))
    return found


def group_of_values(values: np.ndarray[tuple[int, ...], np.dtype[np.floating]], site: str = "values") -> ScaleGroup:
    """A scale group of plain values (any shape), rounded to float16 as a run's counts are."""
    distribution = Distribution.of_values(values)
    return ScaleGroup(0, site, WHOLE, distribution, one_document(distribution))
