"""Per-document results summarised: values with intervals, paired differences, verdicts, and what they rest on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from quambase.apply.evaluation.paired_statistics import (
    FEWEST,
    FEWEST_RESAMPLES,
    LEVEL,
    MOST_RESAMPLES,
    RESAMPLES,
    STEADY_RESAMPLES,
    Interval,
    bootstrap_t_interval,
    detectable,
    holm,
    least_discordant,
    least_sign_flip_p,
    linearised,
    mcnemar_exact,
    misses_zero,
    newcombe,
    resampled_t,
    sign_flip_p,
    standard_error,
    student_interval,
    verdict,
    wilson,
)
from quambase.apply.evaluation.scoring import FLOAT, LAST_WORD
from quambase.apply.int8.needed_scales import DEFAULT_OTHERWISE
from quambase.schema.errors import DatabaseInvalid, DataInvalid

REFERENCES = (FLOAT, DEFAULT_OTHERWISE)
"""What every strategy is compared with: the floating-point model, and upstream's own scales."""

_VALUES = ("perplexity", "kl", "accuracy")

_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("data", pa.string()),
    ("task", pa.string()),
    ("strategy", pa.string()),
    ("documents", pa.int64()),
    ("tokens", pa.int64()),
    *((f"{name}{end}", pa.float64()) for name in _VALUES for end in ("", "_low", "_high")),
    ("top1_agreement", pa.float64()),
    ("token_accuracy", pa.float64()),
    *(
        (f"vs_{reference}{end}", pa.string() if end == "_verdict" else pa.float64())
        for reference in REFERENCES
        for end in ("", "_low", "_high", "_p", "_detectable", "_verdict")
    ),
]

NOT_FINITE = "not finite"
"""The verdict where a perplexity is NaN or infinite: nothing can be compared."""

SUMMARY = pa.schema(_COLUMNS)
"""perplexity  exp of the mean nll per predicted token; for last-word per document, as lm-eval has it
kl          nats per predicted token
accuracy    share of last words right (null for perplexity)
token_accuracy  share of predicted tokens that were the most likely one
vs_*        difference in perplexity (for last-word in accuracy), its p Holm-corrected over the strategies,
            and the smallest difference that gets a verdict with power 0.8
*_low, *_high  95 % intervals
Null: all but the values below FEWEST documents, the intervals of what does not vary (the float model's KL, results that
are identical), and what rests on a number that is not finite."""

Float64 = npt.NDArray[np.float64]


def summarize(results: pa.Table, *, bootstrap: int = RESAMPLES, seed: int = 0) -> pa.Table:
    """Summarise tables.RESULTS of one evaluation into SUMMARY rows, in the order of the results.

    bootstrap  resamples for the intervals of perplexity and KL, FEWEST_RESAMPLES to MOST_RESAMPLES; p-values do not
               depend on it
    seed       of these resamples and of the random sign flips, from 0
    DataInvalid: either is out of range. DatabaseInvalid: two strategies of a text have different documents.
    """
    if not FEWEST_RESAMPLES <= bootstrap <= MOST_RESAMPLES:
        raise DataInvalid(f"bootstrap is {bootstrap}; expected {FEWEST_RESAMPLES} to {MOST_RESAMPLES} resamples")
    if seed < 0:
        raise DataInvalid(f"seed is {seed}; expected 0 or more")
    rows: list[dict[str, Any]] = []
    pairs = zip(results["task"].to_pylist(), results["data"].to_pylist(), strict=True)
    for task, data in dict.fromkeys((str(task), str(data)) for task, data in pairs):
        mask = pc.and_(pc.equal(results["task"], pa.scalar(task)), pc.equal(results["data"], pa.scalar(data)))
        rows += _Text(task, data, results.filter(mask), bootstrap, seed).rows()
    return pa.Table.from_pylist(rows, SUMMARY)


@dataclass(frozen=True)
class _Difference:
    """A paired difference.

    p_value      not corrected; NaN where a perplexity is not finite
    error        the standard error
    exact_pairs  p is McNemar's
    """

    value: float
    interval: Interval | None
    p_value: float
    error: float
    exact_pairs: bool = False

    def detectable(self, documents: int, comparisons: int) -> float | None:
        """The smallest difference that gets a verdict with power 0.8; None: nothing varies, or none can get one."""
        if not 0 < self.error < math.inf or not _reach_a_verdict(documents, comparisons):
            return None
        found = detectable(self.error, documents, comparisons)
        # McNemar's exact test needs some pairs, however small their spread.
        return max(found, least_discordant(comparisons) / documents) if self.exact_pairs else found


