"""What an evaluation says, in words: which strategy is best, what it loses, how certain that is; and remarks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from quambase.apply.evaluation.comparisons import counted_units, too_few
from quambase.apply.evaluation.paired_statistics import (
    FEWEST,
    NOT_DISTINGUISHABLE,
    NOT_FINITE,
    STEADY_RESAMPLES,
    can_reach_a_verdict,
)
from quambase.apply.evaluation.summary import families
from quambase.schema.stored.results import FLOAT, KL_DIFFERENCE, LAST_WORD, LM_EVAL, UPSTREAM

Row = Mapping[str, Any]
"""A row of SUMMARY."""


def loss(row: Row) -> float:
    """What strategies are ranked by, least first: KL; where a text has none, the share that is wrong."""
    if row["kl"] is None:
        return 1 - float(row["accuracy"])
    return float(row["kl"]) if math.isfinite(row["kl"]) else math.inf


def answers(task: str) -> str:
    """What is right or wrong in a task."""
    return "last words" if task == LAST_WORD else "answers"


def sentence(rows: Sequence[Row]) -> str:
    """The rows of one text in a sentence: the strategy of the least KL, what it loses, and how certain that is."""
    ranked = sorted((row for row in rows if row["strategy"] != FLOAT), key=loss)
    if not ranked:
        return f"{FLOAT} has {_alone(rows[0])}"
    good = [row for row in ranked if _is_finite(row)]
    if not good:
        return f"{_not_finite(ranked)}: nothing can be ranked"
    best = good[0]
    alike = [row["strategy"] for row in good if loss(row) == loss(best)]  # as `selected`, where it is one strategy
    if best["kl"] is None:
        parts = [f"{' and '.join(alike)} {'has' if len(alike) == 1 else 'have'} {_right(best)}"]
    else:
        parts = [f"{' and '.join(alike)} {'loses' if len(alike) == 1 else 'lose'} {_kl(best)}"]
    of_upstream = [row["kl"] for row in rows if row["strategy"] == UPSTREAM]
    if of_upstream and best[KL_DIFFERENCE] is not None and of_upstream[0] > 0:
        percent = 100 * best[KL_DIFFERENCE] / of_upstream[0]
        parts[0] += f", {percents(abs(percent), '')} % {'less' if percent < 0 else 'more'} than upstream's scales"
        parts[0] += _certainty(best, KL_DIFFERENCE)
    by_float = [row for row in rows if row["strategy"] == FLOAT]
    if by_float and best[f"vs_{FLOAT}"] is not None:
        if best["accuracy"] is not None:
            shown = f"{answers(best['task'])} {100 * best[f'vs_{FLOAT}']:+.2g} points"
        else:
            shown = f"perplexity {100 * best[f'vs_{FLOAT}'] / by_float[0]['perplexity']:+.2g} %"
        parts.append(shown + _certainty(best, f"vs_{FLOAT}"))
    if best["within_verdict"] is not None:
        right = best["accuracy"] is not None
        what = f"points of float's {answers(best['task'])}" if right else "% of float's perplexity"
        parts.append(f"within {best['within']:g} {what}: {best['within_verdict']}")
    if too_few(best):
        parts.append(f"{best['documents']} documents give values and no verdict: take {FEWEST} or more")
    if bad := [row for row in ranked if not _is_finite(row)]:
        parts.append(_not_finite(bad))
    if best["kl"] is None:
        parts.append("no KL, flips or perplexity: they need the log-likelihood of a right answer")
    return "; ".join(parts)


def _alone(row: Row) -> str:
    """What a model has that is compared with none."""
    right = [_right(row)] if row["task"] == LM_EVAL and row["accuracy"] is not None else []
    if row["perplexity"] is not None:
        right.append(f"perplexity {row['perplexity']:.4g}{_range(row, 'perplexity', '.4g')}")
    return ", ".join(right)


def _right(row: Row) -> str:
    """The share of right answers with its interval."""
    shown = {name: None if row[name] is None else 100 * row[name] for name in ("accuracy_low", "accuracy_high")}
    return f"{100 * row['accuracy']:.3g} % of {answers(row['task'])} right{_range(shown, 'accuracy', '.3g')}"


def runner_up(rows: Sequence[Row]) -> str | None:
    """Which strategy of one text has the least KL after the best; None where there is no other."""
    ranked = sorted((row for row in rows if row["strategy"] != FLOAT and _is_finite(row)), key=loss)
    others = [row for row in ranked if row["kl"] is not None and row["kl"] > ranked[0]["kl"] > 0]
    if not others:
        return None
    more = 100 * (others[0]["kl"] / ranked[0]["kl"] - 1)
    return f"{others[0]['strategy']} is next, with {percents(more, '')} % more KL (a ranking, not a test)"


def percents(value: float, sign: str = "+") -> str:
    """A number of percents or points, signed unless ``sign`` is empty, as short as people read it."""
    return f"{value:{sign},.0f}" if abs(value) >= 9.95 else f"{value:{sign}.2g}"


def _is_finite(row: Row) -> bool:
    return all(row[name] is None or math.isfinite(row[name]) for name in ("kl", "perplexity"))


def _not_finite(rows: Sequence[Row]) -> str:
    return f"not finite, so not ranked: {', '.join(row['strategy'] for row in rows)}"


def _kl(row: Row) -> str:
    """KL with its interval, to the decimal in which the value has its second digit."""
    value = row["kl"]
    decimals = 1 - math.floor(math.log10(value)) if value > 0 else 0
    style = f".{decimals}f" if 0 <= decimals <= 6 else ".2g"
    return f"{value:{style}} nats a token to {FLOAT}{_range(row, 'kl', style)}"


def _range(row: Row, name: str, style: str) -> str:
    """The interval of a figure, nothing where it has none."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None else f" (95 %: {low:{style}} to {high:{style}})"


