"""How often the intervals of `evaluate` hold the truth, and how often its verdicts see differences that are not there.

    python benchmarks/simulate_statistics.py [EXPERIMENTS [RESULTS.parquet]]

Experiments draw n documents out of a population whose figures are known. The population is made up here (heavy tails,
lognormal lengths), or it is the first text of a stored evaluation. docs/statistics.md has what this printed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq

from quambase.apply.evaluation import paired_statistics as statistics
from quambase.apply.evaluation.paired_statistics import (
    LEVEL,
    Interval,
    bootstrap_t_interval,
    detectable,
    holm,
    linearised,
    newcombe,
    resampled_t,
    sign_flip_p,
    standard_error,
    student_interval,
    verdict,
    wilson,
)

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Documents:
    """tokens (N,); nll and kl (N, strategies), nll's first column the reference's."""

    tokens: Float64
    nll: Float64
    kl: Float64

    @property
    def per_token(self) -> tuple[Float64, Float64]:
        """Mean nll and KL per token of each strategy."""
        return self.nll.sum(0) / self.tokens.sum(), self.kl.sum(0) / self.tokens.sum()

    def drawn(self, n: int, generator: np.random.Generator) -> Documents:
        """n documents with replacement."""
        rows = generator.integers(0, self.tokens.size, n)
        return Documents(self.tokens[rows], self.nll[rows], self.kl[rows])

    def shifted(self, by: Float64) -> Documents:
        """The population whose strategies differ from the reference by ``by`` (strategies - 1,) nats per token."""
        nll = self.nll.copy()
        mean = self.per_token[0]
        nll[:, 1:] += self.tokens[:, None] * (mean[0] + by - mean[1:])
        return Documents(self.tokens, nll, self.kl)


def made_up(documents: int, strategies: int, seed: int) -> Documents:
    """Lognormal lengths, Student's t with 3 degrees of freedom for differences of nll, lognormal KL."""
    generator = np.random.default_rng(seed)
    tokens = np.maximum(1, np.rint(generator.lognormal(5, 0.8, documents)))
    base = tokens * generator.normal(3, 0.4, documents)
    common = generator.standard_t(3, (documents, 1))  # strategies clip alike
    noise = common + generator.standard_t(3, (documents, strategies))
    nll = np.concatenate([base[:, None], base[:, None] + 0.05 * np.sqrt(tokens)[:, None] * noise], axis=1)
    kl = tokens[:, None] * generator.lognormal(-5, 0.7, (documents, strategies + 1))
    return Documents(tokens, nll, kl)


def stored(path: Path, reference: str = "quamba") -> Documents:
    """The first text of a stored evaluation, without the float model, ``reference`` first."""
    table = pq.read_table(path, partitioning=None)
    table = table.filter(pc.equal(table["data"], table["data"][0])).sort_by("document")
    labels = [label for label in pc.unique(table["strategy"]).to_pylist() if label not in ("float", reference)]
    own = [table.filter(pc.equal(table["strategy"], label)) for label in [reference, *labels]]
    nll, kl = (np.stack([part[name].to_numpy() for part in own], axis=1) for name in ("nll", "kl"))
    return Documents(own[0]["tokens"].to_numpy().astype(np.float64), nll, kl)


def intervals(found: Documents, resamples: int) -> dict[str, Interval | None]:
    """The intervals that `evaluate` prints, of the reference and of the first strategy's difference from it."""
    mean, shares = linearised(found.nll[:, 0], found.tokens)
    other, other_shares = linearised(found.nll[:, 1], found.tokens)
    kl, kl_shares = linearised(found.kl[:, 0], found.tokens)
    other_kl, other_kl_shares = linearised(found.kl[:, 1], found.tokens)
    values = np.stack([found.nll[:, 0], found.kl[:, 0]], axis=1)
    drawn = resampled_t(values, found.tokens[:, None].repeat(2, axis=1), resamples, 0)
    first, second = np.exp(mean), np.exp(other)
    return {
        "perplexity difference": student_interval(second - first, second * other_shares - first * shares),
        "KL difference": student_interval(other_kl - kl, other_kl_shares - kl_shares),
        "KL": bootstrap_t_interval(kl, standard_error(kl_shares), drawn[:, 1]),
        "log perplexity": bootstrap_t_interval(mean, standard_error(shares), drawn[:, 0]),
        "log perplexity by t": student_interval(mean, shares),
        "KL by t": student_interval(kl, kl_shares),
    }