def _reach_a_verdict(documents: int, comparisons: int) -> bool:
    """Whether the least p that so many documents can give (McNemar's is the same, or less) survives the correction."""
    return comparisons * least_sign_flip_p(documents) <= LEVEL


class _Text:
    """The strategies' per-document columns of one text, in one order of documents."""

    def __init__(self, task: str, data: str, results: pa.Table, bootstrap: int, seed: int) -> None:
        self.task, self.data, self.bootstrap, self.seed = task, data, bootstrap, seed
        self.labels = [str(label) for label in pc.unique(results["strategy"]).to_pylist()]
        self.columns: dict[tuple[str, str], Float64] = {}
        names = ("nll", "kl", "top1_agreement", "top1_right", "tokens", *(("correct",) if task == LAST_WORD else ()))
        for label in self.labels:
            own = results.filter(pc.equal(results["strategy"], pa.scalar(label))).sort_by("document")
            for name in names:
                self.columns[label, name] = own[name].cast(pa.float64()).to_numpy()
            if not np.array_equal(self.columns[label, "tokens"], self.columns[self.labels[0], "tokens"]):
                raise DatabaseInvalid(
                    f"{data}: {label} and {self.labels[0]} were not scored on the same documents; evaluate again"
                )
        self.tokens = self.columns[self.labels[0], "tokens"]
        self.documents = self.tokens.size
        self.enough = self.documents >= FEWEST
        # lm-eval's perplexity of last words is per document.
        self.per = np.ones_like(self.tokens) if task == LAST_WORD else self.tokens

    def rows(self) -> list[dict[str, Any]]:
        found = [self._row(label) for label in self.labels]
        if self.enough:
            self._bootstrap(found)
        for reference in REFERENCES:
            others = [label for label in self.labels if label not in (reference, FLOAT)]
            if reference in self.labels and others:
                self._compare(reference, others, {row["strategy"]: row for row in found})
        return found

    def _row(self, label: str) -> dict[str, Any]:
        tokens = self.tokens.sum()
        row: dict[str, Any] = {
            "data": self.data,
            "task": self.task,
            "strategy": label,
            "documents": self.documents,
            "tokens": int(tokens),
            "perplexity": self._perplexity(label)[0],
            "kl": linearised(self.columns[label, "kl"], self.tokens)[0],
            "top1_agreement": float(self.columns[label, "top1_agreement"].sum() / tokens),
            "token_accuracy": float(self.columns[label, "top1_right"].sum() / tokens),
        }
        if self.task == LAST_WORD:
            right = int(self.columns[label, "correct"].sum())
            row["accuracy"] = right / self.documents
            if self.enough:
                row["accuracy_low"], row["accuracy_high"] = wilson(right, self.documents)
        return row

    def _perplexity(self, label: str) -> tuple[float, Float64]:
        """Perplexity, and each document's share (n,) in its error."""
        mean, shares = linearised(self.columns[label, "nll"], self.per)
        perplexity = _exp(mean)
        with np.errstate(invalid="ignore"):  # an infinite perplexity has no shares: they are NaN
            return perplexity, perplexity * shares

    def _bootstrap(self, rows: list[dict[str, Any]]) -> None:
        """Add the intervals of perplexity and KL: bootstrap-t, of perplexity on the scale of its logarithm."""
        values = [self.columns[label, name] for name in ("nll", "kl") for label in self.labels]
        weights = [per for per in (self.per, self.tokens) for _ in self.labels]
        drawn = resampled_t(np.stack(values, 1), np.stack(weights, 1), self.bootstrap, self.seed)
        intervals = []
        for value, weight, studentised in zip(values, weights, drawn.T, strict=True):
            ratio, shares = linearised(value, weight)
            intervals.append(bootstrap_t_interval(ratio, standard_error(shares), studentised))
        for row, nll, kl in zip(rows, intervals[: len(rows)], intervals[len(rows) :], strict=True):
            if nll and _exp(nll[1]) < math.inf:
                row["perplexity_low"], row["perplexity_high"] = map(_exp, nll)
            if kl:
                row["kl_low"], row["kl_high"] = max(0.0, kl[0]), kl[1]  # no KL is negative

    def _compare(self, reference: str, others: list[str], rows: dict[str, dict[str, Any]]) -> None:
        """Add the differences of ``others`` from ``reference``, one family of comparisons, to their rows."""
        metric = "accuracy" if self.task == LAST_WORD else "perplexity"
        for label in others:
            rows[label][f"vs_{reference}"] = rows[label][metric] - rows[reference][metric]
        if not self.enough:
            return
        compare = self._accuracies if self.task == LAST_WORD else self._perplexities
        found = dict(zip(others, compare(reference, others), strict=True))
        finite = [label for label in others if math.isfinite(found[label].p_value)]
        adjusted = dict(zip(finite, holm([found[label].p_value for label in finite]), strict=True))
        for label in others:
            if label not in adjusted:
                rows[label][f"vs_{reference}_verdict"] = NOT_FINITE
                continue
            difference, p_value = found[label], adjusted[label]
            low, high = difference.interval or (None, None)
            words = verdict(difference.value, difference.interval, p_value, smaller_is_better=metric == "perplexity")
            rows[label] |= {
                f"vs_{reference}_low": low,
                f"vs_{reference}_high": high,
                f"vs_{reference}_p": p_value,
                f"vs_{reference}_detectable": difference.detectable(self.documents, len(finite)),
                f"vs_{reference}_verdict": words,
            }

    def _perplexities(self, reference: str, others: list[str]) -> list[_Difference]:
        """Differences of perplexity: linearised intervals, p by sign flips."""
        base, base_shares = self._perplexity(reference)
        nll = np.stack([self.columns[label, "nll"] - self.columns[reference, "nll"] for label in others], 1)
        found = []
        for label, p_value in zip(others, sign_flip_p(nll, self.seed), strict=True):
            perplexity, own = self._perplexity(label)
            value, shares = perplexity - base, own - base_shares
            p_value = p_value if math.isfinite(value) else math.nan
            found.append(_Difference(value, student_interval(value, shares), float(p_value), standard_error(shares)))
        return found

    def _accuracies(self, reference: str, others: list[str]) -> list[_Difference]:
        """Differences of accuracy: Newcombe's intervals, McNemar's p."""
        there = self.columns[reference, "correct"] > 0
        found = []
        for label in others:
            here = self.columns[label, "correct"] > 0
            only_here, only_there = int((here & ~there).sum()), int((there & ~here).sum())
            interval = newcombe(int((here & there).sum()), only_here, only_there, int((~here & ~there).sum()))
            value = (only_here - only_there) / self.documents
            error = standard_error((here * 1.0 - there - value) / self.documents)
            p_value = mcnemar_exact(only_here, only_there)
            found.append(_Difference(value, interval, p_value, error, exact_pairs=True))
        return found


def _exp(x: float) -> float:
    """e^x, infinite where that is above the largest float64."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))


class Readable(NamedTuple):
    """Tables for people and, a line each, what a reader of them must know."""

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
    """Which of the strategies of one text (least KL first) to take, and how sure that is, a sentence each."""
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
    # A standard error falls with the root of the documents.
    needed = row["documents"] * (smallest / abs(row[name])) ** 2
    if needed <= row["documents"]:
        return line
    if needed > MOST_NEEDED:
        return f"{line}; the difference seen is too small for any practical number of documents"
    return f"{line}; if the difference seen is real, about {_round_up(needed):,} documents would show it"


MOST_NEEDED = 1_000_000
"""Documents beyond which a needed number is not named."""


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
    """What holds for the whole of a summary, a line each: families of comparisons, and how far they reach."""
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
            f"({len(families)} families here, of {max(families.values())} comparisons at most); strategies evaluated "
            "one at a time escape the correction"
        )
    documents = {(row["task"], row["data"]): row["documents"] for row in summary.to_pylist()}
    for (task, data, reference), count in families.items():
        if not _reach_a_verdict(documents[task, data], count):
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
