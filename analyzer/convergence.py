"""What `quambase converge` says: tables of what was measured on subsamples, the verdicts, and the next command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from quambase.analyzer.scale_groups import ScaleGroup
from quambase.analyzer.subsamples import Subsamples
from quambase.schema.commands import collect_command
from quambase.schema.stored.manifest import Manifest
from quambase.schema.values.arrays import Float64

CHANGE, MSE_RATIO, KL, KL_OF_ALL = QUANTITIES = ("change", "mse_ratio", "predicted_kl", "predicted_kl_of_all")
"""How a scale from a part of the documents compares with the scale from all of them: |scale / scale of all - 1|; the
ratio of their squared errors on all documents; the predicted KL of both, nats a token.
"""

TOLERANCE = 0.01
"""A scale has converged when it moves less than this."""

LOW, HIGH = 0.05, 0.95
"""The ends of a band over subsamples."""

LEAST_UNITS = 8
"""Fewer documents or blocks get no verdict: four have six halves, and eight have 70."""

BANDS = [(f"{name}{end}", pa.float64()) for name in (CHANGE, MSE_RATIO, KL) for end in ("", "_low", "_high")]

SIZES = pa.schema(
    [
        ("strategy", pa.string()),
        ("documents", pa.int64()),
        ("units", pa.int64()),
        ("unit", pa.string()),
        ("subsamples", pa.int64()),
        *BANDS,
        (KL_OF_ALL, pa.float64()),
        ("scales", pa.int64()),
    ]
)
"""A row per strategy and number of documents (of ``units`` documents or blocks): the median of ``subsamples``, and the
5 % and 95 % ends of their band. ``change`` and ``mse_ratio`` of a subsample are medians over ``scales``; its
``predicted_kl`` is the sum over the scales in layers that act in evaluation, null where one of them has none.
"""

STRATEGIES = pa.schema(
    [
        ("strategy", pa.string()),
        ("verdict", pa.string()),
        ("converged_at", pa.int64()),
        ("half", pa.int64()),
        *BANDS,
        (KL_OF_ALL, pa.float64()),
        ("worst_change", pa.float64()),
        ("worst_layer", pa.int64()),
        ("worst_site", pa.string()),
        ("worst_group", pa.string()),
        ("units", pa.int64()),
        ("unit", pa.string()),
        ("scales", pa.int64()),
    ]
)
"""A row per strategy. ``verdict``: one of VERDICTS. ``converged_at``: the least number of documents from which on,
up to ``half`` of them, ``change_high`` is below TOLERANCE. The measured columns are those of subsamples of half; there
the worst scale has the largest 95 % end of its own change.
"""

CONVERGED, MOVING, NOT_JUDGED = VERDICTS = ("converged", "not converged", "too few to judge")


@dataclass(frozen=True)
class Measured:
    """One strategy on subsamples.

    groups  the scale groups at which it has a scale
    values  number of units to (subsamples, groups, QUANTITIES)
    """

    label: str
    subsamples: Subsamples
    groups: list[ScaleGroup]
    values: dict[int, Float64]

    @classmethod
    def of(
        cls,
        label: str,
        subsamples: Subsamples,
        groups: Sequence[ScaleGroup],
        found: Sequence[dict[int, Float64] | None],
    ) -> Measured:
        """From what was ``found`` at each of ``groups``, (subsamples, QUANTITIES) by number of units or nothing."""
        pairs = [(group, values) for group, values in zip(groups, found, strict=True) if values is not None]
        stacked = {n: np.stack([values[n] for _, values in pairs], axis=1) for n in subsamples.chosen if pairs}
        return cls(label, subsamples, [group for group, _ in pairs], stacked)

    @property
    def half(self) -> int:
        """The largest number of units measured."""
        return max(self.values)

    def bands(self, units: int) -> dict[str, float | None]:
        """The columns BANDS and KL_OF_ALL of the subsamples of ``units`` units."""
        change, mse_ratio, kl, of_all = np.moveaxis(self.values[units], -1, 0)
        of_subsamples: dict[str, Float64 | None] = {
            CHANGE: np.median(change, axis=1),
            MSE_RATIO: np.median(mse_ratio, axis=1),
        }
        acting = [group.layer >= 0 and group.consumed and not group.point.decode_only for group in self.groups]
        known = any(acting) and bool(np.isfinite(kl[:, acting]).all())
        of_subsamples[KL] = kl[:, acting].sum(axis=1) if known else None
        row: dict[str, float | None] = {KL_OF_ALL: float(of_all[0, acting].sum()) if known else None}
        for name, values in of_subsamples.items():
            ends = [None] * 3 if values is None else np.quantile(values, (0.5, LOW, HIGH)).tolist()
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
        return row

    def verdict(self) -> tuple[str, int | None]:
        """One of VERDICTS, and the least number of documents from which on the scales move less than TOLERANCE."""
        if self.subsamples.count < LEAST_UNITS:
            return NOT_JUDGED, None
        reached = None
        for n in sorted(self.values, reverse=True):
            high = self.bands(n)[f"{CHANGE}_high"]
            if high is None or high >= TOLERANCE:
                break
            reached = n
        return (MOVING, None) if reached is None else (CONVERGED, self.subsamples.documents_of(reached))

    def worst(self) -> tuple[float, ScaleGroup]:
        """The scale that moves most from half of the documents to all, by the 95 % end over subsamples."""
        moved = np.quantile(self.values[self.half][..., 0], HIGH, axis=0)
        place = int(np.argmax(moved))
        return float(moved[place]), self.groups[place]


def sizes_table(measured: Sequence[Measured]) -> pa.Table:
    """Rows of SIZES, strategies in the order given."""
    rows = [
        {
            "strategy": each.label,
            "documents": each.subsamples.documents_of(n),
            "units": n,
            "unit": each.subsamples.kind,
            "subsamples": len(values),
            **each.bands(n),
            "scales": len(each.groups),
        }
        for each in measured
        for n, values in each.values.items()
    ]
    return pa.Table.from_pylist(rows, SIZES)


def strategies_table(measured: Sequence[Measured]) -> pa.Table:
    """Rows of STRATEGIES: those that converge with the fewest documents first, then those that move least."""
    rows = []
    for each in measured:
        if not each.groups:
            continue
        (verdict, converged_at), (worst, group) = each.verdict(), each.worst()
        rows.append(
            {
                "strategy": each.label,
                "verdict": verdict,
                "converged_at": converged_at,
                "half": each.subsamples.documents_of(each.half),
                **each.bands(each.half),
                "worst_change": worst,
                "worst_layer": group.layer,
                "worst_site": group.site,
                "worst_group": group.group_name,
                "units": each.subsamples.count,
                "unit": each.subsamples.kind,
                "scales": len(each.groups),
            }
        )

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        return VERDICTS.index(row["verdict"]), row["converged_at"] or 0, row[f"{CHANGE}_high"]

    return pa.Table.from_pylist(sorted(rows, key=order), STRATEGIES)


def summarize(
    strategies: pa.Table, manifest: Manifest, left_out: dict[str, list[str]], resamples: int, seed: int
) -> list[str]:
    """A sentence for each row of STRATEGIES and for what was left out; then what was compared."""
    documents = manifest.data.documents
    rows = strategies.to_pylist()
    found = [_sentence(row, documents) for row in rows]
    if counts := left_out.get("counts"):
        found.append(f"not judged: {', '.join(counts)}; they need counts of several blocks: collect with --by-block")
    if sensitive := left_out.get("sensitivities"):
        found.append(
            f"not judged: {', '.join(sensitive)}; a run stores sensitivities as one sum over their documents: compare "
            "runs of two numbers of `collect --sensitivity`"
        )
    scales = max(row["scales"] for row in rows)
    median = "" if scales == 1 else f"the median over {scales} scales of "
    found.append(
        f"a move is {median}|scale / scale from all - 1|, the 95 % end of {resamples} subsamples without replacement "
        f"(seed {seed}); only parts up to half are judged: a larger part is near the whole by construction"
    )
    return found


def _sentence(row: dict[str, Any], documents: int) -> str:
    """The verdict on one strategy."""
    label = row["strategy"]
    moved = f"from {row['half']} to all: {_percent(row[f'{CHANGE}_high'])}"
    if row["verdict"] == CONVERGED:
        return f"{label} moves less than {_percent(TOLERANCE)} beyond {_documents(row['converged_at'])} ({moved})"
    if row["verdict"] == MOVING:
        return f"{label} has not converged at {_documents(documents)} ({moved})"
    return f"{label} cannot be judged: {row['units']} {row['unit']}, at least {LEAST_UNITS} are needed ({moved})"


def _percent(share: float) -> str:
    """A share in percent, two digits."""
    return f"{100 * share:.2g} %"


def _documents(count: int) -> str:
    return f"{count} document{'s' * (count != 1)}"


def next_step(strategies: pa.Table, manifest: Manifest, left_out: dict[str, list[str]]) -> tuple[str, str]:
    """What to do, in words, and the command for it."""
    rows = strategies.to_pylist()
    names = {verdict: [row["strategy"] for row in rows if row["verdict"] == verdict] for verdict in VERDICTS}
    documents, samples = manifest.data.documents, int(manifest.identity["samples"])
    enough = f"{_documents(documents)} are enough for {', '.join(names[CONVERGED])}"
    if names[MOVING]:
        more = f"more are needed for {', '.join(names[MOVING])}"
        words = f"{enough}; {more}" if names[CONVERGED] else more
        if (manifest.data.read or samples) < samples:
            return f"{words}; the text was read to its end: take a longer one", _collect(manifest, samples, "FILE")
        return words, _collect(manifest, 2 * samples)
    if names[NOT_JUDGED] or "counts" in left_out:
        words = (
            "counts of smaller blocks tell of the others" if names[NOT_JUDGED] else "counts by block tell of the others"
        )
        return f"{enough}; {words}" if names[CONVERGED] else words, _collect(manifest, samples)
    return enough, "quambase analyze"


BLOCKS_WANTED = 16
"""Least number of blocks of a run that is collected again, if it has that many documents."""


def _collect(manifest: Manifest, samples: int, data: str | None = None) -> str:
    """The command that collects ``samples`` documents of the same model, with counts by block."""
    block = min(int(manifest.identity["block"]), max(1, samples // BLOCKS_WANTED))
    return collect_command(manifest, samples=samples, data=data, batch_size=block, by_block=True)
