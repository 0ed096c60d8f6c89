"""Paired statistics over documents: intervals, p-values, Holm's correction, verdicts.

The document is the unit: its tokens depend on one another, so whole documents are resampled or flipped. Where documents
are parts of a book or a topic, that is the unit, and "document" below stands for all of its documents together
(`quambase.apply.evaluation.comparisons`). Comparisons are paired, so what a document does to both strategies cancels.
docs/statistics.md has the methods and what they were measured to do.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

from quambase.schema.values.arrays import Float64

Interval = tuple[float, float]
"""The ends of an interval, of 95 % unless said otherwise."""

LEVEL = 0.05
"""How often an interval may miss the truth, and a family of comparisons with no real difference show one."""

POWER = 0.8

EQUIVALENCE_LEVEL = 0.1
"""Two one-sided tests at 5 % each show an equivalence exactly where the interval of this level lies in the bounds."""

WITHIN, MOST_WITHIN = 0.5, 50.0
"""How many percent of the floating-point model's perplexity (of accuracy: points) count as no loss, and the most that
may be asked for."""

MOST_NEEDED = 1_000_000
"""Largest number of needed documents that is named."""

FEWEST = 10
"""Below this many documents there are only values: no interval, no p-value, no verdict.

Nine documents that all point one way have p = 2/2^9, which Holm's correction over 13 strategies lifts above 5 %.
"""

FLIPS = 49_999
"""Random sign flips. The least p is 1/50,000, and Holm over 17 strategies makes it 0.0003; a p of 0.05/17 has a
Monte-Carlo standard deviation of 8 % of itself."""

EXACT_FLIPS = 16
"""Up to this many documents all sign flips are taken: 2^16, half of which mirror the other half."""

RESAMPLES = 10_000

FEWEST_RESAMPLES, MOST_RESAMPLES = 100, 100_000
"""What --bootstrap may be. 100,000 resamples of two figures of 18 strategies take 29 MB."""

STEADY_RESAMPLES = 1_000
"""From here the ends of a bootstrapped interval move by 2 % of its width (standard deviation) from seed to seed: a
quantile of 2.5 % of so many normal values has the error sqrt(0.025 * 0.975 / 1000) / 0.058 = 0.084, of 3.92."""

NOT_DISTINGUISHABLE = "not distinguishable"
NOT_FINITE = "not finite"
"""The verdict where a figure is NaN or infinite: nothing can be compared."""

NOT_KNOWN = "not known"

_CHUNK_CELLS = 4_000_000
"""Drawn documents, or flipped signs, held at once; bounds memory to about 100 MB."""


def linearised(values: Float64, weights: Float64) -> tuple[float, Float64]:
    """The ratio sum(values) / sum(weights) and each document's share in its error: (n,), (n,) -> ratio, (n,).

    The shares are the ratio's derivatives by the documents' weights in the sample (the delta method). They add up to
    zero, and those of a difference of two ratios are the differences of theirs.
    """
    ratio = float(values.sum() / weights.sum())
    with np.errstate(invalid="ignore"):  # an infinite value makes the ratio infinite and the shares NaN
        return ratio, (values - ratio * weights) / weights.sum()


def standard_error(shares: Float64) -> float:
    """The standard error of a figure whose documents have these ``shares`` (n,) in its error; infinite for one."""
    documents = shares.size
    if documents == 1:
        return math.inf
    return math.sqrt(documents / (documents - 1) * float(shares @ shares))


def student_quantile(probability: float, documents: int) -> float:
    """The quantile of Student's t with one degree of freedom less than ``documents``."""
    from scipy.special import stdtrit  # half a second to load, and only evaluations need it

    return float(stdtrit(documents - 1, probability))


def student_interval(value: float, shares: Float64, level: float = LEVEL) -> Interval | None:
    """``value`` -+ t standard errors of its linearised ``shares`` (n,); None where nothing varies or is not finite."""
    error = standard_error(shares)
    if not (math.isfinite(value) and 0 < error < math.inf):
        return None
    reach = student_quantile(1 - level / 2, shares.size) * error
    return value - reach, value + reach


def samples(documents: int, resamples: int, seed: int) -> Iterator[Float64]:
    """Bootstrap samples in chunks: how often each document is drawn, (rows, documents) float64.

    A sample is ``documents`` draws with replacement. It depends on ``seed``, ``documents`` and its place alone.
    """
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_CELLS // documents)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(0, documents, (rows, documents))
        drawn += np.arange(rows)[:, None] * documents
        yield np.bincount(drawn.ravel(), minlength=rows * documents).reshape(rows, documents).astype(np.float64)


