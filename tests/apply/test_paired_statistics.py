"""Bootstrap, McNemar, Holm and the summary, each against a slow twin written from its definition."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.apply import statistics, summary
from quambase.apply.statistics import (
    Difference,
    Estimate,
    difference,
    holm,
    interval,
    mcnemar_exact,
    resampled_sums,
    verdict,
)
from quambase.schema.tables import RESULTS


def binomial_test(successes: int, total: int) -> Fraction:
    """Exact two-sided p of a fair coin: every outcome no likelier than the one seen."""
    chances = [Fraction(math.comb(total, k), 2**total) for k in range(total + 1)]
    return sum((chance for chance in chances if chance <= chances[successes]), Fraction(0))


def test_resampled_sums_are_sums_over_the_drawn_documents(monkeypatch):
    columns = np.random.default_rng(0).normal(size=(7, 3))
    monkeypatch.setattr(statistics, "_CHUNK_CELLS", 35)  # five samples at a time: several chunks, the last one short
    found = resampled_sums(columns, 23, seed=5)
    generator = np.random.default_rng(5)
    expected = []
    for start in range(0, 23, 5):
        for sample in generator.integers(0, 7, (min(5, 23 - start), 7)):
            total = np.zeros(3)
            for document in sample:
                total += columns[document]
            expected.append(total)
    # Seven float64 additions in another order: 7 * 2^-53 of a magnitude below 30.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_every_column_sees_the_same_documents():
    columns = np.random.default_rng(1).normal(size=(50, 1)).repeat(2, axis=1)
    found = resampled_sums(columns, 200, seed=0)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
    assert len(set(found[:, 0])) > 150


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Coverage for the mean of 40 normal values: 95 % less the percentile method's known shortfall of about 1 %."""
    generator = np.random.default_rng(2)
    hits = 0
    for experiment in range(300):
        values = generator.normal(size=(40, 1))
        found = interval(0.0, resampled_sums(values, 400, experiment)[:, 0] / 40)
        hits += found.low <= 0 <= found.high
    # 300 trials at 0.94 have a standard deviation of 4.1; five of them either way.
    assert 300 * 0.94 - 21 <= hits <= 300


def test_interval_takes_the_outer_five_percent():
    found = interval(3.0, np.arange(1001.0))
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 25.0, 975.0), rel=1e-14)


@pytest.mark.parametrize("shift", [0.0, 0.4, -3.0])
def test_bootstrap_p_value_by_counting(shift):
    values = np.random.default_rng(3).normal(shift, 1, 999)
    found = difference(shift, values)
    below, above = sum(v <= 0 for v in values), sum(v >= 0 for v in values)
    assert found.p_value == min(1, 2 * min((1 + below) / 1000, (1 + above) / 1000))
    expected = (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)) * math.sqrt(
        sum((v - values.mean()) ** 2 for v in values) / 998
    )
    assert found.detectable == pytest.approx(expected, rel=1e-6)  # the normal quantiles are given to seven digits


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_two_sided_binomial_test(first, second):
    expected = float(binomial_test(first, first + second))
    assert mcnemar_exact(first, second) == pytest.approx(expected, rel=1e-15)  # one division of exact integers


def test_mcnemar_by_enumeration():
    # All 2^8 ways that eight discordant pairs can fall, those at least as uneven as 2 : 6.
    extreme = sum(min(sum(way), 8 - sum(way)) <= 2 for way in itertools.product((0, 1), repeat=8))
    assert mcnemar_exact(2, 6) == mcnemar_exact(6, 2) == extreme / 2**8
    assert mcnemar_exact(4, 4) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms())
@settings(max_examples=60, deadline=None)
def test_holm_by_definition(p_values, random):
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


@pytest.mark.parametrize(
    ("estimate", "p_value", "words"),
    [
        (Estimate(-0.1, -0.2, -0.01), 0.01, "better"),
        (Estimate(0.1, 0.01, 0.2), 0.01, "worse"),
        (Estimate(0.1, -0.01, 0.2), 0.01, "not distinguishable"),
        (Estimate(0.1, 0.0, 0.2), 0.01, "not distinguishable"),
        (Estimate(0.1, 0.01, 0.2), 0.06, "not distinguishable"),
        (Estimate(math.nan, math.nan, math.nan), 1.0, "not distinguishable"),
    ],
)
def test_verdict(estimate, p_value, words):
    assert verdict(estimate, p_value, smaller_is_better=True) == words
    mirrored = {"better": "worse", "worse": "better"}
    assert verdict(estimate, p_value, smaller_is_better=False) == mirrored.get(words, words)


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
                | {"nll": float(nll[i]), "kl": float(abs(noise[i]) if label != "float" else 0), "top1_agreement": 3}
                | {"correct": bool(right[i]) if task == "last-word" else None}
            )
    return pa.Table.from_pylist(rows, RESULTS)