def coverage(population: Documents, n: int, experiments: int, resamples: int = 1000) -> dict[str, float]:
    """How often each interval holds the population's figure."""
    nll, kl = population.per_token
    truth = {
        "perplexity difference": np.exp(nll[1]) - np.exp(nll[0]),
        "KL difference": kl[1] - kl[0],
        "KL": kl[0],
        "log perplexity": nll[0],
        "log perplexity by t": nll[0],
        "KL by t": kl[0],
    }
    hits = dict.fromkeys(truth, 0)
    generator = np.random.default_rng(n)
    for _ in range(experiments):
        for name, interval in intervals(population.drawn(n, generator), resamples).items():
            hits[name] += interval is not None and interval[0] <= truth[name] <= interval[1]
    return {name: count / experiments for name, count in hits.items()}


def verdicts(found: Documents, seed: int = 0) -> list[str]:
    """The verdicts of every strategy on the reference, by perplexity, as `evaluate` gives them."""
    means, shares = zip(*(linearised(column, found.tokens) for column in found.nll.T), strict=True)
    perplexities = np.exp(means)
    adjusted = holm(sign_flip_p(found.nll[:, 1:] - found.nll[:, :1], seed).tolist())
    words = []
    for j, p_value in enumerate(adjusted, 1):
        value = perplexities[j] - perplexities[0]
        interval = student_interval(value, perplexities[j] * shares[j] - perplexities[0] * shares[0])
        words.append(verdict(value, interval, p_value, smaller_is_better=True))
    return words


def false_alarms(population: Documents, n: int, experiments: int) -> tuple[float, float]:
    """With every true difference zero: how often any strategy's corrected p is 5 % or less, and any gets a verdict."""
    null = population.shifted(np.zeros(population.nll.shape[1] - 1))
    generator = np.random.default_rng(n + 1)
    small, alarms = 0, 0
    for _ in range(experiments):
        found = null.drawn(n, generator)
        small += min(holm(sign_flip_p(found.nll[:, 1:] - found.nll[:, :1], 0).tolist())) <= LEVEL
        alarms += any(words != "not distinguishable" for words in verdicts(found))
    return small / experiments, alarms / experiments


def power(population: Documents, n: int, experiments: int) -> float:
    """How often the first strategy gets a verdict when its true difference is what `detectable` says, the others' zero.

    `detectable` is told the standard error that n documents of the population have.
    """
    strategies = population.nll.shape[1] - 1
    null = population.shifted(np.zeros(strategies))
    base = np.exp(null.per_token[0][0])
    shares = (linearised(null.nll[:, 1], null.tokens)[1] - linearised(null.nll[:, 0], null.tokens)[1]) * base
    error = standard_error(shares) * np.sqrt(population.tokens.size / n)
    by = np.zeros(strategies)
    by[0] = np.log1p(detectable(error, n, strategies) / base)
    shifted = population.shifted(by)
    generator = np.random.default_rng(n + 2)
    return sum(verdicts(shifted.drawn(n, generator))[0] == "worse" for _ in range(experiments)) / experiments


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
        small, alarms = false_alarms(population, n, experiments)
        figures = {
            **coverage(population, n, experiments),
            "any corrected p <= 5 %": small,
            "any verdict": alarms,
            "power": power(population, n, experiments),
        }
        print(f"n = {n}: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in figures.items()), flush=True)
    for right, discordant in ((0.1, (0.03, 0.015)), (0.02, (0.01, 0.005))):
        for n in (12, 24, 60, 200, 500):
            alone, paired = share_coverage(n, 20_000, right, discordant)
            print(
                f"n = {n}, share {right}: Wilson {100 * alone:.1f}, "
                f"Newcombe at {discordant} discordant {100 * paired:.1f}"
            )


if __name__ == "__main__":
    main(Path(sys.argv[2]) if sys.argv[2:] else None, int(sys.argv[1]) if sys.argv[1:] else 1000)