def resampled_t(values: Float64, weights: Float64, resamples: int, seed: int) -> Float64:
    """Studentised ratios of bootstrap samples: values (n, m), weights (n, m) -> (resamples, m).

    Column j is (ratio* - ratio) / standard error*, starred what a sample of documents says. Every column sees the same
    samples. Where a sample's documents leave no error, it is 0 or infinite; NaN throughout a column of values that are
    not finite.
    """
    documents, columns = values.shape
    finite = np.isfinite(values).all(0)
    values = np.where(finite, values, 0.0)
    ratio = values.sum(0) / weights.sum(0)
    residual = values - ratio * weights
    # The sample's squared residuals from its own ratio follow from sums of products; residuals are from the whole
    # ratio, so that little cancels.
    stacked = np.concatenate([residual, residual**2, residual * weights, weights, weights**2], axis=1)
    found = np.empty((resamples, columns))
    start = 0
    for times in samples(documents, resamples, seed):
        total, squares, products, weight, weight_squares = np.split(times @ stacked, 5, axis=1)
        shift = total / weight
        parts = squares, 2 * shift * products, shift**2 * weight_squares
        spread = parts[0] - parts[1] + parts[2]
        # What is left of a spread of zero after rounding: a few units in the last place of its three parts.
        rounding = 4 * documents * np.finfo(np.float64).eps * (parts[0] + abs(parts[1]) + parts[2])
        spread[spread <= rounding] = 0
        with np.errstate(divide="ignore", invalid="ignore"):
            studentised = total / np.sqrt(documents / (documents - 1) * spread)
        studentised[total == 0] = 0
        found[start : start + len(times)] = studentised
        start += len(times)
    found[:, ~finite] = np.nan
    return found


def bootstrap_t_interval(value: float, error: float, studentised: Float64) -> Interval | None:
    """The bootstrap-t interval from resampled_t's column; None where nothing varies or an end is not finite."""
    if not (math.isfinite(value) and 0 < error < math.inf) or np.isnan(studentised).any():
        return None
    tail = LEVEL / 2
    # Not interpolated: between two infinite values there is no number.
    least, largest = np.quantile(studentised, [tail, 1 - tail], method="closest_observation")
    low, high = value - largest * error, value - least * error
    return (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None


def wilson(successes: int, total: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share: the p with |share - p| <= z sqrt(p (1 - p) / total)."""
    z = NormalDist().inv_cdf(1 - level / 2)
    share = successes / total
    middle = share + z**2 / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def newcombe(both: int, only_first: int, only_second: int, neither: int, level: float = LEVEL) -> Interval:
    """The interval of first share - second share of the same documents: Newcombe's method 10.

    R. G. Newcombe, Improved confidence intervals for the difference between binomial proportions based on paired data,
    Statistics in Medicine 17 (1998): Wilson's intervals of the two shares, joined by the correlation of the answers.
    """
    total = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    margins = first * (total - first) * second * (total - second)
    covariance = float(both * neither - only_first * only_second)
    if covariance > 0:
        covariance = max(covariance - total / 2, 0.0)
    correlation = covariance / math.sqrt(margins) if margins else 0.0
    (low1, high1), (low2, high2) = wilson(first, total, level), wilson(second, total, level)
    below1, above1 = first / total - low1, high1 - first / total
    below2, above2 = second / total - low2, high2 - second / total
    value = (only_first - only_second) / total
    below = below1**2 - 2 * correlation * below1 * above2 + above2**2
    above = above1**2 - 2 * correlation * above1 * below2 + below2**2
    return value - math.sqrt(max(below, 0.0)), value + math.sqrt(max(above, 0.0))


def sign_flip_p(differences: Float64, seed: int) -> Float64:
    """Two-sided p that two strategies do alike: per-document differences (n, m) -> (m,); NaN for one not finite.

    Were they alike, their results of a document could as well be swapped, which flips the sign of its difference. p is
    the share of all 2^n flips whose sum is at least as far from zero as the sum seen; beyond EXACT_FLIPS documents
    (1 + count) / (1 + FLIPS) of random ones, which keeps its level (Phipson and Smyth 2010). Every column sees the same
    flips.

    It is a test of ratios, not only of sums. Perplexity is exp(sum nll / sum tokens), and both strategies have the same
    tokens W in every document. Swaps leave A + B, the sum of both nll, so exp(A/W) - exp(B/W) grows with A - B alone:
    ordering the flips by the sum of differences of nll orders them by the printed difference of perplexity. (With the
    linearised shares in place of the differences this would hold only to first order.) So it is with KL per token.
    """
    documents = len(differences)
    finite = np.isfinite(differences).all(0)
    differences = np.where(finite, differences, 0.0)
    total = differences.sum(0)
    # Sums that are equal but for the order of their additions count as equal.
    least = abs(total) - documents * np.finfo(np.float64).eps * abs(differences).sum(0)
    if documents <= EXACT_FLIPS:
        # The last sign stays: flipping all signs changes no absolute sum.
        flipped = (np.arange(2 ** (documents - 1))[:, None] >> np.arange(documents)) & 1
        found = (abs(total - 2 * (flipped @ differences)) >= least).mean(0)
    else:
        generator = np.random.default_rng(seed)
        chunk = max(1, _CHUNK_CELLS // documents)
        count = np.zeros(differences.shape[1], np.int64)
        for start in range(0, FLIPS, chunk):
            flipped = generator.integers(0, 2, (min(chunk, FLIPS - start), documents), np.uint8)
            count += (abs(total - 2 * (flipped @ differences)) >= least).sum(0)
        found = (1 + count) / (1 + FLIPS)
    return np.where(finite, found, np.nan)


def least_sign_flip_p(documents: int) -> float:
    """The least p that sign_flip_p can give."""
    return 2.0 ** (1 - documents) if documents <= EXACT_FLIPS else 1 / (1 + FLIPS)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided p: discordant pairs split as a fair coin (1 where there are none)."""
    total = only_first + only_second
    fewer = min(only_first, only_second)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**total))


