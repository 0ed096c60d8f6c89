"""`quambase` alone: what the folder holds, and the next command."""

from __future__ import annotations

from pathlib import Path

import click

from quambase.cli.terminal.console import note
from quambase.cli.terminal.formats import emit
from quambase.schema.commands import DATABASE
from quambase.schema.errors import DatabaseInvalid, QuambaseError
from quambase.schema.scale_table import read_scales
from quambase.schema.stored.results import finished_evaluations
from quambase.schema.stored.runs import list_runs, overview

SCALES = Path("scales.parquet")


def show_folder() -> None:
    """Print the runs, the scale table and the evaluations here, and what to do next."""
    try:
        complete, unfinished = list_runs(DATABASE)
    except DatabaseInvalid:
        complete, unfinished = [], []
    if not complete and not unfinished:
        click.echo("There is no quambase database in this folder yet (no quambase-db).")
        _next("quambase collect --model mamba-5m --samples 128", "a bundled model and text: no network, half a minute")
        click.echo("help:  quambase --help")
        return
    table, damaged = overview(complete)
    if complete:
        click.echo(f"{DATABASE}: {len(complete)} runs, newest first")
        emit(table)
    note(*damaged)
    for folder in unfinished:
        click.echo(f"unfinished: {folder.name} (its collect command, given again, goes on with it)")
    if not complete:
        return
    newest = table["run"][0].as_py() if table.num_rows else None
    try:
        scales = read_scales(SCALES)
    except QuambaseError as error:
        click.echo(f"{SCALES}: none yet" if not SCALES.exists() else f"{SCALES}: {error}")
        _next("quambase analyze", "every strategy at every site of the newest run")
        return
    click.echo(f"{SCALES}: {len(scales.labels())} strategies of run {', '.join(scales.runs())}")
    if newest not in scales.runs():
        _next("quambase analyze --out newest.parquet", f"the scale table is not of the newest run, {newest}")
        return
    evaluations, _ = finished_evaluations(DATABASE)
    mine = [about for about in evaluations if about.get("run") in scales.runs()]
    if not mine:
        _next("quambase evaluate --strategy all --samples 24", "which strategy wins; some minutes on two cores")
        return
    click.echo(f"evaluations: {len(mine)} of this run, the last one {mine[-1]['evaluation']}")
    _next("quambase report", "all of it as one page, every site in pictures")


def _next(command: str, why: str) -> None:
    click.echo(f"next:  {command}   ({why})")
