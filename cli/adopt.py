"""`quambase adopt`: takes a scale table that another tool wrote or a person edited."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from quambase.cli.analyze import strategies_for_people
from quambase.cli.query import run_option
from quambase.cli.terminal.console import (
    PEOPLE,
    Command,
    answer,
    database_option,
    force_option,
    format_option,
    next_command,
    note,
)
from quambase.cli.terminal.formats import emit


@click.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Scale table to write. [default: FILE itself, of a .csv the .parquet beside it]",
)
@run_option
@database_option
@format_option
@force_option
def adopt(file: Path, out: Path | None, run: str | None, db: Path, format_: str, force: bool) -> None:
    """Check a scale table that was edited or made by another tool, compute its errors anew, take its origin from a run.

    FILE is a .parquet or .csv with the columns layer, site and scale, perhaps group_name, label, zero_point and others
    of a scale table. `apply` and `evaluate` read no edited table that was not adopted.

    \b
    Example:
      quambase sql --format csv "select layer, site, scale from scales where label = 'mse'" --out mine.csv
      quambase adopt mine.csv
    """
    from quambase.analyzer.adopt import adopt as take
    from quambase.analyzer.summary import summarize

    found = take(file, db, run, out, force)
    answer(*found.notes)
    summary = summarize(found.table)
    emit(summary if format_ not in PEOPLE else strategies_for_people(summary), format_)
    if found.changed:
        answer(f"{found.changed:,} of {found.table.num_rows:,} scales had the errors of others: computed anew")
    note(f"written: {found.path}")
    answer(f"it holds {found.table.num_rows:,} scales of run {found.run}")
    next_command(f"quambase evaluate --scales {shlex.quote(str(found.path))}", db)
