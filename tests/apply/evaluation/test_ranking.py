"""The table and the sentences of an evaluation: better, worse, same, too few, one strategy, not finite."""

import math
from pathlib import Path

import pyarrow as pa
import pytest
from test_paired_statistics import results

from quambase.apply.evaluation.sentences import round_up
from quambase.apply.evaluation.stored import Evaluation
from quambase.apply.evaluation.summary import SUMMARY, summarize
from quambase.apply.evaluation.summary_text import rank
from quambase.cli.evaluate import emit_evaluation
from quambase.schema.stored.results import FLOAT


def row(label: str, kl: float, documents: int = 20, **more: object) -> dict[str, object]:
    """A strategy's row of SUMMARY, without differences but for ``more``."""
    empty = dict.fromkeys(SUMMARY.names)
    head = {"data": "t", "task": "perplexity", "strategy": label, "documents": documents, "tokens": 10 * documents}
    figures = {"perplexity": 18.0, "kl": kl, "flips": 0.1, "top1_agreement": 0.9, "token_accuracy": 0.5}
    return empty | head | {"clusters": documents} | figures | more


def against(name: str, value: float, words: str, p_value: float, **more: object) -> dict[str, object]:
    """A difference with its verdict; its interval is where the verdict says."""
    low, high = (-1.0, 1.0) if words == "not distinguishable" else sorted((value / 2, 2 * value))
    found = {"": value, "_low": low, "_high": high, "_p": p_value, "_detectable": 0.1, "_verdict": words}
    return {f"{name}{end}": figure for end, figure in found.items()} | {f"{name}{end}": v for end, v in more.items()}


def only(*rows: dict[str, object]) -> tuple[list[dict[str, object]], list[str]]:
    (found,) = rank(pa.Table.from_pylist(list(rows), SUMMARY))
    return found.table.to_pylist(), found.sentences


def test_the_float_model_then_the_least_kl() -> None:
    table, words = only(row("a", 0.008), row(FLOAT, 0.0), row("b", 0.005), row("c", 0.006))
    assert [(line[""], line["strategy"]) for line in table] == [("", FLOAT), ("*", "b"), ("", "c"), ("", "a")]
    assert [line["KL x1000"] for line in table] == ["-", "5", "6", "8"]
    # 6/5 - 1
    assert words == ["b loses 0.0050 nats a token to float", "c is next, with 20 % more KL (a ranking, not a test)"]


def test_equal_strategies_share_the_rank() -> None:
    """`selected` is one strategy wherever that has the least error everywhere."""
    _, words = only(row(FLOAT, 0.0), row("mse", 0.005), row("selected", 0.005), row("c", 0.006))
    assert words[0] == "mse and selected lose 0.0050 nats a token to float" and words[1].startswith(
        "c is next, with 20 %"
    )
    _, words = only(row(FLOAT, 0.0), row("mse", 0.005), row("selected", 0.005))
    assert words == ["mse and selected lose 0.0050 nats a token to float"]


def test_the_sentence_of_the_issue() -> None:
    """KL first, then perplexity, then whether the loss is small enough."""
    kl = {"kl_low": 0.00502, "kl_high": 0.00561} | against("kl_vs_quamba", -0.0012, "better", 0.00018)
    perplexity = against("vs_float", 0.018, "not distinguishable", 0.4, _needed=293)
    more = kl | perplexity | {"within": 0.5, "within_verdict": "not known"}
    table, words = only(row(FLOAT, 0.0), row("mse", 0.0053, 24, **more), row("quamba", 0.0065, 24))
    assert words[0] == (
        "mse loses 0.0053 nats a token to float (95 %: 0.0050 to 0.0056), 18 % less than upstream's scales, certain "
        "(p = 0.00018); perplexity +0.1 %, not distinguishable on 24 documents (about 300 would be needed); within "
        "0.5 % of float's perplexity: not known"
    )
    names = ["", "strategy", "KL x1000", "KL to quamba", "flips %", "perplexity", "to float"]
    assert list(table[1]) == names
    assert list(table[1].values()) == ["*", "mse", "5.3 [5.02, 5.61]", "-18 % better", "10", "18", "+0.1 % same"]


def test_worse_than_upstream() -> None:
    more = against("kl_vs_quamba", 0.001, "worse", 0.01) | against("vs_float", 0.09, "worse", 0.03)
    table, words = only(row(FLOAT, 0.0), row("mse", 0.006, **more), row("quamba", 0.005))
    assert table[2]["strategy"] == "mse" and table[2]["KL to quamba"] == "+20 % worse"
    assert table[2]["to float"] == "+0.5 % worse"
    assert words[0] == "quamba loses 0.0050 nats a token to float", "it is compared with nothing"
    _, words = only(row(FLOAT, 0.0), row("mse", 0.005, **more))
    assert words[0] == "mse loses 0.0050 nats a token to float; perplexity +0.5 %, certain (p = 0.03)", "no upstream"


