"""Limits of a query's memory and time, checked by another thread than the one that runs it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from quambase.schema.errors import QueryInvalid

PAGE = os.sysconf("SC_PAGE_SIZE")


def machine_memory() -> int:
    """Bytes of memory that this process can have: the machine's, or what its container is allowed."""
    found = os.sysconf("SC_PHYS_PAGES") * PAGE
    with suppress(OSError, ValueError):  # no container, or "max"
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


@dataclass(frozen=True)
class Limits:
    """What a query may take.

    memory   bytes; by default half of the machine's. DuckDB keeps to it in its own operators, but does not count the
             lists and the Arrow tables that it makes, so the growth of the process is watched, too
    seconds  None: no limit
    """

    memory: int = field(default_factory=lambda: machine_memory() // 2)
    seconds: float | None = None


def resident_bytes() -> int:
    """Memory that this process has now; 0 where the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    except (OSError, ValueError, IndexError):
        return 0


class Watch:
    """The limits of one query, from when it was begun."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._began, self._before = limits, time.monotonic(), resident_bytes()

    @property
    def seconds(self) -> float:
        """Since the query was begun."""
        return time.monotonic() - self._began

    def check(self) -> None:
        """QueryInvalid: the query has taken more than it may."""
        if self._limits.seconds is not None and self.seconds > self._limits.seconds:
            raise QueryInvalid(
                f"the query took longer than {self._limits.seconds:g} s and was stopped; ask for less, or allow more "
                "with --timeout"
            )
        if resident_bytes() - self._before > self._limits.memory:
            raise out_of_memory(self._limits)


def out_of_memory(limits: Limits) -> QueryInvalid:
    """The error of a query that needs more memory than it may have."""
    return QueryInvalid(
        f"the query needs more than {limits.memory / 1e9:.3g} GB of memory and was stopped; ask for less (LIMIT, fewer "
        "columns, a smaller range), or allow more with --memory"
    )
