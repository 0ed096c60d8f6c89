"""How often the intervals of `evaluate` hold the truth, and how often its verdicts see differences that are not there.

    python benchmarks/simulate_statistics.py [EXPERIMENTS [RESULTS.parquet]]

Experiments draw n documents out of a population whose figures are known, or n clusters (books) with all of their
documents. The population is made up here (heavy tails, lognormal lengths), or it is the first text of a stored
evaluation. docs/statistics.md has what this printed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq

from quambase.apply.evaluation import comparisons
from quambase.apply.evaluation import paired_statistics as statistics
from quambase.apply.evaluation.comparisons import EXPONENTIAL, RATIO, Difference, Units, judged, ratio_difference
from quambase.apply.evaluation.paired_statistics import (
    EQUIVALENCE_LEVEL,
    LEVEL,
    Interval,
    bootstrap_t_interval,
    detectable,
    equivalence,
    linearised,
    newcombe,
    resampled_t,
    standard_error,
    student_interval,
    wilson,
)

Float64 = npt.NDArray[np.float64]

FIGURES = ("perplexity", "KL")


@dataclass(frozen=True)
class Documents:
    """tokens (N,); nll and kl (N, strategies), the first columns the reference's; clusters (N,), from 0."""

    tokens: Float64
    nll: Float64
    kl: Float64
    clusters: npt.NDArray[np.int64]

    @property
    def per_token(self) -> tuple[Float64, Float64]:
        """Mean nll and KL per token of each strategy."""
        return self.nll.sum(0) / self.tokens.sum(), self.kl.sum(0) / self.tokens.sum()

    def drawn(self, n: int, generator: np.random.Generator) -> Documents:
        """n documents with replacement."""
        rows = generator.integers(0, self.tokens.size, n)
        return Documents(self.tokens[rows], self.nll[rows], self.kl[rows], np.arange(n))

    def drawn_clusters(self, n: int, generator: np.random.Generator) -> Documents:
        """n clusters with replacement and all of their documents; one that is drawn twice is two."""
        chosen = generator.integers(0, self.clusters.max() + 1, n)
        rows = [np.flatnonzero(self.clusters == cluster) for cluster in chosen]
        own = np.repeat(np.arange(n), [len(part) for part in rows])
        every = np.concatenate(rows)
        return Documents(self.tokens[every], self.nll[every], self.kl[every], own)

    def united(self) -> Documents:
        """The documents of each cluster as one."""
        units = Units.of([str(cluster) for cluster in self.clusters])
        nll, kl = (np.stack([units.summed(c) for c in figure.T], 1) for figure in (self.nll, self.kl))
        return Documents(units.summed(self.tokens), nll, kl, np.arange(units.count))

    def shifted(self, by: Float64, figure: str = "perplexity") -> Documents:
        """The population whose strategies differ from the reference by ``by`` (strategies - 1,) nats per token in one
        figure. KL, which is never negative, is multiplied; nll gets the same in every token.
        """
        mean = self.per_token[FIGURES.index(figure)]
        if figure == "KL":
            return replace(self, kl=self.kl * np.concatenate([[1.0], (mean[0] + by) / mean[1:]]))
        nll = self.nll.copy()
        nll[:, 1:] += self.tokens[:, None] * (mean[0] + by - mean[1:])
        return replace(self, nll=nll)


def made_up(documents: int, strategies: int, seed: int, *, clustered: bool = False) -> Documents:
    """Lognormal lengths, Student's t with 3 degrees of freedom for differences of nll, lognormal KL. ``clustered``:
    ten documents a cluster, which share a factor of their KL and a part of their difference of nll.
    """
    generator = np.random.default_rng(seed)
    tokens = np.maximum(1, np.rint(generator.lognormal(5, 0.8, documents)))
    base = tokens * generator.normal(3, 0.4, documents)
    common = generator.standard_t(3, (documents, 1))  # strategies clip alike
    noise = common + generator.standard_t(3, (documents, strategies))
    nll = np.concatenate([base[:, None], base[:, None] + 0.05 * np.sqrt(tokens)[:, None] * noise], axis=1)
    kl = tokens[:, None] * generator.lognormal(-5, 0.7, (documents, strategies + 1))
    clusters = np.arange(documents) // 10
    of_cluster = generator.standard_normal((clusters[-1] + 1, strategies + 1))[clusters]
    if clustered:
        nll[:, 1:] += 0.05 * np.sqrt(tokens)[:, None] * of_cluster[:, 1:]
        kl = kl * np.exp(0.3 * of_cluster)
    return Documents(tokens, nll, kl, clusters)


