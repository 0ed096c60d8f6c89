"""The input of a strategy: one scale group's distribution and, for observers that depend on order, its documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from quambase.analyzer.least_squares import optimal_scale
from quambase.analyzer.quantization_error import Figures, figures, piecewise_figures, predicted_kl, signal_energy
from quambase.schema.groups import GROUP, TENSOR, granularity_of, united_groups
from quambase.schema.sites import MAMBA1, MAMBA2, STATE_BY_CHANNEL, WHOLE, Site, find_site, is_model_site
from quambase.schema.sql.database import DocumentSeries, StatsDB
from quambase.schema.tables import DOCUMENT_QUANTILES
from quambase.schema.values.arrays import Float32
from quambase.schema.values.distribution import Distribution, Sensitivity
from quambase.schema.values.number_format import Affine

STATE = "ssm_state_act:input"


@dataclass(frozen=True)
class ScaleGroup:
    """Everything known about the values that share one scale.

    documents   statistics of each document in file order. A group without any (an imported tensor) has its pooled
                distribution as one document; a group made of smaller ones has no quantiles
    family      of the model: "mamba1", "mamba2", or "tensor" for an import
    innermost   no smaller scale group of the site was asked for
    sensitivity  how much the output depends on its values; None where the run does not have that. Of the state: the
                 output of decoding, on the state along the documents
    state_amax  for a Mamba-2's state, (n,) float32: the largest absolute value at each state index; else None
    """

    layer: int
    site: str
    group_name: str
    distribution: Distribution
    documents: DocumentSeries
    family: str = MAMBA1
    innermost: bool = True
    state_amax: Float32 | None = None
    sensitivity: Sensitivity | None = None

    @cached_property
    def signal(self) -> float:
        """Sum of x^2, float64."""
        return signal_energy(self.distribution)

    @cached_property
    def least_squares(self) -> float:
        """The scale of least squared error; several strategies are it at some sites."""
        return optimal_scale(self.distribution)

    @cached_property
    def least_effect(self) -> float:
        """The scale of least predicted KL; of least squared error without sensitivities."""
        return self.least_squares if self.sensitivity is None else optimal_scale(self.sensitivity.weighted)

    @property
    def point(self) -> Site:
        """The site, of an imported tensor perhaps one that no model has."""
        return find_site(self.site, self.family) if is_model_site(self.site, self.family) else Site(self.site)

    @property
    def consumed(self) -> bool:
        """Whether the INT8 model reads this group's scale. It multiplies most divided sites by one scale; their groups'
        own scales are for comparison.
        """
        site = self.point
        return site.consumed and (self.innermost if site.grouped else self.group_name == WHOLE)

    def figures(self, scale: float | Affine | tuple[float, float]) -> Figures:
        """The error of ``scale`` on this group; two for the two-segment code."""
        if isinstance(scale, tuple):
            return piecewise_figures(self.distribution, *scale, self.signal)
        return figures(self.distribution, scale, self.signal)

    def predicted_kl(self, scale: float | Affine | tuple[float, float]) -> float | None:
        """The KL that the error of ``scale`` is predicted to cause, nats a token; None without sensitivities."""
        return None if self.sensitivity is None else predicted_kl(self.sensitivity, scale)


def one_document(distribution: Distribution) -> DocumentSeries:
    """The whole distribution as a single document."""
    return DocumentSeries(
        np.zeros(1, np.int32),
        np.array([distribution.amax], np.float32),
        {name: np.array([distribution.quantile_torch(p)]) for name, p in DOCUMENT_QUANTILES.items()},
    )


def default_granularity(family: str) -> str:
    """The granularity that the INT8 model of ``family`` reads."""
    return GROUP if family == MAMBA2 else TENSOR


def scale_groups(database: StatsDB, run: str, granularity: str | None = None) -> list[ScaleGroup]:
    """Every scale group of a run; ``granularity`` as in `StatsDB.distributions`, None for the model's own."""
    return list(chain.from_iterable(scale_groups_by_layer(database, run, granularity)))


def scale_groups_by_layer(
    database: StatsDB, run: str, granularity: str | None = None, layers: Iterable[int] | None = None
) -> Iterator[list[ScaleGroup]]:
    """The scale groups of each of ``layers``; None: of every one, the head (-1) last. Each layer is read when it is
    asked for.
    """
    family = database.manifest(run).model.family
    level = granularity or default_granularity(family)
    stored = database.documents(run)
    states = database.channel_amax(run, STATE) if family == MAMBA2 else {}
    for layer in database.layers(run) if layers is None else layers:
        listed = [(site, name, found) for _, site, name, found in database.distributions(run, level, layer)]
        sensitivities = database.sensitivities(run, level, layer)
        finest = {site: granularity_of(name) for site, name, _ in listed}  # the last one listed is
        found = []
        for site, name, distribution in listed:
            documents = _documents(stored, layer, site, name, distribution)
            innermost = granularity_of(name) == finest[site]
            state_amax = _state_amax(states, layer, name) if site == STATE and states else None
            sensitivity = sensitivities.get((layer, STATE_BY_CHANNEL if site == STATE else site, name))
            found.append(
                ScaleGroup(layer, site, name, distribution, documents, family, innermost, state_amax, sensitivity)
            )
        yield found


def _members(smallest: list[str], name: str) -> list[str]:
    """The smallest groups of a site that form its group ``name``."""
    return united_groups(smallest, granularity_of(name)).get(name, [])


def _state_amax(stored: Mapping[tuple[int, str], Float32], layer: int, name: str) -> Float32:
    members = _members([group for la, group in stored if la == layer], name)
    amax: Float32 = np.max([stored[layer, member] for member in members], axis=0)
    return amax


def _documents(
    stored: Mapping[tuple[int, str, str], DocumentSeries], layer: int, site: str, name: str, distribution: Distribution
) -> DocumentSeries:
    series = stored.get((layer, site, name))
    if series is None:
        smallest = [group for la, s, group in stored if (la, s) == (layer, site) and group != WHOLE]
        if members := _members(smallest, name):
            series = DocumentSeries.united([stored[layer, site, member] for member in members])
    return one_document(distribution) if series is None or not series.documents.size else series


def group_of_values(values: np.ndarray[tuple[int, ...], np.dtype[np.floating]], site: str = "values") -> ScaleGroup:
    """A scale group of plain values (any shape), rounded to float16 as a run's counts are."""
    distribution = Distribution.of_values(values)
    return ScaleGroup(0, site, WHOLE, distribution, one_document(distribution))
