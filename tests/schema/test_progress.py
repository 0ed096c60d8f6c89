"""What is shown of progress, with a clock of our own: estimates, lines, and that compiling counts on neither side."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable

import pytest

from quambase.schema.errors import DataInvalid
from quambase.schema.progress import Progress, as_clock, compiling, remark, roughly, tell


class Clock:
    """Seconds that pass when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class Terminal(io.StringIO):
    """A terminal; ``lines`` are those that stay, ``shown`` what was ever drawn over."""

    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> list[str]:
        return [text.rstrip() for text in re.split(r"[\r\n]", self.getvalue()) if text.strip()]


def clock_seconds(text: str) -> float:
    """Of 0:12 or 1:05:00."""
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + float(part)
    return total


Cost = Callable[[int, int], float]
"""Seconds of a block's layer."""

EVEN: Cost = lambda block, layer: 0.4  # noqa: E731
COSTS: dict[str, Cost] = {
    "even": EVEN,
    "a slow beginning": lambda block, layer: 0.4 + 3.0 * (block == layer == 0),
    "a heavy last layer": lambda block, layer: 0.3 + 0.9 * (layer == 7),
    "noise": lambda block, layer: 0.4 * random.Random(100 * block + layer).uniform(0.4, 1.6),
}


@pytest.mark.parametrize("kind", COSTS)
def test_after_a_tenth_of_the_work_the_time_left_is_within_a_factor_of_two(kind: str) -> None:
    clock, cost = Clock(), COSTS[kind]
    told: list[tuple[float, float]] = []  # when, and how many seconds from then on
    compilations: list[float] = []
    documents = [32, 32, 32, 30]
    with Progress(True, stream=Terminal(), clock=clock) as progress:
        progress.start("collect", sum(documents), sum(documents))
        begun = clock.now
        for block, count in enumerate(documents):
            with progress.piece(count, count):
                for layer in range(8):
                    # Kernels of the first block are compiled on the way, for longer than all the rest takes.
                    if block == 0:
                        with compiling():
                            compilations.append(clock.now)
                            clock.wait(4.0)
                    clock.wait(cost(block, layer))
                    tell((layer + 1) / 8)
                    left = progress.seconds_left()
                    if left is not None:
                        told.append((clock.now, left))
    work = clock.now - begun - 4.0 * len(compilations)
    checked = 0
    for when, left in told:
        # Compiling that is still to come is no part of what is promised.
        truth = clock.now - when - 4.0 * sum(began > when for began in compilations)
        share = 1 - truth / work
        # Within the last tenth a layer is all that is left, and what it costs beside the others is not known.
        if 0.1 <= share <= 0.9:
            assert truth / 2 <= left <= truth * 2, (share, left, truth)
            checked += 1
    assert checked >= 15


def test_time_spent_compiling_counts_on_neither_side() -> None:
    clock, terminal = Clock(), Terminal()
    with Progress(True, stream=terminal, clock=clock) as progress:
        progress.start("analyze", 100, 100, unit="groups")
        with progress.piece(1, 1):
            with compiling():
                clock.wait(10)
                with compiling():  # one kernel calls another
                    clock.wait(13)
            clock.wait(0.02)
        assert progress.seconds_left() is None, "one group of a hundred is too little"
        for _ in range(9):
            with progress.piece(1, 1):
                clock.wait(0.02)
        left = progress.seconds_left()
        assert left == pytest.approx(90 * 0.02)
    assert any("compiling kernels (once)" in text for text in terminal.shown)
    assert not any("16:0" in text or ":23 left" in text for text in terminal.shown)


def test_numba_says_itself_when_it_compiles() -> None:
    import numba

    terminal = Terminal()

    @numba.njit
    def doubled(x: int) -> int:
        return 2 * x

    with Progress(True, stream=terminal) as progress:
        progress.start("analyze", 10, 10)
        with progress.piece(1, 1):
            assert doubled(21) == 42
        first = sum("compiling kernels (once)" in text for text in terminal.shown)
        with progress.piece(1, 1):
            assert doubled(21) == 42
    assert first == 1 == sum("compiling kernels (once)" in text for text in terminal.shown)
    assert progress._compiled > 0.01  # some hundredths of a second, at the least


