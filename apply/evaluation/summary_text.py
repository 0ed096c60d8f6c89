"""An evaluation's summary as people read it: tables, the ranking by KL, verdicts in words, and remarks."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import pyarrow as pa

from quambase.apply.evaluation.paired_statistics import FEWEST, LEVEL, STEADY_RESAMPLES, misses_zero
from quambase.apply.evaluation.scoring import FLOAT, LAST_WORD
from quambase.apply.evaluation.summary import NOT_FINITE, REFERENCES, can_reach_a_verdict


class Readable(NamedTuple):
    """Tables for people, and their footnotes, a line each."""

    figures: pa.Table
    differences: pa.Table
    footnotes: list[str]


def readable(summary: pa.Table) -> Readable:
    """SUMMARY as a person reads it: each strategy's figures, and its differences to the references.

    Intervals are in brackets, shares in %; differences are of perplexity, or of accuracy in points for last words. A
    verdict that the interval beside it seems to contradict is marked, and a footnote says why.
    """
    figures, differences = [], []
    families = _families(summary)
    marked: dict[str, set[int]] = {}
    for row in summary.to_pylist():
        percent = 100.0 if row["task"] == LAST_WORD else 1.0
        head = {"text": row["data"], "strategy": row["strategy"]}
        figures.append(
            {
                **head,
                "documents": row["documents"],
                "perplexity": _bracketed(row, "perplexity"),
                "KL/token": _bracketed(row, "kl"),
                "top-1 %": f"{100 * row['top1_agreement']:.2f}",
                "next token %": f"{100 * row['token_accuracy']:.2f}",
                "last word %": _bracketed(row, "accuracy", 100.0),
            }
        )
        if row["strategy"] == FLOAT:
            continue
        line: dict[str, str] = {**head, "difference of": "accuracy %" if row["task"] == LAST_WORD else "perplexity"}
        for reference in REFERENCES:
            line[f"to {reference}"] = _bracketed(row, f"vs_{reference}", percent, sign="+")
            line[f"verdict on {reference}"], mark = _marked_verdict(row, reference)
            if mark:
                marked.setdefault(mark, set()).add(families[row["task"], row["data"], reference])
        smallest = row[f"vs_{FLOAT}_detectable"]
        line["detectable"] = "-" if smallest is None else f"{percent * smallest:.3g}"
        differences.append(line)
    footnotes = [_footnote(mark, comparisons) for mark, comparisons in sorted(marked.items())]
    return Readable(pa.Table.from_pylist(figures), pa.Table.from_pylist(differences), footnotes)


class Ranking(NamedTuple):
    """One text for people: a table, best strategy first; its footnotes; and the verdicts in words, a line each."""

    task: str
    data: str
    documents: int
    tokens: int
    table: pa.Table
    footnotes: list[str]
    verdicts: list[str]


def rank(summary: pa.Table) -> list[Ranking]:
    """SUMMARY text by text: the float model first, then the strategies by KL, least (starred) first.

    KL is in thousandths of a nat per token; differences are of perplexity, or of accuracy in points for last words. A
    strategy whose KL is not finite comes last.
    """
    families = _families(summary)
    by_text: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in summary.to_pylist():
        by_text.setdefault((row["task"], row["data"]), []).append(row)
    return [_ranking(task, data, rows, families) for (task, data), rows in by_text.items()]


def _ranking(task: str, data: str, rows: list[dict[str, Any]], families: dict[tuple[str, str, str], int]) -> Ranking:
    floating = [row for row in rows if row["strategy"] == FLOAT]
    strategies = sorted((row for row in rows if row["strategy"] != FLOAT), key=_by_kl)
    percent = 100.0 if task == LAST_WORD else 1.0
    marked: dict[str, set[int]] = {}
    lines = []
    for row in floating + strategies:
        starred = len(strategies) > 1 and row is strategies[0] and math.isfinite(row["kl"])
        line = {
            "": "*" if starred else "",
            "strategy": row["strategy"],
            "KL x1000": "-" if row["strategy"] == FLOAT else _bracketed(row, "kl", 1000.0, digits=3),
            "perplexity": f"{row['perplexity']:.4g}",
        }
        if task == LAST_WORD:
            line["last word %"] = f"{100 * row['accuracy']:.3g}"
        for reference in REFERENCES:
            name = f"vs_{reference}"
            words, mark = _marked_verdict(row, reference)
            if mark:
                marked.setdefault(mark, set()).add(families[task, data, reference])
            short = "" if row["documents"] < FEWEST else SHORT.get(words, words)
            value = row[name]
            if value is not None:
                words = f"{percent * value:+.3g} {short}".rstrip() if math.isfinite(value) else NOT_FINITE
            line[f"to {reference}"] = words
        lines.append(line)
    notes = [_footnote(mark, comparisons) for mark, comparisons in sorted(marked.items())]
    return Ranking(
        task,
        data,
        rows[0]["documents"],
        rows[0]["tokens"],
        pa.Table.from_pylist(lines),
        notes,
        _verdicts(strategies),
    )


SAME = "same"
SHORT = {f"not distinguishable{mark}": f"{SAME}{mark}" for mark in ("", " (a)", " (b)")}
"""Verdicts as a narrow table has them: `same` is "not distinguishable", not a proof that nothing differs."""


def _by_kl(row: dict[str, Any]) -> float:
    return float(row["kl"]) if math.isfinite(row["kl"]) else math.inf


def _verdicts(strategies: list[dict[str, Any]]) -> list[str]:
    """The best strategy of one text (they come least KL first) and how certain that is, a sentence each."""
    found = []
    bad = [row["strategy"] for row in strategies if not (math.isfinite(row["kl"]) and math.isfinite(row["perplexity"]))]
    good = [row for row in strategies if row["strategy"] not in bad]
    if good:
        best, documents = good[0], good[0]["documents"]
        alike = [row["strategy"] for row in good if row["kl"] == best["kl"]]  # as `selected`, where it is one strategy
        others = [row for row in good if row["strategy"] not in alike]
        least = (
            f"{' and '.join(alike)} {'has' if len(alike) == 1 else 'have'} the least KL, {1000 * best['kl']:.3g} x1000"
        )
        if others and others[0]["kl"] > 0:
            least += f", {100 * (1 - best['kl'] / others[0]['kl']):.2g} % below the next, {others[0]['strategy']}"
        alone = f"{best['strategy']}: KL {1000 * best['kl']:.3g} x1000"
        found.append(alone if len(good) == 1 else least)
        if documents < FEWEST:
            found.append(f"{documents} documents give no verdict, only values; take {FEWEST} or more")
        else:
            found += [line for reference in REFERENCES if (line := _against(best, reference))]
    if bad:
        found.append(f"not finite, so not ranked: {', '.join(bad)}")
    return found


def _against(row: dict[str, Any], reference: str) -> str | None:
    """A strategy's difference to a reference in words; None where it was not compared."""
    name = f"vs_{reference}"
    words = row[f"{name}_verdict"]
    if words is None or words == NOT_FINITE:
        return None
    whom = "the float model" if reference == FLOAT else f"upstream's {reference}"
    what = "accuracy" if row["task"] == LAST_WORD else "perplexity"
    if words in ("better", "worse"):
        percent, unit = (100.0, " points") if row["task"] == LAST_WORD else (1.0, "")
        return f"{row['strategy']} is {words} than {whom} in {what}, by {percent * abs(row[name]):.3g}{unit}"
    line = f"{row['strategy']} is not distinguishable from {whom} in {what} on {row['documents']} documents"
    smallest = row[f"{name}_detectable"]
    if smallest is None or row[name] == 0:
        return line
    # A standard error is proportional to one over the root of the number of documents.
    needed = row["documents"] * (smallest / abs(row[name])) ** 2
    if needed <= row["documents"]:
        return line
    if needed > MOST_NEEDED:
        return f"{line}; the difference seen is too small for any practical number of documents"
    return f"{line}; if the difference seen is real, about {_round_up(needed):,} documents would show it"


