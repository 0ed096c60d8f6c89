"""An evaluation's summary as people read it: tables, ranked by KL, and their footnotes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pyarrow as pa

from quambase.apply.evaluation.comparisons import too_few
from quambase.apply.evaluation.paired_statistics import FEWEST, LEVEL, NOT_DISTINGUISHABLE, NOT_FINITE, misses_zero
from quambase.apply.evaluation.sentences import loss, percents, runner_up, sentence
from quambase.apply.evaluation.summary import REFERENCES, Families, families
from quambase.schema.stored.results import FLOAT, KL_DIFFERENCE, LAST_WORD, LM_EVAL, UPSTREAM


class Readable(NamedTuple):
    """Tables for people, and their footnotes, a line each."""

    figures: pa.Table
    differences: pa.Table
    footnotes: list[str]


def readable(summary: pa.Table) -> Readable:
    """SUMMARY as a person reads it: each strategy's figures, and its differences to the references.

    Intervals are in brackets, shares in %, KL in thousandths of a nat per token; other differences are of perplexity,
    or of accuracy in points where documents are right or wrong. A verdict that the interval beside it seems to
    contradict is marked, and a footnote says why.
    """
    rows = summary.to_pylist()
    marked: dict[str, set[int]] = {}
    compared = families(summary)
    right = _right_column(LM_EVAL if any(row["task"] == LM_EVAL for row in rows) else LAST_WORD)
    differences = [_differences(row, compared, marked) for row in rows if row["strategy"] != FLOAT]
    figures = [
        {
            "text": row["data"],
            "strategy": row["strategy"],
            "documents": row["documents"],
            "clusters": row["clusters"],
            "KL x1000": _bracketed(row, "kl", 1000.0),
            "flips %": _bracketed(row, "flips", 100.0),
            "perplexity": _bracketed(row, "perplexity"),
            "next token %": "-" if row["token_accuracy"] is None else f"{100 * row['token_accuracy']:.2f}",
            right: _bracketed(row, "accuracy", 100.0),
        }
        for row in rows
    ]
    return Readable(pa.Table.from_pylist(figures), pa.Table.from_pylist(differences), _footnotes(marked))


def _right_column(task: str) -> str:
    """The heading of the share of right answers."""
    return "last word %" if task == LAST_WORD else "right %"


def _differences(row: dict[str, Any], compared: Families, marked: dict[str, set[int]]) -> dict[str, str]:
    """The line of a strategy's differences."""
    right = row["accuracy"] is not None
    line = {"text": row["data"], "strategy": row["strategy"]}
    for name, to, on in (
        (KL_DIFFERENCE, f"KL x1000 to {UPSTREAM}", "KL"),
        *((f"vs_{reference}", f"to {reference}", reference) for reference in REFERENCES),
    ):
        if name == f"vs_{FLOAT}":
            line["difference of"] = "accuracy %" if right else "perplexity"
        factor = 1000.0 if name == KL_DIFFERENCE else 100.0 if right else 1.0
        line[to] = _bracketed(row, name, factor, sign="+")
        line[f"verdict on {on}"] = _marked_verdict(row, name, compared, marked)
        if name != f"vs_{UPSTREAM}":
            smallest = row[f"{name}_detectable"]
            line["detectable KL" if name == KL_DIFFERENCE else "detectable"] = (
                "-" if smallest is None else f"{factor * smallest:.3g}"
            )
    line["within"] = "-" if row["within_verdict"] is None else f"{row['within']:g} %: {row['within_verdict']}"
    return line


class Ranking(NamedTuple):
    """One text for people: what was learnt, in sentences; a table, best strategy first; and its footnotes."""

    task: str
    data: str
    size: str
    sentences: list[str]
    table: pa.Table
    footnotes: list[str]


def rank(summary: pa.Table) -> list[Ranking]:
    """SUMMARY text by text: the float model first, then the strategies by KL, least (starred) first.

    KL is in thousandths of a nat per token, its difference in % of that of upstream's scales; the last difference is in
    % of the floating-point model's perplexity, or in points of accuracy. A strategy whose KL is not finite comes last.
    A text without KL is ranked by accuracy.
    """
    compared = families(summary)
    by_text: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in summary.to_pylist():
        by_text.setdefault((row["task"], row["data"]), []).append(row)
    return [_ranking(task, data, rows, compared) for (task, data), rows in by_text.items()]


