"""Every strategy at every scale group of a run, as one scale table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from quambase.analyzer.error import QMAX, QMIN, piecewise_figures
from quambase.analyzer.groups import ScaleGroup, scale_groups
from quambase.analyzer.strategies import Choice, Scale, parse_labels
from quambase.schema.answer import PrintsAsTable
from quambase.schema.database import StatsDB
from quambase.schema.errors import UnknownName
from quambase.schema.grouping import granularity_of
from quambase.schema.manifest import Manifest
from quambase.schema.progress import Progress, Shown
from quambase.schema.scales import (
    QUAMBASE,
    TARGETS,
    UPSTREAM,
    provenance_of,
    refuse_fewer_labels,
    refuse_foreign_table,
    write_scales,
)
from quambase.schema.sites import WHOLE, Site, find_site, is_model_site
from quambase.schema.tables import SCALES


@dataclass(frozen=True, repr=False)
class Analysis(PrintsAsTable):
    """What `analyze` made.

    table       rows of tables.SCALES
    provenance  as `schema.scales.ScaleTable` has it
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
    force        let ``out`` take the place of a file that is no scale table

    target       which INT8 model `selected` is for: ``quambase``'s own, or ``upstream``'s, whose Hadamard quantizer at
                 out_proj:input wraps where ours clamps, so that only scales that clip nothing are selected there

    ``selected`` marks the least squared error among strategies of one multiplication that the target can use; ties go
    to the larger scale, then to the earlier strategy. The same statistics give the same
    bytes. OutputRefused, and the errors of `StatsDB` and `parse_labels`.
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
        # A strategy's time goes with the different values that a group has.
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

    A strategy that needs the quantiles of each document has no row for a group whose documents' are not known.
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

    ``saturates``: every consumer clamps, so that clipping is safe at any scale. ``state_scales``: those of each state
    index, which the figures, of the one scale, know nothing of: a state is counted by group.
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
        "qmin": QMIN,
        "qmax": QMAX,
        "amax": amax,
        "clipped_share": figures.clipped_share,
        "mse": figures.mse,
        "sqnr_db": figures.sqnr_db,
        "codes_used": figures.codes_used,
        "codes_above_120": figures.codes_above_120,
        "entropy_bits": figures.entropy_bits,
        # From 127.5 scales on a code rounds to 128, which wraps where nothing clamps; the quotient is float32's.
        "clip_safe": saturates or bool(np.float32(amax) / np.float32(single) < np.float32(127.5)),
    }


def _warnings(database: StatsDB, manifest: Manifest) -> list[str]:
    rows = database.sql(
        "SELECT layer, site, max(nonfinite) AS nonfinite, max(overflow) AS overflow FROM site_stats "
        "WHERE run = $run AND (nonfinite > 0 OR overflow > 0) GROUP BY ALL ORDER BY layer, site",
        {"run": manifest.run},
    ).to_pylist()
    return [
        f"warning: layer {row['layer']} {row['site']}: {row['nonfinite']} values are NaN or infinite "
        f"({row['overflow']} of them finite before rounding to 16 bits); no scale accounts for them"
        for row in rows
    ]


def summarize(table: pa.Table) -> pa.Table:
    """Each strategy of a scale table over the sites the INT8 model consumes, in the order of the table.

    ``groups`` how many scales, ``selected`` how many of them were, ``sqnr_db_median`` and ``sqnr_db_least`` over
    them, ``clipped_share_mean``, ``unsafe`` how many would wrap in upstream's kernel. Sites of an imported tensor
    count as consumed: there are no others.
    """
    rows = table.to_pylist()
    consumed = [row for row in rows if row["consumed"]] or rows
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in consumed:
        by_label.setdefault(row["label"], []).append(row)

    def summary(label: str, mine: list[dict[str, Any]]) -> dict[str, Any]:
        levels = sorted(row["sqnr_db"] for row in mine if not math.isnan(row["sqnr_db"]))
        clipped = [row["clipped_share"] for row in mine if not math.isnan(row["clipped_share"])]
        return {
            "strategy": label,
            "groups": len(mine),
            "selected": sum(row["selected"] for row in mine),
            "sqnr_db_median": statistics.median(levels) if levels else None,
            "sqnr_db_least": levels[0] if levels else None,
            "clipped_share_mean": statistics.fmean(clipped) if clipped else None,
            "unsafe": sum(not row["clip_safe"] for row in mine),
        }

    return pa.Table.from_pylist([summary(label, mine) for label, mine in by_label.items()])
