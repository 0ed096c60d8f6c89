# mypy: disable-error-code="call-overload, misc"
"""Intervals, p-values and the summary, each against a slow twin, scipy, or a published example."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, permutation_test
from scipy.stats import t as student

from quambase.apply.evaluation import paired_statistics as statistics
from quambase.apply.evaluation import sentences, summary, summary_text
from quambase.apply.evaluation.paired_statistics import (
    bootstrap_t_interval,
    detectable,
    holm,
    least_discordant,
    least_sign_flip_p,
    linearised,
    mcnemar_exact,
    newcombe,
    resampled_t,
    samples,
    sign_flip_p,
    standard_error,
    student_interval,
    student_quantile,
    verdict,
    wilson,
)
from quambase.apply.evaluation.stored import Evaluation
from quambase.cli.evaluate import emit_evaluation
from quambase.cli.evaluate import evaluate as evaluate_command
from quambase.cli.results import results as results_command
from quambase.schema.errors import DatabaseInvalid, DataInvalid
from quambase.schema.tables import RESULTS


def binomial_test(successes: int, total: int) -> Fraction:
    """Exact two-sided p of a fair coin: every outcome no likelier than the one seen."""
    chances = [Fraction(math.comb(total, k), 2**total) for k in range(total + 1)]
    return sum((chance for chance in chances if chance <= chances[successes]), Fraction(0))


def test_samples_count_the_drawn_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_CHUNK_CELLS", 35)  # five samples at a time: several chunks, the last one short
    found = np.concatenate(list(samples(7, 23, seed=5)))
    generator = np.random.default_rng(5)
    drawn = np.concatenate([generator.integers(0, 7, (min(5, 23 - start), 7)) for start in range(0, 23, 5)])
    np.testing.assert_array_equal(found, [[list(row).count(i) for i in range(7)] for row in drawn])


def test_shares_are_the_ratios_derivatives_and_give_the_textbook_error() -> None:
    generator = np.random.default_rng(0)
    weights = generator.uniform(1, 9, 11)
    values = weights * generator.normal(3, 1, 11)
    ratio, shares = linearised(values, weights)
    assert ratio == pytest.approx(sum(values) / sum(weights), rel=1e-14)
    for i in range(11):
        # A document counted 1 + h times. The second derivative over the first is 2 w / sum w, below 1: h/2 is 5e-7.
        times = np.ones(11)
        times[i] += 1e-6
        moved = (times @ values) / (times @ weights)
        assert (moved - ratio) / 1e-6 == pytest.approx(shares[i], rel=1e-6, abs=1e-9)
    # Cochran, Sampling Techniques, 6.4, without the finite population's factor.
    squares = sum((y - ratio * w) ** 2 for y, w in zip(values, weights, strict=True)) / 10
    assert standard_error(shares) == pytest.approx(math.sqrt(squares / 11) / (sum(weights) / 11), rel=1e-12)


def test_student_interval() -> None:
    # Quantiles as tables print them.
    for documents, quantile in ((10, 2.262), (12, 2.201), (24, 2.069), (61, 2.000)):
        assert student_quantile(0.975, documents) == pytest.approx(quantile, abs=5e-4)
    values = np.random.default_rng(1).normal(2, 1, 14)
    mean, shares = linearised(values, np.ones(14))
    # With weights of one it is the mean's interval. scipy's quantiles and ours come from different inversions.
    expected = student.interval(0.95, 13, loc=values.mean(), scale=values.std(ddof=1) / math.sqrt(14))
    assert student_interval(mean, shares) == pytest.approx(expected, rel=1e-10)
    assert student_interval(0.0, np.zeros(14)) is None
    assert student_interval(math.nan, shares) is None


def test_resampled_t_by_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_CHUNK_CELLS", 13 * 7)
    generator = np.random.default_rng(2)
    weights = np.stack([generator.uniform(1, 50, 13), np.ones(13)], axis=1)
    values = weights * generator.lognormal(0, 1, (13, 2))
    found = resampled_t(values, weights, 40, seed=3)
    for row, times in zip(found, np.concatenate(list(samples(13, 40, 3))), strict=True):
        documents = [i for i in range(13) for _ in range(int(times[i]))]
        for j in range(2):
            y, w = values[documents, j], weights[documents, j]
            ratio = sum(y) / sum(w)
            error = math.sqrt(sum((y - ratio * w) ** 2) / 12 * 13) / sum(w)
            expected = (ratio - values[:, j].sum() / weights[:, j].sum()) / error
            # The squares are got by subtraction of parts a thousand times as large at most.
            assert row[j] == pytest.approx(expected, rel=1e-10)


def test_bootstrap_t_takes_the_outer_five_percent_and_knows_when_there_is_nothing_to_know() -> None:
    studentised = np.arange(-1000.0, 1001.0) / 500 + 0.3
    # The 2.5 % and 97.5 % quantiles are -1.9 + 0.3 and 1.9 + 0.3; they change places and signs.
    assert bootstrap_t_interval(5.0, 0.1, studentised) == pytest.approx((5 - 0.22, 5 + 0.16), abs=2e-4)
    assert bootstrap_t_interval(5.0, 0.0, np.zeros(100)) is None
    # One document in twelve has all of the KL: a third of the samples miss it and know no upper end.
    values = np.zeros((12, 2))
    values[3, 0] = 1.0
    values[4, 1] = math.inf
    found = resampled_t(values, np.ones((12, 2)), 500, seed=0)
    assert np.isneginf(found[:, 0]).mean() == pytest.approx((11 / 12) ** 12, abs=0.11)  # five standard deviations
    ratio, shares = linearised(values[:, 0], np.ones(12))
    assert bootstrap_t_interval(ratio, standard_error(shares), found[:, 0]) is None
    assert np.isnan(found[:, 1]).all()
    # Samples of the ten documents that are at the ratio itself say no difference, not 0/0.
    values = np.array([[1.0]] * 10 + [[0.5], [1.5]])
    found = resampled_t(values, np.ones((12, 1)), 500, seed=0)
    assert (found == 0).mean() > (10 / 12) ** 12 / 2 and np.isfinite(found).all()


def perplexity(nll: Any, tokens: Any) -> float:
    return math.exp(sum(nll) / sum(tokens))


def test_sign_flips_are_every_swap_of_documents_in_the_printed_perplexities() -> None:
    """Swap two strategies' results in every subset of ten documents, and take their perplexities anew."""
    generator = np.random.default_rng(4)
    tokens = generator.integers(3, 90, 10)
    first = tokens * generator.normal(3, 0.5, 10)
    found = []
    for shift in (0.0, 0.02, 0.06):
        second = first + tokens * generator.normal(shift, 0.05, 10)
        seen = abs(perplexity(first, tokens) - perplexity(second, tokens))
        as_far = 0
        for swaps in itertools.product((False, True), repeat=10):
            here, there = np.where(swaps, second, first), np.where(swaps, first, second)
            as_far += abs(perplexity(here, tokens) - perplexity(there, tokens)) >= seen * (1 - 1e-12)
        (p_value,) = sign_flip_p((second - first)[:, None], seed=0)
        assert p_value == as_far / 2**10

        def difference(x: Any, y: Any, axis: Any, tokens: Any = tokens) -> Any:
            return np.exp(x.sum(axis) / tokens.sum()) - np.exp(y.sum(axis) / tokens.sum())

        scipys = permutation_test((first, second), difference, permutation_type="samples", n_resamples=np.inf)
        assert p_value == pytest.approx(scipys.pvalue, rel=1e-12)
        found.append(p_value)
    assert found[2] < 0.05 < found[0]  # both ends of the range were seen