@pytest.mark.parametrize(
    ("value", "more", "end"),
    [
        (0.02, {"_needed": 80}, " (about 80 would be needed)"),
        (-0.03, {"_needed": 5551}, " (about 5,600 would be needed)"),
        (0.0001, {"_needed": None}, " (no practical number would do)"),
        (0.0, {"_needed": None}, ""),
        (0.02, {"_needed": None, "_detectable": None}, ""),
        (0.02, {"_needed": 11}, ""),  # detectable as it is, and not detected: no number of documents follows
    ],
)
def test_same_and_how_many_documents_would_tell(value: float, more: dict[str, object], end: str) -> None:
    difference = against("vs_float", value, "not distinguishable", 0.5, **more)
    table, words = only(row(FLOAT, 0.0), row("mse", 0.005, **difference))
    percent = f"{100 * value / 18:+.2g} %"
    assert table[1]["to float"] == f"{percent} same"
    assert words == [
        f"mse loses 0.0050 nats a token to float; perplexity {percent}, not distinguishable on 20 documents{end}"
    ]


def test_numbers_of_documents_are_rounded_up_to_two_digits() -> None:
    assert [round_up(n) for n in (7, 56, 100, 101, 5551, 999_999)] == [7, 56, 100, 110, 5600, 1_000_000]


def test_last_words_are_in_points() -> None:
    more = {"task": "last-word", "accuracy": 0.4, "within": 0.5, "within_verdict": "no"}
    table, words = only(row("mse", 0.005, **more, **against("vs_float", -0.0833, "worse", 0.002)))
    assert (table[0]["last word %"], table[0]["to float"]) == ("40", "-8.3 worse") and "perplexity" not in table[0]
    table, words = only(
        row(FLOAT, 0.0, task="last-word", accuracy=0.5),
        row("mse", 0.005, **more, **against("vs_float", -0.0833, "worse", 0.002)),
    )
    assert words == [
        "mse loses 0.0050 nats a token to float; last words -8.3 points, certain (p = 0.002); "
        "within 0.5 points of float's last words: no"
    ]


def test_too_few_documents_give_values_only() -> None:
    more = {"vs_float": 0.18, "kl_vs_quamba": -0.001}
    table, words = only(row(FLOAT, 0.0, 9), row("a", 0.005, 9, **more), row("quamba", 0.006, 9, vs_float=0.2))
    assert (table[1]["to float"], table[1]["KL to quamba"]) == ("+1 %", "-17 %")
    assert words[0] == (
        "a loses 0.0050 nats a token to float, 17 % less than upstream's scales; perplexity +1 %; 9 documents give "
        "values and no verdict: take 10 or more"
    )


def test_what_is_not_finite_is_last_and_named() -> None:
    names = ("kl_vs_quamba", "vs_float")
    broken = {name: math.nan for name in names} | {f"{name}_verdict": "not finite" for name in names}
    broken["perplexity"] = math.nan
    base = row(FLOAT, 0.0), row("quamba", 0.005)
    table, words = only(*base, row("bad", math.nan, **broken), row("a", 0.006))
    assert [line["strategy"] for line in table[1:]] == ["quamba", "a", "bad"]
    assert table[3]["to float"] == table[3]["KL to quamba"] == "not finite"
    assert words[0].startswith("quamba loses") and words[0].endswith("; not finite, so not ranked: bad")
    table, words = only(row("bad", math.nan, **broken), row("worse", math.inf))
    assert {line[""] for line in table} == {""}
    assert words == ["not finite, so not ranked: bad, worse: nothing can be ranked"]


def test_the_float_model_alone_has_a_sentence() -> None:
    _, words = only(row(FLOAT, 0.0, perplexity_low=17.2, perplexity_high=18.91))
    assert words == ["float has perplexity 18 (95 %: 17.2 to 18.91)"]


@pytest.mark.parametrize("task", ["perplexity", "last-word"])
def test_every_line_fits_and_own_texts_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str) -> None:
    labels = {"quamba": 0.02, "adaptive_outlier_aware@" + ",".join(["ssm_state_act:input"] * 6) + "/quamba": 0.3}
    about = {"tasks": [{"data": "t", "self_generated": True}]}
    found = Evaluation("x", tmp_path, results(12, labels, task), about, ["a note " * 30])
    emit_evaluation(found, 1000, 0, 0.5, "table", None)
    out, err = capsys.readouterr()
    assert max(map(len, [*out.splitlines(), *err.splitlines()])) <= 100
    words = " ".join(out.split())
    assert "no measure of real text" in words and "quamba loses 0.00034 nats a token to float" in words
    table = summarize(found.results, bootstrap=1000)
    assert rank(table)[0].table["strategy"].to_pylist()[-1] in labels  # nothing is shortened but on the page
