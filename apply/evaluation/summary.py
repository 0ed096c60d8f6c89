"""Per-document results summarised: values with intervals, paired differences and verdicts. No torch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from quambase.apply.evaluation.comparisons import (
    EXPONENTIAL,
    RATIO,
    SHARE,
    Difference,
    Units,
    difference_columns,
    differences,
    ends_of,
    exponential,
    interval_columns,
    judged,
    pairs,
)
from quambase.apply.evaluation.paired_statistics import (
    EQUIVALENCE_LEVEL,
    FEWEST,
    FEWEST_RESAMPLES,
    MOST_RESAMPLES,
    MOST_WITHIN,
    RESAMPLES,
    WITHIN,
    Interval,
    bootstrap_t_interval,
    equivalence,
    linearised,
    newcombe,
    resampled_t,
    standard_error,
    student_interval,
    wilson,
)
from quambase.schema.errors import DatabaseInvalid, DataInvalid
from quambase.schema.stored.results import FLOAT, KL_DIFFERENCE, UPSTREAM
from quambase.schema.values.arrays import Float64

REFERENCES = (FLOAT, UPSTREAM)
"""What every strategy is compared with: the floating-point model, and upstream's own scales."""

DIFFERENCES = (KL_DIFFERENCE, *(f"vs_{reference}" for reference in REFERENCES))
"""Columns of differences; each is a family of comparisons of its own, on every text."""


SUMMARY = pa.schema(
    [
        ("data", pa.string()),
        ("task", pa.string()),
        ("strategy", pa.string()),
        ("documents", pa.int64()),
        ("clusters", pa.int64()),
        ("tokens", pa.int64()),
        *interval_columns("kl"),
        *difference_columns(KL_DIFFERENCE),
        *interval_columns("flips"),
        *interval_columns("perplexity"),
        *interval_columns("accuracy"),
        ("top1_agreement", pa.float64()),
        ("token_accuracy", pa.float64()),
        *(column for reference in REFERENCES for column in difference_columns(f"vs_{reference}")),
        *interval_columns("within"),
        ("within_verdict", pa.string()),
    ]
)
"""clusters    of how many books, topics or files the documents come: the units of all intervals and p-values where
            there are FEWEST or more, else the documents are
kl          KL from the floating-point model, nats per predicted token
kl_vs_*     difference in kl
flips       share of predicted tokens whose most likely token is not the floating-point model's (1 - top1_agreement)
perplexity  exp of the mean nll per predicted token; where documents are right or wrong per document, as lm-eval has it
            for last words
accuracy    share of documents that are right (null where none is right or wrong)
token_accuracy  share of predicted tokens that were the most likely one
vs_*        difference in perplexity, or in accuracy where documents are right or wrong
*_p         Holm-corrected over the strategies; *_detectable the smallest difference that gets a verdict with power 0.8;
            *_needed on how many documents the difference seen is such (null beyond MOST_NEEDED)
*_low, *_high  95 % intervals
within      the bounds of equivalence, in percent of the floating-point model's perplexity (of accuracy: in points);
            within_low, within_high: the 90 % interval of the difference in the same unit; within_verdict: yes, no, not
            known
Null: all but the values below FEWEST units, the intervals of what does not vary (the float model's KL, results that
are identical), what rests on a number that is not finite, and, where a model generates the answers, all that rests on
log-likelihoods: tokens, kl, flips, perplexity."""


