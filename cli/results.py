"""`quambase results` and `quambase report`: what is stored, as tables and as a page, without running a model."""

from __future__ import annotations

from pathlib import Path

import click

from quambase.cli.evaluate import emit_evaluation, statistics_options
from quambase.cli.query import run_option
from quambase.cli.terminal.console import (
    FILE,
    Command,
    answer,
    database_option,
    force_option,
    next_command,
    note,
    output_options,
    wrapped,
)
from quambase.cli.terminal.formats import emit


@click.command(cls=Command)
@click.argument("evaluation", required=False)
@click.option("--list", "list_", is_flag=True, help="List the stored evaluations instead.")
@statistics_options
@database_option
@output_options
def results(
    evaluation: str | None,
    list_: bool,
    bootstrap: int,
    seed: int,
    within: float,
    db: Path,
    format_: str,
    output: Path | None,
) -> None:
    """The table of a finished evaluation (EVALUATION: its id or the beginning of it; default the newest).

    \b
    Example:
      quambase results --list
    """
    from quambase.apply.evaluation.stored import find_evaluation, list_evaluations

    if list_:
        table, notes = list_evaluations(db)
        emit(table, format_, output)
        note(*notes)
        next_command("quambase results EVALUATION", db)
        return
    found = find_evaluation(db, evaluation)
    emit_evaluation(found, bootstrap, seed, within, format_, output)
    note(f"stored: {found.folder}")


@click.command(cls=Command)
@run_option
@click.option(
    "--scales",
    type=FILE,
    help="Scale table. [default: scales.parquet of the database, then of this folder]",
)
@click.option("--evaluation", metavar="ID", help="A stored evaluation. [default: the newest of the run]")
@click.option(
    "--converge/--no-converge",
    "converge",
    default=None,
    help="Also judge whether the documents are enough. [default: where the run was collected with --by-block]",
)
@click.option(
    "--out",
    type=FILE,
    default=Path("report.html"),
    show_default=True,
    help="File to write.",
)
@database_option
@force_option
def report(
    run: str | None,
    scales: Path | None,
    evaluation: str | None,
    converge: bool | None,
    out: Path,
    db: Path,
    force: bool,
) -> None:
    """Write one HTML page of a run: the answer, where it hurts, every site in pictures, the evaluation, provenance.

    It opens in a browser without a server and without a network.

    \b
    Example:
      quambase report
      quambase report --scales scales.parquet --out report.html
    """
    from quambase.report.report import report as write_report

    found = write_report(db, run, scales, out, evaluation, converge, True, force)
    for line in found.summary:
        click.echo(wrapped(line))
    note(*found.notes)
    note(f"written: {found.path} ({found.size / 1e6:.2g} MB, {found.sites} sites)")
    answer("it opens by a double-click, also without a network")
    next_command(found.command)
