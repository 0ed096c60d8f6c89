"""KL differences, flips, clusters, equivalence and needed documents, each against loops, scipy, or the same documents
united by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from scipy.stats import t as student
from scipy.stats import ttest_1samp
from test_paired_statistics import by_document, results

from quambase.apply.evaluation.comparisons import Units, counted_units
from quambase.apply.evaluation.paired_statistics import (
    MOST_NEEDED,
    can_reach_a_verdict,
    detectable,
    documents_needed,
    equivalence,
    holm,
    newcombe,
    wilson,
)
from quambase.apply.evaluation.sentences import remarks
from quambase.apply.evaluation.stored import Evaluation
from quambase.apply.evaluation.summary import SUMMARY, summarize
from quambase.apply.evaluation.summary_text import rank
from quambase.cli.evaluate import emit_evaluation
from quambase.cli.evaluate import evaluate as evaluate_command
from quambase.schema.errors import DataInvalid
from quambase.schema.tables import RESULTS


def changed(table: pa.Table, **columns: Any) -> pa.Table:
    """The table with columns replaced, each by a function of a row."""
    for name, make in columns.items():
        values = [make(row) for row in table.to_pylist()]
        place = RESULTS.get_field_index(name)
        table = table.set_column(place, RESULTS.field(place), pa.array(values, RESULTS.field(place).type))
    return table


def clustered(documents: int, strategies: dict[str, float], clusters: int, task: str = "perplexity") -> pa.Table:
    """Results whose document i is of cluster i modulo ``clusters``, with flips that differ by document."""
    table = results(documents, strategies, task)
    return changed(
        table,
        cluster=lambda row: f"book {row['document'] % clusters}",
        top1_agreement=lambda row: row["tokens"] - (row["strategy"] != "float") * (row["document"] % 4),
    )


def by_label(table: pa.Table, **options: Any) -> dict[str, dict[str, Any]]:
    return {row["strategy"]: row for row in summarize(table, **options).to_pylist()}


# One figure after the other ------------------------------------------------------------------------


def test_kl_is_compared_with_upstreams_by_loops() -> None:
    table = changed(
        results(12, {"quamba": 0.0, "mse": 0.0, "bad": 0.0}),
        kl=lambda row: (
            row["kl"] * {"float": 0, "quamba": 1, "mse": 0.6, "bad": 1.05}[row["strategy"]] + (row["kl"] > 0)
        ),
    )
    found = by_label(table, bootstrap=100)
    tokens, base = by_document(table, "quamba", "tokens"), by_document(table, "quamba", "kl")
    p_values = []
    for label in ("mse", "bad"):
        d = [a - b for a, b in zip(by_document(table, label, "kl"), base, strict=True)]
        ratio = sum(d) / sum(tokens)
        assert found[label]["kl_vs_quamba"] == pytest.approx(found[label]["kl"] - found["quamba"]["kl"], rel=1e-9)
        squares = sum((x - ratio * t) ** 2 for x, t in zip(d, tokens, strict=True))
        error = math.sqrt(12 / 11 * squares) / sum(tokens)
        reach = student.ppf(0.975, 11) * error
        ends = [found[label][f"kl_vs_quamba{end}"] for end in ("", "_low", "_high")]
        assert ends == pytest.approx([ratio, ratio - reach, ratio + reach], rel=1e-9)
        factor = student.ppf(1 - 0.025 / 2, 11) + student.ppf(0.8, 11)
        assert found[label]["kl_vs_quamba_detectable"] == pytest.approx(factor * error, rel=1e-9)
        signs = itertools.product((1, -1), repeat=12)
        sums = [abs(sum(s * x for s, x in zip(sign, d, strict=True))) for sign in signs]
        p_values.append(sum(total >= abs(sum(d)) * (1 - 1e-12) for total in sums) / 2**12)
    assert [found[label]["kl_vs_quamba_p"] for label in ("mse", "bad")] == pytest.approx(holm(p_values), rel=1e-12)
    assert {found[label]["kl_vs_quamba"] for label in ("float", "quamba")} == {None}
    assert by_label(results(12, {"mse": 0.0}), bootstrap=100)["mse"]["kl_vs_quamba"] is None, "no upstream"


def test_kl_tells_what_perplexity_cannot() -> None:
    """A tenth less KL in every document, and a perplexity that only noise moves."""
    table = changed(
        results(24, {"quamba": 0.0, "mse": 0.0}),
        kl=lambda row: (
            {"float": 0, "quamba": 1, "mse": 0.9}[row["strategy"]] * row["tokens"] * (1 + row["document"] % 3)
        ),
    )
    row = by_label(table, bootstrap=100)["mse"]
    assert (row["kl_vs_quamba_verdict"], row["vs_quamba_verdict"]) == ("better", "not distinguishable")
    assert row["kl_vs_quamba_needed"] <= 24 < (row["vs_quamba_needed"] or math.inf)


def test_flips_by_loops() -> None:
    table = clustered(20, {"quamba": 0.0}, clusters=20)
    row = by_label(table, bootstrap=100)["quamba"]
    tokens = by_document(table, "quamba", "tokens")
    flips = [t - a for t, a in zip(tokens, by_document(table, "quamba", "top1_agreement"), strict=True)]
    share = sum(flips) / sum(tokens)
    squares = sum((f - share * t) ** 2 for f, t in zip(flips, tokens, strict=True))
    reach = student.ppf(0.975, 19) * math.sqrt(20 / 19 * squares) / sum(tokens)
    assert [row["flips"], row["flips_low"], row["flips_high"]] == pytest.approx([share, share - reach, share + reach])
    assert row["flips"] == pytest.approx(1 - row["top1_agreement"], rel=1e-12)
    # One document has them all: the interval is cut off at 0.
    table = changed(table, top1_agreement=lambda r: r["tokens"] - (r["document"] == 3))
    row = by_label(table, bootstrap=100)["quamba"]
    assert row["flips_low"] == 0 < row["flips"] < row["flips_high"]


# Clusters ------------------------------------------------------------------------------------------


def test_units() -> None:
    units = Units.of(["a", None, "b", "a", None, *"cdefghi"])
    assert (units.documents, units.clusters, units.count, units.single) == (12, 11, 11, False)
    assert units.summed(np.arange(12.0)).tolist() == [3.0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    few = Units.of(["a", "b"] * 8)
    assert (few.documents, few.clusters, few.count, few.single) == (16, 2, 16, True)
    assert few.summed(np.arange(16.0)).tolist() == list(range(16))
    assert Units.of(["1", None]).clusters == 2, "a document of no known cluster is of none that is known"
    assert [counted_units(40, clusters) for clusters in (9, 10, 40)] == [40, 10, 40]


@pytest.mark.parametrize("task", ["perplexity", "last-word"])
def test_a_cluster_of_each_document_changes_nothing(task: str) -> None:
    table = results(30, {"quamba": 0.02, "mse": 0.01}, task)
    named = changed(table, cluster=lambda row: f"c{row['document']}")
    assert summarize(named, bootstrap=200).equals(summarize(table, bootstrap=200))


def united(table: pa.Table, clusters: int) -> pa.Table:
    """The same results with the documents of a cluster as one document."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for row in table.to_pylist():
        key = row["strategy"], row["document"] % clusters
        if key not in rows:
            rows[key] = row | {"document": key[1], "cluster": None}
        else:
            for name in ("tokens", "nll", "kl", "top1_agreement", "top1_right"):
                rows[key][name] += row[name]
    return pa.Table.from_pylist(list(rows.values()), RESULTS)