def stored(path: Path, reference: str = "quamba") -> Documents:
    """The first text of a stored evaluation, without the float model, ``reference`` first."""
    table = pq.read_table(path, partitioning=None)
    table = table.filter(pc.equal(table["data"], table["data"][0])).sort_by("document")
    labels = [label for label in pc.unique(table["strategy"]).to_pylist() if label not in ("float", reference)]
    own = [table.filter(pc.equal(table["strategy"], label)) for label in [reference, *labels]]
    nll, kl = (np.stack([part[name].to_numpy() for part in own], axis=1) for name in ("nll", "kl"))
    tokens = own[0]["tokens"].to_numpy().astype(np.float64)
    # Evaluations from before there were clusters lack the column.
    names = own[0]["cluster"].to_pylist() if "cluster" in own[0].column_names else [None] * tokens.size
    return Documents(tokens, nll, kl, Units.of(names).codes)


def differences(found: Documents, figure: str) -> list[Difference]:
    """Every strategy's difference from the reference in one figure, as `evaluate` computes them."""
    kind, values = (RATIO, found.kl) if figure == "KL" else (EXPONENTIAL, found.nll)
    units = Units.of([None] * found.tokens.size)
    return comparisons.differences(kind, list(values[:, 1:].T), values[:, 0], found.tokens, units, 0)


def intervals(found: Documents, resamples: int) -> dict[str, Interval | None]:
    """The intervals that `evaluate` prints, of the reference and of the first strategy's difference from it."""
    mean, shares = linearised(found.nll[:, 0], found.tokens)
    kl, kl_shares = linearised(found.kl[:, 0], found.tokens)
    values = np.stack([found.nll[:, 0], found.kl[:, 0]], axis=1)
    drawn = resampled_t(values, found.tokens[:, None].repeat(2, axis=1), resamples, 0)
    other, other_shares = linearised(found.nll[:, 1], found.tokens)
    first, second = np.exp(mean), np.exp(other)
    return {
        "perplexity difference": student_interval(second - first, second * other_shares - first * shares),
        "KL difference": ratio_difference(found.kl[:, 1], found.kl[:, 0], found.tokens, 1.0).interval,
        "KL": bootstrap_t_interval(kl, standard_error(kl_shares), drawn[:, 1]),
        "log perplexity": bootstrap_t_interval(mean, standard_error(shares), drawn[:, 0]),
        "log perplexity by t": student_interval(mean, shares),
        "KL by t": student_interval(kl, kl_shares),
    }


def truths(population: Documents) -> dict[str, float]:
    """What the intervals are of."""
    nll, kl = population.per_token
    return {
        "perplexity difference": np.exp(nll[1]) - np.exp(nll[0]),
        "KL difference": kl[1] - kl[0],
        "KL": kl[0],
        "log perplexity": nll[0],
        "log perplexity by t": nll[0],
        "KL by t": kl[0],
    }


def coverage(population: Documents, n: int, experiments: int, resamples: int = 1000) -> dict[str, float]:
    """How often each interval holds the population's figure."""
    truth = truths(population)
    hits = dict.fromkeys(truth, 0)
    generator = np.random.default_rng(n)
    for _ in range(experiments):
        for name, interval in intervals(population.drawn(n, generator), resamples).items():
            hits[name] += interval is not None and interval[0] <= truth[name] <= interval[1]
    return {name: count / experiments for name, count in hits.items()}


def cluster_coverage(
    population: Documents, n: int, experiments: int, resamples: int = 1000
) -> tuple[dict[str, float], dict[str, float]]:
    """Of n clusters with all of their documents: how often each interval holds the population's figure where clusters
    are the units, and where their documents are.
    """
    truth = truths(population)
    hits: tuple[dict[str, float], dict[str, float]] = (dict.fromkeys(truth, 0.0), dict.fromkeys(truth, 0.0))
    generator = np.random.default_rng(n + 4)
    for _ in range(experiments):
        found = population.drawn_clusters(n, generator)
        for counted, one in zip(hits, (found.united(), found), strict=True):
            for name, interval in intervals(one, resamples).items():
                holds = interval is not None and interval[0] <= truth[name] <= interval[1]
                counted[name] += holds / experiments
    return hits


def verdicts(found: Documents, figure: str) -> list[str]:
    """The verdicts of every strategy on the reference, as `evaluate` gives them."""
    family = {str(i): difference for i, difference in enumerate(differences(found, figure))}
    columns = judged(family, Units.of([None] * found.tokens.size), smaller_is_better=True)
    return [str(one["_verdict"]) for one in columns.values()]


