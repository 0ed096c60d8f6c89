"""A sample of `python tests/faults`: no full disk, error or kill at a write breaks an output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from faults.attempts import Outcome, incomplete, judged, wrong_files
from faults.disturbed import COMPILER, KILL, Ended, Fault

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def faults(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(HERE), *arguments], capture_output=True, text=True, check=False)


SAMPLE = ("collect --sensitivity", "analyze", "apply", "apply --export", "evaluate", "report", "plot pdf", "merge")


def test_a_sample_of_calls_fails_without_harm() -> None:
    named = [word for name in SAMPLE for word in ("--command", name)]
    done = faults("--sample", "6", *named)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) > 4 * len(SAMPLE)


def test_a_planted_fault_is_found() -> None:
    """Files that are written in their places stay behind half written."""
    done = faults("--sample", "8", "--command", "plot pdf", "--careless")
    assert done.returncode == 1 and "wrong bytes" in done.stdout.splitlines()[-1], done.stdout + done.stderr


# The judge ----------------------------------------------------------------------------------------

RUN, MODEL = "quambase-db/runs/a", "quambase-db/models/b"


def test_what_is_wrong_under_a_right_name() -> None:
    expected = {"out": b"new", "kept": b"k", f"{RUN}": None, f"{RUN}/run.json": b"{}", f"{RUN}/x.parquet": b"x"}
    before = {"kept": b"old"}
    assert wrong_files(expected, before, expected) == []
    assert wrong_files({"out": b"", "kept": b"old"}, before, expected) == ["out"], "an empty file is a wrong one"
    assert wrong_files({"kept": b"ol"}, before, expected) == ["kept"]
    half = {RUN: None, f"{RUN}/x.parquet": b""}
    assert incomplete(half) == [f"{RUN}/"] and wrong_files(half, before, expected) == [], (
        "an unfinished run may have it"
    )
    assert wrong_files(half | {f"{RUN}/run.json": b"{}"}, before, expected) == [f"{RUN}/x.parquet"]
    marked = {MODEL: None, f"{MODEL}/config.json": b'{"family": "x", "unfinished": true}'}
    assert incomplete(marked) == [f"{MODEL}/"]


@pytest.mark.parametrize(
    ("code", "stderr", "verdict"),
    [
        (1, "1 of 2\nerror: No space left on device: a; free some space: finished parts are kept\n", "line"),
        (1, "error: No space left on device\n", "no remedy"),
        (1, "error: a; finished parts are kept\nerror: b\n", "no line"),
        (2, "error: a; finished parts are kept\n", "no line"),
        (1, "Traceback (most recent call last):\nOSError\nerror: a; finished parts are kept", "traceback"),
        (0, "note\n", "harmless"),
        (-9, "", "no line"),
    ],
)
def test_verdicts(code: int, stderr: str, verdict: str) -> None:
    ended = Ended(code, "", stderr, "", "")
    assert judged(ended, Fault(1)) == verdict
    assert (judged(ended, Fault(1, KILL, 0)) == "killed") == (code == -9)
    outcome = Outcome("a", "b")
    outcome.add(verdict, "what")
    assert bool(outcome.faults) == (verdict not in ("line", "harmless"))
