"""What decoding costs: KL by how many tokens were decoded, beside that of the same predictions by prefill."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from quambase.apply.evaluation.comparisons import Units, ends_of, interval_columns
from quambase.apply.evaluation.paired_statistics import FEWEST, linearised, student_interval
from quambase.schema.stored.results import DECODE, FLOAT, PREFILL, STATE
from quambase.schema.values.arrays import Float64

BY_POSITION = pa.schema(
    [
        ("data", pa.string()),
        ("strategy", pa.string()),
        ("decoded_from", pa.int32()),
        ("decoded_to", pa.int32()),
        ("documents", pa.int64()),
        ("tokens", pa.int64()),
        *interval_columns("kl"),
        ("flips", pa.float64()),
        ("perplexity", pa.float64()),
        ("prefill_kl", pa.float64()),
        *interval_columns("added"),
    ]
)
"""decoded_from, decoded_to  how many tokens were decoded before the predictions; null: of all predictions
kl          of decoding, nats a token; prefill_kl: of the same predictions by one forward pass
added       kl - prefill_kl, paired over documents (over clusters where there are FEWEST or more)
*_low, *_high  Student's 95 % intervals, null below FEWEST documents that have such predictions
flips       share of the decoded predictions whose most likely token is not the floating-point model's
perplexity  exp of the mean nll of the decoded predictions
"""

SUMS = ("tokens", "nll", "kl", "top1_agreement")
"""What is summed over predictions, of a whole document and at each position."""

BUCKETS_SHOWN = 9
"""Columns of the table for people."""


def by_position(results: pa.Table) -> pa.Table:
    """The rows of BY_POSITION of an evaluation's results: strategy by strategy, first of all predictions, then of each
    number of tokens decoded. None where nothing was decoded.
    """
    rows: list[dict[str, Any]] = []
    decoded = results.filter(pc.equal(results["task"], DECODE))
    for data in pc.unique(decoded["data"]).to_pylist():
        for strategy in pc.unique(decoded["strategy"]).to_pylist():
            if strategy != FLOAT:
                rows += _of_strategy(results, data, strategy)
    return pa.Table.from_pylist(rows, BY_POSITION)


def base_of(strategy: str) -> str:
    """The strategy whose prefill that of ``strategy`` is: a format of the state acts in decoding only."""
    return strategy.partition(STATE)[0]


def _of_strategy(results: pa.Table, data: str, strategy: str) -> list[dict[str, Any]]:
    """The rows of one strategy on one text."""
    own = results.filter(pc.equal(results["data"], data))
    decode, prefill = (
        own.filter(pc.and_(pc.equal(own["strategy"], label), pc.equal(own["task"], task)))
        .sort_by("document")
        .to_pylist()
        for task, label in ((DECODE, strategy), (PREFILL, base_of(strategy)))
    )
    units = Units.of([document["cluster"] for document in decode])
    keys = dict.fromkeys((p["decoded_from"], p["decoded_to"]) for d in decode for p in d["positions"])
    columns = {task: _columns(documents) for task, documents in ((DECODE, decode), (PREFILL, prefill))}
    found = []
    for low, high in [(None, None), *sorted(keys)]:
        sums = {(task, name): units.summed(columns[task][low, name]) for task in columns for name in SUMS}
        place = {"data": data, "strategy": strategy, "decoded_from": low, "decoded_to": high}
        documents = int((columns[DECODE][low, "tokens"] > 0).sum())
        found.append(place | {"documents": documents} | _figures(sums))
    return found


def _columns(documents: Sequence[dict[str, Any]]) -> dict[tuple[int | None, str], Float64]:
    """Sums of each document (documents,), by the fewest tokens decoded before (None: all predictions) and name."""
    found: dict[tuple[int | None, str], Float64] = defaultdict(lambda: np.zeros(len(documents)))
    for place, document in enumerate(documents):
        for name in SUMS:
            found[None, name][place] = document[name]
            for position in document["positions"]:
                found[position["decoded_from"], name][place] = position[name]
    return found


def _figures(sums: dict[tuple[str, str], Float64]) -> dict[str, Any]:
    """The figures of BY_POSITION from sums (units,) of each task."""
    some = sums[DECODE, "tokens"] > 0
    tokens = sums[DECODE, "tokens"][some]
    (kl, shares), (before, shares_before) = (linearised(sums[task, "kl"][some], tokens) for task in (DECODE, PREFILL))
    found: dict[str, Any] = {
        "tokens": int(tokens.sum()),
        "kl": kl,
        "flips": 1 - float(sums[DECODE, "top1_agreement"].sum() / tokens.sum()),
        "perplexity": float(np.exp(sums[DECODE, "nll"].sum() / tokens.sum())),
        "prefill_kl": before,
        "added": kl - before,
    }
    if some.sum() >= FEWEST:
        for name, own in (("kl", shares), ("added", shares - shares_before)):
            found |= ends_of(name, student_interval(found[name], own))
    return found


def sentences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the rows of one text (BY_POSITION) say, in words: what decoding adds to the best strategy, and where."""
    wholes = sorted((row for row in rows if row["decoded_from"] is None), key=lambda row: row["kl"])
    if not wholes:
        return []
    best = wholes[0]
    of_best = [row for row in rows if row["strategy"] == best["strategy"] and row["decoded_from"]]
    found = [
        f"decoding with {best['strategy']} has a KL of {best['kl']:.2g} nats a token, prefill {best['prefill_kl']:.2g}"
        f" on the same predictions: decoding adds {_number(best, 'added')}"
    ]
    certain = [row for row in of_best if row["added_low"] is not None]
    of_best = certain if len(certain) > 1 else of_best
    if len(of_best) > 1:
        first, last = of_best[0], of_best[-1]
        found.append(
            f"it adds {_number(first, 'added')} at {_range(first)} tokens decoded, "
            f"{_number(last, 'added')} at {_range(last)}: {_trend(first, last)}"
        )
    return found


