"""Runs `quambase` in forked children of a process that has imported everything, and lets the n-th change of a file
fail. See faults.c for which calls those are.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
COMPILER = shutil.which("gcc") or shutil.which("cc")

ONCE, FROM_THERE_ON, KILL = range(3)


@dataclass(frozen=True)
class Fault:
    """The call number ``number`` (from 1; 0: none) fails, by itself or with all later ones, or kills the process."""

    number: int = 0
    how: int = ONCE
    error: int = errno.ENOSPC


KINDS = {
    "full once": (ONCE, errno.ENOSPC),
    "full from there on": (FROM_THERE_ON, errno.ENOSPC),
    "input/output error": (ONCE, errno.EIO),
    "killed": (KILL, 0),
}


@dataclass(frozen=True)
class Ended:
    """How a command ended. ``calls``: what each counted call was, a letter each; ``failed``: the one that failed."""

    code: int
    stdout: str
    stderr: str
    calls: str
    failed: str


def build(folder: Path) -> Path:
    """Compile faults.c."""
    library = folder / "faults.so"
    options = ["-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
    subprocess.run([str(COMPILER), *options, str(SOURCE), "-o", str(library), "-ldl", "-lpthread"], check=True)
    return library


def environment(library: Path, folder: Path) -> dict[str, str]:
    """Of a process in which files can fail: one thread each, as threads of OpenMP do not survive a fork."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    threads["NUMBA_THREADING_LAYER"] = "workqueue"  # numba with OpenMP refuses to run after a fork
    places = {"TMPDIR": str(folder / "case" / "tmp"), "MPLCONFIGDIR": str(folder), "FAULTS_LIBRARY": str(library)}
    return {**os.environ, **threads, **places, "LD_PRELOAD": str(library), "NO_COLOR": "1"}


class Case:
    """A folder, always at the same path, in which commands run one after the other.

    around  it lies in here, beside what its commands print
    """

    def __init__(self, around: Path) -> None:
        self.around, self.folder = around, around / "case"
        self._library = ctypes.CDLL(os.environ["FAULTS_LIBRARY"])
        self._library.faults_begin.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int)
        self._library.faults_calls.restype = self._library.faults_failed.restype = ctypes.c_char_p

    def begin(self, content: Path) -> None:
        """Make the folder a copy of ``content``."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(content, self.folder, symlinks=True)
        (self.folder / "tmp").mkdir(exist_ok=True)

    def run_here(self, words: Sequence[str]) -> None:
        """Run ``quambase WORDS`` in the folder in this process, so that its children find compiled what it needs.
        RuntimeError: it fails.
        """
        here = Path.cwd()
        os.chdir(self.folder)
        with (self.around / "stdout").open("w") as file, redirect_stdout(file), redirect_stderr(file):
            code = _call(words)
        os.chdir(here)
        if code:
            raise RuntimeError(f"{' '.join(words)} fails undisturbed:\n{(self.around / 'stdout').read_text()}")

    def run(self, words: Sequence[str], fault: Fault = Fault(), seconds: float = 120) -> Ended:
        """Run ``quambase WORDS`` in the folder, in a child; -9 is the code of one that did not end in time, too."""
        child = os.fork()
        if child == 0:
            self._become(words, fault)
        for _ in range(int(seconds / 0.002)):  # counted, as the clock stands still
            if (waited := os.waitpid(child, os.WNOHANG)) != (0, 0):
                break
            time.sleep(0.002)
        else:
            os.kill(child, signal.SIGKILL)
            waited = os.waitpid(child, 0)
        calls, _, failed = (self.around / "calls").read_text().partition("\n")
        stdout, stderr = ((self.around / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return Ended(os.waitstatus_to_exitcode(waited[1]), stdout, stderr, calls, failed)

    def _become(self, words: Sequence[str], fault: Fault) -> None:
        """In the child: run the command and leave."""
        (self.around / "calls").write_text("")
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(self.around / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        os.chdir(self.folder)
        self._library.faults_begin(os.fsencode(self.folder), fault.number, fault.how, fault.error)
        code = _call(words)
        calls, failed = self._library.faults_calls(), self._library.faults_failed()
        self._library.faults_begin(b"", 0, 0, 0)
        (self.around / "calls").write_bytes(calls + b"\n" + failed)
        os._exit(code)


def _call(words: Sequence[str]) -> int:
    from quambase.cli.main import quambase

    code = 0
    try:
        quambase(args=list(words), prog_name="quambase")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return code


@contextmanager
def in_place(path: Path) -> Iterator[Path]:
    """What `quambase.schema.files.replacing` must not be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path


def prepare_process(careless: bool = False) -> None:
    """Import every command, and stop the clock: what a manifest tells of times is then the same every time.

    careless  files are written in their places: a planted fault
    """
    import quambase.collector.collect as collect
    from quambase.cli.main import COMMANDS, load_command

    for name in COMMANDS:
        load_command(name)
    collect.CHECKPOINT_SECONDS = -1.0  # a checkpoint after every block
    for name in ("time", "monotonic", "perf_counter"):
        setattr(time, name, lambda: 1.8e9)
    if careless:
        for module in [module for name, module in sys.modules.items() if name.startswith("quambase.")]:
            if hasattr(module, "replacing"):
                module.replacing = in_place  # type: ignore[attr-defined]
