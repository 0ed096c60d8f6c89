"""A comparison of two results as people read it: a sentence first, then a table. No torch."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa

from quambase.apply.evaluation.comparisons import SHARE, too_few
from quambase.apply.evaluation.diff.sample_logs import NO_FILTER
from quambase.apply.evaluation.paired_statistics import FEWEST, NOT_DISTINGUISHABLE, NOT_FINITE
from quambase.apply.evaluation.sentences import still_needed
from quambase.apply.evaluation.summary_text import SAME

Row = dict[str, Any]
"""A row of DIFF."""


def sentences(table: pa.Table) -> list[str]:
    """What a comparison says: of logs the first row; of stored evaluations, for each text, KL and what it did."""
    rows = table.to_pylist()
    if rows[0]["strategy_a"] is None:
        return [sentence(rows[0])]
    found = []
    texts = dict.fromkeys((row["data"], row["task"]) for row in rows)
    for text in texts:
        mine = [row for row in rows if (row["data"], row["task"]) == text]
        labels = mine[0]["strategy_a"], mine[0]["strategy_b"]
        first = [row for row in mine if (row["strategy_a"], row["strategy_b"]) == labels]
        told = [row for row in first if row["metric"] in ("kl", "accuracy")]
        told += [row for row in first if row["metric"] == "perplexity" and len(told) < 2]
        where = f"{text[0]}, {text[1]}, {_strategies(mine[0])}"
        found.append(f"{where}: {'; '.join(map(sentence, told))}")
    return found


def sentence(row: Row) -> str:
    """One row: on how many documents B is worse and better, both values, the difference and how certain it is."""
    name, unit = _name(row), " %" if _in_percent(row) else ""
    documents = f"{row['documents']:,}"
    if not row["higher"] and not row["lower"] and math.isfinite(row["difference"]):
        return f"A and B are alike in all {documents} documents: {name} {_value(row, row['a'])}{unit}"
    worse, better = _worse_and_better(row)
    words = ("lower", "higher") if row["larger_is_better"] is None else ("worse", "better")
    counted = (
        f"B answers {worse:,} of {documents} documents {words[0]} and {better:,} {words[1]}"
        if row["kind"] == SHARE
        else f"B is {words[0]} on {worse:,} of {documents} documents and {words[1]} on {better:,}"
    )
    values = f"{name} {_value(row, row['a'])} -> {_value(row, row['b'])}{unit}"
    points = " points" if _in_percent(row) else ""
    difference = f"difference {_value(row, row['difference'], '+')}{points}"
    if row["difference_low"] is not None:
        ends = (_value(row, row[f"difference{end}"], "+") for end in ("_low", "_high"))
        difference += f" (95 %: {' to '.join(ends)})"
    return f"{counted}: {values}, {difference}{_certainty(row)}"


def _certainty(row: Row) -> str:
    if too_few(row):
        return f"; {row['documents']} documents give no verdict: take {FEWEST} or more"
    verdict = row["difference_verdict"]
    if verdict == NOT_FINITE:
        return f": {NOT_FINITE}"
    line = f", p = {row['difference_p']:.2g}: "
    if verdict != NOT_DISTINGUISHABLE:
        return f"{line}B is {verdict}"
    needed = still_needed(row, "difference", " documents")
    return f"{line}{verdict}; {needed}" if needed else f"{line}{verdict}"


def short_table(table: pa.Table) -> pa.Table:
    """The rows of DIFF for a narrow page: shares in %, their differences in points."""
    rows = table.to_pylist()
    stored = rows[0]["strategy_a"] is not None
    several = len({(row["data"], row["task"]) for row in rows}) > 1
    lines = []
    for row in rows:
        smallest, p_value = row["difference_detectable"], row["difference_p"]
        line = {"text": f"{row['data']}, {row['task']}"} if stored and several else {}
        if stored:
            line["strategy"] = _strategies(row)
        line |= {
            "metric": _name(row) + (" %" if _in_percent(row) else ""),
            "A": _value(row, row["a"]),
            "B": _value(row, row["b"]),
            "B - A": _ranged(row),
            "p": "-" if p_value is None else f"{p_value:.2g}",
            "verdict": _short_verdict(row),
        }
        if not stored:
            line["worse/better"] = "{:,} / {:,}".format(*_worse_and_better(row))
        line["detectable"] = "-" if smallest is None else _size(row, smallest)
        lines.append(line)
    return pa.Table.from_pylist(lines)


def _worse_and_better(row: Row) -> tuple[int, int]:
    """On how many documents B is worse and better; lower and higher where it is not known which is better."""
    return (row["higher"], row["lower"]) if row["larger_is_better"] is False else (row["lower"], row["higher"])


def _ranged(row: Row) -> str:
    """The difference with its interval: what it reaches to either side, or, where the sides differ, its ends."""
    shown = _value(row, row["difference"], "+")
    if row["difference_low"] is None:
        return shown
    if row["kind"] != SHARE:
        return f"{shown} ±{_size(row, row['difference_high'] - row['difference'])}"
    low, high = (_value(row, row[f"difference{end}"], "+") for end in ("_low", "_high"))
    return f"{shown} [{low}, {high}]"


def _short_verdict(row: Row) -> str:
    """The verdict as a narrow table has it."""
    if too_few(row):
        return f"under {FEWEST} documents"
    return SAME if row["difference_verdict"] == NOT_DISTINGUISHABLE else str(row["difference_verdict"])


def _strategies(row: Row) -> str:
    a, b = row["strategy_a"], row["strategy_b"]
    return str(a) if a == b else f"{a} -> {b}"


def _name(row: Row) -> str:
    return f"{row['metric']} ({row['filter']})" if row["filter"] not in (None, NO_FILTER) else str(row["metric"])


def _in_percent(row: Row) -> bool:
    return row["kind"] == SHARE or row["metric"] in ("flips", "accuracy")


def _size(row: Row, value: float) -> str:
    """The size of a difference."""
    return _value(row, value, "+").lstrip("+")


def _value(row: Row, value: float, sign: str = "") -> str:
    """A value, or a difference, in the row's unit: shares with a decimal that one document in a thousand moves."""
    if not math.isfinite(value):
        return str(value)
    if _in_percent(row):
        return f"{100 * value:{sign}.{1 if row['documents'] < 2000 else 2}f}"
    return f"{value:{sign}.2g}" if sign else f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"
