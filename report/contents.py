"""Gathers what the page shows: one run, its scale table, its newest evaluation, and its convergence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from quambase.analyzer.converge import Convergence, converge
from quambase.analyzer.pictures.numbers.positions import Positions, positions_of_every_site
from quambase.analyzer.pictures.numbers.site_grid import SiteGrid, site_grid
from quambase.analyzer.pictures.numbers.strategies import StrategyOverSites, strategies_over_sites
from quambase.analyzer.site.one_site import one_run
from quambase.apply.evaluation.stored import Evaluation, find_evaluation
from quambase.report.site_pages import site_pages
from quambase.schema.errors import DatabaseInvalid, QuambaseError, ScalesInvalid
from quambase.schema.progress import Progress, Shown
from quambase.schema.scale_table import SELECTED, ScaleTable, read_scales
from quambase.schema.sites import SiteKey
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.manifest import Manifest
from quambase.schema.stored.results import DECODE, finished_evaluations

SCALES = Path("scales.parquet")


@dataclass(frozen=True)
class Contents:
    """What the page shows.

    db          the database folder
    manifest    of the run
    path        the scale table's file; None where there is none of the run
    scales      that table
    rows        its rows of the run
    grids       the layer-by-site grid of the selected rows, then of each strategy; without a table only outlier ratios
    strategies  each strategy over all sites that act in evaluation, the best first
    evaluation  the newest of the run; None where there is none
    summary     its rows (`quambase.apply.evaluation.summary.SUMMARY`)
    decoded     that evaluation where it is one by decoding, else the newest of the run that is; None: there is none
    by_tokens   its rows of each text, by how many tokens were decoded
                (`quambase.apply.evaluation.decode_summary.BY_POSITION`)
    positions   each site as a whole by position; empty where the run was not collected with ``by_position``
    convergence of the run; None where it was not judged
    pages       of each site, as the page's data has it (`quambase.report.site_pages`)
    notes       what a reader should know, a line each
    """

    db: Path
    manifest: Manifest
    path: Path | None
    scales: ScaleTable | None
    rows: pa.Table | None
    grids: list[SiteGrid]
    strategies: list[StrategyOverSites]
    evaluation: Evaluation | None
    summary: pa.Table | None
    decoded: Evaluation | None
    by_tokens: dict[str, list[dict[str, Any]]]
    positions: dict[SiteKey, Positions]
    convergence: Convergence | None
    pages: list[dict[str, Any]]
    notes: list[str]

    @property
    def evaluations(self) -> list[Evaluation]:
        """Those that the page shows."""
        return list({one.id: one for one in (self.evaluation, self.decoded) if one is not None}.values())


def gather(
    db: Path, run: str | None, given: Path | None, evaluation: str | None, judge: bool | None, progress: Shown
) -> Contents:
    """Read everything: the arguments of `quambase.report.report.report`; ``given``: scales, ``judge``: converge."""
    with Progress(progress) as shown, StatsDB(db, run) as database:
        shown.say("reading the distributions")
        manifest = one_run(database, "report")
        notes: list[str] = []
        path, scales = _scales_of(db, manifest.run, given, notes)
        rows = None
        grids = [site_grid(database, manifest.run)]
        strategies: list[StrategyOverSites] = []
        if scales is not None:
            rows = scales.table.filter(pc.equal(scales.table["run"], pa.scalar(manifest.run)))
            grids = [site_grid(database, manifest.run, rows, label) for label in _labels(rows)]
            strategies = strategies_over_sites(database, manifest.run, rows)
        positions = positions_of_every_site(database, manifest.run)
        pages = site_pages(database, manifest, rows, positions, shown)
        found, decoded = _evaluations_of(db, manifest.run, evaluation, notes)
        if found is not None:
            shown.say("summarising the evaluation")
        summary = None if found is None else found.summary()
    convergence = _convergence_of(db, manifest, judge, progress, notes)
    notes += database.notes
    return Contents(
        db, manifest, path, scales, rows, grids, strategies, found, summary, decoded, _by_tokens(decoded), positions,
        convergence, pages, notes,
    )  # fmt: skip


def _by_tokens(decoded: Evaluation | None) -> dict[str, list[dict[str, Any]]]:
    by_text: dict[str, list[dict[str, Any]]] = {}
    for row in [] if decoded is None else decoded.by_position().to_pylist():
        by_text.setdefault(row["data"], []).append(row)
    return by_text


def _labels(rows: pa.Table) -> list[str]:
    """`SELECTED` where rows are, then every strategy."""
    chosen = [SELECTED] if pc.any(rows["selected"]).as_py() else []
    return [*chosen, *map(str, pc.unique(rows["label"]).to_pylist())]


def _scales_of(db: Path, run: str, given: Path | None, notes: list[str]) -> tuple[Path | None, ScaleTable | None]:
    """The scale table ``given``, else that of the database or of this folder, where it is of ``run``.

    ScalesInvalid: the one given is damaged or of another run.
    """
    found = [given] if given else [path for path in (db / SCALES, SCALES) if path.is_file()]
    for path in found:
        try:
            scales = read_scales(path)
        except QuambaseError as error:
            if given:
                raise
            notes.append(f"{path} is left out: {error}")
            continue
        if run in scales.runs():
            return path, scales
        other = f"{path} has no scales of run {run}, but of {', '.join(scales.runs())}"
        if given:
            raise ScalesInvalid(f"{other}; name that run with --run, or run `analyze --run {run} --out FILE`")
        notes.append(other)
    return None, None


def _evaluations_of(
    db: Path, run: str, evaluation: str | None, notes: list[str]
) -> tuple[Evaluation | None, Evaluation | None]:
    """The evaluation named, else the newest one of ``run``; and that by decoding: the same one, else the newest, unless
    one is named. UnknownName, DatabaseInvalid: that named is not there.
    """
    if evaluation is not None:
        named = find_evaluation(db, evaluation)
        return named, named if _decodes(named.about) else None
    finished, damaged = finished_evaluations(db)
    notes += damaged
    mine = [about for about in finished if about.get("run") == run]
    if finished and not mine:
        notes.append(f"no evaluation of run {run}; {len(finished)} of other runs are left out")
    newest = [found[-1] if found else None for found in (mine, [about for about in mine if _decodes(about)])]
    found, decoded = (None if about is None else find_evaluation(db, str(about["evaluation"])) for about in newest)
    return found, decoded


def _decodes(about: dict[str, Any]) -> bool:
    """Whether an evaluation is one by decoding."""
    return any(task["task"] == DECODE for task in about["tasks"])


def _convergence_of(
    db: Path, manifest: Manifest, judge: bool | None, progress: Shown, notes: list[str]
) -> Convergence | None:
    """Whether the documents are enough, where the run has the counts of its blocks or it is asked for.

    DatabaseInvalid: it is asked for, and the run holds too few documents.
    """
    if judge is False or (judge is None and not manifest.identity.get("by_block")):
        return None
    try:
        return converge(db, manifest.run, progress=progress)
    except DatabaseInvalid as error:
        if judge:
            raise
        notes.append(f"convergence is left out: {error}")
        return None
