"""`quambase demo`, as small as it goes, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from quambase.cli.demo import MARK, steps
from quambase.cli.main import COMMANDS, quambase


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quambase", "demo", *arguments],
        cwd=folder,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_demo_runs_every_command_it_prints(tmp_path: Path) -> None:
    done = run(tmp_path, "--samples", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [line.removeprefix("$ ") for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert printed == [command for _, commands in steps(4) for command in commands]
    assert {command.split()[1] for command in printed} > {"collect", "sql", "analyze", "compare", "apply", "evaluate"}
    folder = tmp_path / "quambase-demo"
    for name in ("scales.parquet", "compare.png", "report.html", "mamba2.parquet", "mamba2-db/runs"):
        assert (folder / name).exists(), name
    assert all(len(list((folder / "quambase-db" / kind).glob("*"))) == 1 for kind in ("runs", "results"))
    # Titles and what the commands print are in order: what this process prints is not held back.
    order = [done.stdout.index(text) for text in ("$ quambase sql", " ratio\n", "$ quambase analyze")]
    assert order == sorted(order)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    done = CliRunner().invoke(quambase, ["demo", "--out", str(tmp_path)])
    assert done.exit_code == 1 and done.stderr.startswith(f"error: {tmp_path} holds files that are not the demo's")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_command_that_fails_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = ["quambase sql nonsense", "quambase sql x"]
    monkeypatch.setattr("quambase.cli.demo.steps", lambda samples: [("1.", commands)])
    for _ in range(2):  # its own folder is taken again
        done = CliRunner().invoke(quambase, ["demo", "--out", str(tmp_path / "d")])
        assert done.exit_code == 1 and "error: the demo ended with this command" in done.stderr
        assert done.stdout.count("$ quambase") == 1 and (tmp_path / "d" / MARK).exists()


def test_commands_are_written_as_they_are_typed() -> None:
    for _, commands in steps(32):
        for command in commands:
            assert command.split()[0] == "quambase" and command.split()[1] in COMMANDS
