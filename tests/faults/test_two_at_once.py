"""Two processes that write the same output at the same time: each file is whole, and that of one of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults.attempts import tree
from faults.commands import ANALYZE, APPLY, EVALUATE, GROUPED, MAMBA1
from faults.started import BEGIN, start

from quambase.schema.stored.results import finished_evaluations
from quambase.schema.stored.runs import list_runs, sound_manifests

STOPPING = """
import signal
def stopping(descriptor, fsync=os.fsync):
    os.fsync = fsync
    os.kill(os.getpid(), signal.SIGSTOP)
    fsync(descriptor)
os.fsync = stopping
"""
"""The process stops when its first file is written, and has not taken its place yet."""

NUMBERED = """
import signal
evaluate = quambase.apply.evaluation.evaluate
def stopping(db, next_number=evaluate.next_number):
    number = next_number(db)
    os.kill(os.getpid(), signal.SIGSTOP)
    return number
evaluate.next_number = stopping
"""
"""The process stops when it has chosen the evaluation's number, and has not written it yet."""

NUMBERED_RUN = """
import signal
import quambase.collector.tables.run_folder as run_folder
def stopping(folders, sound_manifests=run_folder.sound_manifests):
    found = sound_manifests(folders)
    os.kill(os.getpid(), signal.SIGSTOP)
    return found
run_folder.sound_manifests = stopping
"""
"""The same of a run."""

KILLED = """
import signal
evaluate = quambase.apply.evaluation.evaluate
def killed(path, content, write_json=evaluate.write_json):
    write_json(path, content)
    os.kill(os.getpid(), signal.SIGKILL)
evaluate.write_json = killed
"""
"""The process is killed when the evaluation is finished, and holds its locks still."""

LOCKED = """
import errno, pathlib
asked = []
def unlink(path, missing_ok=False, unlink=pathlib.Path.unlink):
    if path.parts[-2:] == ("results", ".lock"):
        asked.append(path)
        if len(asked) == NUMBER:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
    unlink(path, missing_ok)
pathlib.Path.unlink = unlink
"""
"""The lock under which evaluations are numbered is not removed when this is tried for the NUMBER-th time."""


@contextmanager
def stopped(folder: Path, *words: str, where: str = STOPPING) -> Iterator[subprocess.Popen[str]]:
    """A command that has stopped amid its work, and goes on when the block is left."""
    script = BEGIN + where + "command(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", script, *words], cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), process.communicate()[1]
        yield process
        process.send_signal(signal.SIGCONT)
        stderr = process.communicate(timeout=300)[1]
        assert process.returncode == 0, stderr
    finally:
        if process.returncode is None:
            process.kill()
            process.communicate()


def busy(folder: Path, what: str, *words: str) -> None:
    """The command ends in one line, which says that another process is writing ``what``."""
    done = start(folder, "", *words)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert lines[0].startswith(f"error: another process is writing {what}"), lines
    assert lines[0].endswith("; wait for it, or stop it and run the same command again")


HELD = {
    "collect": (MAMBA1, "quambase-db/runs", "run mamba1-"),
    "apply": (APPLY, "quambase-db/models", "the model quambase-db/models/"),
    "evaluate": (EVALUATE, "quambase-db/results", "evaluation "),
}


@pytest.mark.parametrize("name", HELD)
def test_the_second_of_the_same_command_is_told_to_wait(made: Path, tmp_path: Path, name: str) -> None:
    words, output, what = HELD[name]
    folder = shutil.copytree(made, tmp_path / "copy")
    shutil.rmtree(folder / output)
    assert start(folder, "", *words).returncode == 0
    expected = tree(folder)
    shutil.rmtree(folder / output)
    with stopped(folder, *words):
        busy(folder, what, *words)
    found = tree(folder)
    assert found.keys() == expected.keys()
    assert [path for path in found if found[path] != expected[path] and not path.endswith("run.json")] == []


def waits_for_a_lock(process: subprocess.Popen[str]) -> bool:
    waiting = [line.split() for line in Path("/proc/locks").read_text().splitlines() if " -> FLOCK " in line]
    return str(process.pid) in [words[5] for words in waiting]