def test_random_sign_flips_come_to_the_exact_share(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(5).normal([0.0, 0.4, 1.5], 1, (17, 3))
    signs = (np.arange(2**17)[:, None] >> np.arange(17) & 1) * 2 - 1
    exact = (abs(signs @ differences) >= abs(differences.sum(0)) - 1e-12).mean(0)
    found = sign_flip_p(differences, seed=1)
    # Five standard deviations of a share of 49,999, and the one that is added.
    error = 5 * np.sqrt(exact * (1 - exact) / 49_999) + 1 / 50_000
    assert (abs(found - exact) <= error).all() and exact[2] < 0.001 < 0.05 < exact[0]
    monkeypatch.setattr(statistics, "_CHUNK_CELLS", 17 * 1000)
    # Other chunks draw the same bits in the same order, or very nearly so: the same share either way.
    assert (abs(sign_flip_p(differences, seed=1) - exact) <= error).all()


@pytest.mark.parametrize("documents", [12, 40])
def test_sign_flips_of_nothing_and_of_what_is_not_finite(documents: int) -> None:
    differences = np.random.default_rng(6).normal(3, 1, (documents, 4))
    differences[:, 1] = 0
    differences[2, 2] = math.nan
    differences[:, 3] = 0.1
    found = sign_flip_p(differences, seed=0)
    assert found[0] == found[3] == least_sign_flip_p(documents)
    assert found[1] == 1 and math.isnan(found[2])


def test_sums_that_differ_by_rounding_alone_are_equal() -> None:
    """Tenths, whose sums round: flipping 0.1, 0.2 and -0.3 together leaves the sum as it is."""
    whole = np.array([[1, 2, -3, 4, 1, -2, 5, 3, 2, -1, 3]], float).T
    assert sign_flip_p(whole / 10, seed=0) == sign_flip_p(whole, seed=0)  # integers are added exactly


@given(st.integers(0, 200), st.integers(1, 200))
@settings(max_examples=80, deadline=None)
def test_wilson_as_scipy_has_it(successes: Any, more: Any) -> None:
    total = successes + more - 1 or 1
    expected = binomtest(successes, total).proportion_ci(0.95, method="wilson")
    assert wilson(successes, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("table", "low", "high"), [((36, 12, 2, 0), 0.0569, 0.3404), ((20, 12, 2, 16), 0.0562, 0.3292)]
)
def test_newcombe_as_published(table: Any, low: float, high: float) -> None:
    """Method 10 in the examples of Newcombe (1998), Statistics in Medicine 17, table III; four digits."""
    assert newcombe(*table) == pytest.approx((low, high), abs=5e-5)
    both, first, second, neither = table
    assert newcombe(both, second, first, neither) == pytest.approx((-high, -low), abs=5e-5)


@given(st.integers(0, 40), st.integers(0, 9), st.integers(0, 9), st.integers(1, 40))
@settings(max_examples=80, deadline=None)
def test_newcombe_from_its_definition(both: Any, first: Any, second: Any, neither: Any) -> None:
    n = both + first + second + neither
    ends = [binomtest(k, n).proportion_ci(0.95, method="wilson") for k in (both + first, both + second)]
    p1, p2 = (both + first) / n, (both + second) / n
    margins = math.prod([both + first, second + neither, both + second, first + neither])
    product = both * neither - first * second
    phi = 0 if not margins else (max(product - n / 2, 0) if product > 0 else product) / math.sqrt(margins)
    d1, d2 = p1 - ends[0].low, ends[1].high - p2
    u1, u2 = ends[0].high - p1, p2 - ends[1].low
    below = math.sqrt(d1**2 - 2 * phi * d1 * d2 + d2**2)
    above = math.sqrt(u1**2 - 2 * phi * u1 * u2 + u2**2)
    assert newcombe(both, first, second, neither) == pytest.approx((p1 - p2 - below, p1 - p2 + above), abs=1e-7)


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_two_sided_binomial_test(first: Any, second: Any) -> None:
    expected = float(binomial_test(first, first + second))
    assert mcnemar_exact(first, second) == pytest.approx(expected, rel=1e-15)  # one division of exact integers


def test_mcnemar_by_enumeration() -> None:
    # All 2^8 ways that eight discordant pairs can fall, those at least as uneven as 2 : 6.
    extreme = sum(min(sum(way), 8 - sum(way)) <= 2 for way in itertools.product((0, 1), repeat=8))
    assert mcnemar_exact(2, 6) == mcnemar_exact(6, 2) == extreme / 2**8
    assert mcnemar_exact(4, 4) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms())