def least_discordant(comparisons: int = 1) -> int:
    """How many discordant pairs, all in one direction, McNemar's exact test needs before it can say anything.

    Holm's correction over ``comparisons`` is counted in. Fewer pairs cannot be significant, so no difference below this
    many documents can be shown, however alike the rest are.
    """
    pairs = 1
    while comparisons * mcnemar_exact(pairs, 0) > LEVEL:
        pairs += 1
    return pairs


def detectable(error: float, documents: int, comparisons: int) -> float:
    """The true difference that gets a verdict with power 0.8, from the ``error`` (standard) of the difference seen.

    One real difference among ``comparisons`` has the least p, which Holm multiplies by their number. So it must lie t
    at 1 - 0.05 / (2 comparisons) standard errors from zero, and in 8 samples of 10 it does where the truth is further
    by t at 0.8. With many documents and 10 comparisons that is 2.81 + 0.84 standard errors. Student's t stands for the
    estimated error. Of real documents 12 have power 0.6, 24 have 0.7, 60 and more nearly 0.8 (docs/statistics.md).
    """
    tail = LEVEL / (2 * comparisons)
    return (student_quantile(1 - tail, documents) + student_quantile(POWER, documents)) * error


def can_reach_a_verdict(documents: int, comparisons: int) -> bool:
    """Whether the least p that so many documents can give (McNemar's is the same, or less) survives the correction."""
    return comparisons * least_sign_flip_p(documents) <= LEVEL


def documents_needed(value: float, error: float, documents: int, comparisons: int) -> int | None:
    """The least number of documents on which a difference of ``value`` is `detectable`: has power 0.8 to get a verdict.

    ``error`` is its standard error on ``documents``; that of m documents is sqrt(documents / m) as large. None: nothing
    varies or differs, or MOST_NEEDED would not do.
    """
    if not (0 < error < math.inf and 0 < abs(value) < math.inf):
        return None

    def enough(count: int) -> bool:
        smallest = detectable(error * math.sqrt(documents / count), count, comparisons)
        return can_reach_a_verdict(count, comparisons) and smallest <= abs(value)

    if not enough(MOST_NEEDED):
        return None
    return bisect_left(range(MOST_NEEDED), True, lo=FEWEST, key=enough)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def equivalence(interval: Interval | None, bounds: Interval) -> str:
    """``yes``: the interval (of EQUIVALENCE_LEVEL) lies within the bounds; ``no``: outside; ``not known``."""
    if interval is None:
        return NOT_KNOWN
    if bounds[0] <= interval[0] and interval[1] <= bounds[1]:
        return "yes"
    return "no" if interval[1] < bounds[0] or bounds[1] < interval[0] else NOT_KNOWN


def misses_zero(interval: Interval | None) -> bool:
    """Whether an interval lies on one side of zero."""
    return interval is not None and not interval[0] <= 0 <= interval[1]


def verdict(value: float, interval: Interval | None, adjusted_p: float, *, smaller_is_better: bool) -> str:
    """Better or worse where the interval misses zero and the corrected p is 5 % or less; else not distinguishable."""
    if not (misses_zero(interval) and adjusted_p <= LEVEL):
        return NOT_DISTINGUISHABLE
    return "better" if (value < 0) == smaller_is_better else "worse"
