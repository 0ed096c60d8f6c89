"""A reader with every kind of fault, on which the harness itself is tested."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from pathlib import Path

from fuzz_judge import CRASH, HANG, MEMORY, TRACEBACK, UNPRINTABLE
from fuzz_targets import SEEDS, Seed, Target

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


def _leave(path: Path) -> object:
    """Leaves a thread behind unless the file is unchanged; AssertionError: an earlier one is still there."""
    assert threading.active_count() == 1
    if path.read_bytes() != (SEEDS[-1] / TEXT).read_bytes():
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    return None


TEXT = Path("texts", "rows.txt")
PLANTED = {
    name: Target(name, lambda made: [Seed(made / TEXT, ("bytes",))], read)
    for name, read in (("planted", _read), ("left behind", _leave))
}