def test_clusters_are_counted_as_wholes() -> None:
    """Every interval, p and verdict is what the same text has whose books are a document each."""
    table = clustered(60, {"quamba": 0.02, "mse": 0.01}, clusters=13)
    found = summarize(table, bootstrap=200, seed=3).to_pylist()
    expected = summarize(united(table, 13), bootstrap=200, seed=3).to_pylist()
    apart = summarize(changed(table, cluster=lambda row: None), bootstrap=200, seed=3).to_pylist()
    for row, other, single in zip(found, expected, apart, strict=True):
        assert (row["documents"], row["clusters"], other["documents"], single["clusters"]) == (60, 13, 13, 60)
        for name in set(SUMMARY.names) - {"documents", "clusters"}:
            if name.endswith("_needed") and row[name] is not None:
                assert row[name] == math.ceil(other[name] * 60 / 13), "so many documents are so many clusters"
            elif isinstance(row[name], float):
                assert row[name] == pytest.approx(other[name], rel=1e-9), name
            else:
                assert row[name] == other[name], name
        assert single["kl"] == pytest.approx(row["kl"], rel=1e-12), "values do not depend on the units"
    assert found[1]["kl_vs_quamba"] is None and found[2]["kl_vs_quamba_low"] != apart[2]["kl_vs_quamba_low"]
    (ranking,) = rank(summarize(table, bootstrap=200))
    assert ranking.size.startswith("60 documents of 13 clusters, ")