def test_a_terminal_shows_stage_what_runs_documents_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    clock, terminal = Clock(), Terminal()
    with Progress(True, stream=terminal, clock=clock) as progress:
        progress.say("loading mamba-5m")
        progress.start("evaluate", 128, 1280)
        for number in range(4):
            with progress.piece(16, 160, f"strategy {number + 1} of 11: mse"):
                for layer in range(8):
                    clock.wait(1.0)
                    tell((layer + 1) / 8)
    assert terminal.shown[0] == "loading mamba-5m"
    assert "evaluate: about 2 minutes to go" not in terminal.shown  # 59 s are said in seconds
    assert "evaluate: about 60 s to go" in terminal.shown or "evaluate: about 55 s to go" in terminal.shown
    # Half of the second block's layers are done: 16 + 8 documents in 12 s, so 2 a second and 52 s for the other 104.
    expected = "evaluate: strategy 2 of 11: mse  ████················   19%  documents 24/128  2/s  0:52 left"
    assert expected in terminal.shown
    assert terminal.getvalue().endswith("\r"), "the line is gone when something else is printed"


def test_elsewhere_a_line_at_the_start_and_one_every_half_minute() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(True, stream=stream, clock=clock) as progress:
        progress.say("loading mamba-5m")
        progress.start("collect", 100, 100)
        for _ in range(100):
            with progress.piece(1, 1):
                clock.wait(1.0)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["collect: 100 documents", "collect: about 95 s to go"] or lines[1].endswith("2 minutes to go")
    assert lines[2:] == [f"collect   {d}%  documents {d}/100  1/s  {as_clock(100 - d)} left" for d in (35, 65, 95)]


def test_short_work_says_one_line_elsewhere() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(True, stream=stream, clock=clock) as progress:
        progress.start("analyze", 50, 50, unit="groups")
        for _ in range(50):
            with progress.piece(1, 1):
                clock.wait(0.02)
    assert stream.getvalue() == "analyze: 50 groups\n"


def test_resumed_work_counts_as_done_but_not_in_the_rate() -> None:
    clock, terminal = Clock(), Terminal()
    with Progress(True, stream=terminal, clock=clock) as progress:
        progress.start("collect", 100, 1000, done=(60, 600))
        with progress.piece(20, 200):
            clock.wait(10)
        assert progress.seconds_left() == pytest.approx(10)
        clock.wait(1)
        progress.tell(0.0)
    assert any("80%  documents 80/100" in text for text in terminal.shown)


def test_a_function_is_told_instead() -> None:
    calls: list[tuple[int, int]] = []
    with Progress(lambda done, total: calls.append((done, total))) as progress:
        progress.start("collect", 4, 40)
        for _ in range(2):
            with progress.piece(2, 20):
                tell(0.5)
    assert calls == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_error_leaves_no_half_line_and_no_listener(capsys: pytest.CaptureFixture[str]) -> None:
    from numba.core import event

    listeners = sum(map(len, event._registered.values()))
    terminal = Terminal()
    with pytest.raises(DataInvalid), Progress(True, stream=terminal) as progress:
        progress.start("collect", 4, 40)
        remark("warning: something")
        progress.say("writing")
        raise DataInvalid("no")
    assert terminal.getvalue().endswith("\r") and "warning: something\n" in terminal.getvalue()
    assert sum(map(len, event._registered.values())) == listeners
    tell(0.5)  # nobody listens, nothing happens
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", [110, 80, 60, 50])
def test_a_line_is_no_wider_than_the_terminal_and_keeps_its_figures(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    clock, terminal = Clock(), Terminal()
    with Progress(True, stream=terminal, clock=clock) as progress:
        progress.start("evaluate", 100, 100)
        with progress.piece(50, 50, "strategy 4 of 11: percentile:0.9999"):
            clock.wait(25)
            tell(1.0)
    last = terminal.shown[-1]
    assert max(map(len, terminal.shown)) < columns and last.endswith("50%  documents 50/100  2/s  0:25 left")
    assert ("█" in last) == (columns == 110) and last.startswith("evalu")


def test_durations_as_people_say_them() -> None:
    assert [as_clock(s) for s in (0.4, 12, 75, 3900)] == ["0:00", "0:12", "1:15", "1:05:00"]
    assert [roughly(s) for s in (1, 21, 88, 130, 5000, 9000)] == [
        "5 s",
        "20 s",
        "90 s",
        "2 minutes",
        "83 minutes",
        "2 hours",
    ]
    assert clock_seconds("1:05:00") == 3900