def summarize(results: pa.Table, *, bootstrap: int = RESAMPLES, seed: int = 0, within: float = WITHIN) -> pa.Table:
    """Summarise the rows of one evaluation (`quambase.schema.tables.RESULTS`) into SUMMARY rows, in their order.

    bootstrap  resamples for the intervals of perplexity and KL, FEWEST_RESAMPLES to MOST_RESAMPLES; p-values do not
               depend on it
    seed       of these resamples and of the random sign flips, from 0
    within     bounds of equivalence to the floating-point model, in percent, above 0 and up to MOST_WITHIN
    DataInvalid: one is out of range. DatabaseInvalid: two strategies of a text have different documents.
    """
    if not FEWEST_RESAMPLES <= bootstrap <= MOST_RESAMPLES:
        raise DataInvalid(f"bootstrap is {bootstrap}; expected {FEWEST_RESAMPLES} to {MOST_RESAMPLES} resamples")
    if seed < 0:
        raise DataInvalid(f"seed is {seed}; expected 0 or more")
    if not 0 < within <= MOST_WITHIN:
        raise DataInvalid(f"within is {within}; expected percents above 0 and up to {MOST_WITHIN:g}")
    rows: list[dict[str, Any]] = []
    texts = zip(results["task"].to_pylist(), results["data"].to_pylist(), strict=True)
    for task, data in dict.fromkeys((str(task), str(data)) for task, data in texts):
        mask = pc.and_(pc.equal(results["task"], pa.scalar(task)), pc.equal(results["data"], pa.scalar(data)))
        rows += _Text(task, data, results.filter(mask), bootstrap, seed, within).rows()
    return pa.Table.from_pylist(rows, SUMMARY)


Families = dict[tuple[str, str, str], int]
"""How many strategies were compared, by task, text and column of the difference."""


def families(summary: pa.Table) -> Families:
    """The families of comparisons of a summary."""
    compared = [
        (row["task"], row["data"], name)
        for row in summary.to_pylist()
        for name in DIFFERENCES
        if row[f"{name}_p"] is not None
    ]
    return dict(Counter(compared))


_LIKELIHOODS = ("nll", "kl", "top1_agreement", "top1_right")
"""Columns of RESULTS that are null where a model generates its answers."""