@settings(max_examples=60, deadline=None)
def test_holm_by_definition(p_values: Any, random: Any) -> None:
    adjusted = holm(p_values)
    for alpha in (0.01, 0.05, 0.2, 0.7):
        # Step down: reject the smallest while p <= alpha / (hypotheses left).
        rejected = set()
        for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
            if p_values[index] * (len(p_values) - place) > alpha:
                break
            rejected.add(index)
        assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected
    order = list(range(len(p_values)))
    random.shuffle(order)
    assert holm([p_values[i] for i in order]) == [adjusted[i] for i in order]


def test_least_discordant_pairs_count_the_correction() -> None:
    """Six pairs, all one way, are the fewest that McNemar's exact test calls significant: 2/2^6 <= 0.05 < 2/2^5."""
    assert least_discordant() == 6 and mcnemar_exact(6, 0) <= 0.05 < mcnemar_exact(5, 0)
    assert least_discordant(10) == 9  # 20 / 2^9 = 0.039


def test_detectable_is_what_holm_leaves() -> None:
    normal = NormalDist()
    expected = normal.inv_cdf(1 - 0.05 / 20) + normal.inv_cdf(0.8)
    # Of a million documents Student's t is the normal distribution; its quantiles differ by z (z^2 + 1) / 4e6.
    assert detectable(2.0, 10**6, 10) == pytest.approx(2 * expected, rel=1e-5)
    expected = student.ppf(1 - 0.05 / 20, 11) + student.ppf(0.8, 11)
    assert detectable(1.0, 12, 10) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("value", "interval", "p_value", "words"),
    [
        (-0.1, (-0.2, -0.01), 0.01, "better"),
        (0.1, (0.01, 0.2), 0.05, "worse"),
        (0.1, (-0.01, 0.2), 0.01, "not distinguishable"),
        (0.1, (0.0, 0.2), 0.01, "not distinguishable"),
        (0.1, (0.01, 0.2), 0.06, "not distinguishable"),
        (0.0, None, 1.0, "not distinguishable"),
    ],
)
def test_verdict(value: float, interval: Any, p_value: float, words: str) -> None:
    assert verdict(value, interval, p_value, smaller_is_better=True) == words
    mirrored = {"better": "worse", "worse": "better"}
    assert verdict(value, interval, p_value, smaller_is_better=False) == mirrored.get(words, words)


