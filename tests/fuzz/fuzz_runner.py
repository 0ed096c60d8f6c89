"""Gives inputs to readers in worker processes, replaces a worker that dies, and counts what came of them."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import torch
from fuzz_inputs import Input, make_input
from fuzz_judge import CRASH, FINDINGS, HANG, MEMORY, OUTCOMES, SAME, Verdict, judge, limit_address_space
from fuzz_planted import PLANTED
from fuzz_targets import SEEDS, TARGETS, Seed, Target

ALL = TARGETS | PLANTED

ADDRESS_SPACE = 3 << 30
"""Bytes that a worker may ask for beyond what it has after its imports."""

ROUND = 50_000
"""Inputs of a round over all targets."""

EXAMPLES = 3
"""Inputs kept of each fault."""


@dataclass(frozen=True)
class Limits:
    """Seconds for an input, after which it counts as a hang, and until a deaf worker is ended."""

    seconds: float = 10.0
    patience: float = 50.0


@dataclass(frozen=True)
class Fault:
    """A finding: the first inputs that led to it."""

    target: str
    outcome: str
    where: str
    number: int
    kind: str
    story: str


@dataclass
class Counts:
    """How often each outcome came, by target, and the faults with their first inputs."""

    tried: dict[str, dict[str, int]]
    faults: dict[tuple[str, str, str], list[Fault]] = field(default_factory=dict)
    times: dict[tuple[str, str, str], int] = field(default_factory=dict)

    def add(self, fault: Fault) -> None:
        key = fault.target, fault.outcome, fault.where
        self.times[key] = self.times.get(key, 0) + 1
        held = self.faults.setdefault(key, [])
        if len(held) < EXAMPLES:
            held.append(fault)

    @property
    def total(self) -> int:
        return sum(sum(counts.values()) for counts in self.tried.values())


class Bench:
    """A target's real files laid out in a folder of this process, and what reading each of them gives."""

    def __init__(self, target: Target, made: Path, work: Path, limits: Limits) -> None:
        self.target, self.limits = target, limits
        self.seeds = target.seeds(made)
        assert self.seeds, f"{target.name} has no real file in {made}"
        self.contents = [seed.file.read_bytes() for seed in self.seeds]
        self.paths: list[Path] = [self._lay(seed, work / f"{i}") for i, seed in enumerate(self.seeds)]
        self.expected: dict[int, object] = {}

    @staticmethod
    def _lay(seed: Seed, folder: Path) -> Path:
        if seed.folder is None:
            folder.mkdir(parents=True)
            return folder / seed.file.name
        # Names of runs, shards and evaluations are part of what is read.
        within = folder / seed.folder.parent.name / seed.folder.name
        shutil.copytree(seed.folder, within)
        return within / seed.file.relative_to(seed.folder)

    def make(self, seed: int, number: int) -> Input:
        return make_input(self.target, self.seeds, self.contents, seed, number)

    def judge(self, made: Input) -> Verdict:
        path = self.paths[made.place]
        if made.place not in self.expected:
            path.write_bytes(self.contents[made.place])
            first = judge(self.target.read, path, None, 60.0, 1 << 40)
            assert first.outcome not in (*FINDINGS, "refused"), f"{made.seed.file}: {first.where}\n{first.story}"
            self.expected[made.place] = first.content
            again = judge(self.target.read, path, first.content, 60.0, 1 << 40)
            assert again.outcome == SAME, f"{made.seed.file}: two readings differ"
        path.write_bytes(made.data)
        verdict = judge(self.target.read, path, self.expected[made.place], self.limits.seconds, self.target.memory)
        if self.seeds[made.place].folder is not None:
            path.write_bytes(self.contents[made.place])  # other seeds lie in the same folder
        return verdict


def work_folder() -> Path:
    """A new folder, in memory where there is one."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None))


def _left_behind() -> bool:
    """Whether a reader's thread goes on: a query that nothing interrupts, which may take ever more memory."""
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    for thread in others:
        thread.join(1.0)
    return any(thread.is_alive() for thread in others)


def _worker(
    made: Path, work: Path, tasks: Sequence[tuple[str, range]], seed: int, limits: Limits, state: Any, pipe: Connection
) -> None:
    """Judge inputs; ``state``: the place in ``tasks``, the number, its beginning; then counts by task and outcome.

    Ends early, with exit code 0, after an input that left a thread behind.
    """
    log = os.open(work / "stderr", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 2)
    os.environ.pop("RUST_BACKTRACE", None)  # of panics that are caught
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    SEEDS.append(made)
    for place, (name, numbers) in enumerate(tasks):
        if not numbers:
            continue
        limit_address_space(ADDRESS_SPACE)  # beyond what earlier targets left
        bench = Bench(ALL[name], made, work / name.replace(" ", "-"), limits)
        for number in numbers:
            state[0], state[1], state[2] = place, number, time.monotonic()
            made_input = bench.make(seed, number)
            state[2] = time.monotonic()  # making a bomb takes seconds
            verdict = bench.judge(made_input)
            if verdict.outcome == MEMORY:  # once more, without what earlier inputs left in this process
                gc.collect()
                limit_address_space(ADDRESS_SPACE)
                verdict = bench.judge(made_input)
            state[3 + place * len(OUTCOMES) + OUTCOMES.index(verdict.outcome)] += 1
            if verdict.outcome in FINDINGS:
                pipe.send(Fault(name, verdict.outcome, verdict.where, number, made_input.kind, verdict.story))
            if _left_behind():
                os._exit(0)
        shutil.rmtree(work / name.replace(" ", "-"))
    state[0], state[2] = len(tasks), float("inf")
    pipe.close()