class _Text:
    """The strategies' columns of one text: sums over each unit, in one order of units."""

    def __init__(self, task: str, data: str, results: pa.Table, bootstrap: int, seed: int, within: float) -> None:
        self.task, self.data, self.bootstrap, self.seed, self.within = task, data, bootstrap, seed, within
        self.labels = [str(label) for label in pc.unique(results["strategy"]).to_pylist()]
        self.columns: dict[tuple[str, str], Float64] = {}
        self.likelihoods, self.answers = (not results[name].null_count for name in ("nll", "correct"))
        names = _LIKELIHOODS * self.likelihoods + ("correct",) * self.answers
        tables = {
            label: results.filter(pc.equal(results["strategy"], pa.scalar(label))).sort_by("document")
            for label in self.labels
        }
        first = tables[self.labels[0]]
        self.units = Units.of(first["cluster"].to_pylist())
        for label, own in tables.items():
            if not own["tokens"].equals(first["tokens"]):
                raise DatabaseInvalid(
                    f"{data}: {label} and {self.labels[0]} were not scored on the same documents; evaluate again"
                )
            for name in names:
                self.columns[label, name] = self.units.summed(own[name].cast(pa.float64()).to_numpy())
        self.tokens = self.units.summed(first["tokens"].cast(pa.float64()).to_numpy())
        self.documents = self.units.documents
        self.enough = self.units.count >= FEWEST
        # lm-eval's perplexity of last words is per document.
        self.per = self.units.summed(np.ones(self.documents)) if self.answers else self.tokens

    def rows(self) -> list[dict[str, Any]]:
        found = {label: self._row(label) for label in self.labels}
        if self.enough and self.likelihoods:
            self._bootstrap(list(found.values()))
        for reference in REFERENCES:
            others = [label for label in self.labels if label not in (reference, FLOAT)]
            if reference in self.labels and others:
                if reference == UPSTREAM and self.likelihoods:
                    self._add(found, KL_DIFFERENCE, others, self._kls(others), smaller_is_better=True)
                kind = SHARE if self.answers else EXPONENTIAL
                compared = self._differences(kind, "correct" if self.answers else "nll", reference, others)
                self._add(found, f"vs_{reference}", others, compared, smaller_is_better=not self.answers)
        if FLOAT in self.labels:
            for label in self.labels:
                found[label]["within"] = None if label == FLOAT else self.within
                if self.enough and label != FLOAT:
                    self._equivalence(label, found[label])
        return list(found.values())

    def _row(self, label: str) -> dict[str, Any]:
        row: dict[str, Any] = {
            "data": self.data,
            "task": self.task,
            "strategy": label,
            "documents": self.documents,
            "clusters": self.units.clusters,
        }
        if self.likelihoods:
            row |= self._of_likelihoods(label)
        if self.answers:
            row["accuracy"], shares = linearised(self.columns[label, "correct"], self.per)
            if self.enough and self.units.single:
                row |= ends_of("accuracy", wilson(int(self.columns[label, "correct"].sum()), self.documents))
            elif self.enough:
                row |= ends_of("accuracy", _as_share(student_interval(row["accuracy"], shares)))
        return row

    def _of_likelihoods(self, label: str) -> dict[str, Any]:
        """The columns that rest on log-likelihoods."""
        tokens = self.tokens.sum()
        flipped, flips = linearised(self.tokens - self.columns[label, "top1_agreement"], self.tokens)
        found: dict[str, Any] = {
            "tokens": int(tokens),
            "perplexity": self._perplexity(label),
            "kl": linearised(self.columns[label, "kl"], self.tokens)[0],
            "flips": flipped,
            "top1_agreement": float(self.columns[label, "top1_agreement"].sum() / tokens),
            "token_accuracy": float(self.columns[label, "top1_right"].sum() / tokens),
        }
        return found | (ends_of("flips", _as_share(student_interval(flipped, flips))) if self.enough else {})

    def _perplexity(self, label: str) -> float:
        return exponential(self.columns[label, "nll"], self.per)[0]

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

    def _add(
        self,
        rows: dict[str, dict[str, Any]],
        name: str,
        labels: list[str],
        found: list[Difference],
        *,
        smaller_is_better: bool,
    ) -> None:
        """Add one family of comparisons to the rows of its labels, as columns that begin with ``name``."""
        family = dict(zip(labels, found, strict=True))
        for label, columns in judged(family, self.units, smaller_is_better=smaller_is_better).items():
            rows[label] |= {f"{name}{end}": value for end, value in columns.items()}

    def _kls(self, others: list[str]) -> list[Difference]:
        """Differences of KL from upstream's scales; none is tested where perplexity is not finite."""
        return [
            difference if math.isfinite(self._perplexity(label)) else replace(difference, p_value=math.nan)
            for label, difference in zip(others, self._differences(RATIO, "kl", UPSTREAM, others), strict=True)
        ]

    def _differences(self, kind: str, name: str, reference: str, others: list[str]) -> list[Difference]:
        """Differences of one column's figure, each strategy's to the reference's."""
        columns, base = [self.columns[label, name] for label in others], self.columns[reference, name]
        return differences(kind, columns, base, self.tokens if name == "kl" else self.per, self.units, self.seed)

    def _equivalence(self, label: str, row: dict[str, Any]) -> None:
        """Add whether a strategy is as good as the floating-point model, within bounds."""
        name = "correct" if self.answers else "nll"
        here, there = self.columns[label, name], self.columns[FLOAT, name]
        interval: Interval | None
        if self.answers and self.units.single:
            interval = newcombe(*pairs(here > 0, there > 0), EQUIVALENCE_LEVEL)
        else:
            value, shares = linearised(here - there, self.per)
            interval = student_interval(value, shares, EQUIVALENCE_LEVEL)
            if not self.answers and value == 0 and not shares.any():
                interval = 0.0, 0.0  # the same likelihoods; the same few answers would prove nothing
        if interval is not None:
            low, high = interval if self.answers else (_exp(end) - 1 for end in interval)
            interval = 100 * low, 100 * high
        row |= ends_of("within", interval) | {"within_verdict": equivalence(interval, (-self.within, self.within))}


def _as_share(interval: Interval | None) -> Interval | None:
    """Cut off at 0 and 1."""
    return interval and (max(0.0, interval[0]), min(1.0, interval[1]))


def _exp(x: float) -> float:
    """e^x, infinite where that is above the largest float64."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))
