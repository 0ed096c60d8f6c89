"""`quambase diff`: its statistics against scipy and statsmodels, its pairing, and files that are no logs."""

from __future__ import annotations

import hashlib
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from scipy.stats import binomtest, permutation_test, ttest_rel
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW
from test_paired_statistics import results

from quambase.apply.evaluation.diff.evaluations import compare_evaluations
from quambase.apply.evaluation.diff.figures import DIFF
from quambase.apply.evaluation.diff.logs import compare_logs
from quambase.apply.evaluation.diff.sample_logs import paired_samples, read_sample_log
from quambase.apply.evaluation.diff.words import sentences
from quambase.apply.evaluation.paired_statistics import documents_needed
from quambase.apply.evaluation.stored import Evaluation, find_evaluation
from quambase.apply.evaluation.summary import summarize
from quambase.cli.main import load_command
from quambase.schema.errors import DataInvalid
from quambase.schema.tables import RESULTS

A, B = "samples_arc_2026-09-01T10-00-00.123456.jsonl", "samples_arc_2026-09-02T10-00-00.654321.jsonl"


def digest(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def rows(**metrics: Any) -> list[dict[str, Any]]:
    """A row for each document, as lm-eval writes them."""
    count = len(next(iter(metrics.values())))
    return [
        {
            "doc_id": i,
            "doc": {"question": f"q{i}"},
            "target": "yes",
            "arguments": {"gen_args_0": {"arg_0": f"prompt {i}"}},
            "resps": [["yes"]],
            "filtered_resps": ["yes"],
            "filter": "none",
            "metrics": list(metrics),
            "doc_hash": digest(f"q{i}"),
            "prompt_hash": digest(f"prompt {i}"),
            "target_hash": digest("yes"),
            **{name: values[i] for name, values in metrics.items()},
        }
        for i in range(count)
    ]


def write(path: Path, samples: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in samples))
    return path


