"""Gives one input to a reader and says what came of it. Time and memory are limited, so that a hang is a result too."""

from __future__ import annotations

import re
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fuzz_targets import fingerprint

from quambase.schema.errors import QuambaseError

REFUSED, SAME, OTHER = "refused", "no effect", "other content"
TRACEBACK, HANG, MEMORY, CRASH, UNPRINTABLE = "traceback", "hang", "memory", "crash", "unclear line"
OUTCOMES = (REFUSED, SAME, OTHER, TRACEBACK, HANG, MEMORY, CRASH, UNPRINTABLE)
FINDINGS = (TRACEBACK, HANG, MEMORY, CRASH, UNPRINTABLE)
"""Outcomes that are faults of a reader. "unclear line": an error that is no single printable line, or a long one."""

LONGEST_LINE = 1000
"""Characters of an error, without the file's path."""


@dataclass(frozen=True)
class Verdict:
    """What came of an input: one of OUTCOMES; where the fault is, to tell faults apart; and the whole story."""

    outcome: str
    where: str = ""
    story: str = ""
    content: object = None


class OutOfTime(KeyboardInterrupt):
    """Raised in a reader that takes too long; a KeyboardInterrupt, since those are the only ones that all let pass."""


@contextmanager
def time_limit(seconds: float) -> Iterator[list[bool]]:
    """Interrupt what runs after ``seconds``, and again until it ends; yields a list that is not empty from then on."""
    passed: list[bool] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        passed.append(True)
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield passed
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limit_address_space(more: int) -> None:
    """From now on this process can ask for ``more`` bytes at most; what it asks for beyond is a MemoryError."""
    with Path("/proc/self/statm").open() as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.RLIM_INFINITY))


def _peak() -> int:
    """The largest resident size since `_forget_peak`, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _forget_peak() -> int:
    """Let the peak begin at the present size, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


_ALLOCATION = re.compile(r"alloc|out of memory|memory exhausted|bad_array_new_length", re.IGNORECASE)


def _asked_too_much(error: BaseException | None) -> bool:
    """Whether an error, or one that it hides, is that memory was refused."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError):
            return True
        if not isinstance(error, QuambaseError) and _ALLOCATION.search(str(error).partition("\n")[0]):
            return True
        error = error.__cause__ or error.__context__
    return False


def _where(error: BaseException) -> str:
    """The error's type and the last line of quambase that it passed."""
    frames = list(traceback.extract_tb(error.__traceback__))
    ours = [frame for frame in frames if "/quambase/" in frame.filename]
    last = [None, *frames, *ours][-1]
    place = f"{Path(last.filename).name}:{last.lineno}" if last else "?"
    return f"{type(error).__name__} at {place}"


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-6000:]


def unclear(line: str, path: Path) -> str | None:
    """Why an error's text is no line for a terminal; None if it is."""
    line = line.replace(str(path), "FILE").replace(str(path.parent), "FOLDER")
    if not line.strip():
        return "empty"
    if not line.isprintable():
        return "not printable"
    return "too long" if len(line) > LONGEST_LINE else None


def judge(read: Callable[[Path], object], path: Path, expected: object, seconds: float, memory: int) -> Verdict:
    """Read the file at ``path``; ``expected``: the fingerprint of the unchanged file's content."""
    before = _forget_peak()
    error: BaseException | None = None
    content: object = None
    with time_limit(seconds) as late:
        try:
            content = fingerprint(read(path))
        except BaseException as caught:
            error = caught
            if isinstance(caught, KeyboardInterrupt) and not late:
                raise
    grown = _peak() - before
    if late:
        return Verdict(HANG, f"took more than {seconds:g} s", "" if error is None else _told(error))
    if _asked_too_much(error):
        assert error is not None
        return Verdict(MEMORY, f"asked for too much: {_where(error)}", _told(error))
    if grown > memory:
        return Verdict(MEMORY, f"took {grown >> 20} MiB; at most {memory >> 20} are expected")
    if error is None:
        return Verdict(SAME if content == expected else OTHER, content=content)
    if not isinstance(error, QuambaseError):
        return Verdict(TRACEBACK, _where(error), _told(error))
    fault = unclear(str(error), path)
    return Verdict(UNPRINTABLE, f"{fault}: {_where(error)}", str(error)) if fault else Verdict(REFUSED, str(error))
