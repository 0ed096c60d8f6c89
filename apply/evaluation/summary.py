"""Per-document results summarised: values with intervals, paired differences and verdicts. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
    Interval,
    bootstrap_t_interval,
    detectable,
    holm,
    least_discordant,
    least_sign_flip_p,
    linearised,
    mcnemar_exact,
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
        if not 0 < self.error < math.inf or not can_reach_a_verdict(documents, comparisons):
            return None
        found = detectable(self.error, documents, comparisons)
        # McNemar's exact test needs some pairs, however small their spread.
        return max(found, least_discordant(comparisons) / documents) if self.exact_pairs else found


def can_reach_a_verdict(documents: int, comparisons: int) -> bool:
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
        """Perplexity, and each document's contribution (n,) to its deviation."""
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
