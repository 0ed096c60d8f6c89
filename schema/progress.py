"""Progress on stderr while a stage works: what runs, how much is done, and how long the rest will take.

On a terminal one line is redrawn; elsewhere a line is printed at the start and every half minute. The time left is
extrapolated from the later half of the work done so far. Nothing is said before some work is measured, and the time
that kernels take to compile, which happens once, is left out.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

Shown = bool | Callable[[int, int], None]
"""Whether progress is shown on stderr, or a function to call instead, with (documents done, documents in all)."""

DRAW_SECONDS = 0.1
"""Least seconds between two drawings on a terminal."""

LINE_SECONDS = 30.0
"""Seconds between two lines where stderr is no terminal."""

MEASURED_SHARE, MEASURED_SECONDS = 0.05, 5.0
"""The time left is shown after this share of the work, or after this time."""

LONG_SECONDS = 10.0
"""Stages that are expected to take longer are announced, with about how long."""

BAR = 20
"""Characters in the bar."""

_running: list[Progress] = []
"""The progress of every call under way, the innermost last."""


class Progress:
    """The progress of one call, which may have several stages one after another.

    A stage is shown in ``units`` (documents) and estimated by ``work``, numbers proportional to the time that its
    pieces take (tokens). Only the thread that made the object reports.
    """

    def __init__(
        self, shown: Shown, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._call = shown if callable(shown) else None
        self._stream = (stream or sys.stderr) if shown is True else None
        self._terminal = self._stream is not None and self._stream.isatty()
        self._clock = clock
        self._thread = threading.get_ident()
        self._width = 0  # of the line that is on the terminal
        self._listener: Any = None
        self._stage = self._detail = ""
        self._unit = "documents"
        self._compiling = 0
        self._compiling_since = self._compiled = 0.0
        self._drawn = self._lined = self._started = -LINE_SECONDS
        self._units = self._total_units = 0.0
        self._work = self._total_work = self._before = 0.0
        self._piece = (0.0, 0.0)
        self._share = 0.0
        self._marks: deque[tuple[float, float]] = deque([(0.0, 0.0)])
        self._announced = True
        self._called: int | None = None

    def __enter__(self) -> Progress:
        _running.append(self)
        if self._stream:
            self._listener = _listen_to_numba(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _running.remove(self)
        if self._listener is not None:
            _numba_events().unregister("numba:compile", self._listener)
        self._erase()

    def say(self, text: str) -> None:
        """Show what happens now, where its length is not known."""
        self._stage, self._detail, self._total_work, self._announced = text, "", 0.0, True
        self._show(force=True)

    def start(
        self, stage: str, units: float, work: float, *, unit: str = "documents", done: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        """Begin a stage of ``units`` and ``work``; an earlier call already did ``done`` of both."""
        self._stage, self._detail, self._unit = stage, "", unit
        self._total_units, self._total_work = units, work
        self._units, self._before = done
        self._work, self._share, self._piece = self._before, 0.0, (0.0, 0.0)
        self._started, self._compiled = self._clock(), 0.0
        self._marks = deque([(0.0, 0.0)])
        self._announced = False
        if self._stream and not self._terminal:
            resumed = f", {self._shown_units()} of them done before" if self._units else ""
            self._line(f"{stage}: {round(units):,} {unit}{resumed}")
        self._show(force=True)

    @contextmanager
    def piece(self, units: float, work: float, detail: str = "") -> Iterator[None]:
        """A piece of the stage: inside, `tell` reports how much of it is done; on leaving, all of it is."""
        self._piece, self._share = (units, work), 0.0
        self._detail = detail
        self._show()
        yield
        self._units, self._work = self._units + units, self._work + work
        self._piece, self._share = (0.0, 0.0), 0.0
        self._mark()
        self._show()

    def tell(self, share: float) -> None:
        """Report that ``share`` (0 to 1) of the current piece is done."""
        if threading.get_ident() == self._thread:
            self._share = share
            self._mark()
            self._show()

    def seconds_left(self) -> float | None:
        """Seconds that the rest of the stage will take, without compiling; None before enough is measured."""
        work = self._work_done() - self._before
        seconds = self._seconds()
        whole = self._total_work - self._before
        if work <= 0 or (work < MEASURED_SHARE * whole and seconds < MEASURED_SECONDS):
            return None
        # The start is slow, since kernels are loaded and memory is allocated: measure the later half.
        since_work, since_seconds = self._marks[0]
        return (seconds - since_seconds) * max(0.0, whole - work) / (work - since_work)

    def compilation_begins(self) -> None:
        """A kernel begins to compile; that may compile others."""
        if threading.get_ident() == self._thread:
            self._compiling += 1
            if self._compiling == 1:
                self._compiling_since = self._clock()
                self._show(force=True)

    def compilation_ends(self) -> None:
        """The kernel of the last `compilation_begins` is compiled."""
        if threading.get_ident() == self._thread and self._compiling:
            self._compiling -= 1
            if not self._compiling:
                self._compiled += self._clock() - max(self._compiling_since, self._started)
                self._show()

    def remark(self, text: str) -> None:
        """Print a line that stays."""
        self._erase()
        print(text, file=self._stream or sys.stderr, flush=True)

    def _mark(self) -> None:
        """Record when so much was done; drop the records before the last one at or below half of it."""
        work = self._work_done() - self._before
        if work > self._marks[-1][0]:
            self._marks.append((work, self._seconds()))
            while len(self._marks) > 1 and self._marks[1][0] <= work / 2:
                self._marks.popleft()

    def _seconds(self) -> float:
        """Seconds since the stage began, without compiling."""
        now = self._clock()
        compiling = now - max(self._compiling_since, self._started) if self._compiling else 0.0
        return now - self._started - self._compiled - compiling

    def _work_done(self) -> float:
        return self._work + self._share * self._piece[1]

    def _shown_units(self) -> int:
        """Units done: those of finished pieces, and the share of the current piece, rounded down."""
        return int(min(self._total_units, self._units + self._share * self._piece[0]) + 1e-6)

    def _show(self, *, force: bool = False) -> None:
        if self._call and self._total_work:
            units = self._shown_units()
            if units != self._called:
                self._called = units
                self._call(units, round(self._total_units))
        if not self._stream:
            return
        now = self._clock()
        if self._terminal:
            if force or now - self._drawn >= DRAW_SECONDS:
                self._announce()
                self._draw(self._text())
                self._drawn = now
        elif self._total_work:
            self._announce()
            if now - self._lined >= LINE_SECONDS:
                self._line(self._text())

    def _announce(self) -> None:
        """Say once in a stage about how long it will take, if that is long."""
        if self._announced or not self._total_work:
            return
        left = self.seconds_left()
        if left is None:
            return
        self._announced = True
        if left >= LONG_SECONDS:
            text = f"{self._stage}: about {roughly(left)} to go"
            if self._terminal:
                self.remark(text)
            else:
                self._line(text)

    def _text(self) -> str:
        """The stage and what runs; where work is measured, also a bar, share, units, rate and time left."""
        what = f"{self._stage}: {self._detail}" if self._detail else self._stage
        if self._compiling:
            return f"{what}  compiling kernels (once)"
        if not self._total_work:
            return what
        share = min(1.0, self._work_done() / self._total_work)
        parts = [f"{share:4.0%}", f"{self._unit} {self._shown_units():,}/{round(self._total_units):,}"]
        left = self.seconds_left()
        if left is not None:
            units = self._units + self._share * self._piece[0]
            before = self._before / self._total_work * self._total_units
            parts += [f"{rate((units - before) / max(self._seconds(), 1e-9))}/s", f"{as_clock(left)} left"]
        figures = "  ".join(parts)
        if not self._terminal:
            return f"{what}  {figures}"
        # A line that is too long loses its bar first, then the end of what runs; figures stay.
        room = _columns() - len(figures) - 2
        if len(what) + 2 + BAR <= room:
            filled = round(share * BAR)
            return f"{what}  {'█' * filled}{'·' * (BAR - filled)}  {figures}"
        return f"{what if len(what) <= room else what[: max(0, room - 1)] + '…'}  {figures}"

    def _draw(self, text: str) -> None:
        columns = _columns()
        text = text if len(text) <= columns else text[: columns - 1] + "…"
        assert self._stream is not None
        self._stream.write("\r" + text.ljust(min(self._width, columns)))
        self._stream.flush()
        self._width = len(text)

    def _erase(self) -> None:
        if self._width and self._stream:
            self._draw("")
            self._stream.write("\r")
            self._stream.flush()
            self._width = 0

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
        self._lined = self._clock()


SILENT = Progress(False)
"""A progress that shows nothing."""


def tell(share: float) -> None:
    """Report to whichever progress is shown that ``share`` (0 to 1) of the current piece is done.

    Models call it after every layer. Passing a `Progress` down to them would put it into every signature in between.
    """
    if _running:
        _running[-1].tell(share)


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, kernels are compiled: told to whichever progress is shown."""
    shown = _running[-1] if _running else SILENT
    shown.compilation_begins()
    try:
        yield
    finally:
        shown.compilation_ends()


def remark(text: str) -> None:
    """Print a line on stderr, apart from the one that shows progress."""
    (_running[-1] if _running else SILENT).remark(text)


def _columns() -> int:
    """The terminal's columns without the last one, at which some terminals begin a new line."""
    return shutil.get_terminal_size().columns - 1


def _listen_to_numba(progress: Progress) -> Any:
    """Tell ``progress`` when numba compiles a kernel; one loaded from its cache is not compiled."""
    events = _numba_events()

    class Compilations(events.Listener):  # type: ignore[misc, name-defined]
        def on_start(self, event: Any) -> None:
            progress.compilation_begins()

        def on_end(self, event: Any) -> None:
            progress.compilation_ends()

    listener = Compilations()
    events.register("numba:compile", listener)
    return listener


def _numba_events() -> Any:
    """numba's event module, untyped; imported only when needed, since that takes half a second."""
    return importlib.import_module("numba.core.event")


def as_clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 0:12, 1:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def roughly(seconds: float) -> str:
    """A duration in words: 20 s, 3 minutes, 2 hours."""
    if seconds < 90:
        return f"{max(5, 5 * round(seconds / 5))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} minutes"
    return f"{round(seconds / 3600)} hours"


def rate(value: float) -> str:
    """A rate: two digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
