"""The group's own help."""

from __future__ import annotations

import os
import subprocess
import sys

import pyarrow as pa
import pytest
from click.testing import CliRunner

from quambase.cli.main import COMMANDS, load_command, quambase, summary
from quambase.cli.terminal.formats import emit


@pytest.mark.parametrize("name", COMMANDS)
def test_summaries_are_the_beginning_of_the_commands_help(name: str) -> None:
    help_text = " ".join((load_command(name).help or "").split())
    assert summary(name)
    assert help_text.startswith(summary(name))


def test_help_lists_every_command() -> None:
    shown = CliRunner().invoke(quambase, ["--help"]).stdout
    listed = [line.split()[0] for line in shown.partition("Commands:")[2].splitlines() if line[2:3].strip()]
    assert listed == list(COMMANDS)


def test_a_line_break_in_a_cell_does_not_break_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    emit(pa.table({"token": ["a\nb", "ü\t"], "n": [1, 2]}))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["token  n", "-----  -", "a\\nb   1", "ü\\t    2"]


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_wait_briefly_unless_the_user_says_how(given: dict[str, str], found: str) -> None:
    variables = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    script = "import os, quambase.cli.main; print(os.environ.get('GOMP_SPINCOUNT'))"
    ran = subprocess.run(
        [sys.executable, "-c", script], env=variables | given, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == found