class _Job:
    """One worker at a time, and what is left for it."""

    def __init__(self, made: Path, names: Sequence[str], numbers: Sequence[range], seed: int, limits: Limits) -> None:
        self.made, self.names, self.numbers, self.seed, self.limits = made, names, list(numbers), seed, limits
        self.state = multiprocessing.get_context("spawn").Array("d", 3 + len(names) * len(OUTCOMES), lock=False)
        self.done = False
        self.work = Path()
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.work = work_folder()
        self.state[0], self.state[1], self.state[2] = -1, -1, time.monotonic()
        self.pipe, end = context.Pipe(duplex=False)
        tasks = list(zip(self.names, self.numbers, strict=True))
        self.process = context.Process(
            target=_worker, args=(self.made, self.work, tasks, self.seed, self.limits, self.state, end), daemon=True
        )
        self.process.start()
        end.close()

    def received(self) -> list[Fault]:
        """Findings since the last call; a worker that died, ended early or hangs is replaced."""
        found: list[Fault] = []
        alive = self.process.is_alive()  # asked before the pipe is emptied: nothing comes after it
        with contextlib.suppress(EOFError):
            while self.pipe.poll():
                found.append(self.pipe.recv())
        if alive and time.monotonic() - self.state[2] > self.limits.patience + 60 * (self.state[0] < 0):
            self.process.kill()
            self.process.join()
            found.append(self._lost(HANG, "did not answer a signal"))
        elif not alive and not self.done:
            if self.process.exitcode:
                found.append(self._lost(CRASH, _signal(self.process.exitcode)))
            elif self.state[0] < len(self.numbers):
                self.close()
                self._go_on()
            else:
                self.done = True
                self.close()
        return found

    def _lost(self, outcome: str, where: str) -> Fault:
        """The finding of an input that took the worker with it; starts another worker behind it."""
        place, number, code = int(self.state[0]), int(self.state[1]), self.process.exitcode
        story = (self.work / "stderr").read_text(errors="replace")[-3000:] if (self.work / "stderr").exists() else ""
        self.close()
        if place < 0:
            raise RuntimeError(f"a worker could not start ({where}): {story}")
        self.state[3 + place * len(OUTCOMES) + OUTCOMES.index(outcome)] += 1
        if outcome == CRASH and code == 1:  # the harness itself failed
            raise RuntimeError(story)
        self._go_on()
        return Fault(self.names[place], outcome, where, number, "?", story)

    def _go_on(self) -> None:
        """Start another worker behind the last input."""
        place, number = int(self.state[0]), int(self.state[1])
        for earlier in range(place):
            self.numbers[earlier] = range(0)
        left = self.numbers[place]
        self.numbers[place] = range(number + left.step, left.stop, left.step)
        self._start()

    def close(self) -> None:
        """End the worker and remove its folder."""
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.work, ignore_errors=True)


def _signal(code: int | None) -> str:
    try:
        return signal.Signals(-(code or 0)).name
    except ValueError:
        return f"exit code {code}"


def shares(names: Sequence[str], inputs: int) -> dict[str, int]:
    """``inputs`` divided among targets by their shares, at least one each."""
    whole = sum(ALL[name].share for name in names)
    return {name: max(1, round(inputs * ALL[name].share / whole)) for name in names}


def run(
    made: Path,
    names: Sequence[str],
    inputs: int,
    seed: int,
    *,
    jobs: int = 1,
    limits: Limits | None = None,
    minutes: float = float("inf"),
    tell: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """Give about ``inputs`` inputs to the targets ``names``, in rounds, so that those stopped after ``minutes`` have
    seen every target; ``tell`` is called with the counts now and then. Ctrl-C ends it with what was tried.
    """
    limits = limits or Limits()
    numbers = shares(names, inputs)
    rounds = -(-inputs // ROUND)
    tasks = [
        (name, numbers[name] * each // rounds, numbers[name] * (each + 1) // rounds)
        for each in range(rounds)
        for name in names
    ]
    of_tasks = [name for name, _, _ in tasks]
    running = [
        _Job(made, of_tasks, [range(start + job, stop, jobs) for _, start, stop in tasks], seed, limits)
        for job in range(jobs)
    ]
    counts = Counts({name: dict.fromkeys(OUTCOMES, 0) for name in names})
    end = time.monotonic() + minutes * 60
    try:
        while not all(job.done for job in running) and time.monotonic() < end:
            wait_for([job.pipe for job in running if not job.done] + [job.process.sentinel for job in running], 0.5)
            for job in running:
                for fault in job.received() if not job.done else []:
                    counts.add(fault)
            counts.tried = {name: dict.fromkeys(OUTCOMES, 0) for name in names}
            for (place, name), (i, outcome) in itertools.product(enumerate(of_tasks), enumerate(OUTCOMES)):
                counts.tried[name][outcome] += sum(int(job.state[3 + place * len(OUTCOMES) + i]) for job in running)
            tell(counts)
    except KeyboardInterrupt:
        pass
    finally:
        for job in running:
            job.close()
    return counts


def repeat(made: Path, name: str, seed: int, number: int, limits: Limits) -> tuple[Input, Verdict]:
    """One input, in this process."""
    SEEDS.append(made)
    work = work_folder()
    try:
        bench = Bench(ALL[name], made, work / "one", limits)
        found = bench.make(seed, number)
        return found, bench.judge(found)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        sys.stderr.flush()