def test_last_words_of_clusters_are_ratios() -> None:
    table = clustered(48, {"quamba": 0.3}, clusters=12, task="last-word")
    row = by_label(table, bootstrap=200)["quamba"]
    here, there = (np.array(by_document(table, label, "correct")) for label in ("quamba", "float"))
    d = (here - there).reshape(4, 12).sum(0)  # documents i, i + 12, ... are of one cluster: four of each
    value = d.sum() / 48
    assert row["vs_float"] == pytest.approx(value, rel=1e-12)
    error = math.sqrt(12 / 11 * sum((d - 4 * value) ** 2)) / 48
    reach = student.ppf(0.975, 11) * error
    assert (row["vs_float_low"], row["vs_float_high"]) == pytest.approx((value - reach, value + reach), rel=1e-9)
    signs = np.array(list(itertools.product((1, -1), repeat=12)))
    assert row["vs_float_p"] == (abs(signs @ d) >= abs(d.sum())).mean()
    reach = student.ppf(0.95, 11) * error
    assert (row["within_low"], row["within_high"]) == pytest.approx((100 * (value - reach), 100 * (value + reach)))
    right = here.reshape(4, 12).sum(0)
    error = math.sqrt(12 / 11 * sum((right - 4 * here.mean()) ** 2)) / 48
    reach = student.ppf(0.975, 11) * error
    assert row["accuracy"] == pytest.approx(here.mean(), rel=1e-12)
    assert row["accuracy_high"] == pytest.approx(min(1, here.mean() + reach), rel=1e-9)
    assert (row["accuracy_low"], row["accuracy_high"]) != wilson(int(here.sum()), 48)


def test_fewer_than_ten_clusters_leave_the_documents_and_a_remark() -> None:
    table = clustered(40, {"quamba": 0.02, "mse": 0.0}, clusters=9)
    summary = summarize(table, bootstrap=1000)
    plain = summarize(changed(table, cluster=lambda row: None), bootstrap=1000)
    assert summary.drop_columns("clusters").equals(plain.drop_columns("clusters"))
    (line,) = [line for line in remarks(summary, 1000) if "clusters" in line]
    assert line.startswith("t: 40 documents come from 9 clusters (books, topics, files), fewer than the 10 that can be")
    assert not any("clusters" in line for line in remarks(plain, 1000))
    # Decoding and prefill of one text are two tasks, of which it is said once.
    both = pa.concat_tables([changed(table, task=lambda row, name=name: name) for name in ("decode", "prefill")])
    assert [line for line in remarks(summarize(both, bootstrap=1000), 1000) if "clusters" in line] == [line]
    enough = summarize(clustered(40, {"quamba": 0.02, "mse": 0.0}, clusters=10), bootstrap=1000)
    assert not any("clusters" in line for line in remarks(enough, 1000))
    # Nine documents have no intervals anyway.
    few = summarize(clustered(9, {"quamba": 0.02, "mse": 0.0}, clusters=3), bootstrap=1000)
    assert remarks(few, 1000) == []


# Equivalence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((-0.5, 0.5), "yes"),
        ((0.1, 0.2), "yes"),
        ((-0.6, 0.1), "not known"),
        ((0.4, 0.51), "not known"),
        ((0.5, 0.6), "not known"),
        ((0.51, 0.6), "no"),
        ((-3.0, -0.6), "no"),
        (None, "not known"),
    ],
)
def test_equivalence_is_where_the_interval_lies(interval: Any, words: str) -> None:
    assert equivalence(interval, (-0.5, 0.5)) == words


def test_equivalence_is_two_one_sided_tests() -> None:
    """Of documents of one length the difference of log perplexity is a mean: scipy has its t-tests."""
    seen = set()
    for bound in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0):
        table = changed(
            results(25, {"quamba": 0.001}),
            tokens=lambda row: 40,
            nll=lambda row: 100 + (row["strategy"] == "quamba") * (0.1 + 0.3 * math.sin(row["document"])),
        )
        row = by_label(table, bootstrap=100, within=bound)["quamba"]
        d = (np.array(by_document(table, "quamba", "nll")) - by_document(table, "float", "nll")) / 40
        ends = np.log1p(np.array([-bound, bound]) / 100)
        inside = [
            ttest_1samp(d, end, alternative=side).pvalue <= 0.05
            for end, side in zip(ends, ("greater", "less"), strict=True)
        ]
        outside = [
            ttest_1samp(d, end, alternative=side).pvalue < 0.05
            for end, side in zip(ends, ("less", "greater"), strict=True)
        ]
        expected = "yes" if all(inside) else "no" if any(outside) else "not known"
        assert row["within_verdict"] == expected and row["within"] == bound
        low, high = student.interval(0.9, 24, d.mean(), d.std(ddof=1) / 5)
        assert (row["within_low"], row["within_high"]) == pytest.approx((100 * math.expm1(low), 100 * math.expm1(high)))
        seen.add(expected)
    assert seen == {"yes", "no", "not known"}
    assert by_label(table, bootstrap=100)["float"]["within"] is None