def at_once(folder: Path, first: tuple[str, ...], second: tuple[str, ...], where: str) -> None:
    """Run two commands, of which the first stops, until the second has finished or waits for it."""
    script = [sys.executable, "-c", BEGIN + "command(sys.argv[1:])", *second]
    with stopped(folder, *first, where=where):
        other = subprocess.Popen(script, cwd=folder, stderr=subprocess.PIPE, text=True)
        while other.poll() is None and not waits_for_a_lock(other):
            time.sleep(0.01)
    stderr = other.communicate(timeout=300)[1]
    assert other.returncode == 0, stderr
    assert not [path for path in tree(folder) if path.endswith(".lock")]


def test_two_evaluations_that_finish_at_once(made: Path, tmp_path: Path) -> None:
    """They have two numbers, in the order in which they finished."""
    folder = shutil.copytree(made, tmp_path / "copy")
    shutil.rmtree(folder / "quambase-db" / "results")
    at_once(folder, EVALUATE, (*EVALUATE, "--samples", "3"), NUMBERED)
    found, _ = finished_evaluations(folder / "quambase-db")
    assert [each["number"] for each in found] == [1, 2]
    documents = [each["tasks"][0]["documents"] for each in found]
    assert documents[0] > documents[1], "the second one, of fewer documents, finished first"


def test_two_runs_that_finish_at_once(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "copy")
    shutil.rmtree(folder / "quambase-db")
    at_once(folder, MAMBA1, (*MAMBA1, "--samples", "4"), NUMBERED_RUN)
    found, _ = sound_manifests(list_runs(folder / "quambase-db")[0])
    assert [each.created["number"] for each in found] == [2, 1]
    assert found[0].data.documents < found[1].data.documents, "the second one, of fewer documents, finished first"


def test_the_locks_of_a_killed_evaluation_are_removed(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "copy")
    shutil.rmtree(folder / "quambase-db" / "results")
    assert start(folder, KILLED, *EVALUATE).returncode == -signal.SIGKILL
    assert [path for path in tree(folder) if path.endswith("results/.lock")], "it was killed elsewhere"
    assert start(folder, "", *EVALUATE).returncode == 0
    assert not [path for path in tree(folder) if path.endswith(".lock")]


@pytest.mark.parametrize("number", [1, 2])
def test_a_lock_that_could_not_be_removed_is_removed_by_the_next(made: Path, tmp_path: Path, number: int) -> None:
    folder = shutil.copytree(made, tmp_path / "copy")
    shutil.rmtree(folder / "quambase-db" / "results")
    failed = start(folder, LOCKED.replace("NUMBER", str(number)), *EVALUATE).returncode
    assert failed or not [path for path in tree(folder) if path.endswith(".lock")], "a lock is left in silence"
    assert start(folder, "", *EVALUATE).returncode == 0
    assert not [path for path in tree(folder) if path.endswith(".lock")]


def test_two_merges(tmp_path: Path, made: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "copy")
    shutil.rmtree(folder / "quambase-db")
    assert start(folder, "", *GROUPED, "--shard", "0/1").returncode == 0
    with stopped(folder, "merge"):
        busy(folder, "run grouped-", "merge")
    assert start(folder, "", "doctor").returncode == 0


def test_two_models_for_one_folder(made: Path, tmp_path: Path) -> None:
    """The folder never has the tensors of one and the settings of the other."""
    folder = shutil.copytree(made, tmp_path / "copy")
    assert start(folder, "", "apply", "--strategy", "absmax", "--out", "alone").returncode == 0
    with stopped(folder, "apply", "--strategy", "absmax", "--out", "model"):
        busy(folder, "the model model", "apply", "--strategy", "quamba", "--out", "model")
    assert tree(folder / "model") == tree(folder / "alone")


def test_two_scale_tables_of_one_name(made: Path, tmp_path: Path) -> None:
    """Either is whole at once; the one that ended last remains."""
    folder = shutil.copytree(made, tmp_path / "copy")
    (folder / "scales.parquet").unlink()
    assert start(folder, "", "analyze", "--strategy", "absmax", "--out", "alone.parquet").returncode == 0
    with stopped(folder, "analyze", "--strategy", "absmax"):
        assert not (folder / "scales.parquet").exists()
        assert start(folder, "", *ANALYZE).returncode == 0
        assert (folder / "scales.parquet").read_bytes() == (made / "scales.parquet").read_bytes()
    assert (folder / "scales.parquet").read_bytes() == (folder / "alone.parquet").read_bytes()
    assert not [path for path in tree(folder) if path.endswith(".tmp")]