def results(documents: int, strategies: dict[str, float], task: str = "perplexity", seed: int = 0) -> pa.Table:
    """Per-document rows; a strategy's nll is the float's times (1 + its figure), noisily."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, 60, documents)
    base = tokens * generator.uniform(2, 4, documents)
    rows = []
    for label, worse in {"float": 0.0, **strategies}.items():
        noise = 0 if label == "float" else generator.normal(0, 0.01, documents)
        nll = base * (1 + worse + noise)
        right = (base / tokens < 3) ^ ((generator.uniform(size=documents) < abs(worse)) & (label != "float"))
        for i in generator.permutation(documents):  # the order of rows must not matter
            rows.append(
                dict.fromkeys(RESULTS.names)
                | {"strategy": label, "task": task, "data": "t", "document": int(i), "tokens": int(tokens[i])}
                | {
                    "nll": float(nll[i]),
                    "kl": float(abs(noise[i]) if label != "float" else 0),
                    "top1_agreement": 3,
                    "top1_right": 2,
                }
                | {"correct": bool(right[i]) if task == "last-word" else None}
            )
    return pa.Table.from_pylist(rows, RESULTS)


def by_document(table: pa.Table, label: str, name: str) -> list[float]:
    rows = [row for row in table.to_pylist() if row["strategy"] == label]
    return [float(row[name]) for row in sorted(rows, key=lambda row: row["document"])]


def test_summary_of_perplexity_by_loops() -> None:
    table = results(15, {"quamba": 0.02, "mse": 0.0})
    found = {row["strategy"]: row for row in summary.summarize(table, bootstrap=120, seed=9).to_pylist()}
    tokens = by_document(table, "float", "tokens")
    total = sum(tokens)
    draws = np.random.default_rng(9).integers(0, 15, (120, 15))

    def ratio(values: Any, sample: Any) -> tuple[float, float]:
        """The ratio of a sample's sums, and its standard error."""
        mean = sum(values[i] for i in sample) / sum(tokens[i] for i in sample)
        squares = sum((values[i] - mean * tokens[i]) ** 2 for i in sample)
        return mean, math.sqrt(15 / 14 * squares) / sum(tokens[i] for i in sample)

    def by_bootstrap(values: Any) -> list[float]:
        mean, error = ratio(values, range(15))
        drawn = [(m - mean) / e for m, e in (ratio(values, sample) for sample in draws)]
        low, high = np.quantile(drawn, [0.025, 0.975], method="closest_observation")
        return [mean - high * error, mean - low * error]

    nll = {label: by_document(table, label, "nll") for label in ("float", "quamba", "mse")}
    for label, own in nll.items():
        row = found[label]
        # Float64 sums of 15 terms, exponentiated.
        assert row["perplexity"] == pytest.approx(perplexity(own, tokens), rel=1e-12)
        expected = [math.exp(end) for end in by_bootstrap(own)]
        assert [row["perplexity_low"], row["perplexity_high"]] == pytest.approx(expected, rel=1e-10)
        if label != "float":
            low, high = by_bootstrap(by_document(table, label, "kl"))
            assert [row["kl_low"], row["kl_high"]] == pytest.approx([max(0, low), high], rel=1e-10)
        assert row["tokens"] == total and row["documents"] == 15 and row["accuracy"] is None
    assert (found["float"]["kl"], found["float"]["kl_low"], found["float"]["kl_high"]) == (0, None, None)
    for reference, others in (("float", ["quamba", "mse"]), ("quamba", ["mse"])):
        p_values = []
        for label in others:
            row = found[label]
            first, second = perplexity(nll[label], tokens), perplexity(nll[reference], tokens)
            shares = [
                first * (a / total - math.log(first) * t / total) - second * (b / total - math.log(second) * t / total)
                for a, b, t in zip(nll[label], nll[reference], tokens, strict=True)
            ]
            error = math.sqrt(15 / 14 * sum(share**2 for share in shares))
            reach = student.ppf(0.975, 14) * error
            expected = [first - second, first - second - reach, first - second + reach]
            assert [row[f"vs_{reference}{end}"] for end in ("", "_low", "_high")] == pytest.approx(expected, abs=1e-10)
            factor = student.ppf(1 - 0.025 / len(others), 14) + student.ppf(0.8, 14)
            assert row[f"vs_{reference}_detectable"] == pytest.approx(factor * error, rel=1e-9)
            d = np.array(nll[label]) - nll[reference]
            signs = np.array(list(itertools.product((1, -1), repeat=15)))
            p_values.append(float((abs(signs @ d) >= abs(d.sum()) * (1 - 1e-12)).mean()))
        expected = holm(p_values)
        assert [found[label][f"vs_{reference}_p"] for label in others] == pytest.approx(expected, rel=1e-12)
    assert found["quamba"]["vs_float_verdict"] == "worse"
    assert found["mse"]["vs_quamba_verdict"] == "better"
    assert found["float"]["vs_float"] is None and found["quamba"]["vs_quamba"] is None