def _trend(first: dict[str, Any], last: dict[str, Any]) -> str:
    """Whether intervals that lie apart show that what decoding adds changes with length."""
    if first["added_low"] is None or last["added_low"] is None:
        return f"too few documents to say whether it grows (take {FEWEST} or more that are this long)"
    if last["added_low"] > first["added_high"]:
        return "it grows with length"
    if last["added_high"] < first["added_low"]:
        return "it shrinks with length"
    return "no growth with length is shown"


def _number(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.2g}" if low is None else f"{row[name]:.2g} (95 %: {low:.2g} to {high:.2g})"


def _range(row: dict[str, Any]) -> str:
    return f"{row['decoded_from']:,} to {row['decoded_to']:,}"


def table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """KL in thousandths by tokens decoded, for people, least first: a line for decoding with each strategy (and format
    of the state), and one for each strategy's prefill. A column is named after the most tokens of its bucket.
    """
    wholes = sorted((row for row in rows if row["decoded_from"] is None), key=lambda row: row["kl"])
    ends = sorted({row["decoded_to"] for row in rows if row["decoded_to"] is not None})[-BUCKETS_SHOWN:]
    lines: dict[tuple[str, str], tuple[float, dict[str, str]]] = {}
    for whole in wholes:
        strategy = whole["strategy"]
        own = {row["decoded_to"]: row for row in rows if row["strategy"] == strategy}
        for name, how, label in (("kl", DECODE, strategy), ("prefill_kl", PREFILL, base_of(strategy))):
            cells = {f"{end:,}": f"{1000 * own[end][name]:.3g}" if end in own else "-" for end in ends}
            lines[how, label] = (
                whole[name],
                {"KL x1000": how, "strategy": label, "all": f"{1000 * whole[name]:.3g}"} | cells,
            )
    return pa.Table.from_pylist([line for _, line in sorted(lines.values(), key=lambda found: found[0])])