def test_equivalence_of_last_words_is_newcombes() -> None:
    table = results(300, {"quamba": 0.02}, task="last-word")
    row = by_label(table, bootstrap=100, within=5)["quamba"]
    here, there = (np.array(by_document(table, label, "correct")) > 0 for label in ("quamba", "float"))
    both, first, second = (int(x.sum()) for x in (here & there, here & ~there, ~here & there))
    low, high = newcombe(both, first, second, 300 - both - first - second, level=0.1)
    assert (row["within_low"], row["within_high"]) == pytest.approx((100 * low, 100 * high))
    assert row["vs_float_low"] < low and row["within_verdict"] == "yes", "a 90 % interval is the narrower one"


def test_identical_results_are_equivalent() -> None:
    table = results(12, {"same": 0.0})
    base = dict(zip(range(12), by_document(table, "float", "nll"), strict=True))
    row = by_label(changed(table, nll=lambda row: base[row["document"]]), bootstrap=100)["same"]
    assert (row["within_verdict"], row["within_low"], row["within_high"]) == ("yes", 0, 0)
    # Of the same answers in every cluster nothing is known beyond these: other documents may have others.
    table = clustered(40, {"same": 0.0}, 10, "last-word")
    for correct in (True, False):
        row = by_label(changed(table, correct=lambda row, c=correct: c), bootstrap=100)["same"]
        assert (row["within_verdict"], row["within_low"]) == ("not known", None)


@pytest.mark.parametrize("within", [0.0, -1.0, 50.1, math.nan])
def test_bounds_out_of_range_are_refused(within: float) -> None:
    with pytest.raises(DataInvalid, match="expected percents above 0 and up to 50"):
        summarize(results(3, {}), within=within)
    done = CliRunner().invoke(evaluate_command, ["--within", str(within)])
    assert (done.exit_code == 2 and "--within" in done.stderr) or math.isnan(within)


# How many documents --------------------------------------------------------------------------------


@pytest.mark.parametrize("comparisons", [1, 10])
@pytest.mark.parametrize("effect", [0.1, 0.4, 1.0, 3.0, -0.7])
def test_needed_documents_by_trying_every_number(effect: float, comparisons: int) -> None:
    """``effect``: the difference in standard deviations of a document."""
    count = 10
    while not (
        can_reach_a_verdict(count, comparisons) and detectable(1 / math.sqrt(count), count, comparisons) <= abs(effect)
    ):
        count += 1
    assert documents_needed(effect, 1 / math.sqrt(24), 24, comparisons) == count
    assert count > 10 or abs(effect) >= 1


def test_needed_documents_where_there_is_no_answer() -> None:
    assert documents_needed(0.0, 0.1, 24, 1) is None
    assert documents_needed(0.1, 0.0, 24, 1) is None
    assert documents_needed(math.nan, 0.1, 24, 1) is None
    assert documents_needed(1e-3, 1.0, 24, 1) is None, "more than a million"
    assert documents_needed(1.0, 0.01, 24, 3000) is None, "no p is small enough for Holm"
    assert 0.9 * MOST_NEEDED < (documents_needed(0.00286, 1 / math.sqrt(24), 24, 1) or 0) <= MOST_NEEDED


def test_needed_last_words_by_the_textbook() -> None:
    """One answer in 40 differs. Connor (1987): (z sqrt(discordant) + z' sqrt(discordant - difference^2))^2 over the
    squared difference; here the second root stands for both, and Student's t for z."""
    table = results(40, {"same": 0.0}, task="last-word")
    correct = {(row["strategy"], row["document"]): row["correct"] for row in table.to_pylist()}
    table = changed(
        table,
        correct=lambda row: correct["float", row["document"]] ^ (row["strategy"] != "float" and row["document"] == 5),
    )
    row = by_label(table, bootstrap=100)["same"]
    z, power = NormalDist().inv_cdf(0.975), NormalDist().inv_cdf(0.8)
    p = 1 / 40
    connor = (z * math.sqrt(p) + power * math.sqrt(p - p * p)) ** 2 / p**2
    assert abs(row["vs_float"]) == pytest.approx(p) and row["vs_float_needed"] == pytest.approx(connor, rel=0.03)


# The command ---------------------------------------------------------------------------------------


def test_programs_get_every_column_and_the_sentence_goes_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = clustered(30, {"quamba": 0.02, "mse": 0.001}, clusters=10)
    for format_ in ("json", "csv"):
        emit_evaluation(Evaluation("x", tmp_path, table, {}, []), 1000, 0, 0.5, format_, None)
        out, err = capsys.readouterr()
        assert all(name in out for name in SUMMARY.names) and "nats a token to float" not in out
        assert "nats a token to float (95 %: " in err
    emit_evaluation(Evaluation("x", tmp_path, table, {}, []), 1000, 0, 0.5, "table", None)
    out, err = capsys.readouterr()
    assert "nats a token to float (95 %: " in out.splitlines()[0] and "nats" not in err
    assert "\nt, perplexity: 30 documents of 10 clusters, " in out