def test_summary_of_last_words() -> None:
    table = results(400, {"quamba": 0.2, "same": 0.0}, task="last-word")
    found = {row["strategy"]: row for row in summary.summarize(table, bootstrap=300).to_pylist()}
    right = {label: by_document(table, label, "correct") for label in ("float", "quamba", "same")}
    assert found["quamba"]["accuracy"] == pytest.approx(sum(right["quamba"]) / 400, rel=1e-15)
    only = sum(a > b for a, b in zip(right["quamba"], right["float"], strict=True))
    other = sum(a < b for a, b in zip(right["quamba"], right["float"], strict=True))
    # Two strategies compared with float; the smaller p is doubled, "same" has p = 1.
    assert found["quamba"]["vs_float_p"] == pytest.approx(
        min(1, 2 * float(binomial_test(only, only + other))), rel=1e-12
    )
    assert found["same"]["vs_float_verdict"] == "not distinguishable"
    mean = sum(by_document(table, "quamba", "nll")) / 400
    assert found["quamba"]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-12)


def test_accuracy_has_score_intervals() -> None:
    table = results(40, {"quamba": 0.2}, task="last-word")
    reference, row = summary.summarize(table, bootstrap=100).to_pylist()
    here, there = (np.array(by_document(table, label, "correct")) > 0 for label in ("quamba", "float"))
    expected = binomtest(int(here.sum()), 40).proportion_ci(0.95, method="wilson")
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx((expected.low, expected.high), abs=1e-12)
    counts = [(here & there).sum(), (here & ~there).sum(), (~here & there).sum(), (~here & ~there).sum()]
    assert (row["vs_float_low"], row["vs_float_high"]) == newcombe(*map(int, counts))
    assert row["vs_float"] == row["accuracy"] - reference["accuracy"]
    # The textbook variance of a paired difference of shares, (b + c - (b - c)^2 / n) / n^2, by n - 1 for n.
    b, c = counts[1:3]
    error = math.sqrt((b + c - (b - c) ** 2 / 40) / 40 / 39)
    factor = student.ppf(0.975, 39) + student.ppf(0.8, 39)
    assert row["vs_float_detectable"] == pytest.approx(max(factor * error, 6 / 40), rel=1e-9)


