"""The shell of `quambase sql`: statements one after another, with history and completion."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quambase.cli.sql import ask, cookbook_table
from quambase.cli.terminal.console import note
from quambase.cli.terminal.formats import ROWS, emit
from quambase.schema.errors import QuambaseError
from quambase.schema.sql.queries import cookbook

if TYPE_CHECKING:
    from quambase.schema.sql.database import StatsDB

PROMPT, MORE = "quambase> ", "     ...> "

HELP = """A statement ends with ; and may have several lines. @NAME asks a query of the cookbook, @NAME limit=3 with a
parameter. .queries lists the cookbook, .schema the views and columns, .quit (or Ctrl-D) ends. Tab completes."""

KEYWORDS = """select from where group by order limit having join using with as and or not null is in between case when
then else end distinct count sum min max avg median desc asc nulls last union all over partition describe summarize"""

LONGEST_HISTORY = 1000


class Shell:
    """A session on an opened database."""

    def __init__(self, database: StatsDB) -> None:
        self.database = database
        schema = database.describe().to_pylist()
        names = [row["column"] or row["view"].partition("(")[0] for row in schema]
        sites = database.query("sites")["site"].to_pylist()
        own = [f"@{name}" for name in cookbook()] + [".queries", ".schema", ".help", ".quit"]
        self.words = sorted({*names, *sites, *KEYWORDS.split(), *own})

    def run(self) -> None:
        """Read statements and print answers until the input ends. An error is a line, and the session goes on."""
        note(*self.database.notes, "a statement ends with ; and .help says more")
        history = _history_file()
        self._prepare_line_editor(history)
        try:
            while (statement := self._read()) is not None:
                self._answer(statement)
        finally:
            _save_history(history)

    def complete(self, text: str, state: int) -> str | None:
        """The ``state``-th word that begins with ``text``: readline's completer."""
        found = [word for word in self.words if word.startswith(text)]
        return found[state] if state < len(found) else None

    def _read(self) -> str | None:
        """The next statement without its semicolon; None at the end of the input. Ctrl-C drops what was typed."""
        lines: list[str] = []
        while True:
            try:
                line = input(MORE if lines else PROMPT)
            except EOFError:
                click.echo()
                return None
            except KeyboardInterrupt:
                click.echo()
                lines = []
                continue
            if not lines and line.startswith((".", "@")):
                return line.strip().rstrip(";")
            lines += [line] if line.strip() else []
            if lines and lines[-1].rstrip().endswith(";"):
                return "\n".join(lines).rstrip().rstrip(";")

    def _answer(self, statement: str) -> None:
        try:
            if statement in (".quit", ".exit", ".q"):
                raise SystemExit(0)
            if statement == ".schema":
                emit(self.database.describe().table, "table", wrap="comment")
            elif statement == ".queries":
                emit(cookbook_table(), "table", wrap="question")
            elif statement.startswith("."):
                click.echo(HELP)
            else:
                name, *settings = statement.split() if statement.startswith("@") else [statement]
                found, lines = ask(self.database, name, tuple(settings), most=ROWS)
                note(*lines)
                if found.num_columns:
                    emit(found.table, "table", rows=found.rows)
        except QuambaseError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            note("interrupted")

    def _prepare_line_editor(self, history: Path | None) -> None:
        try:
            import readline
        except ImportError:  # Windows: no history, no completion
            return
        readline.set_completer(self.complete)
        readline.set_completer_delims(" \t\n,;()='\"<>+*/")
        readline.parse_and_bind("tab: complete")
        if history is not None:
            with suppress(OSError):
                readline.read_history_file(history)


def _history_file() -> Path | None:
    """``quambase/sql-history`` in XDG_STATE_HOME, or in ``.local/state`` of the home directory; None without one."""
    chosen = os.environ.get("XDG_STATE_HOME", "")
    try:
        return (Path(chosen) if chosen else Path.home() / ".local" / "state") / "quambase" / "sql-history"
    except RuntimeError:  # the user has no home directory
        return None


def _save_history(path: Path | None) -> None:
    """Store what was typed; a disk that refuses is no error."""
    if path is None:
        return
    with suppress(ImportError, OSError):
        import readline

        path.parent.mkdir(parents=True, exist_ok=True)
        readline.set_history_length(LONGEST_HISTORY)
        readline.write_history_file(path)