def _ranking(task: str, data: str, rows: list[dict[str, Any]], compared: Families) -> Ranking:
    by_label = {row["strategy"]: row for row in rows}
    strategies = sorted((row for row in rows if row["strategy"] != FLOAT), key=loss)
    wholes = {name: by_label.get(label, {}).get(figure) for name, label, figure in _WHOLES}
    if rows[0]["accuracy"] is not None:
        wholes[f"vs_{FLOAT}"] = 1.0
    marked: dict[str, set[int]] = {}
    lines = []
    for row in [*(row for row in rows if row["strategy"] == FLOAT), *strategies]:
        starred = len(strategies) > 1 and row is strategies[0] and math.isfinite(loss(row))
        floating = row["strategy"] == FLOAT
        line = {
            "": "*" if starred else "",
            "strategy": row["strategy"],
            "KL x1000": "-" if floating else _bracketed(row, "kl", 1000.0, digits=3),
        }
        if UPSTREAM in by_label:
            line[f"KL to {UPSTREAM}"] = _short_difference(row, KL_DIFFERENCE, wholes, compared, marked)
        line["flips %"] = "-" if floating else _flips(row)
        if row["accuracy"] is not None:
            line[_right_column(task)] = f"{100 * row['accuracy']:.3g}"
        else:
            line["perplexity"] = f"{row['perplexity']:.4g}"
        line[f"to {FLOAT}"] = _short_difference(row, f"vs_{FLOAT}", wholes, compared, marked)
        lines.append(line)
    size = f"{rows[0]['documents']:,} documents"
    if rows[0]["clusters"] < rows[0]["documents"]:
        size += f" of {rows[0]['clusters']:,} clusters"
    words = [sentence(rows)]
    if (next_best := runner_up(rows)) is not None:
        words.append(next_best)
    if rows[0]["tokens"] is not None:
        size += f", {rows[0]['tokens']:,} tokens"
    return Ranking(task, data, size, words, pa.Table.from_pylist(lines), _footnotes(marked))


_WHOLES = ((KL_DIFFERENCE, UPSTREAM, "kl"), (f"vs_{FLOAT}", FLOAT, "perplexity"))
"""What a difference is in percent of."""


def _short_difference(
    row: dict[str, Any], name: str, wholes: dict[str, float | None], compared: Families, marked: dict[str, set[int]]
) -> str:
    """A difference in percent (of last words: in points), and its verdict."""
    whole = wholes[name]
    if row[name] is None or not whole:
        return "-"
    if not math.isfinite(row[name] / whole):
        return NOT_FINITE
    points = name != KL_DIFFERENCE and row["accuracy"] is not None
    shown = percents(100 * row[name] / whole) + ("" if points else " %")
    if too_few(row):
        return shown
    words = _marked_verdict(row, name, compared, marked)
    return f"{shown} {SHORT.get(words, words)}"


def _flips(row: dict[str, Any]) -> str:
    """The share of flips in %, with what its interval reaches upwards."""
    if row["flips"] is None:
        return "-"
    shown = f"{100 * row['flips']:.3g}"
    return shown if row["flips_high"] is None else f"{shown} ±{100 * (row['flips_high'] - row['flips']):.2g}"


SAME = "same"
SHORT = {f"{NOT_DISTINGUISHABLE}{mark}": f"{SAME}{mark}" for mark in ("", " (a)", " (b)")}
"""Verdicts as a narrow table has them: `same` is "not distinguishable", not a proof that nothing differs."""

_MISSES, _CONTAINS = "(a)", "(b)"


def _marked_verdict(row: dict[str, Any], name: str, compared: Families, marked: dict[str, set[int]]) -> str:
    """The verdict on a difference as people read it, with the mark of the footnote that it needs, if any; the mark and
    the size of the verdict's family are added to ``marked``.
    """
    if row[name] is None:
        return "-"
    if too_few(row):
        return f"too few documents (under {FEWEST})"
    words = str(row[f"{name}_verdict"])
    p_value, low, high = (row[f"{name}{end}"] for end in ("_p", "_low", "_high"))
    shown = misses_zero(None if low is None else (low, high))
    if p_value is None or shown == (p_value <= LEVEL):
        return words
    mark = _MISSES if shown else _CONTAINS
    marked.setdefault(mark, set()).add(compared[row["task"], row["data"], name])
    return f"{words} {mark}"


def _footnotes(marked: dict[str, set[int]]) -> list[str]:
    return [_footnote(mark, comparisons) for mark, comparisons in sorted(marked.items())]


def _footnote(mark: str, comparisons: set[int]) -> str:
    """Why an interval seems to contradict the verdicts that are marked, in families of so many comparisons."""
    over = " or ".join(map(str, sorted(comparisons)))
    corrected = f"after Holm's correction over {over} comparisons" if comparisons != {1} else "by a test of its own"
    if mark == _MISSES:
        return f"{mark} the interval, of this one difference, misses zero, but p is above {LEVEL} {corrected}"
    return f"{mark} p is {LEVEL} or less {corrected}, but the interval contains zero; a verdict needs both"


def _bracketed(row: dict[str, Any], name: str, factor: float = 1.0, sign: str = "", digits: int = 4) -> str:
    value = row[name]
    if value is None or math.isnan(value):
        return "-"
    shown = f"{factor * value:{sign}.{digits}g}"
    if row[f"{name}_low"] is None:
        return shown
    low, high = factor * row[f"{name}_low"], factor * row[f"{name}_high"]
    return f"{shown} [{low:{sign}.{digits}g}, {high:{sign}.{digits}g}]"