def test_one_answer_that_differs_does_not_make_every_difference_detectable() -> None:
    """Its spread is tiny, but McNemar's exact test needs six pairs."""
    table = results(40, {"same": 0.0}, task="last-word")
    correct = table["correct"].to_pylist()
    correct[-1] = not correct[-1]
    field = RESULTS.field("correct")
    table = table.set_column(RESULTS.get_field_index("correct"), field, pa.array(correct, field.type))
    row = summary.summarize(table, bootstrap=100).to_pylist()[1]
    assert abs(row["vs_float"]) == pytest.approx(1 / 40, rel=1e-12) and row["vs_float_detectable"] == 6 / 40


def test_the_interval_of_kl_is_not_below_zero() -> None:
    """Ten documents, all but one short: samples without the long one have errors that say little of the whole."""
    table = results(10, {"quamba": 0.02})
    long = [document == 3 for document in table["document"].to_pylist()]
    kl = [
        0.01 if far else (document % 2) * 1.0 for far, document in zip(long, table["document"].to_pylist(), strict=True)
    ]
    tokens = [20_000 if far else 20 for far in long]
    for name, values in (("kl", kl), ("tokens", tokens)):
        field = RESULTS.field(name)
        table = table.set_column(RESULTS.get_field_index(name), field, pa.array(values, field.type))
    values, weights = (np.array(by_document(table, "quamba", name)) for name in ("kl", "tokens"))
    ratio, shares = linearised(values, weights)
    drawn = resampled_t(values[:, None], weights[:, None], 1000, 0)[:, 0]
    low, high = bootstrap_t_interval(ratio, standard_error(shares), drawn)
    row = summary.summarize(table, bootstrap=1000).to_pylist()[1]
    assert low < 0 and (row["kl_low"], row["kl_high"]) == (0, pytest.approx(high, rel=1e-12))


@pytest.mark.parametrize("task", ["perplexity", "last-word"])
def test_identical_results_have_no_detectable_difference(task: str) -> None:
    table = results(40, {"same": 0.0}, task=task)
    columns = {name: table[name].to_pylist() for name in ("strategy", "document", "nll", "correct")}
    of_float = {
        (document): (nll, correct)
        for strategy, document, nll, correct in zip(*columns.values(), strict=True)
        if strategy == "float"
    }
    for place, name in enumerate(("nll", "correct")):
        values = [of_float[document][place] for document in columns["document"]]
        field = RESULTS.field(name)
        table = table.set_column(RESULTS.get_field_index(name), field, pa.array(values, field.type))
    row = summary.summarize(table, bootstrap=100).to_pylist()[1]
    assert (row["vs_float"], row["vs_float_p"], row["vs_float_detectable"]) == (0, 1, None)
    assert row["vs_float_verdict"] == "not distinguishable"
    assert (row["vs_float_low"] is None) == (task == "perplexity")  # equal answers still leave a score interval


@pytest.mark.parametrize("task", ["perplexity", "last-word"])
@pytest.mark.parametrize("documents", [1, 2, 9])
def test_few_documents_have_values_and_nothing_else(documents: int, task: str) -> None:
    summed = summary.summarize(results(documents, {"quamba": 0.5}, task), bootstrap=100)
    values = {"data", "task", "strategy", "documents", "tokens", "perplexity", "kl", "top1_agreement"}
    values |= {"token_accuracy", "vs_float", *(("accuracy",) if task == "last-word" else ())}
    values |= {"clusters", "flips", "within"}
    row = summed.to_pylist()[1]
    assert {name for name, value in row.items() if value is not None} == values
    figures, differences, footnotes = summary_text.readable(summed)
    shown = [cell for table in (figures, differences) for row in table.to_pylist() for cell in row.values()]
    assert not any("[" in str(cell) for cell in shown) and not footnotes
    assert differences["verdict on float"].to_pylist() == ["too few documents (under 10)"]
    assert differences["detectable"].to_pylist() == ["-"]


