"""`quambase results`: stored evaluations, without running anything."""

from __future__ import annotations

from pathlib import Path

import click

from quambase.cli.console import Command, database_option, next_command, note, output_options
from quambase.cli.evaluate import emit_evaluation, statistics_options
from quambase.cli.formats import emit


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
        for line in notes:
            note(line)
        next_command("quambase results EVALUATION", db)
        return
    found = find_evaluation(db, evaluation)
    emit_evaluation(found, bootstrap, seed, within, format_, output)
    note(f"stored: {found.folder}")
