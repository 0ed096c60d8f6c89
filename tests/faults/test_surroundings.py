"""Databases that vanish, inputs that change under an interrupted run, odd names of folders."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from faults.attempts import Tree, tree
from faults.commands import COLLECT, EVALUATE, make_inputs
from faults.started import start
from interrupting import interrupted

from quambase.cli.main import quambase
from quambase.collector.collect import collect

VANISHING = """
from quambase.apply.evaluation.block_scorer import BlockScorer
from quambase.collector.tables.run_folder import BlockFiles
def vanishing(method):
    def call(*arguments):
        shutil.rmtree("quambase-db")
        return method(*arguments)
    return call
BlockFiles.add, BlockScorer.score = vanishing(BlockFiles.add), vanishing(BlockScorer.score)
"""


def refused_in_a_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of the error."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


WRITING = {"collect": (*COLLECT, "--model", "grouped"), "evaluate": (*EVALUATE, "--strategy", "absmax")}


@pytest.mark.parametrize("name", ["collect", "evaluate"])
def test_a_database_that_vanishes_at_work(made: Path, tmp_path: Path, name: str) -> None:
    """It ends in a line, or in a whole result; afterwards the command makes what it always makes."""
    folder = shutil.copytree(made, tmp_path / "copy")
    words = WRITING[name]
    done = start(folder, VANISHING, *words)
    if done.returncode:
        refused_in_a_line(done)
    again = start(folder, "", *words)
    assert again.returncode == 0, again.stderr
    assert not [path for path in tree(folder) if path.endswith(".tmp") or path.endswith(".lock")]


@pytest.mark.parametrize("file", ["texts.jsonl", "mamba1/model.safetensors", "mamba1/tokenizer.json"])
def test_an_input_that_changes_under_an_interrupted_run(tmp_path: Path, file: str) -> None:
    """What was collected before is not mixed with what comes after: the run is that of the new input."""
    make_inputs(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    make_inputs(other)

    def run(db: str) -> Path:
        arguments = {"data": tmp_path / "texts.jsonl", "batch_size": 2, "keep_tokens": 4, "progress": False}
        return collect(tmp_path / "mamba1", 6, db=tmp_path / db, **arguments).folder

    with interrupted():
        run("db")
    if file == "texts.jsonl":
        (tmp_path / file).write_text((tmp_path / file).read_text().replace("w1 ", "w7 "))
    elif file.endswith("json"):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text.replace('"w1": 1,', '"w1": 2,').replace('"w2": 2,', '"w2": 1,', 1))
    else:
        from tiny_model import write_tiny_model

        shutil.rmtree(tmp_path / "mamba1")
        write_tiny_model(tmp_path / "mamba1", seed=1)
    found, fresh = run("db"), run("fresh")
    assert found.name == fresh.name and tables(found) == tables(fresh)


def tables(folder: Path) -> Tree:
    return {path: content for path, content in tree(folder).items() if path != "run.json"}


NAMES = ["a?b", "a%20b", "a*b", "a[1]", "a b", "a\nb", "a'b\"c", "-a", "x" * 200, "ä", "a:b", "b=1", "~", "link"]


@pytest.mark.parametrize("name", NAMES)
def test_odd_names(fabricated_database: Path, tmp_path: Path, name: str) -> None:
    """A database and outputs in a folder with this name."""
    folder = tmp_path / name
    if name == "link":
        folder.symlink_to(tmp_path / "there")
        folder = folder.resolve()
    folder.mkdir()
    folder = tmp_path / name
    shutil.copytree(fabricated_database, folder / "db")
    options = ["--db", str(folder / "db")]
    asked = ["sql", "select count(*) as n from counts", *options, "--format", "csv", "--out", str(folder / "n.csv")]
    for words in (asked, ["analyze", *options, "--strategy", "absmax", "--out", str(folder / "s.parquet")]):
        done = CliRunner().invoke(quambase, words)
        assert done.exit_code == 0, done.output
    assert sorted(path.name for path in folder.iterdir()) == ["db", "n.csv", "s.parquet"]
    assert int((folder / "n.csv").read_text().split()[1]) > 0


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_files_have_the_modes_of_the_umask(tmp_path: Path, umask: int) -> None:
    make_inputs(tmp_path)
    before = os.umask(umask)
    try:
        collect(tmp_path / "mamba1", 2, data=tmp_path / "texts.jsonl", db=tmp_path / "db", progress=False)
    finally:
        os.umask(before)
    for path in (tmp_path / "db").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
