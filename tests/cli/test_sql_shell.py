"""The shell of `quambase sql` on a terminal: answers, errors, completion, history."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from quambase.cli.main import load_command
from quambase.cli.terminal.sql_shell import Shell
from quambase.schema.sql.database import StatsDB


def session(db: Path, home: Path, typed: list[bytes]) -> str:
    """What a terminal shows of a shell in which ``typed`` is typed, each after the prompt."""
    main, child = pty.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(home), "TERM": "dumb", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-m", "quambase", "sql", "--db", str(db)], stdin=child, stdout=child, stderr=child,
        env=environment, close_fds=True,
    )  # fmt: skip
    os.close(child)
    shown = b""
    for line in [*typed, b""]:
        shown += _until(main, b"> ")
        if line:
            os.write(main, line)
    os.write(main, b"\x04")
    shown += _until(main, None)
    assert process.wait(20) == 0
    os.close(main)
    return shown.decode()


def _until(terminal: int, end: bytes | None) -> bytes:
    """What comes up to a prompt, or to the end."""
    found = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            found += os.read(terminal, 65536)
        except OSError:  # the other side is closed
            return found
        if end is not None and found.endswith((b"quambase" + end, b"..." + end)):
            return found
    raise AssertionError(f"no prompt within a minute: {found.decode()}")


def test_a_session(fabricated_database: Path, tmp_path: Path) -> None:
    shown = session(
        fabricated_database,
        tmp_path,
        [
            b"select 6 * 7\n",
            b"as answer;\n",
            b"@outlier-sites limit=1\n",
            b"select nothing from site_stats;\n",
            b"@outlier-site\n",
            b".queries\n",
            b"select count(*) as rows_there from site_st\t;\n",
        ],
    )
    assert "answer" in shown and "42" in shown and "...> " in shown
    assert "error: unknown column 'nothing'" in shown and "did you mean outlier-sites" in shown
    assert "@document-order" in shown and "rows_there" in shown and "site_stats" in shown and "Traceback" not in shown
    history = (tmp_path / "quambase" / "sql-history").read_text()
    assert "@outlier-sites limit=1" in history and "select count(*) as rows_there from site_stats;" in history


def test_completion_knows_views_columns_sites_and_recipes(fabricated_database: Path) -> None:
    with StatsDB(fabricated_database) as database:
        shell = Shell(database)
    for beginning, word in [("outlier_ch", "outlier_channels"), ("q99", "q99"), ("x_proj:i", "x_proj:input")]:
        assert shell.complete(beginning, 0) == word
    assert shell.complete("@outlier-ch", 0) == "@outlier-channels" and shell.complete("@outlier-ch", 1) is None


@pytest.mark.parametrize(
    ("arguments", "typed", "message"),
    [
        ([], "", "give a QUERY, @NAME of the cookbook"),
        (["--schema", "--queries"], None, "give one of QUERY, --file, --queries and --schema"),
        (["select 1", "--set", "a=1"], None, "--set goes with a query of the cookbook"),
    ],
)
def test_usage(fabricated_database: Path, arguments: list[str], typed: str | None, message: str) -> None:
    done = CliRunner().invoke(load_command("sql"), ["--db", str(fabricated_database), *arguments], input=typed)
    assert done.exit_code == 2 and message in done.output


def test_a_query_comes_by_a_pipe_and_from_the_cookbook(fabricated_database: Path) -> None:
    database = ["--db", str(fabricated_database), "--format", "csv"]
    done = CliRunner().invoke(load_command("sql"), database, input="select 42 as a")
    assert done.exit_code == 0 and done.stdout.splitlines() == ['"a"', "42"]
    done = CliRunner().invoke(load_command("sql"), [*database, "@outlier-sites", "--set", "limit=2"])
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 3
    assert "Which sites have the largest outliers?" in done.stderr