def by_document(table: pa.Table, label: str, name: str) -> list[float]:
    rows = [row for row in table.to_pylist() if row["strategy"] == label]
    return [float(row[name]) for row in sorted(rows, key=lambda row: row["document"])]


def test_summary_of_perplexity_by_loops():
    table = results(15, {"quamba": 0.02, "mse": 0.0})
    found = {row["strategy"]: row for row in summary.summarize(table, bootstrap=120, seed=9).to_pylist()}
    tokens = by_document(table, "float", "tokens")
    draws = np.random.default_rng(9).integers(0, 15, (120, 15))

    def perplexity(label: str, sample) -> float:
        nll = by_document(table, label, "nll")
        return math.exp(sum(nll[i] for i in sample) / sum(tokens[i] for i in sample))

    everyone = range(15)
    for label in ("float", "quamba", "mse"):
        resampled = [perplexity(label, sample) for sample in draws]
        row = found[label]
        # Float64 sums of 15 terms, exponentiated.
        assert row["perplexity"] == pytest.approx(perplexity(label, everyone), rel=1e-12)
        expected = np.quantile(resampled, [0.025, 0.975])
        assert [row["perplexity_low"], row["perplexity_high"]] == pytest.approx(expected, rel=1e-12)
        assert row["tokens"] == sum(tokens) and row["documents"] == 15 and row["accuracy"] is None
    for label, reference in (("quamba", "float"), ("mse", "float"), ("mse", "quamba")):
        paired = [perplexity(label, sample) - perplexity(reference, sample) for sample in draws]
        row = found[label]
        expected = np.quantile(paired, [0.025, 0.975])
        assert [row[f"vs_{reference}_low"], row[f"vs_{reference}_high"]] == pytest.approx(expected, abs=1e-10)
    assert found["quamba"]["vs_float_verdict"] == "worse"
    assert found["mse"]["vs_quamba_verdict"] == "better"
    assert found["float"]["vs_float"] is None and found["quamba"]["vs_quamba"] is None


def test_summary_of_last_words():
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


def test_few_documents_get_no_verdict():
    table = results(9, {"quamba": 0.5})
    row = summary.summarize(table, bootstrap=100).to_pylist()[1]
    assert "too few documents" in row["vs_float_verdict"]


def test_holm_is_over_the_strategies_compared():
    one = summary.summarize(results(30, {"a": 0.002}), bootstrap=2000).to_pylist()[1]["vs_float_p"]
    many = {"a": 0.002, **{f"b{i}": 0.0 for i in range(4)}}
    five = summary.summarize(results(30, many), bootstrap=2000).to_pylist()[1]["vs_float_p"]
    assert five == min(1.0, 5 * one) or five > one


def test_readable_has_a_row_per_strategy_and_percents():
    summed = summary.summarize(results(40, {"quamba": 0.3}, task="last-word"), bootstrap=100)
    figures, differences = summary.readable(summed)
    assert figures["strategy"].to_pylist() == ["float", "quamba"]
    accuracy = float(figures["last word %"].to_pylist()[0].split(" ")[0])
    assert accuracy == pytest.approx(100 * summed["accuracy"][0].as_py(), rel=1e-3)  # four digits are shown
    assert differences["strategy"].to_pylist() == ["quamba"]
    assert differences["difference of"].to_pylist() == ["accuracy %"]
    assert isinstance(difference(0.0, np.zeros(3)), Difference)


def test_equal_answers_do_not_make_every_difference_detectable():
    """Six discordant pairs, all one way, are the fewest that McNemar's exact test calls significant: 2/2^6 <= 0.05."""
    from quambase.apply.statistics import least_discordant

    assert least_discordant() == 6
    assert mcnemar_exact(6, 0) <= 0.05 < mcnemar_exact(5, 0)
    row = summary.summarize(results(40, {"same": 0.0}, task="last-word"), bootstrap=100).to_pylist()[1]
    assert row["vs_float_detectable"] >= 6 / 40