def test_ten_documents_have_all() -> None:
    row = summary.summarize(results(10, {"quamba": 0.5}), bootstrap=1000).to_pylist()[1]
    assert row["vs_float_verdict"] == "worse" and row["vs_float_p"] == 2 / 2**10
    assert row["perplexity_low"] < row["perplexity"] < row["perplexity_high"]


@pytest.mark.parametrize("documents", [10, 24, 40])
def test_a_small_bootstrap_and_many_strategies_still_allow_verdicts(documents: int) -> None:
    many = {"quamba": 0.02, **{f"s{i}": 0.02 for i in range(16)}}
    table = results(documents, many)
    found = [summary.summarize(table, bootstrap=count, seed=1) for count in (100, 2000)]
    for rows in (one.to_pylist()[1:] for one in found):
        assert {row["vs_float_verdict"] for row in rows} == {"worse"}
        assert max(row["vs_float_p"] for row in rows) <= 17 * 2 / 2**10
    for name in ("vs_float_p", "vs_float_low", "vs_quamba_p", "vs_quamba_high", "vs_float_detectable"):
        assert found[0][name].equals(found[1][name])
    assert "coarse" in sentences.remarks(found[0], 100)[0]
    assert "coarse" not in str(sentences.remarks(found[0], 1000))


def test_more_strategies_than_the_documents_can_tell_apart_are_said() -> None:
    summed = summary.summarize(results(10, {f"s{i}": 0.02 for i in range(26)}), bootstrap=100)
    # 26 times the least p of ten documents, 2/2^10, is 0.0508.
    assert {row["vs_float_verdict"] for row in summed.to_pylist()[1:]} == {"not distinguishable"}
    assert set(summed["vs_float_detectable"].to_pylist()) == {None}
    assert "10 documents are too few for any verdict on float" in sentences.remarks(summed, 1000)[-1]


def test_holm_is_over_the_strategies_compared() -> None:
    one = summary.summarize(results(30, {"a": 0.004}), bootstrap=100).to_pylist()[1]["vs_float_p"]
    many = {"a": 0.004, **{f"b{i}": 0.0 for i in range(4)}}
    table = results(30, many)
    base = np.array(by_document(table, "float", "nll"))
    d = np.stack([np.array(by_document(table, label, "nll")) - base for label in many], axis=1)
    expected = holm(sign_flip_p(d, 0).tolist())
    rows = summary.summarize(table, bootstrap=100).to_pylist()[1:]
    assert [row["vs_float_p"] for row in rows] == pytest.approx(expected, rel=1e-12)
    assert 0 < one < 0.05 < expected[0]  # the same documents: what one comparison shows, five do not


def test_what_is_not_finite_takes_nothing_else_with_it() -> None:
    table = results(20, {"quamba": 0.02, "mse": 0.02, "broken": 0.02})
    nll = table["nll"].to_pylist()
    broken = table["strategy"].to_pylist().index("broken")
    for bad in (math.nan, math.inf, 1e6):  # of 1e6 nats in one document perplexity overflows
        nll[broken] = bad
        changed = table.set_column(RESULTS.get_field_index("nll"), RESULTS.field("nll"), pa.array(nll))
        rows = {row["strategy"]: row for row in summary.summarize(changed, bootstrap=100).to_pylist()}
        assert rows["broken"]["vs_float_verdict"] == rows["broken"]["vs_quamba_verdict"] == "not finite"
        for name in ("perplexity_low", "vs_float_low", "vs_float_p", "vs_float_detectable"):
            assert rows["broken"][name] is None
        # What is left is as if it had not been there.
        whole = table.filter(pa.array([label != "broken" for label in table["strategy"].to_pylist()]))
        expected = {row["strategy"]: row for row in summary.summarize(whole, bootstrap=100).to_pylist()}
        assert {label: rows[label] for label in expected} == expected


def test_remarks_say_what_a_family_is() -> None:
    (many,) = sentences.remarks(summary.summarize(results(12, {"quamba": 0.0, "mse": 0.0})), 10_000)
    assert "(3 families here, of 2 comparisons at most)" in many and "one at a time escape" in many
    (one,) = sentences.remarks(summary.summarize(results(12, {"mse": 0.0})), 10_000)
    assert one.startswith("one strategy was compared") and "one at a time escape" in one
    for nothing in (results(12, {}), results(9, {"quamba": 0.0, "mse": 0.0})):
        assert sentences.remarks(summary.summarize(nothing), 10_000) == []


