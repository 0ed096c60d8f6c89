"""What a scale table says: its strategies side by side, what is selected, and where the loss is."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from quambase.schema.scale_table import QUAMBASE, UPSTREAM
from quambase.schema.sites import HEAD_LAYER


def summarize(table: pa.Table) -> pa.Table:
    """Each strategy of a scale table over the scales the INT8 model consumes, best first.

    ``predicted_kl``: the sum over the layers' scales that act in evaluation; null where one of them has none. The
    head's is not in it, since an INT8 model leaves the head in floating point unless told otherwise.
    ``sqnr_db_median``, ``sqnr_db_least`` with its ``worst_layer`` and ``worst_site``, ``clipped_share_mean``: over the
    scales that act in evaluation, recurrent states set aside (they act in decoding only).
    ``selected`` of ``scales``, and ``wraps_upstream``, how many would wrap in upstream's kernel: over all.
    Best is the least predicted KL, where there is none the largest median; strategies whose codes need a decoder come
    last. Sites of an imported tensor count as consumed: there are no others.
    """
    rows = table.to_pylist()
    consumed = [row for row in rows if row["consumed"]] or rows
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in consumed:
        by_label.setdefault(row["label"], []).append(row)

    def summary(label: str, mine: list[dict[str, Any]]) -> dict[str, Any]:
        evaluated = [row for row in mine if not row["decode_only"]] or mine
        known = [row for row in evaluated if not math.isnan(row["sqnr_db"])]
        worst = min(known, key=lambda row: row["sqnr_db"], default=None)
        clipped = [row["clipped_share"] for row in evaluated if not math.isnan(row["clipped_share"])]
        return {
            "strategy": label,
            "predicted_kl": predicted_loss(mine),
            "sqnr_db_median": statistics.median(row["sqnr_db"] for row in known) if known else None,
            "sqnr_db_least": worst["sqnr_db"] if worst else None,
            "worst_layer": worst["layer"] if worst else None,
            "worst_site": worst["site"] if worst else None,
            "clipped_share_mean": statistics.fmean(clipped) if clipped else None,
            "wraps_upstream": sum(not row["clip_safe"] for row in mine),
            "selected": sum(row["selected"] for row in mine),
            "scales": len(mine),
            "needs_decode": mine[0]["needs_decode"],
        }

    found = [summary(label, mine) for label, mine in by_label.items()]

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        kl, median = row["predicted_kl"], row["sqnr_db_median"]
        return row["needs_decode"], math.inf if kl is None else kl, math.inf if median is None else -median

    found.sort(key=order)
    return pa.Table.from_pylist(found, SUMMARY)


SUMMARY = pa.schema(
    [
        ("strategy", pa.string()),
        ("predicted_kl", pa.float64()),
        ("sqnr_db_median", pa.float64()),
        ("sqnr_db_least", pa.float64()),
        ("worst_layer", pa.int64()),
        ("worst_site", pa.string()),
        ("clipped_share_mean", pa.float64()),
        ("wraps_upstream", pa.int64()),
        ("selected", pa.int64()),
        ("scales", pa.int64()),
        ("needs_decode", pa.bool_()),
    ]
)
"""What `summarize` answers."""


def acting(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The ``rows`` of layers whose scale acts in evaluation."""
    return (row for row in rows if row["layer"] >= 0 and row["consumed"] and not row["decode_only"])


def predicted_loss(rows: Iterable[dict[str, Any]]) -> float | None:
    """The predicted KL of ``rows`` together, one of each scale, nats a token: over those that are `acting`. None where
    one of them has none, or there are none.
    """
    found = [row["predicted_kl"] for row in acting(rows)]
    return None if not found or None in found else math.fsum(found)


def predicted_decoding_loss(rows: Iterable[dict[str, Any]]) -> float | None:
    """What decoding is predicted to lose more than prefill, at the state, nats a token; ``rows``: one of each scale.
    None where one of the state's scales has no predicted KL, or there are none.
    """
    found = [row["predicted_kl"] for row in rows if row["layer"] >= 0 and row["consumed"] and row["decode_only"]]
    return None if not found or None in found else math.fsum(found)


DB_PER_BIT = 20 * math.log10(2)
"""One bit more halves the step: 6.02 dB."""