def _certainty(row: Row, name: str) -> str:
    """How certain a difference is; nothing where it was not tested."""
    words = row[f"{name}_verdict"]
    if words is None or words == NOT_FINITE:
        return ""
    if words != NOT_DISTINGUISHABLE:
        return f", certain (p = {row[f'{name}_p']:.2g})"
    line, needed = f", {NOT_DISTINGUISHABLE} on {row['documents']} documents", still_needed(row, name)
    return f"{line} ({needed})" if needed else line


def still_needed(row: Row, name: str, noun: str = "") -> str:
    """How many documents a difference without a verdict would need, in words; empty where more would not help.

    noun  what they are called, after a space
    """
    if row[f"{name}_detectable"] is None or row[name] == 0:
        return ""
    count = row[f"{name}_needed"]
    if count is None:
        return f"no practical number{noun and f' of{noun}'} would do"
    return f"about {round_up(count):,}{noun} would be needed" if count > row["documents"] else ""


def round_up(count: int) -> int:
    """``count`` up to two digits."""
    unit: int = 10 ** max(0, len(str(count)) - 2)
    return math.ceil(count / unit) * unit


def few_clusters(data: str, documents: int, clusters: int) -> str | None:
    """A remark where documents are counted as if they were independent, though it is known that they are not."""
    if not documents > clusters < FEWEST <= documents:
        return None
    return (
        f"{data}: {documents} documents come from {clusters} clusters (books, topics, files), fewer than the {FEWEST} "
        "that can be counted as wholes: documents count as independent, so intervals and p-values may be too small"
    )


def remarks(summary: pa.Table, bootstrap: int) -> list[str]:
    """Remarks on a whole summary, a line each: clusters, families of comparisons, and whether a verdict is possible."""
    found = []
    if bootstrap < STEADY_RESAMPLES:
        found.append(
            f"--bootstrap {bootstrap} is coarse: the intervals of perplexity and KL change visibly with --seed; "
            f"take {STEADY_RESAMPLES} or more (p-values and intervals of differences do not depend on it)"
        )
    compared = families(summary)
    if compared and max(compared.values()) == 1:
        found.append(
            "one strategy was compared, so p-values are not corrected: strategies evaluated one at a time escape "
            "Holm's correction; evaluate those to choose from together (--scales)"
        )
    elif compared:
        found.append(
            "p-values are corrected (Holm) within a family, the strategies compared on one text by one figure with one "
            f"reference ({len(compared)} {'family' if len(compared) == 1 else 'families'} here, of "
            f"{max(compared.values())} comparisons at most); strategies evaluated one at a time escape the correction"
        )
    sizes = {(row["task"], row["data"]): (row["documents"], row["clusters"]) for row in summary.to_pylist()}
    found += [line for (_, data), size in sizes.items() if (line := few_clusters(data, *size))]
    for (task, data, name), count in compared.items():
        units = counted_units(*sizes[task, data])
        if not can_reach_a_verdict(units, count):
            reference = "KL" if name == KL_DIFFERENCE else name.removeprefix("vs_")
            found.append(
                f"{data}: {units} documents are too few for any verdict on {reference} after the "
                f"correction for {count} strategies; take more documents or fewer strategies"
            )
    return list(dict.fromkeys(found))  # decoding and prefill of one text have the same
