"""Commands of a user who may not write what a file's mode forbids: in a process where that holds for root, too."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1

EACH = """
import contextlib, io, json, os, sys, traceback
from quambase.cli.main import quambase
ended = []
for folder, words in json.loads(sys.stdin.read()):
    os.chdir(folder)
    (out, err), code = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2)), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            quambase(words)
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
            code = 70
    ended.append([code, *(stream.buffer.getvalue().decode() for stream in (out, err))])
print(json.dumps(ended))
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """Its one line of an error."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert self.code == 1 and len(lines) == 1 and "Traceback" not in self.stderr, (self.code, self.stderr)
        return lines[0]


def bound() -> None:
    """For ``preexec_fn``: the program that is started then lacks root's right to write everywhere."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def needs_modes(folder: Path) -> None:
    """Skip the test where modes do not bind even such a process."""
    with unwritable(folder):
        script = "import sys; open(sys.argv[1] + '/x', 'w')"
        done = subprocess.run([sys.executable, "-c", script, str(folder)], preexec_fn=bound, capture_output=True)
    if done.returncode == 0:
        (folder / "x").unlink()
        pytest.skip("root may write everywhere here")


def run_bound(commands: Sequence[tuple[Path, Sequence[str]]], **variables: str) -> list[Ended]:
    """Run ``quambase WORDS`` in its folder, for each of the commands, one after the other in one process."""
    given = json.dumps([(str(folder), list(words)) for folder, words in commands])
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        preexec_fn=bound,
        input=given,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Ended(*each) for each in json.loads(done.stdout.splitlines()[-1])]


@contextmanager
def unwritable(*folders: Path, deep: bool = False) -> Iterator[None]:
    """The folders, ``deep``: and all below them, have no permission to write inside."""
    paths = [*folders, *(path for folder in folders if deep for path in folder.rglob("*") if not path.is_symlink())]
    modes = {path: path.stat().st_mode for path in paths}
    for path, mode in modes.items():
        path.chmod(mode & 0o7555)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