def false_alarms(population: Documents, n: int, experiments: int, figure: str = "perplexity") -> tuple[float, float]:
    """With every true difference zero: how often any strategy's corrected p is 5 % or less, and any gets a verdict."""
    null = population.shifted(np.zeros(population.nll.shape[1] - 1), figure)
    generator = np.random.default_rng(n + 1)
    small, alarms = 0, 0
    for _ in range(experiments):
        found = null.drawn(n, generator)
        p_values = [difference.p_value for difference in differences(found, figure)]
        small += len(p_values) * min(p_values) <= LEVEL  # the least p of Holm's
        alarms += any(words != statistics.NOT_DISTINGUISHABLE for words in verdicts(found, figure))
    return small / experiments, alarms / experiments


def power(population: Documents, n: int, experiments: int, figure: str = "perplexity") -> float:
    """How often the first strategy gets a verdict when its true difference is what `detectable` says, the others' zero.

    `detectable` is told the standard error that n documents of the population have.
    """
    strategies = population.nll.shape[1] - 1
    null = population.shifted(np.zeros(strategies), figure)
    error = differences(null, figure)[0].error * np.sqrt(population.tokens.size / n)
    smallest = detectable(error, n, strategies)
    by = np.zeros(strategies)
    by[0] = smallest if figure == "KL" else np.log1p(smallest / np.exp(null.per_token[0][0]))
    shifted = population.shifted(by, figure)
    generator = np.random.default_rng(n + 2)
    return sum(verdicts(shifted.drawn(n, generator), figure)[0] == "worse" for _ in range(experiments)) / experiments


def wrong_equivalence(population: Documents, n: int, experiments: int) -> float:
    """How often the first strategy is said to be within 0.5 % of the reference's perplexity, being just that far."""
    bound = np.log1p(0.005)
    by = np.zeros(population.nll.shape[1] - 1)
    by[0] = bound
    shifted = population.shifted(by)
    generator = np.random.default_rng(n + 5)
    said = 0
    for _ in range(experiments):
        found = shifted.drawn(n, generator)
        value, shares = linearised(found.nll[:, 1] - found.nll[:, 0], found.tokens)
        interval = student_interval(value, shares, EQUIVALENCE_LEVEL)
        said += equivalence(interval, (-bound, bound)) == "yes"
    return said / experiments


def share_coverage(n: int, experiments: int, right: float, discordant: tuple[float, float]) -> tuple[float, float]:
    """How often Wilson's interval holds a share of ``right``, and Newcombe's the difference of two paired shares, whose
    answers differ in ``discordant`` (only the first right, only the second) of all documents.
    """
    generator = np.random.default_rng(n + 3)
    first, second = discordant
    both = right - second
    counts = generator.multinomial(n, [both, first, second, 1 - both - first - second], experiments)
    alone = [wilson(int(count), n) for count in generator.binomial(n, right, experiments)]
    paired = [newcombe(*map(int, row)) for row in counts]
    return (
        sum(low <= right <= high for low, high in alone) / experiments,
        sum(low <= first - second <= high for low, high in paired) / experiments,
    )


def main(path: Path | None, experiments: int) -> None:
    population = stored(path) if path else made_up(5000, 10, 0)
    # A figure's own Monte-Carlo error is far larger than what fewer flips change.
    statistics.FLIPS = 4_999
    strategies = population.nll.shape[1] - 1
    name = path.name if path else "made up"
    print(f"{name}: {population.tokens.size} documents, {strategies} strategies, {experiments} experiments; in %")
    for n in (12, 24, 60, 200):
        figures = coverage(population, n, experiments)
        for figure in FIGURES:
            small, alarms = false_alarms(population, n, experiments, figure)
            figures |= {
                f"any corrected p <= 5 % of {figure}": small,
                f"any verdict on {figure}": alarms,
                f"power in {figure}": power(population, n, experiments, figure),
            }
        figures["equivalent at the bound"] = wrong_equivalence(population, n, experiments)
        print(f"n = {n}: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in figures.items()), flush=True)
    clustered = population if path else made_up(5000, 10, 0, clustered=True)
    known = clustered.clusters.max() + 1 < clustered.tokens.size
    for n in (12, 24, 36) if known else ():
        whole, apart = cluster_coverage(clustered, n, experiments, resamples=300)
        shown = ", ".join(f"{name} {100 * whole[name]:.1f} ({100 * apart[name]:.1f})" for name in whole)
        print(f"{n} clusters, as wholes (by documents): {shown}", flush=True)
    for right, discordant in ((0.1, (0.03, 0.015)), (0.02, (0.01, 0.005))):
        for n in (12, 24, 60, 200, 500):
            alone, paired = share_coverage(n, 20_000, right, discordant)
            print(
                f"n = {n}, share {right}: Wilson {100 * alone:.1f}, "
                f"Newcombe at {discordant} discordant {100 * paired:.1f}"
            )


if __name__ == "__main__":
    main(Path(sys.argv[2]) if sys.argv[2:] else None, int(sys.argv[1]) if sys.argv[1:] else 1000)
