"""The verdict sentences of an evaluation: better, worse, same, too few, one strategy, not finite."""

import math
from pathlib import Path

import pyarrow as pa
import pytest
from test_paired_statistics import results

from quambase.apply.evaluation.scoring import FLOAT
from quambase.apply.evaluation.stored import Evaluation
from quambase.apply.evaluation.summary import SUMMARY, summarize
from quambase.apply.evaluation.summary_text import rank
from quambase.cli.evaluate import emit_evaluation


def row(label: str, kl: float, documents: int = 20, **more: object) -> dict[str, object]:
    """A strategy's row of SUMMARY, without differences but for ``more``."""
    empty = dict.fromkeys(SUMMARY.names)
    head = {"data": "t", "task": "perplexity", "strategy": label, "documents": documents, "tokens": 10 * documents}
    return empty | head | {"perplexity": 18.0, "kl": kl, "top1_agreement": 0.9, "token_accuracy": 0.5} | more


def against(reference: str, value: float, words: str, smallest: float | None = None) -> dict[str, object]:
    return {f"vs_{reference}": value, f"vs_{reference}_verdict": words, f"vs_{reference}_detectable": smallest}


def only(*rows: dict[str, object]) -> tuple[list[dict[str, object]], list[str]]:
    (found,) = rank(pa.Table.from_pylist(list(rows), SUMMARY))
    return found.table.to_pylist(), found.verdicts


def test_the_float_model_then_the_least_kl() -> None:
    table, words = only(row("a", 0.008), row(FLOAT, 0.0), row("b", 0.005), row("c", 0.006))
    assert [(line[""], line["strategy"]) for line in table] == [("", FLOAT), ("*", "b"), ("", "c"), ("", "a")]
    assert [line["KL x1000"] for line in table] == ["-", "5", "6", "8"]
    assert words == ["b has the least KL, 5 x1000, 17 % below the next, c"]  # 1 - 5/6


def test_equal_strategies_share_the_rank() -> None:
    """`selected` is one strategy wherever that has the least error everywhere."""
    _, words = only(row(FLOAT, 0.0), row("mse", 0.005), row("selected", 0.005), row("c", 0.006))
    assert words == ["mse and selected have the least KL, 5 x1000, 17 % below the next, c"]
    _, words = only(row(FLOAT, 0.0), row("mse", 0.005), row("selected", 0.005))
    assert words == ["mse and selected have the least KL, 5 x1000"]


def test_better_and_worse_with_their_size() -> None:
    more = against(FLOAT, 0.0853, "worse", 0.05) | against("quamba", -0.0714, "better", 0.05)
    table, words = only(row(FLOAT, 0.0), row("mse", 0.005, **more))
    assert (table[1]["to float"], table[1]["to quamba"]) == ("+0.0853 worse", "-0.0714 better")
    assert words == [
        "mse: KL 5 x1000",
        "mse is worse than the float model in perplexity, by 0.0853",
        "mse is better than upstream's quamba in perplexity, by 0.0714",
    ]


@pytest.mark.parametrize(
    ("value", "smallest", "end"),
    [
        (0.02, 0.04, "; if the difference seen is real, about 80 documents would show it"),  # 20 (0.04 / 0.02)^2
        (-0.03, 0.05, "; if the difference seen is real, about 56 documents would show it"),  # 55.6, up
        (0.0001, 1.0, "; the difference seen is too small for any practical number of documents"),
        (0.0, 0.04, ""),
        (0.02, None, ""),
        (0.02, 0.01, ""),  # detectable as it is, and not detected: no number of documents follows
    ],
)
def test_same_and_how_many_documents_would_tell(value: float, smallest: float | None, end: str) -> None:
    more = against(FLOAT, value, "not distinguishable", smallest)
    table, words = only(row(FLOAT, 0.0), row("mse", 0.005, **more))
    assert table[1]["to float"] == f"{value:+.3g} same"
    assert words[1:] == [f"mse is not distinguishable from the float model in perplexity on 20 documents{end}"]


def test_last_words_are_in_points() -> None:
    more = {"task": "last-word", "accuracy": 0.4} | against(FLOAT, -0.0833, "worse", 0.05)
    table, words = only(row("mse", 0.005, **more))
    assert (table[0]["last word %"], table[0]["to float"]) == ("40", "-8.33 worse")
    assert words[1] == "mse is worse than the float model in accuracy, by 8.33 points"


def test_too_few_documents_give_values_only() -> None:
    table, words = only(row("a", 0.005, 9, vs_float=0.1), row("b", 0.006, 9, vs_float=0.2))
    assert table[0]["to float"] == "+0.1"
    assert words[1:] == ["9 documents give no verdict, only values; take 10 or more"]


def test_what_is_not_finite_is_last_and_named() -> None:
    broken = {"perplexity": math.nan} | against(FLOAT, math.nan, "not finite")
    table, words = only(row("bad", math.nan, **broken), row("a", 0.006), row("b", 0.005))
    assert [line["strategy"] for line in table] == ["b", "a", "bad"] and table[2]["to float"] == "not finite"
    assert words[0].startswith("b has the least KL") and words[-1] == "not finite, so not ranked: bad"
    table, words = only(row("bad", math.nan, **broken), row("worse", math.inf))
    assert {line[""] for line in table} == {""} and words == ["not finite, so not ranked: bad, worse"]


@pytest.mark.parametrize("task", ["perplexity", "last-word"])
def test_every_line_fits_and_own_texts_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str) -> None:
    labels = {"quamba": 0.02, "adaptive_outlier_aware@" + ",".join(["ssm_state_act:input"] * 6) + "/quamba": 0.3}
    about = {"tasks": [{"data": "t", "self_generated": True}]}
    found = Evaluation("x", tmp_path, results(12, labels, task), about, ["a note " * 30])
    emit_evaluation(found, 1000, 0, "table", None)
    out, err = capsys.readouterr()
    assert max(map(len, [*out.splitlines(), *err.splitlines()])) <= 100
    assert "no measure of real text" in " ".join(out.split()) and "quamba has the least KL" in err
    table = summarize(found.results, bootstrap=1000)
    assert rank(table)[0].table["strategy"].to_pylist()[-1] in labels  # nothing is shortened but on the page
