"""Two lm-eval sample logs compared. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quambase.apply.evaluation.comparisons import EXPONENTIAL, RATIO, SHARE
from quambase.apply.evaluation.diff.figures import Compared, Figure, because, compare
from quambase.apply.evaluation.diff.sample_logs import (
    NO_FILTER,
    Sample,
    SampleLog,
    Value,
    paired_samples,
    read_sample_log,
)
from quambase.schema.errors import DataInvalid

_SMALLER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "ter", "wer", "brier_score")
_LARGER = re.compile(r"acc|exact|^em$|f1|^mc[12]$|bleu|chrf|rouge|pass|score|correct|match|contains")


def compare_logs(a: Path, b: Path, seed: int = 0) -> Compared:
    """Compare two logs of samples; ``seed`` is of the random sign flips. DataInvalid: no such logs, other documents."""
    logs = read_sample_log(a), read_sample_log(b)
    figures: list[Figure] = []
    notes: list[str] = []
    common = [label for label in logs[0].filters if label in logs[1].filters]
    if not common:
        raise DataInvalid(
            f"{a} and {b} have no filter in common: {', '.join(logs[0].filters)}, and {', '.join(logs[1].filters)}"
        )
    for label in common:
        pairs = paired_samples(*logs, label)
        found, left_out = _log_figures(logs[0], label, pairs)
        figures += found
        notes += left_out
    for log, other, name in ((logs[0], logs[1], "A"), (logs[1], logs[0], "B")):
        if alone := [label for label in log.filters if label not in other.filters]:
            notes.append(f"only in {name}, left out: filter {', '.join(alone)}")
    if not figures:
        raise DataInvalid(f"{a} and {b} have no metric in common with a number for every document" + because(notes))
    how = "their hashes" if logs[0].hashed and logs[1].hashed else "number and content (a log lacks hashes)"
    notes.insert(0, f"documents are paired by {how}")
    # What is right or wrong answers the question that is asked most; then the order of the file.
    figures.sort(key=lambda figure: figure.kind != SHARE)
    return Compared(str(a), str(b), compare(figures, seed), list(dict.fromkeys(notes)))


def _log_figures(log: SampleLog, label: str, pairs: Sequence[tuple[Sample, Sample]]) -> tuple[list[Figure], list[str]]:
    """The metrics of one filter, and a line for each that cannot be compared."""
    figures, notes = [], []
    names = [dict.fromkeys(name for pair in pairs for name in pair[side].values) for side in (0, 1)]
    for metric in [*names[0], *(name for name in names[1] if name not in names[0])]:
        values = [[pair[side].values.get(metric) for pair in pairs] for side in (0, 1)]
        try:
            figures.append(_log_figure(log, label, metric, *values))
        except ValueError as error:
            notes.append(f"left out: {metric}{'' if label == NO_FILTER else f' ({label})'}, {error}")
    return figures, notes


def _log_figure(
    log: SampleLog, label: str, metric: str, a: Sequence[Value | None], b: Sequence[Value | None]
) -> Figure:
    """One metric of a log. ValueError: why it cannot be compared."""
    missing = [sum(value is None for value in side) for side in (a, b)]
    if any(missing):
        raise ValueError(f"no number for {missing[0]:,} documents of A and {missing[1]:,} of B")
    first, second = ([value if isinstance(value, tuple) else (value, 1.0) for value in side] for side in (a, b))
    (one, weights), (other, others) = (np.array(side, np.float64).T for side in (first, second))
    if not np.array_equal(weights, others) or not (weights > 0).all():
        raise ValueError(
            "whose weights differ between A and B" if (weights > 0).all() else "whose weights are not positive"
        )
    kind = SHARE if np.isin([one, other], (0, 1)).all() and (weights == 1).all() else RATIO
    # lm-eval logs the log-likelihood from which the perplexity of all documents is computed.
    if metric in ("word_perplexity", "byte_perplexity") or (
        metric == "perplexity" and max(one.max(), other.max()) <= 0
    ):
        kind, one, other = EXPONENTIAL, -one, -other
    elif metric == "bits_per_byte" and isinstance(a[0], tuple):
        one, other = -one / math.log(2), -other / math.log(2)
    better = False if metric in _SMALLER else True if kind == SHARE or _LARGER.search(metric) else None
    clusters: list[str | None] = [None] * len(a)
    return Figure(metric, kind, one, other, weights, clusters, better, log.task, filter=label)
