"""`quambase sql`: a query, one of the cookbook's, or a shell."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click
import pyarrow as pa
from click.shell_completion import CompletionItem

from quambase.cli.query import note_sql, run_option, show_sql_option
from quambase.cli.terminal.console import (
    FILE,
    Command,
    answer,
    database_option,
    line_width,
    note,
    options,
    output_options,
)
from quambase.cli.terminal.formats import ROWS, emit
from quambase.schema.errors import QueryInvalid
from quambase.schema.progress import Progress
from quambase.schema.sql.queries import cookbook, definitions_for, recipe

if TYPE_CHECKING:
    from quambase.schema.sql.answer import Answer
    from quambase.schema.sql.database import StatsDB


def _complete_recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(f"@{name}") for name in cookbook() if f"@{name}".startswith(incomplete)]


def _memory(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """``4GB``, ``500 MB`` in bytes."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB)", value.strip(), re.IGNORECASE)
    size = 0 if found is None else int(float(found[1]) * {"mb": 10**6, "gb": 10**9}[found[2].lower()])
    if not 10**7 <= size < 2**50:
        raise click.BadParameter(f"{value!r}; expected at least 10 MB, such as 500MB or 4GB", ctx, param)
    return size


sql_options = options(
    click.argument("query", required=False, metavar="[QUERY|@NAME]", shell_complete=_complete_recipes),
    click.option("-f", "--file", type=click.File(encoding="utf-8"), help="Read the query from a file (- for stdin)."),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="PARAMETER=VALUE",
        help="Set a parameter of @NAME; once for each. [default: those that --queries shows]",
    ),
    click.option("--queries", is_flag=True, help="List the cookbook: each @NAME, its question and its parameters."),
    click.option("--schema", is_flag=True, help="List every view, macro and column with its meaning instead."),
    show_sql_option,
    run_option,
    click.option("--scales", type=FILE, help="Scale table of the view scales."),
    click.option(
        "--unsafe", is_flag=True, help="Let the query read and write other files, attach databases and load extensions."
    ),
    click.option(
        "--memory",
        metavar="SIZE",
        callback=_memory,
        help="Memory that the query may take, such as 4GB. [default: half of the machine's]",
    ),
    click.option(
        "--timeout", metavar="SECONDS", type=click.FloatRange(0, min_open=True), help="Time that it may take."
    ),
    database_option,
)
"""What is asked, of which run, and what it may take."""


@click.command(cls=Command)
@sql_options
@output_options
def sql(
    query: str | None,
    file: TextIO | None,
    settings: tuple[str, ...],
    queries: bool,
    schema: bool,
    show_sql: bool,
    run: str | None,
    scales: Path | None,
    unsafe: bool,
    memory: int | None,
    timeout: float | None,
    db: Path,
    format_: str,
    output: Path | None,
) -> None:
    """Answer a DuckDB query over the views of a run, or a query of the cookbook; without one, open a shell.

    A query may come by a pipe, too. With --show-sql, the definitions of the views and macros that the query names are
    printed.

    \b
    Example:
      quambase sql "select layer, site, outlier_ratio from site_stats order by outlier_ratio desc limit 10"
      quambase sql @outlier-channels --set layer=6
      quambase sql --queries
      quambase sql --schema
    """
    if query is not None and not query.strip():
        raise click.UsageError("the query is empty; expected SQL, such as 'select * from site_stats limit 5'")
    if queries + schema + (query is not None) + (file is not None) > 1:
        raise click.UsageError("give one of QUERY, --file, --queries and --schema")
    if settings and not (query or "").startswith("@"):
        raise click.UsageError("--set goes with a query of the cookbook, @NAME")
    if queries:
        emit(cookbook_table(), format_, output, wrap="question")
        return
    text = None if schema else _query(query, file)
    from quambase.schema.sql.database import StatsDB
    from quambase.schema.sql.limits import Limits

    limits = Limits(seconds=timeout) if memory is None else Limits(memory, timeout)
    trace = note_sql if show_sql else None
    with StatsDB(db, run, unsafe=unsafe, scales=scales, trace=trace, limits=limits) as database:
        if text is None and not schema:
            from quambase.cli.terminal.sql_shell import Shell

            Shell(database).run()
            return
        # People see the first rows of a table; the others are only counted.
        most = ROWS if format_ == "table" and output is None and line_width() is not None else None
        with _ended_at_once(database):
            found, lines = (database.describe(), []) if text is None else ask(database, text, settings, show_sql, most)
        note(*(database.notes if text is not None else ()), *lines)
    if text is not None and text.startswith("@"):
        answer(recipe(text[1:]).question)
    if found.num_columns:
        emit(found.table, format_, output, wrap="comment" if text is None else None, rows=found.rows)


def ask(
    database: StatsDB,
    text: str,
    settings: tuple[str, ...] = (),
    show_sql: bool = False,
    most: int | None = None,
) -> tuple[Answer, list[str]]:
    """The answer to SQL, or to ``@NAME`` of the cookbook with these parameters; and notes on what a view lacks.

    most  only so many rows are kept, all are counted

    QueryInvalid, UnknownName.
    """
    values = None
    if text.startswith("@"):
        asked = recipe(text[1:].strip())
        text, values = asked.sql, asked.with_values(settings)
    if show_sql:
        for statement in definitions_for(text):
            note_sql(statement)
    with _watched() as watch:
        found = database.sql(text, values, watch, most)
    scales = database.scales_notes if "scales" in text.lower() else []
    return found, [*scales, *(database.results_notes or [])]


@contextmanager
def _ended_at_once(database: StatsDB) -> Iterator[None]:
    """End the process without waiting where a stopped query goes on, as one inside a function of DuckDB does."""
    try:
        yield
    except (QueryInvalid, KeyboardInterrupt) as error:
        if database.left_behind:
            click.echo(f"error: {str(error) or 'interrupted'}", err=True)
            sys.stderr.flush()
            os._exit(1)
        raise


@contextmanager
def _watched() -> Iterator[Callable[[float], None]]:
    """A function that shows how much of a query is done, from its first call on."""
    shown: Progress | None = None
    first = 0.0
    with ExitStack() as stack:

        def tell(share: float) -> None:
            nonlocal shown, first
            if shown is None:
                shown, first = stack.enter_context(Progress(True)), min(share, 0.99)
                # The rate is measured from here on.
                shown.start("query", 100, 1, unit="percent", done=(100 * first, first))
                stack.enter_context(shown.piece(100 * (1 - first), 1 - first))
            shown.tell(max(0.0, share - first) / (1 - first))

        yield tell


def cookbook_table() -> pa.Table:
    """The queries of the cookbook: name, question, parameters with their defaults."""
    rows = [
        {
            "name": f"@{each.name}",
            "question": each.question,
            "parameters": ", ".join(f"{name}={value}" for name, value in each.parameters.items()),
        }
        for each in cookbook().values()
    ]
    return pa.Table.from_pylist(rows)


def _query(given: str | None, file: TextIO | None) -> str | None:
    """The query given, or that of the file or the pipe; None where a person types in a shell."""
    if given is not None:
        return given.strip()
    if file is not None:
        return _read(file)
    if sys.stdin.isatty():
        return None
    text = sys.stdin.read()
    if not text.strip():
        raise click.UsageError("give a QUERY, @NAME of the cookbook, --file, --queries or --schema")
    return text


def _read(file: TextIO) -> str:
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise QueryInvalid(
            f"{file.name} is not UTF-8 text ({error.reason} at byte {error.start}); save the query as UTF-8"
        ) from None
