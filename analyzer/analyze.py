"""Every strategy at every scale group of a run, as one scale table."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from quambase.analyzer.quantization_error import piecewise_figures
from quambase.analyzer.scale_groups import ScaleGroup, scale_groups
from quambase.analyzer.strategies import Choice, Scale, parse_labels
from quambase.schema.errors import UnknownName
from quambase.schema.groups import granularity_of
from quambase.schema.manifest import Manifest
from quambase.schema.number_format import INT8
from quambase.schema.progress import Progress, Shown
from quambase.schema.scale_table import (
    QUAMBASE,
    TARGETS,
    UPSTREAM,
    provenance_of,
    refuse_fewer_labels,
    refuse_foreign_table,
    write_scales,
)
from quambase.schema.sites import WHOLE, Site, find_site, is_model_site
from quambase.schema.sql.answer import PrintsAsTable
from quambase.schema.sql.database import StatsDB
from quambase.schema.tables import SCALES


@dataclass(frozen=True, repr=False)
class Analysis(PrintsAsTable):
    """What `analyze` made.

    table       rows of tables.SCALES
    provenance  as in `quambase.schema.scale_table.ScaleTable`
    notes       what a user should know, one line each: which run it is, NaN, infinities, overflow
    path        the file written, None if none was
    """

    table: pa.Table
    provenance: dict[str, Any]
    notes: list[str]
    path: Path | None

    def shown(self) -> pa.Table:
        """Each strategy in one row."""
        return summarize(self.table)


def analyze(
    db: str | Path = Path("quambase-db"),
    run: str | None = None,
    strategies: Sequence[str] | None = None,
    granularity: str | None = None,
    out: str | Path | None = Path("scales.parquet"),
    progress: Shown = False,
    target: str = QUAMBASE,
    force: bool = False,
) -> Analysis:
    """Compute every strategy at every scale group and write the scale table.

    db           database folder
    run          None for the newest complete run, a run id, or ``"all"``
    strategies   labels such as ``percentile:0.9999``; None for `strategies.DEFAULT_LABELS`, ``all`` for every
                 one
    granularity  ``tensor``: one scale per site; ``ssd_group``, ``head_group``, ``group``: also one for each SSD
                 group, each head group, each smallest group of a divided site (each includes the coarser ones).
                 None: what the INT8 model reads, ``tensor`` of a Mamba-1 and ``group`` of a Mamba-2
    out          where to write; None writes nothing
    progress     shown on stderr, or a function that is called with (groups done, groups in all)
    target       which INT8 model `selected` is for: ``quambase``'s own, or ``upstream``'s, whose Hadamard quantizer at
                 out_proj:input wraps where ours clamps, so that only scales that clip nothing are selected there
    force        replace ``out`` even if it is no scale table

    ``selected`` marks the least squared error among the strategies with one scale that the target can use. Ties go to
    the larger scale, then to the earlier strategy. Equal statistics give equal bytes.
    Errors: OutputRefused, and those of `StatsDB` and `parse_labels`.
    """
    out = None if out is None else Path(out)
    if target not in TARGETS:
        raise UnknownName.of("target", target, TARGETS)
    choices = parse_labels(list(strategies) if strategies else None)
    if out is not None:
        refuse_foreign_table(out, force=force)
        if not force:
            refuse_fewer_labels(out, [choice.label for choice in choices])
    rows: list[dict[str, Any]] = []
    with Progress(progress) as shown:
        with StatsDB(db, run) as database:
            shown.say("reading the distributions")
            manifests = sorted(database.runs, key=lambda manifest: manifest.run)
            notes = [*database.notes, *(line for manifest in manifests for line in _warnings(database, manifest))]
            groups = [(m.run, group) for m in manifests for group in scale_groups(database, m.run, granularity)]
        # The time of a strategy is proportional to the distinct values of a group.
        works = [group.distribution.values.size for _, group in groups]
        shown.start("analyze", len(groups), sum(works), unit="groups")
        for (run_id, group), work in zip(groups, works, strict=True):
            with shown.piece(1, work, f"layer {group.layer} {group.site}"):
                rows += group_rows(run_id, group, choices, target)
    table = pa.Table.from_pylist(rows, schema=SCALES)
    provenance = provenance_of(manifests, granularity or "the model's", target)
    if out is not None:
        write_scales(out, table, provenance)
    return Analysis(table, provenance, notes, out)


def group_rows(run: str, group: ScaleGroup, choices: list[Choice], target: str = QUAMBASE) -> list[dict[str, Any]]:
    """One row of tables.SCALES for each of ``choices``, one of them selected for the INT8 model ``target``.

    A strategy that needs the quantiles of each document has no row for a group for which they are not stored.
    """
    known = is_model_site(group.site, group.family)
    site = find_site(group.site, group.family) if known else Site(group.site)
    key = {"run": run, "layer": group.layer, "site": group.site, "group_name": group.group_name}
    # The model multiplies most divided sites by one scale; their groups' own scales are for comparison.
    consumed = site.consumed and (group.innermost if site.grouped else group.group_name == WHOLE)
    rows = [
        {
            **key,
            "strategy": choice.strategy.name,
            "params": choice.params_json,
            "label": choice.label,
            "granularity": granularity_of(group.group_name),
            "count": group.distribution.total,
            "consumed": consumed,
            "decode_only": site.decode_only,
            "needs_decode": choice.strategy.needs_decode,
            **scale_columns(group, choice.scale(group), site.saturates, choice.state_scales(group)),
            "selected": False,
        }
        for choice in choices
        if group.documents.quantiles or not choice.needs_document_quantiles
    ]
    eligible = [i for i, row in enumerate(rows) if not row["needs_decode"] and (row["clip_safe"] or target != UPSTREAM)]
    if eligible:
        # The error of an empty group is NaN: no strategy is better there, the first is as good as any.
        errors = {i: 0.0 if math.isnan(rows[i]["mse"]) else rows[i]["mse"] for i in eligible}
        rows[min(eligible, key=lambda i: (errors[i], -rows[i]["scale"], i))]["selected"] = True
    return rows


def scale_columns(
    group: ScaleGroup, scale: Scale, saturates: bool = True, state_scales: list[float] | None = None
) -> dict[str, Any]:
    """The columns of tables.SCALES that follow from a scale: its error, its codes and whether clipping is
    safe.

    ``saturates``: every consumer clamps, so that clipping is safe at any scale. ``state_scales``: one for each state
    index. The figures are those of the one scale, since a state is counted by group and not by index.
    """
    components = list(scale) if isinstance(scale, tuple) else state_scales
    single = scale[0] if isinstance(scale, tuple) else scale
    if isinstance(scale, tuple):
        figures = piecewise_figures(group.distribution, *scale, group.signal)
    else:
        figures = group.figures(scale)
    amax = group.distribution.amax
    return {
        "scale": single,
        "component_scales": components,
        "qmin": INT8.qmin,
        "qmax": INT8.qmax,
        "amax": amax,
        "clipped_share": figures.clipped_share,
        "mse": figures.mse,
        "sqnr_db": figures.sqnr_db,
        "codes_used": figures.codes_used,
        "codes_above_120": figures.codes_above_120,
        "entropy_bits": figures.entropy_bits,
        # A code that rounds beyond qmax wraps where nothing clamps; the quotient is float32's.
        "clip_safe": saturates or bool(np.float32(amax) / np.float32(single) < np.float32(INT8.rounds_beyond)),
    }


def _warnings(database: StatsDB, manifest: Manifest) -> list[str]:
    rows = database.query("nonfinite_values", {"run": manifest.run}).to_pylist()
    return [
        f"warning: layer {row['layer']} {row['site']}: {row['nonfinite']} values are NaN or infinite "
        f"({row['overflow']} of them finite before rounding to 16 bits); no scale accounts for them"
        for row in rows
    ]


def summarize(table: pa.Table) -> pa.Table:
    """Each strategy of a scale table over the scales the INT8 model consumes, best first.

    ``sqnr_db_median``, ``sqnr_db_least`` with its ``worst_layer`` and ``worst_site``, and ``clipped_share_mean`` are
    over the scales that act in evaluation, recurrent states set aside (they act in decoding only). ``selected`` of
    ``scales``, and how many would wrap in upstream's kernel (``wraps_upstream``), are over all. Best is the largest
    median; strategies whose codes need a decoder come last. Sites of an imported tensor count as consumed: there are
    no others.
    """
    rows = table.to_pylist()
    consumed = [row for row in rows if row["consumed"]] or rows
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in consumed:
        by_label.setdefault(row["label"], []).append(row)

    def summary(label: str, mine: list[dict[str, Any]]) -> dict[str, Any]:
        acting = [row for row in mine if not row["decode_only"]] or mine
        known = [row for row in acting if not math.isnan(row["sqnr_db"])]
        worst = min(known, key=lambda row: row["sqnr_db"], default=None)
        clipped = [row["clipped_share"] for row in acting if not math.isnan(row["clipped_share"])]
        return {
            "strategy": label,
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
    found.sort(key=lambda row: (row["needs_decode"], math.inf if (m := row["sqnr_db_median"]) is None else -m))
    return pa.Table.from_pylist(found, SUMMARY)


SUMMARY = pa.schema(
    [
        ("strategy", pa.string()),
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

DB_PER_BIT = 20 * math.log10(2)
"""One bit more halves the step: 6.02 dB."""


def selection(table: pa.Table, target: str = QUAMBASE) -> list[str]:
    """Which strategies are selected in ``table``, and how they compare with upstream's scales, a sentence each."""
    rows = table.to_pylist()
    consumed = [row for row in rows if row["consumed"]] or rows
    chosen = [row for row in consumed if row["selected"]]
    if not chosen:
        return ["nothing is selected: every strategy here needs a decoder, which no INT8 model has"]
    counts = Counter(row["label"] for row in chosen)
    shares = ", ".join(f"{label} at {count}" for label, count in counts.most_common())
    why = "the least squared error" + (
        ", at out_proj:input among scales that clip nothing, since upstream's kernel wraps there"
        if target == UPSTREAM
        else ""
    )
    found = [f"selected takes {shares} of {len(chosen)} scales: {why} at each"]

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
