"""`quambase stats`, `quambase runs` and `quambase doctor`: questions that need no model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.decorators import FC

from quambase.cli.terminal.complete import complete_runs, complete_sites, complete_strategies
from quambase.cli.terminal.console import COUNT, Command, answer, database_option, note, one_each, output_options
from quambase.cli.terminal.formats import emit
from quambase.schema.sql.yardstick import DECODING, EVALUATED, HEAD, outlier_line, reader, worst_site

if TYPE_CHECKING:
    from quambase.schema.sql.database import StatsDB

READERS = {
    EVALUATED: "outliers",
    DECODING: "states (act in decoding only)",
    HEAD: "head (read where it is quantized)",
}
"""How `stats` names sites, by the part of the INT8 model that reads them."""

run_option = click.option(
    "--run", shell_complete=complete_runs, help="Run id, its beginning, or all. [default: the newest complete run]"
)


def strategies_option(help_: str = "A strategy; once for each. [default: as analyze]") -> Callable[[FC], FC]:
    """`--strategy`, repeated."""
    return click.option(
        "--strategy",
        "strategies",
        multiple=True,
        callback=one_each,
        metavar="LABEL",
        shell_complete=complete_strategies,
        help=help_,
    )


show_sql_option = click.option("--show-sql", is_flag=True, help="Print the SQL that runs, on stderr.")


def note_sql(text: str) -> None:
    """Print SQL on stderr."""
    note(*text.splitlines())


@click.command(cls=Command)
@click.option("--site", shell_complete=complete_sites, help="Only this site.")
@click.option("--layer", type=int, help="Only this layer; -1 is the head.")
@click.option("--limit", type=COUNT, default=20, show_default=True, help="Rows at most.")
@show_sql_option
@run_option
@database_option
@output_options
def stats(
    site: str | None,
    layer: int | None,
    limit: int,
    show_sql: bool,
    run: str | None,
    db: Path,
    format_: str,
    output: Path | None,
) -> None:
    """The sites with the largest outliers, as amax over the 99.95 % quantile.

    \b
    Example:
      quambase stats --site x_proj:input --limit 5
    """
    from quambase.schema.sql.database import StatsDB

    with StatsDB(db, run, trace=note_sql if show_sql else None) as database:
        found = database.stats(site=site, layer=layer, limit=limit).table
        emit(found, format_, output)
        note(*database.notes)
        answer(*_outliers(database, site, layer))


def _outliers(database: StatsDB, site: str | None, layer: int | None) -> Iterator[str]:
    """The worst of the chosen sites in each run, one sentence for each part of the INT8 model that reads them."""
    for manifest in database.runs:
        rows = database.query("reach_of_sites", {"run": manifest.run}).to_pylist()
        rows = [row for row in rows if site in (None, row["site"]) and layer in (None, row["layer"])]
        if not any(reader(row["site"], manifest.model.family) in READERS for row in rows):
            yield "no INT8 model reads a scale there"
        family = manifest.model.family
        of = f" of {manifest.run}" if len(database.runs) > 1 else ""
        for wanted, words in READERS.items():
            worst = worst_site(rows, family, wanted)
            if worst is not None:
                yield f"{words}{of}: {outlier_line(worst)}"


@click.command(cls=Command)
@database_option
@output_options
def runs(db: Path, format_: str, output: Path | None) -> None:
    """The runs of a database, newest first: model, text, size, and what `--run` calls them.

    \b
    Example:
      quambase runs
    """
    from quambase.schema.stored.runs import list_runs, overview

    complete, unfinished = list_runs(db)
    table, damaged = overview(complete)
    emit(table, format_, output)
    note(*damaged)
    for folder in unfinished:
        note(f"unfinished: {folder.name}; its collect command, given again, goes on with it")
    if table.num_rows:
        answer(f"{table.num_rows} complete; without --run, commands take {table['run'][0]}, the newest")
    else:
        answer("no complete run; `quambase collect` makes one")


@click.command(cls=Command)
@database_option
@output_options
def doctor(db: Path, format_: str, output: Path | None) -> None:
    """Check every file that is read again against its checksum, and values; exit code 1 if anything is bad.

    \b
    Example:
      quambase doctor --db quambase-db
    """
    from quambase.schema.stored.doctor import BAD, examine

    report = examine(db)
    emit(report, format_, output, wrap="detail")
    bad = [row for row in report.to_pylist() if row["status"] == BAD]
    if bad:
        answer(
            f"{len(bad)} of {report.num_rows} checks are bad, first: {bad[0]['check']} {bad[0]['subject']}; each line "
            "says what to do; where a value is not finite, look at the model"
        )
        sys.exit(1)
    notes = report["status"].to_pylist().count("note")
    answer("all is well" + (f"; notes: {notes}" if notes else ""))
