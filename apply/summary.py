"""Per-document results summarised: values with intervals, paired differences, verdicts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from quambase.apply.scales import DEFAULT_OTHERWISE
from quambase.apply.scoring import FLOAT, LAST_WORD
from quambase.apply.statistics import (
    Difference,
    difference,
    holm,
    interval,
    least_discordant,
    mcnemar_exact,
    resampled_sums,
    verdict,
)

REFERENCES = (FLOAT, DEFAULT_OTHERWISE)
"""What every strategy is compared with: the floating-point model, and upstream's own scales."""

FEWEST = 10
"""Below this many documents a bootstrap over documents says nothing."""

RESAMPLES = 10_000

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

SUMMARY = pa.schema(_COLUMNS)
"""perplexity  exp of the mean nll per predicted token; for last-word per document, as lm-eval has it
kl          nats per predicted token
accuracy    share of last words right (null for perplexity)
token_accuracy  share of predicted tokens that were the most likely one
vs_*        difference in perplexity (for last-word in accuracy), its p Holm-corrected over the strategies,
            and the smallest difference that this many documents show with power 0.8
*_low, *_high  95 % intervals"""

Float64 = npt.NDArray[np.float64]


def summarize(results: pa.Table, *, bootstrap: int = RESAMPLES, seed: int = 0) -> pa.Table:
    """Summarise tables.RESULTS of one evaluation into SUMMARY rows, in the order of the results."""
    rows: list[dict[str, Any]] = []
    pairs = zip(results["task"].to_pylist(), results["data"].to_pylist(), strict=True)
    for task, data in dict.fromkeys((str(task), str(data)) for task, data in pairs):
        mask = pc.and_(pc.equal(results["task"], pa.scalar(task)), pc.equal(results["data"], pa.scalar(data)))
        rows += _Text(task, data, results.filter(mask), bootstrap, seed).rows()
    return pa.Table.from_pylist(rows, SUMMARY)


class _Text:
    """The strategies' per-document columns of one text, in one order of documents."""

    def __init__(self, task: str, data: str, results: pa.Table, bootstrap: int, seed: int) -> None:
        self.task, self.data = task, data
        self.labels = [str(label) for label in pc.unique(results["strategy"]).to_pylist()]
        self.columns: dict[tuple[str, str], Float64] = {}
        for label in self.labels:
            own = results.filter(pc.equal(results["strategy"], pa.scalar(label))).sort_by("document")
            for name in ("nll", "kl", "top1_agreement", "top1_right", "tokens", "correct"):
                # `correct` is null where the task has no last word.
                self.columns[label, name] = np.array([float(v or 0) for v in own[name].to_pylist()])
        self.documents = self.columns[self.labels[0], "tokens"].size
        keys = list(self.columns)
        stacked = np.stack([self.columns[key] for key in keys], axis=1)
        drawn = resampled_sums(stacked, bootstrap, seed)
        self.resampled = {key: drawn[:, i] for i, key in enumerate(keys)}
        self.sums = {key: np.array([column.sum()]) for key, column in self.columns.items()}

    def rows(self) -> list[dict[str, Any]]:
        found = [self._row(label) for label in self.labels]
        for reference in REFERENCES:
            others = [label for label in self.labels if label not in (reference, FLOAT)]
            if reference not in self.labels or not others:
                continue
            differences = {label: self._difference(label, reference) for label in others}
            adjusted = dict(zip(others, holm([differences[o].p_value for o in others]), strict=True))
            for row in found:
                label = row["strategy"]
                if label in differences:
                    row |= self._compared(reference, differences[label], adjusted[label])
        return found

    def _metric(self, name: str, label: str, source: dict[tuple[str, str], Float64]) -> Float64:
        """A metric from sums: (1,) of the documents themselves, or (resamples,)."""
        tokens = source[label, "tokens"]
        if name == "perplexity":
            per = np.full_like(tokens, self.documents) if self.task == LAST_WORD else tokens
            return np.asarray(np.exp(source[label, "nll"] / per), np.float64)
        if name == "kl":
            return source[label, "kl"] / tokens
        if name == "accuracy":
            return source[label, "correct"] / self.documents
        return source[label, name] / tokens

    def _row(self, label: str) -> dict[str, Any]:
        row: dict[str, Any] = {
            "data": self.data,
            "task": self.task,
            "strategy": label,
            "documents": self.documents,
            "tokens": int(self.sums[label, "tokens"][0]),
            "top1_agreement": float(self._metric("top1_agreement", label, self.sums)[0]),
            "token_accuracy": float(self._metric("top1_right", label, self.sums)[0]),
        }
        for name in _VALUES:
            if name == "accuracy" and self.task != LAST_WORD:
                continue
            value = float(self._metric(name, label, self.sums)[0])
            found = interval(value, self._metric(name, label, self.resampled))
            row |= {name: value, f"{name}_low": found.low, f"{name}_high": found.high}
        return row

    def _difference(self, label: str, reference: str) -> Difference:
        metric = "accuracy" if self.task == LAST_WORD else "perplexity"
        value = self._metric(metric, label, self.sums) - self._metric(metric, reference, self.sums)
        drawn = self._metric(metric, label, self.resampled) - self._metric(metric, reference, self.resampled)
        found = difference(float(value[0]), drawn)
        if metric == "perplexity":
            return found
        here, there = self.columns[label, "correct"] > 0, self.columns[reference, "correct"] > 0
        p_value = mcnemar_exact(int((here & ~there).sum()), int((there & ~here).sum()))
        # The bootstrap's spread is too small, even zero, where few documents differ.
        detectable = max(found.detectable, least_discordant() / self.documents)
        return Difference(found.estimate, p_value, detectable)

    def _compared(self, reference: str, found: Difference, adjusted: float) -> dict[str, Any]:
        words = verdict(found.estimate, adjusted, smaller_is_better=self.task != LAST_WORD)
        values = {
            "": found.estimate.value,
            "_low": found.estimate.low,
            "_high": found.estimate.high,
            "_p": adjusted,
            "_detectable": found.detectable,
            "_verdict": words if self.documents >= FEWEST else f"too few documents (under {FEWEST})",
        }
        return {f"vs_{reference}{end}": value for end, value in values.items()}


def readable(summary: pa.Table) -> tuple[pa.Table, pa.Table]:
    """SUMMARY as a person reads it: each strategy's figures, and its differences to the references.

    Intervals are in brackets, shares in %; differences are of perplexity, or of accuracy in points for last words.
    """
    figures, differences = [], []
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
            line[f"verdict on {reference}"] = row[f"vs_{reference}_verdict"] or "-"
        detectable = row[f"vs_{FLOAT}_detectable"]
        line["detectable"] = "-" if detectable is None else f"{percent * detectable:.3g}"
        differences.append(line)
    return pa.Table.from_pylist(figures), pa.Table.from_pylist(differences)


def _bracketed(row: dict[str, Any], name: str, factor: float = 1.0, sign: str = "") -> str:
    value = row[name]
    if value is None or math.isnan(value):
        return "-"
    low, high = factor * row[f"{name}_low"], factor * row[f"{name}_high"]
    return f"{factor * value:{sign}.4g} [{low:{sign}.4g}, {high:{sign}.4g}]"