def test_strategies_of_other_documents_are_refused() -> None:
    table = results(12, {"quamba": 0.02})
    with pytest.raises(DatabaseInvalid, match="t: quamba and float were not scored on the same documents"):
        summary.summarize(table.slice(0, 23))


def test_readable_has_a_row_per_strategy_and_percents() -> None:
    summed = summary.summarize(results(40, {"quamba": 0.3}, task="last-word"), bootstrap=100)
    figures, differences, _ = summary_text.readable(summed)
    assert figures["strategy"].to_pylist() == ["float", "quamba"]
    accuracy = float(figures["last word %"].to_pylist()[0].split(" ")[0])
    assert accuracy == pytest.approx(100 * summed["accuracy"][0].as_py(), rel=1e-3)  # four digits are shown
    assert differences["strategy"].to_pylist() == ["quamba"]
    assert differences["difference of"].to_pylist() == ["accuracy %"]


@pytest.mark.parametrize(
    ("low", "high", "p_value", "mark"),
    [(0.1, 0.3, 0.2, "(a)"), (-0.1, 0.3, 0.01, "(b)"), (0.1, 0.3, 0.01, ""), (-0.1, 0.3, 0.2, "")],
)
def test_a_verdict_that_its_interval_contradicts_is_explained(
    low: float, high: float, p_value: float, mark: str
) -> None:
    row = summary.summarize(results(12, {"quamba": 0.0}), bootstrap=100).to_pylist()
    row[1] |= {"vs_float_low": low, "vs_float_high": high, "vs_float_p": p_value}
    row[1]["vs_float_verdict"] = verdict(0.2, (low, high), p_value, smaller_is_better=True)
    _, differences, footnotes = summary_text.readable(pa.Table.from_pylist(row, summary.SUMMARY))
    (shown,) = differences["verdict on float"].to_pylist()
    assert shown == f"{row[1]['vs_float_verdict']} {mark}".strip()
    assert [footnote[:3] for footnote in footnotes] == ([mark] if mark else [])
    assert not mark or "by a test of its own" in footnotes[0]  # one comparison: nothing was corrected


def test_the_footnote_stands_under_the_table_and_the_family_in_the_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two documents' worth of Holm: one difference that its interval shows, twelve comparisons, no verdict."""
    table = results(12, {"a": 0.0035, **{f"b{i}": 0.0 for i in range(11)}}, seed=0)
    row = summary.summarize(table).to_pylist()[1]
    assert row["vs_float_low"] > 0 and row["vs_float_p"] > 0.05  # what the footnote is for
    emit_evaluation(Evaluation("x", tmp_path, table, {}, []), 1000, 0, 0.5, "table", None)
    out, err = capsys.readouterr()
    assert " same (a)" in out and max(map(len, [*out.splitlines(), *err.splitlines()])) <= 100
    assert " ".join(out.split()).endswith(
        "(a) the interval, of this one difference, misses zero, but p is above 0.05 after Holm's correction over 12 "
        "comparisons"
    )
    assert "strategies evaluated one at a time escape the correction" in " ".join(err.split())
    emit_evaluation(Evaluation("x", tmp_path, table, {}, []), 1000, 0, 0.5, "json", None)
    assert json.loads(capsys.readouterr()[0])[1]["vs_float_verdict"] == "not distinguishable"


@pytest.mark.parametrize("command", [evaluate_command, results_command])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "-1"], "-1 is not in the range"),
        (["--bootstrap", "1000000000"], "1000000000 is not in the range 100<=x<=100000"),
        (["--bootstrap", "99"], "99 is not in the range"),
    ],
)
def test_seed_and_bootstrap_out_of_range_are_one_line(command: Any, options: Any, words: str) -> None:
    found = CliRunner().invoke(command, options)
    assert found.exit_code == 2 and words in found.stderr and not found.stdout
    with pytest.raises(DataInvalid, match="expected"):
        summary.summarize(results(3, {}), **{options[0][2:]: int(options[1])})