MOST_NEEDED = 1_000_000
"""Largest number of needed documents that is named."""


def _round_up(count: float) -> int:
    """``count`` up to two digits."""
    unit: int = 10 ** max(0, len(str(int(count))) - 2)
    return math.ceil(count / unit) * unit


_MISSES, _CONTAINS = "(a)", "(b)"


def _marked_verdict(row: dict[str, Any], reference: str) -> tuple[str, str]:
    """The verdict as people read it, and the mark of the footnote that it needs, or none."""
    name = f"vs_{reference}"
    if row[name] is None:
        return "-", ""
    if row["documents"] < FEWEST:
        return f"too few documents (under {FEWEST})", ""
    words = str(row[f"{name}_verdict"])
    p_value, low, high = (row[f"{name}{end}"] for end in ("_p", "_low", "_high"))
    shown = misses_zero(None if low is None else (low, high))
    if p_value is None or shown == (p_value <= LEVEL):
        return words, ""
    mark = _MISSES if shown else _CONTAINS
    return f"{words} {mark}", mark


def _footnote(mark: str, comparisons: set[int]) -> str:
    """Why an interval seems to contradict the verdicts that are marked, in families of so many comparisons."""
    over = " or ".join(map(str, sorted(comparisons)))
    corrected = f"after Holm's correction over {over} comparisons" if comparisons != {1} else "by a test of its own"
    if mark == _MISSES:
        return f"{mark} the interval, of this one difference, misses zero, but p is above {LEVEL} {corrected}"
    return f"{mark} p is {LEVEL} or less {corrected}, but the interval contains zero; a verdict needs both"