def compared(tmp_path: Path, a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the comparison of two logs."""
    found = compare_logs(write(tmp_path / A, a), write(tmp_path / B, b))
    assert found.table.schema.equals(DIFF)
    return found.table.to_pylist()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(load_command("diff"), [str(a) for a in arguments], catch_exceptions=False)


def answers(documents: int, both: int, only_a: int, only_b: int) -> tuple[list[float], list[float]]:
    """Right answers of A and of B, in an order of no meaning."""
    pairs = [(1.0, 1.0)] * both + [(1.0, 0.0)] * only_a + [(0.0, 1.0)] * only_b
    pairs += [(0.0, 0.0)] * (documents - len(pairs))
    random.Random(documents).shuffle(pairs)
    return [a for a, _ in pairs], [b for _, b in pairs]


# Statistics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(500, 294, 12, 4), (500, 300, 0, 9), (40, 20, 3, 3), (24, 0, 20, 0)])
def test_right_or_wrong_is_mcnemars_exact_test(tmp_path: Path, counts: tuple[int, int, int, int]) -> None:
    documents, both, only_a, only_b = counts
    a, b = answers(*counts)
    (row,) = compared(tmp_path, rows(acc=a), rows(acc=b))
    table = [[both, only_a], [only_b, documents - both - only_a - only_b]]
    assert row["difference_p"] == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-12)
    assert row["difference_p"] == pytest.approx(binomtest(only_a, only_a + only_b).pvalue, rel=1e-12)
    assert (row["kind"], row["lower"], row["higher"], row["documents"]) == ("share", only_a, only_b, documents)
    assert (row["a"], row["b"]) == pytest.approx((sum(a) / documents, sum(b) / documents))
    assert row["difference"] == pytest.approx((only_b - only_a) / documents)
    assert row["flips"] == pytest.approx((only_a + only_b) / documents)
    # Newcombe's method 10, of statsmodels' Wilson intervals and the correlation of the answers.
    p, q = sum(b) / documents, sum(a) / documents
    (low1, high1), (low2, high2) = (proportion_confint(sum(x), documents, method="wilson") for x in (b, a))
    product = both * table[1][1] - only_a * only_b
    margins = sum(a) * (documents - sum(a)) * sum(b) * (documents - sum(b))
    phi = (max(product - documents / 2, 0) if product > 0 else product) / math.sqrt(margins) if margins else 0
    below = math.sqrt((p - low1) ** 2 - 2 * phi * (p - low1) * (high2 - q) + (high2 - q) ** 2)
    above = math.sqrt((high1 - p) ** 2 - 2 * phi * (high1 - p) * (q - low2) + (q - low2) ** 2)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((p - q - below, p - q + above), abs=1e-12)


def test_numbers_are_the_paired_t_interval_and_every_swap(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    a = generator.uniform(0, 1, 14)
    b = a + generator.normal(0.1, 0.2, 14)
    (row,) = compared(tmp_path, rows(f1=list(a)), rows(f1=list(b)))
    assert (row["kind"], row["difference"]) == ("ratio", pytest.approx((b - a).mean(), rel=1e-12))
    expected = ttest_rel(b, a).confidence_interval(0.95)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(DescrStatsW(b - a).tconfint_mean(0.05))

    def difference(x: Any, y: Any, axis: Any) -> Any:
        return x.mean(axis) - y.mean(axis)

    swaps = permutation_test((b, a), difference, permutation_type="samples", n_resamples=np.inf)
    assert row["difference_p"] == pytest.approx(swaps.pvalue, rel=1e-12)
    assert (row["higher"], row["lower"]) == ((b > a).sum(), (b < a).sum())


def test_filters_of_one_metric_are_corrected_together(tmp_path: Path) -> None:
    both = []
    for turn in (0, 1):
        samples = []
        for label, counts in (("strict", (60, 20, 12, 2)), ("flexible", (60, 30, 9, 4)), ("none", (60, 30, 5, 5))):
            values = answers(*counts)[turn]
            samples += [row | {"filter": label} for row in rows(exact_match=values, acc=values)]
        both.append(samples)
    found = compared(tmp_path, *both)
    assert [(row["metric"], row["filter"]) for row in found[:2]] == [("exact_match", "strict"), ("acc", "strict")]
    plain = [mcnemar([[0, a], [b, 0]], exact=True).pvalue for a, b in ((12, 2), (9, 4), (5, 5))]
    expected = multipletests(plain, method="holm")[1]
    for metric in ("exact_match", "acc"):
        p_values = [row["difference_p"] for row in found if row["metric"] == metric]
        assert p_values == pytest.approx(list(expected), rel=1e-12)


@pytest.mark.parametrize("effect", [0.05, 0.2, 0.5])
def test_needed_documents_are_statsmodels(effect: float) -> None:
    """It has the noncentral t-distribution for the power, and we the sum of two quantiles: two documents apart."""
    expected = TTestPower().solve_power(effect_size=effect, power=0.8, alpha=0.05)
    assert documents_needed(effect, 1 / math.sqrt(100), 100, 1) == pytest.approx(expected, abs=2)


# Words ---------------------------------------------------------------------------------------------


def told(tmp_path: Path, **metrics: tuple[list[Any], list[Any]]) -> str:
    a, b = (rows(**{name: pair[side] for name, pair in metrics.items()}) for side in (0, 1))
    found = compare_logs(write(tmp_path / A, a), write(tmp_path / B, b))
    (line,) = sentences(found.table)
    return line


def test_the_sentence_of_the_issue(tmp_path: Path) -> None:
    assert told(tmp_path, acc=answers(500, 294, 12, 4)) == (
        "B answers 12 of 500 documents worse and 4 better: acc 61.2 -> 59.6 %, difference -1.6 points (95 %: -3.2 to "
        "+0.0), p = 0.077: not distinguishable; about 980 documents would be needed"
    )


def test_what_else_may_be_said(tmp_path: Path) -> None:
    assert told(tmp_path, acc=answers(500, 250, 40, 10)).endswith(", p = 2.4e-05: B is worse")
    assert told(tmp_path, acc=answers(500, 250, 10, 40)).endswith(": B is better")
    assert told(tmp_path, acc=answers(500, 250, 0, 0)) == "A and B are alike in all 500 documents: acc 50.0 %"
    assert told(tmp_path, acc=answers(500, 250, 7, 7)).endswith("p = 1: not distinguishable")
    assert told(tmp_path, acc=answers(9, 3, 2, 1)) == (
        "B answers 2 of 9 documents worse and 1 better: acc 55.6 -> 44.4 %, difference -11.1 points; 9 documents "
        "give no verdict: take 10 or more"
    )
    up = [0.1 * i for i in range(20)], [0.1 * i + 0.3 + 0.01 * (i % 3) for i in range(20)]
    assert told(tmp_path, f1=up).startswith("B is worse on 0 of 20 documents and better on 20: f1 0.95 -> 1.26, ")
    assert told(tmp_path, ter=up).endswith(": B is worse") and told(tmp_path, ter=up).startswith("B is worse on 20 ")
    assert told(tmp_path, odd=up).startswith("B is lower on 0 of 20 documents and higher on 20: odd")
    assert told(tmp_path, odd=up).endswith(": B is higher")
    assert told(tmp_path, f1=([math.nan] * 20, up[1])).endswith("difference nan: not finite")
    # Right or wrong comes first, whatever the order of the file.
    assert "acc 60.0" in told(tmp_path, f1=up, acc=answers(20, 10, 2, 1))


# Metrics -------------------------------------------------------------------------------------------


def test_perplexities_are_those_of_all_documents(tmp_path: Path) -> None:
    """lm-eval logs log-likelihoods and what they are of; the perplexity is exp of minus the ratio of sums."""
    generator = np.random.default_rng(1)
    words = generator.integers(20, 400, 12).tolist()
    a, b = (-generator.uniform(3, 4, 12) * words for _ in (0, 1))
    logs = []
    for values in (a, b):
        paired = [[float(x), w] for x, w in zip(values, words, strict=True)]
        logs.append(rows(word_perplexity=paired, bits_per_byte=paired, perplexity=list(values / 100), far=list(values)))
    found = {row["metric"]: row for row in compared(tmp_path, *logs)}
    row = found["word_perplexity"]
    assert row["a"] == pytest.approx(math.exp(-sum(a) / sum(words))) and row["larger_is_better"] is False
    assert row["difference"] == pytest.approx(math.exp(-sum(b) / sum(words)) - math.exp(-sum(a) / sum(words)))
    assert row["lower"] == (b > a).sum(), "a larger likelihood is a lower perplexity"
    assert found["bits_per_byte"]["b"] == pytest.approx(-sum(b) / sum(words) / math.log(2))
    assert found["perplexity"]["b"] == pytest.approx(math.exp(-b.mean() / 100))
    assert found["far"]["kind"] == "ratio"
    # Perplexities that overflow are compared with nothing.
    (row,) = compared(tmp_path, rows(perplexity=list(a)), rows(perplexity=list(b)))
    assert (row["a"], row["difference_verdict"], row["difference_p"]) == (math.inf, "not finite", None)
    # A shift of every log-likelihood per word shifts the perplexity by a known factor; there is no noise.
    shifted = [[x + 0.1 * w, w] for x, w in zip(a, words, strict=True)]
    (row,) = compared(
        tmp_path, rows(word_perplexity=[[x, w] for x, w in zip(a, words, strict=True)]), rows(word_perplexity=shifted)
    )
    assert row["b"] / row["a"] == pytest.approx(math.exp(-0.1)) and row["difference_verdict"] == "better"


def test_lists_of_answers_are_weighed(tmp_path: Path) -> None:
    """IFEval: several instructions a document."""
    a = [[True, False], [True], [False, False, True]] * 5
    b = [[True, True], [True], [False, False, True]] * 5
    (row,) = compared(tmp_path, rows(inst_level_strict_acc=a), rows(inst_level_strict_acc=b))
    assert (row["kind"], row["a"], row["b"], row["higher"]) == ("ratio", 3 / 6, 4 / 6, 5)


def test_metrics_without_numbers_are_left_out_and_named(tmp_path: Path) -> None:
    a = rows(acc=[1.0] * 12, bleu=[["a", "b"]] * 12, half=[0.5] * 11 + [None], words=[[1.0, 5.0]] * 12)
    b = rows(acc=[0.0] * 12, bleu=[["a", "c"]] * 12, half=[0.5] * 12, words=[[1.0, 6.0]] * 12)
    found = compare_logs(write(tmp_path / A, a), write(tmp_path / B, b))
    assert found.table["metric"].to_pylist() == ["acc"]
    assert found.notes == [
        "documents are paired by their hashes",
        "left out: bleu, no number for 12 documents of A and 12 of B",
        "left out: half, no number for 1 documents of A and 0 of B",
        "left out: words, whose weights differ between A and B",
    ]


def test_a_log_that_names_no_metrics(tmp_path: Path) -> None:
    samples = [
        [{k: v for k, v in row.items() if k != "metrics"} for row in rows(acc=values)]
        for values in answers(30, 9, 3, 1)
    ]
    (row,) = compared(tmp_path, *samples)
    assert row["metric"] == "acc"


def test_truth_values_are_answers(tmp_path: Path) -> None:
    a, b = ([bool(x) for x in side] for side in answers(30, 10, 4, 2))
    (row,) = compared(tmp_path, rows(correct=a), rows(correct=b))
    assert (row["kind"], row["lower"], row["higher"]) == ("share", 4, 2)


def test_a_filter_of_one_log_only(tmp_path: Path) -> None:
    a, b = answers(30, 10, 4, 2)
    more = [row | {"filter": "strict"} for row in rows(acc=a)]
    found = compare_logs(write(tmp_path / A, rows(acc=a) + more), write(tmp_path / B, rows(acc=b)))
    assert found.table["filter"].to_pylist() == ["none"] and "only in A, left out: filter strict" in found.notes
    with pytest.raises(DataInvalid, match="no filter in common: strict, and none"):
        compare_logs(write(tmp_path / A, more), write(tmp_path / B, rows(acc=b)))


# Pairs ---------------------------------------------------------------------------------------------


def test_the_order_of_lines_does_not_matter(tmp_path: Path) -> None:
    a, b = answers(60, 20, 9, 3)
    samples = rows(acc=b)
    random.Random(1).shuffle(samples)
    (row,) = compared(tmp_path, rows(acc=a), samples)
    assert (row["lower"], row["higher"]) == (9, 3)


def test_hashes_pair_whatever_the_numbers(tmp_path: Path) -> None:
    a, b = answers(40, 20, 5, 3)
    samples = [row | {"doc_id": 1000 - row["doc_id"]} for row in rows(acc=b)]
    (row,) = compared(tmp_path, rows(acc=a), samples)
    assert (row["lower"], row["higher"]) == (5, 3)


def test_equal_documents_are_paired_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    same = {"doc_hash": "d", "prompt_hash": "p", "target_hash": "t"}
    a = [row | same for row in rows(acc=[1.0] * 7 + [0.0] * 5)]
    b = [row | same for row in rows(acc=[1.0] * 4 + [0.0] * 8)]
    (row,) = compared(tmp_path, a, b[::-1])
    assert (row["documents"], row["lower"], row["higher"]) == (12, 3, 0)


def test_logs_without_hashes_are_paired_by_number_and_content(tmp_path: Path) -> None:
    a, b = answers(30, 10, 4, 2)
    plain = [{k: v for k, v in row.items() if not k.endswith("_hash")} for row in rows(acc=b)]
    plain = [row | {"doc": dict(reversed([*row["doc"].items(), ("id", i)]))} for i, row in enumerate(plain)]
    hashed = [row | {"doc": row["doc"] | {"id": i}} for i, row in enumerate(rows(acc=a))]
    for one, other in ((hashed, plain), (plain, plain)):
        found = compare_logs(write(tmp_path / A, one), write(tmp_path / B, other[::-1]))
        assert found.notes[0] == "documents are paired by number and content (a log lacks hashes)"
        assert found.table["documents"].to_pylist() == [30]
    changed = [row | {"doc": {"question": "another"}} for row in plain]
    with pytest.raises(
        DataInvalid, match=r"30 of 30 are only in A, 30 of 30 only in B; their numbers \(doc_id\) are the"
    ):
        compared(tmp_path, plain, changed)
    with pytest.raises(DataInvalid, match=r"has neither hashes \(doc_hash, prompt_hash, target_hash\) nor a doc"):
        compared(tmp_path, plain, [{k: v for k, v in row.items() if k != "doc"} for row in plain])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r[:20], "10 of 30 are only in A, 0 of 20 only in B; compare runs on the same documents"),
        (
            lambda r: [x | {"prompt_hash": digest(f"other {i}")} for i, x in enumerate(r)],
            "the documents are the same, but their prompt_hash differ: compare runs with the same examples and chat",
        ),
        (
            lambda r: [x | {"target_hash": "0"} for x in r],
            "the documents are the same, but their target_hash differ: compare runs with the same version of the task",
        ),
        (
            lambda r: [x | {"doc_hash": digest(f"other {i}")} for i, x in enumerate(r)],
            "30 of 30 are only in A, 30 of 30 only in B; compare runs on the same documents",
        ),
        (
            lambda r: [*r[:-1], r[-1] | {"doc_hash": "0"}],
            "1 of 30 are only in A, 1 of 30 only in B; compare runs on the",
        ),
    ],
)
def test_other_documents_are_refused_with_the_reason(tmp_path: Path, change: Callable[[Any], Any], reason: str) -> None:
    a, b = answers(30, 10, 4, 2)
    with pytest.raises(DataInvalid) as error:
        compared(tmp_path, rows(acc=a), change(rows(acc=b)))
    assert reason in str(error.value) and str(error.value).isprintable()


def test_pairs_come_in_the_order_of_the_first(tmp_path: Path) -> None:
    a, b = (read_sample_log(write(tmp_path / name, rows(acc=[1.0] * 12)[::step])) for name, step in ((A, 1), (B, -1)))
    pairs = paired_samples(a, b, "none")
    assert [one.document for one, _ in pairs] == [other.document for _, other in pairs] == [str(i) for i in range(12)]
    assert a.task == "arc" and b.task == "arc"


# Hostile files -------------------------------------------------------------------------------------

GOOD = rows(acc=[1.0, 0.0] * 6)

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "holds no samples"),
    "blank lines": (b"\n\n  \n", "holds no samples"),
    "parquet": (b"PAR1\xff\xfe\x00", "is not UTF-8 text"),
    "utf-16": ('{"doc_id": 1}'.encode("utf-16"), "is not UTF-8 text"),
    "no json": (b'{"doc_id": 1, "acc": 1.0}\nacc,1\n', "is no JSON in line 2"),
    "cut short": ((json.dumps(GOOD[0]) + "\n" + json.dumps(GOOD[1])[:50]).encode(), "is no JSON in line 2"),
    "a results file": (json.dumps({"results": {"arc": {"acc,none": 0.5}}}).encode(), "has no doc_id"),
    "a pretty one": (json.dumps(GOOD[0], indent=1).encode(), "is no JSON in line 1"),
    "a list": (json.dumps(GOOD).encode(), "holds no JSON object in line 1"),
    "null": (b"null\n", "holds null in line 1"),
    "deep": (b"[" * 100_000, "is nested too deep in line 1"),
    "a deep document": (b'{"doc_id": 1, "doc": ' + b"[" * 900 + b"]" * 900 + b"}", ""),
    "a list for a number": (b'{"doc_id": [1]}', "has no doc_id"),
    "truth for a number": (b'{"doc_id": true}', "has no doc_id"),
    "a filter that is no text": (b'{"doc_id": 1, "filter": 3}', "has a filter that is no text"),
    "twice": ((json.dumps(GOOD[0]) + "\n").encode() * 2, "has document 0 2 times with filter none"),
    "an escape": (b'{"doc_id": "\\u001b[31m\\n", "acc": 1}\n' * 2, "has document ?[31m? 2 times"),
    "no metric": (b'{"doc_id": 1, "doc": {}, "metrics": "acc", "acc": "high"}', "no metric in common"),
    "no document": (b'{"doc_id": 1, "acc": 1.0}', "has neither hashes"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("place", [0, 1])
def test_a_file_that_is_no_log_is_one_line(tmp_path: Path, name: str, place: int) -> None:
    content, words = HOSTILE[name]
    (tmp_path / "bad.jsonl").write_bytes(content)
    good = write(tmp_path / A, [{"doc_id": 1, "doc": {}, "acc": 0.5}] if name == "no metric" else GOOD)
    files = [good, tmp_path / "bad.jsonl"]
    done = run(*files[:: 1 if place else -1])
    assert done.exit_code == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and line.isprintable() and words in line and len(line) < 600


def test_noise_in_a_log_never_ends_in_a_traceback(tmp_path: Path) -> None:
    whole = b"".join(json.dumps(row).encode() + b"\n" for row in GOOD)
    good = write(tmp_path / A, GOOD)
    generator = random.Random(0)
    for _ in range(150):
        spoilt = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            spoilt[generator.randrange(len(spoilt))] = generator.randrange(256)
        (tmp_path / B).write_bytes(bytes(spoilt))
        done = run(good, tmp_path / B)
        assert (done.exit_code == 0) or (done.exit_code == 1 and len(done.stderr.splitlines()) == 1)


def test_numbers_of_any_size(tmp_path: Path) -> None:
    lines = [
        json.dumps(row).replace('"f1": 0.5', f'"f1": {value}')
        for row, value in zip(rows(f1=[0.5] * 12), ["1" * 5000, "1e999", "NaN", *["0.25"] * 9], strict=True)
    ]
    (tmp_path / B).write_text("\n".join(lines))
    (row,) = compare_logs(write(tmp_path / A, rows(f1=[0.5] * 12)), tmp_path / B).table.to_pylist()
    assert row["difference_verdict"] == "not finite" and row["difference_p"] is None
    assert run(tmp_path / A, tmp_path / B, "--format", "json").exit_code == 0


def test_what_is_neither_is_told_what_is_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / A, GOOD)
    for arguments, words in (
        ((A, "nothing.jsonl"), "there is no file nothing.jsonl; expected two sample logs of lm-eval"),
        (("x", "y"), "there is no file x or y; expected two sample logs"),
        ((A, str(tmp_path)), "is a folder; expected lm-eval's samples_*.jsonl"),
        (("/dev/null", A), "/dev/null is not a file; expected lm-eval's"),
    ):
        done = run(*arguments)
        assert done.exit_code == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert run(A).exit_code == 2


# Stored evaluations --------------------------------------------------------------------------------


def store(db: Path, name: str, table: pa.Table, **about: Any) -> Evaluation:
    folder = db / "results" / name
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "results.parquet")
    content = {"format_version": 1, "evaluation": name, "model": "m", "scales": "", "strategies": [], "tasks": []}
    (folder / "evaluation.json").write_text(json.dumps(content | {"notes": []} | about))
    return find_evaluation(db, name)


def hashed(table: pa.Table) -> pa.Table:
    """Results whose documents have hashes that are in another order than their numbers."""
    values = pa.array([digest(document) for document in table["document"].to_pylist()])
    return table.set_column(RESULTS.get_field_index("sha256"), RESULTS.field("sha256"), values)


def only(table: pa.Table, *labels: str) -> pa.Table:
    return table.filter(pa.array([label in labels for label in table["strategy"].to_pylist()]))


@pytest.mark.parametrize("task", ["perplexity", "last-word"])
@pytest.mark.parametrize("clusters", [None, 12])
def test_two_evaluations_say_what_one_of_both_would(tmp_path: Path, task: str, clusters: int | None) -> None:
    """`mse` of A and `quamba` of B: the differences are those that one evaluation gives `mse` from `quamba`."""
    table = hashed(results(48, {"mse": 0.0, "quamba": 0.02}, task))
    if clusters:
        names = pa.array([f"c{document % clusters}" for document in table["document"].to_pylist()])
        table = table.set_column(RESULTS.get_field_index("cluster"), RESULTS.field("cluster"), names)
    a, b = store(tmp_path, "aa", only(table, "float", "mse")), store(tmp_path, "bb", only(table, "float", "quamba"))
    found = {row["metric"]: row for row in compare_evaluations(a, b).table.to_pylist() if row["strategy_a"] == "mse"}
    both = {row["strategy"]: row for row in summarize(table, bootstrap=100).to_pylist()}
    expected = both["mse"]
    for metric in ("kl", "flips", "perplexity", *(("accuracy",) if task == "last-word" else ())):
        ends = found[metric]["a"], found[metric]["b"]
        assert ends == pytest.approx((expected[metric], both["quamba"][metric]), rel=1e-12), metric
    figures = {"kl": "kl_vs_quamba", ("accuracy" if task == "last-word" else "perplexity"): "vs_quamba"}
    for metric, name in figures.items():
        row = found[metric]
        assert (row["strategy_b"], row["documents"], row["clusters"]) == ("quamba", 48, clusters or 48)
        assert row["difference"] == pytest.approx(-expected[name], rel=1e-9), "B - A here, mse - quamba there"
        ends = row["difference_low"], row["difference_high"]
        assert ends == pytest.approx((-expected[f"{name}_high"], -expected[f"{name}_low"]), rel=1e-9)
        assert row["difference_detectable"] == pytest.approx(expected[f"{name}_detectable"], rel=1e-9)
        # Documents are in another order, so that random flips are others: five standard deviations of two such shares.
        p_value = expected[f"{name}_p"]
        error = 0 if clusters or metric == "accuracy" else 5 * math.sqrt(2 * p_value * (1 - p_value) / 49_999)
        assert row["difference_p"] == pytest.approx(p_value, rel=1e-9, abs=error)
        assert row["difference_needed"] == expected[f"{name}_needed"]
        opposite = {"better": "worse", "worse": "better"}
        verdict = expected[f"{name}_verdict"]
        assert row["difference_verdict"] == opposite.get(verdict, verdict)
    (line,) = sentences(compare_evaluations(a, b).table)
    assert line.startswith(f"t, {task}, mse -> quamba: B is ") and " kl 0.00" in line


def test_few_clusters_are_told(tmp_path: Path) -> None:
    table = hashed(results(40, {"mse": 0.0}))
    for count, name in ((9, "nine"), (10, "ten")):
        names = pa.array([f"c{document % count}" for document in table["document"].to_pylist()])
        named = table.set_column(RESULTS.get_field_index("cluster"), RESULTS.field("cluster"), names)
        found = compare_evaluations(store(tmp_path, name, named), store(tmp_path, f"{name}2", named))
        assert [note.startswith("t, perplexity: 40 documents come from 9 clusters") for note in found.notes] == (
            [False, True] if count == 9 else [False]
        )


def test_upstreams_scales_do_not_stand_between_two_strategies(tmp_path: Path) -> None:
    table = hashed(results(20, {"mse": 0.0, "quamba": 0.02, "absmax": 0.03, "pow2": 0.03}))
    a, b = (
        store(tmp_path, "aa", only(table, "float", "mse", "quamba")),
        store(tmp_path, "bb", only(table, "float", "absmax")),
    )
    found = compare_evaluations(a, b)
    assert list(dict.fromkeys(zip(*(found.table[f"strategy_{x}"].to_pylist() for x in "ab"), strict=True))) == [
        ("mse", "absmax"),
        ("float", "float"),
    ]
    assert "only in A, left out: quamba" in found.notes
    several = compare_evaluations(a, store(tmp_path, "cc", only(table, "float", "absmax", "pow2")))
    assert set(several.table["strategy_a"].to_pylist()) == {"float"}
    assert {"only in A, left out: mse, quamba", "only in B, left out: absmax, pow2"} <= set(several.notes)
    with pytest.raises(DataInvalid, match="have no text and strategy in common"):
        compare_evaluations(
            store(tmp_path, "dd", only(table, "mse", "pow2")), store(tmp_path, "ee", only(table, "absmax"))
        )


def test_strategies_of_both_are_compared_with_themselves(tmp_path: Path) -> None:
    table = hashed(results(20, {"mse": 0.0, "quamba": 0.02, "absmax": 0.03}))
    a, b = (
        store(tmp_path, "aa", table, weights_sha256="1"),
        store(tmp_path, "bb", only(table, "float", "mse", "quamba")),
    )
    found = compare_evaluations(a, b)
    rows = found.table.to_pylist()
    assert [(row["strategy_a"], row["strategy_b"]) for row in rows] == [
        *[("mse", "mse")] * 3,
        *[("quamba", "quamba")] * 3,
        ("float", "float"),
    ]
    assert {row["difference"] for row in rows} == {0.0} and "only in A, left out: absmax" in found.notes
    assert any("the models differ" in note for note in found.notes)


def test_other_documents_or_tokens_of_a_text_are_refused(tmp_path: Path) -> None:
    table = hashed(results(20, {"mse": 0.0}))
    a = store(tmp_path, "aa", table)
    fewer = table.filter(pa.array([document < 15 for document in table["document"].to_pylist()]))
    with pytest.raises(
        DataInvalid, match="5 of 20 are only in A, 0 of 15 only in B; evaluate both with the same --data"
    ):
        compare_evaluations(a, store(tmp_path, "bb", fewer))
    place = RESULTS.get_field_index("tokens")
    other = table.set_column(place, RESULTS.field("tokens"), pa.array([9] * table.num_rows, pa.int32()))
    with pytest.raises(DataInvalid, match="have other numbers of tokens; evaluate both with one tokenizer"):
        compare_evaluations(a, store(tmp_path, "cc", other))
    place = RESULTS.get_field_index("data")
    elsewhere = table.set_column(place, RESULTS.field("data"), pa.array(["u"] * table.num_rows))
    with pytest.raises(
        DataInvalid, match=r"no text and strategy in common \(only in A, left out: t, perplexity; only in B"
    ):
        compare_evaluations(a, store(tmp_path, "dd", elsewhere))


def test_the_command_on_evaluations(tmp_path: Path) -> None:
    table = hashed(results(24, {"mse": 0.0, "quamba": 0.02}))
    store(tmp_path, "aa", only(table, "float", "mse"))
    store(tmp_path, "bb", only(table, "float", "quamba"))
    done = run("aa", "bb", "--db", tmp_path)
    assert done.exit_code == 0 and done.stdout.startswith("t, perplexity, mse -> quamba: B is worse on ")
    assert max(map(len, done.stdout.splitlines())) <= 100 and "A: evaluation aa of m" in done.stderr
    done = run("aa", "cc", "--db", tmp_path)
    assert (
        done.exit_code == 1 and "unknown evaluation 'cc'" in done.stderr and "two sample logs of lm-eval" in done.stderr
    )
    log = write(tmp_path / A, GOOD)
    done = run("aa", log, "--db", tmp_path)
    assert done.exit_code == 1 and "there is no file aa; expected two sample logs" in done.stderr


# Formats -------------------------------------------------------------------------------------------


def test_every_format(tmp_path: Path) -> None:
    logs = [write(tmp_path / name, rows(acc=side)) for name, side in zip((A, B), answers(500, 294, 12, 4), strict=True)]
    done = run(*logs)
    assert done.stdout.startswith("B answers 12 of 500 documents worse and 4 better: acc 61.2 -> 59.6 %")
    assert max(map(len, done.stdout.splitlines())) <= 100 and "paired by their hashes" in done.stderr
    assert " ".join(done.stdout.splitlines()[-1].split()) == "acc % 61.2 59.6 -1.6 [-3.2, +0.0] 0.077 same 12 / 4 2.2"
    done = run(*logs, "--format", "json")
    assert [*json.loads(done.stdout)[0]] == DIFF.names and "B answers 12 of 500" in done.stderr
    done = run(*logs, "--format", "parquet", "--out", tmp_path / "d.parquet")
    assert pq.read_table(tmp_path / "d.parquet")["difference"].to_pylist() == [pytest.approx(-0.016)]
    assert run(*logs, "--format", "markdown").stdout.count("|") > 10
    assert run(*logs, "--format", "csv").stdout.startswith('"data","task"')


def test_it_needs_no_torch(tmp_path: Path) -> None:
    logs = [write(tmp_path / name, rows(acc=side)) for name, side in zip((A, B), answers(50, 20, 3, 2), strict=True)]
    script = (
        "import sys\n"
        "for name in ('torch', 'tokenizers', 'safetensors', 'numba', 'duckdb'): sys.modules[name] = None\n"
        "from quambase.cli.main import quambase\n"
        "quambase()"
    )
    command = [sys.executable, "-c", script, "diff", *map(str, logs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "B answers 3 of 50" in done.stdout, done.stderr
