"""Every strategy at every scale group of a run, as one scale table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from quambase.analyzer.by_group import of_every
from quambase.analyzer.scale_groups import ScaleGroup
from quambase.analyzer.sixteen_bit import Mix, choose, frontier
from quambase.analyzer.strategies import Choice, Scale, parse_labels
from quambase.analyzer.summary import summarize
from quambase.schema.errors import DatabaseInvalid, DataInvalid, UnknownName
from quambase.schema.groups import granularity_of
from quambase.schema.progress import Progress, Shown
from quambase.schema.scale_table import (
    EFFECT,
    IN_16_BIT,
    MSE,
    QUAMBASE,
    SELECTIONS,
    TARGETS,
    UPSTREAM,
    provenance_of,
    refuse_fewer_labels,
    refuse_foreign_table,
    write_scales,
)
from quambase.schema.sql.answer import PrintsAsTable
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.manifest import Manifest
from quambase.schema.tables import SCALES
from quambase.schema.values.number_format import INT8, multipliers, zero_point_of


@dataclass(frozen=True, repr=False)
class Analysis(PrintsAsTable):
    """What `analyze` made.

    table       rows of tables.SCALES
    provenance  as in `quambase.schema.scale_table.ScaleTable`
    notes       what a user should know, one line each: which run it is, NaN, infinities, overflow
    path        the file written, None if none was
    frontier    the best choices of operators in 16 bit, as `quambase.analyzer.sixteen_bit.frontier` finds them
    mix         the one of them that the strategy `mixed` of the table makes
    """

    table: pa.Table
    provenance: dict[str, Any]
    notes: list[str]
    path: Path | None
    frontier: list[Mix] = field(default_factory=list)
    mix: Mix | None = None

    def shown(self) -> pa.Table:
        """Each strategy in one row."""
        return summarize(self.table)


def analyze(
    db: str | Path = Path("quambase-db"),
    run: str | None = None,
    strategies: Sequence[str | Callable[..., Scale]] | None = None,
    granularity: str | None = None,
    out: str | Path | None = Path("scales.parquet"),
    progress: Shown = False,
    target: str = QUAMBASE,
    force: bool = False,
    select: str | None = None,
    keep: int | None = None,
    budget: float | None = None,
) -> Analysis:
    """Compute every strategy at every scale group and write the scale table.

    db           database folder
    run          None for the newest complete run, a run id, or ``"all"``
    strategies   labels such as ``percentile:0.9999``, ``FILE.py:NAME``, and functions; None for
                 `strategies.DEFAULT_LABELS`, ``all`` for every one
    granularity  ``tensor``: one scale per site; ``ssd_group``, ``head_group``, ``group``: also one for each SSD
                 group, each head group, each smallest group of a divided site (each includes the coarser ones).
                 None: what the INT8 model reads, ``tensor`` of a Mamba-1 and ``group`` of a Mamba-2
    out          where to write; None writes nothing
    progress     shown on stderr, or a function that is called with (layers done, layers in all); the head is one
    target       which INT8 model `selected` is for: ``quambase``'s own, or ``upstream``'s, whose Hadamard quantizer at
                 out_proj:input wraps where ours clamps, so that only scales that clip nothing are selected there
    force        replace ``out`` even if it is no scale table
    select       selected rows have the least ``effect`` (predicted KL, of a run with sensitivities) or ``mse`` among
                 scales that the target can use. None: ``effect`` where it is known. A site without goes by ``mse``
    keep         the table also has the strategy `mixed`: the selected scales with at most so many operators in 16 bit,
                 those whose predicted KL is most (`quambase.analyzer.sixteen_bit`)
    budget       likewise, with the fewest operators whose predicted KL, nats a token, is then at most this

    Ties go to the larger scale, then to the earlier strategy. Equal statistics give equal bytes.
    >>> found = quambase.analyze("quambase-db", strategies=["mse", "percentile:0.9999"], out=None)
    >>> found.table.column("label").unique().to_pylist()
    ['mse', 'percentile:0.9999']

    Errors: OutputRefused; DatabaseInvalid (also: no sensitivities); DataInvalid (``keep`` or ``budget`` of another
    target, of several runs, or out of range); those of `StatsDB` and `parse_labels`.
    """
    out = None if out is None else Path(out)
    for kind, word, known in (("target", target, TARGETS), ("selection", select or EFFECT, SELECTIONS)):
        if word not in known:
            raise UnknownName.of(kind, word, known)
    _check_mixed(keep, budget, target, run)
    choices = parse_labels(list(strategies) if strategies else None)
    if out is not None:
        refuse_foreign_table(out, force=force)
        if not force:
            refuse_fewer_labels(out, [choice.label for choice in choices])
    rows: list[dict[str, Any]] = []
    with Progress(progress) as shown, StatsDB(db, run) as database:
        manifests = sorted(database.runs, key=lambda manifest: manifest.run)
        notes = [*database.notes, *(line for manifest in manifests for line in _warnings(database, manifest))]
        named = "all" not in (strategies or ["all"]) and any(c.strategy.needs_sensitivity for c in choices)
        mixed = keep is not None or budget is not None
        sensitive = _sensitive(database, asked=select == EFFECT or named or mixed)
        layers = [database.layers(manifest.run) for manifest in manifests]
        work = sum(sum(of_run.values()) for of_run in layers)
        shown.start("analyze", sum(map(len, layers)), work, unit="layers")
        for manifest in manifests:
            run_id, by_effect = manifest.run, manifest.run in sensitive
            made = partial(group_rows, run_id, choices=choices, target=target, select=select, sensitive=by_effect)
            for _, of_group in of_every(made, database, run_id, shown, granularity):
                rows += of_group
    table = pa.Table.from_pylist(rows, schema=SCALES)
    by = select or (EFFECT if sensitive else MSE)
    provenance = provenance_of(manifests, granularity or "the model's", target, by)
    found = frontier((row for row in rows if row["selected"]), manifests[0].model.family) if len(manifests) == 1 else []
    mix = choose(found, keep, budget) if mixed else None
    if mix is not None:
        provenance |= {IN_16_BIT: [list(operator) for operator in mix.operators]}
    if out is not None:
        write_scales(out, table, provenance)
    return Analysis(table, provenance, notes, out, found, mix)


def group_rows(
    run: str,
    group: ScaleGroup,
    choices: list[Choice],
    target: str = QUAMBASE,
    select: str | None = None,
    sensitive: bool = False,
) -> list[dict[str, Any]]:
    """One row of tables.SCALES for each of ``choices``, one of them selected for the INT8 model ``target``.

    A strategy that needs the quantiles of each document has no row for a group for which they are not stored; one for
    runs with sensitivities only if the run is ``sensitive``.
    """
    site, consumed = group.point, group.consumed
    key = {"run": run, "layer": group.layer, "site": group.site, "group_name": group.group_name}
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
        if choice.fits(group) and (sensitive or not choice.strategy.needs_sensitivity)
    ]
    select_least(rows, target, select)
    return rows


def select_least(rows: list[dict[str, Any]], target: str = QUAMBASE, select: str | None = None) -> None:
    """Mark as selected the row of least loss among the rows of tables.SCALES of one scale group; ``target`` and
    ``select`` as in `analyze`. None where every strategy needs a decoder.
    """
    eligible = [
        i
        for i, row in enumerate(rows)
        if not row["needs_decode"] and (target != UPSTREAM or (row["clip_safe"] and not row["zero_point"]))
    ]
    if eligible:
        by_effect = select != MSE and all(rows[i]["predicted_kl"] is not None for i in eligible)
        # The error of an empty group is NaN: no strategy is better there, the first is as good as any.
        errors = {i: float(np.nan_to_num(rows[i]["predicted_kl" if by_effect else "mse"])) for i in eligible}
        rows[min(eligible, key=lambda i: (errors[i], -rows[i]["scale"], i))]["selected"] = True


def scale_columns(
    group: ScaleGroup, scale: Scale, saturates: bool = True, state_scales: list[float] | None = None
) -> dict[str, Any]:
    """The columns of tables.SCALES that follow from a scale: its error, its codes and whether clipping is
    safe.

    ``saturates``: every consumer clamps, so that clipping is safe at any scale. ``state_scales``: one for each state
    index. The figures are those of the one scale, since a state is counted by group and not by index.
    """
    components = list(scale) if isinstance(scale, tuple) else state_scales
    single = multipliers(scale)[0]
    figures = group.figures(scale)
    amax = group.distribution.amax
    return {
        "scale": single,
        "zero_point": zero_point_of(scale),
        "component_scales": components,
        "qmin": INT8.qmin,
        "qmax": INT8.qmax,
        "amax": amax,
        "clipped_share": figures.clipped_share,
        "mse": figures.mse,
        "sqnr_db": figures.sqnr_db,
        "predicted_kl": group.predicted_kl(scale),
        "codes_used": figures.codes_used,
        "codes_above_120": figures.codes_above_120,
        "entropy_bits": figures.entropy_bits,
        # A code that rounds beyond qmax wraps where nothing clamps; the quotient is float32's.
        "clip_safe": saturates or bool(np.float32(amax) / np.float32(single) < np.float32(INT8.rounds_beyond)),
    }


def _check_mixed(keep: int | None, budget: float | None, target: str, run: str | None) -> None:
    """DataInvalid where the two exclude each other, or nothing can be left in 16 bit."""
    if keep is None and budget is None:
        return
    if keep is not None and budget is not None:
        raise DataInvalid("keep and budget are both given; give the number of operators in 16 bit, or the loss to meet")
    if target == UPSTREAM:
        raise DataInvalid("upstream's INT8 model has no operator in 16 bit; leave out keep and budget, or the target")
    if run == "all":
        raise DataInvalid("operators in 16 bit are those of one model; name one run")
    if keep is not None and keep < 1:
        raise DataInvalid(f"keep is {keep} operators in 16 bit; expected at least 1")
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise DataInvalid(f"budget is {budget} nats a token; expected a positive number, such as 0.003")


def _sensitive(database: StatsDB, *, asked: bool) -> set[str]:
    """The runs that have sensitivities. DatabaseInvalid where they are ``asked`` for and a run has none."""
    found = {manifest.run for manifest in database.runs if database.sensitivity_tokens(manifest.run)}
    missing = sorted(manifest.run for manifest in database.runs if manifest.run not in found)
    if asked and missing:
        raise DatabaseInvalid(
            f"run {missing[0]} has no sensitivities, which predicted effects need; collect it again with --sensitivity"
        )
    return found


def _warnings(database: StatsDB, manifest: Manifest) -> list[str]:
    rows = database.query("nonfinite_values", {"run": manifest.run}).to_pylist()
    return [
        f"warning: layer {row['layer']} {row['site']}: {row['nonfinite']} values are NaN or infinite "
        f"({row['overflow']} of them finite before rounding to 16 bits); no scale accounts for them"
        for row in rows
    ]