def _families(summary: pa.Table) -> dict[tuple[str, str, str], int]:
    """How many strategies were compared, by task, text and reference."""
    compared = [
        (row["task"], row["data"], reference)
        for row in summary.to_pylist()
        for reference in REFERENCES
        if row[f"vs_{reference}_p"] is not None
    ]
    return dict(Counter(compared))


def remarks(summary: pa.Table, bootstrap: int) -> list[str]:
    """Remarks on a whole summary, a line each: its families of comparisons, and whether a verdict is possible."""
    found = []
    if bootstrap < STEADY_RESAMPLES:
        found.append(
            f"--bootstrap {bootstrap} is coarse: the intervals of perplexity and KL change visibly with --seed; "
            f"take {STEADY_RESAMPLES} or more (p-values and intervals of differences do not depend on it)"
        )
    families = _families(summary)
    if families and max(families.values()) == 1:
        found.append(
            "one strategy was compared, so p-values are not corrected: strategies evaluated one at a time escape "
            "Holm's correction; evaluate those to choose from together (--scales)"
        )
    elif families:
        found.append(
            "p-values are corrected (Holm) within a family, the strategies compared on one text with one reference "
            f"({len(families)} {'family' if len(families) == 1 else 'families'} here, of {max(families.values())} "
            "comparisons at most); strategies evaluated one at a time escape the correction"
        )
    documents = {(row["task"], row["data"]): row["documents"] for row in summary.to_pylist()}
    for (task, data, reference), count in families.items():
        if not can_reach_a_verdict(documents[task, data], count):
            found.append(
                f"{data}: {documents[task, data]} documents are too few for any verdict on {reference} after the "
                f"correction for {count} strategies; take more documents or fewer strategies"
            )
    return found


def _bracketed(row: dict[str, Any], name: str, factor: float = 1.0, sign: str = "", digits: int = 4) -> str:
    value = row[name]
    if value is None or math.isnan(value):
        return "-"
    shown = f"{factor * value:{sign}.{digits}g}"
    if row[f"{name}_low"] is None:
        return shown
    low, high = factor * row[f"{name}_low"], factor * row[f"{name}_high"]
    return f"{shown} [{low:{sign}.{digits}g}, {high:{sign}.{digits}g}]"