def selection(table: pa.Table, target: str = QUAMBASE, *, by_effect: bool = True) -> list[str]:
    """Which strategies are selected in ``table``, what the loss is predicted to be and where, and how they compare with
    upstream's scales, a sentence each. ``by_effect``: rows with a predicted KL were selected by it.
    """
    rows = table.to_pylist()
    consumed = [row for row in rows if row["consumed"]] or rows
    chosen = [row for row in consumed if row["selected"]]
    if not chosen:
        return ["nothing is selected: every strategy here needs a decoder, and no integer product reads its codes"]
    counts = Counter(row["label"] for row in chosen)
    shares = ", ".join(f"{label} at {count}" for label, count in counts.most_common())
    loss = predicted_loss(chosen)
    why = ("the least squared error" if loss is None or not by_effect else "the least predicted KL") + (
        ", at out_proj:input among scales that clip nothing, since upstream's kernel wraps there"
        if target == UPSTREAM
        else ""
    )
    found = [f"selected takes {shares} of {len(chosen)} scales: {why} at each"]
    if loss is not None:
        found += [_losses(consumed, loss), _places(chosen, loss), *_decoding(consumed)]

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["run"], row["layer"], row["site"], row["group_name"]

    upstream = {key(row): row["sqnr_db"] for row in consumed if row["label"] == "quamba"}
    gains = [
        (gain, row)
        for row in chosen
        if not row["decode_only"] and math.isfinite(gain := row["sqnr_db"] - upstream.get(key(row), math.nan))
    ]
    if gains:
        middle = statistics.median(gain for gain, _ in gains)
        most, at = max(gains, key=lambda each: each[0])
        found.append(
            f"against upstream's quamba: {middle:+.2g} dB at the median scale ({middle / DB_PER_BIT:+.2g} bits), "
            f"{most:+.2g} dB at most (layer {at['layer']} {at['site']})"
        )
    wrapping = sum(not row["clip_safe"] for row in chosen)
    if wrapping:
        found.append(
            f"{wrapping} of the selected scales clip where upstream's kernel wraps: for upstream, analyze with "
            "--target upstream"
        )
    return found


def _losses(consumed: list[dict[str, Any]], loss: float) -> str:
    """The predicted loss of the selected scales, compared with `mse` and upstream's scales."""
    others = _beside(consumed, loss, predicted_loss)
    head = next((row["predicted_kl"] for row in consumed if row["selected"] and row["layer"] == HEAD_LAYER), None)
    if head:
        others.append(f"a quantized head would add {head:.2g}")
    return "; ".join([f"predicted loss of the activations: {loss:.2g} nats a token", *others])


def _decoding(consumed: list[dict[str, Any]]) -> list[str]:
    """What the state's selected scales are predicted to add to the loss of decoding, compared with other strategies; of
    a run without that prediction, how to get it. Nothing where no scale of the state is selected.
    """
    chosen = [row for row in consumed if row["selected"]]
    if not any(row["layer"] >= 0 and row["decode_only"] for row in chosen):
        return []
    loss = predicted_decoding_loss(chosen)
    if loss is None:
        return ["the state's scales have the least squared error; collect --state-every chooses them for decoding"]
    others = _beside(consumed, loss, predicted_decoding_loss)
    return ["; ".join([f"decoding is predicted to lose {loss:.2g} nats a token more, at the state", *others])]


def _beside(
    rows: list[dict[str, Any]], loss: float, loss_of: Callable[[Iterable[dict[str, Any]]], float | None]
) -> list[str]:
    """How ``loss`` compares with that of `mse` and of upstream's scales among ``rows``, where it differs."""
    found = []
    for label, name in (("mse", "mse"), ("quamba", "upstream's quamba")):
        other = loss_of(row for row in rows if row["label"] == label)
        if other and (change := round(100 * (loss / other - 1))):
            found.append(f"{change:+} % against {name}, {other:.2g}")
    return found


SHOWN = 3
"""Sites named in a sentence."""


def _places(chosen: list[dict[str, Any]], loss: float) -> str:
    """Which sites have most of the predicted loss of what is selected, over the layers; and the scale that has most."""
    if not loss:
        return "nothing is predicted to be lost"
    known = list(acting(chosen))
    by_site: Counter[str] = Counter()
    for row in known:
        by_site[row["site"]] += row["predicted_kl"]
    shares = [f"{site} {100 * kl / loss:.0f} %" for site, kl in by_site.most_common(SHOWN)]
    worst = max(known, key=lambda row: float(row["predicted_kl"]))
    where = f"layer {worst['layer']} {worst['site']}"
    return f"most of it at {', '.join(shares)}; most at one scale: {where}"
