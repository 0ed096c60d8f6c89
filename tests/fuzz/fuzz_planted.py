"""A reader with every kind of fault, on which the harness itself is tested."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path

from fuzz_judge import CRASH, HANG, MEMORY, TRACEBACK, UNPRINTABLE
from fuzz_targets import Seed, Target

from quambase.schema.errors import QuambaseError

FAULTS = (CRASH, HANG, "hang of native code", MEMORY, TRACEBACK, UNPRINTABLE)


def planted(data: bytes) -> str | None:
    """The fault with which this input is met; the unchanged file has none."""
    place = hashlib.sha256(data).digest()[0] % 48
    return FAULTS[place] if place < len(FAULTS) else None


class Unclear(QuambaseError):
    """An error whose text is as it is given."""

    def __str__(self) -> str:
        return str(self.text)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def _read(path: Path) -> object:
    data = path.read_bytes()
    fault = planted(data)
    if fault == CRASH:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang of native code":  # which no signal interrupts
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(1000)
    held = []
    while fault == MEMORY:
        held.append(bytes(64 << 20))
    while fault == HANG:
        pass
    if fault == TRACEBACK:
        raise KeyError("vocab_size")
    if fault == UNPRINTABLE:
        raise Unclear("two\nlines")
    return data


PLANTED = {"planted": Target("planted", lambda made: [Seed(made / "texts" / "rows.txt", ("bytes",))], _read)}
