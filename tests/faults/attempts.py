"""Disturbs a command at each of its calls, and judges what came of it.

A disturbed command may end in exit code 1 and one line, or well where the failing call did not matter. It never leaves
other bytes under the name of something complete, and the same command run again, undisturbed, ends in the bytes of a
run that was never disturbed, with nothing beside them.
"""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from faults.commands import Command, make_inputs
from faults.disturbed import KILL, KINDS, Case, Ended, Fault

COMPLETE = {
    "runs/*": "run.json",
    "runs/*/shards/*": "shard.json",
    "results/*": "evaluation.json",
    "models/*": "config.json",
}
"""Folders of a database, and the file that says that one of them is complete."""

Tree = Mapping[str, bytes | None]
"""The files below a folder, by their paths, and their bytes; None for a folder."""


def tree(folder: Path) -> Tree:
    """What lies below ``folder``."""
    return {
        path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def incomplete(found: Tree) -> list[str]:
    """Folders of the database that do not say that they are complete, each with a slash at its end."""
    places = {path for path in found if any(Path(path).match(f"quambase-db/{pattern}") for pattern in COMPLETE)}
    complete = {
        path
        for path in places
        for name in COMPLETE.values()
        if b'"unfinished": true' not in (found.get(f"{path}/{name}") or b'"unfinished": true')
    }
    return [f"{path}/" for path in places - complete]


def wrong_files(found: Tree, before: Tree, expected: Tree) -> list[str]:
    """Files with a right name and other bytes than they should have, now or before the command."""
    unfinished = tuple(incomplete(found))
    return [
        path
        for path in sorted(found.keys() & expected.keys())
        if not path.startswith(unfinished)
        and found[path] != expected[path]
        and (path not in before or found[path] != before[path])
    ]


@dataclass
class Outcome:
    """What came of the attempts at one command with one kind of fault."""

    command: str
    kind: str
    calls: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, verdict: str, what: str) -> None:
        """Count a verdict; what is no good one is described."""
        self.counts[verdict] += 1
        if verdict not in ("line", "harmless", "killed"):
            self.faults.append(f"{self.command}, {self.kind}: {verdict}: {what}")


class Folders:
    """The folders that commands begin in, each made once.

    around  a new folder to work in
    """

    def __init__(self, around: Path) -> None:
        self.case, self._around = Case(around), around
        self._made: dict[tuple[tuple[str, ...], ...], Path] = {}

    def after(self, commands: tuple[tuple[str, ...], ...]) -> Path:
        """A folder with the inputs, and with what these commands make of them."""
        if commands not in self._made:
            target = self._around / f"start-{len(self._made)}"
            if commands:
                self.case.begin(self.after(commands[:-1]))
                self.case.run_here(commands[-1])
                target = self._around / f"start-{len(self._made)}"
                shutil.copytree(self.case.folder, target, symlinks=True)
            else:
                target.mkdir()
                make_inputs(target)
            self._made[commands] = target
        return self._made[commands]


class Disturbed:
    """A command, the folder it begins in and the one it ends in when nothing disturbs it."""

    def __init__(self, name: str, command: Command, folders: Folders) -> None:
        self.name, self.words, self.case = name, command.words, folders.case
        self.start = folders.after(command.before)
        self.case.begin(self.start)
        self.before = tree(self.case.folder)
        self.case.run_here(self.words)
        self.case.begin(self.start)
        ended = self.case.run(self.words)
        if ended.code:
            raise RuntimeError(f"{' '.join(self.words)} fails in a child:\n{ended.stderr}")
        self.calls, self.expected = ended.calls, tree(self.case.folder)

    def attempt(self, fault: Fault) -> tuple[str, str]:
        """Disturb the command once; returns a verdict and what it is about."""
        self.case.begin(self.start)
        ended = self.case.run(self.words, fault)
        verdict = judged(ended, fault)
        found = tree(self.case.folder)
        what = f"call {fault.number} ({ended.failed or 'none'}): {ended.stderr.strip()[-1500:]}"
        if wrong := wrong_files(found, self.before, self.expected):
            return "wrong bytes", f"{what}; {', '.join(wrong)}"
        needless = {"quambase-db/models/last.txt"}  # `apply` says so, and names its folder in the next command
        if ended.code == 0 and (missing := self.expected.keys() - found.keys() - needless):
            return "wrong bytes", f"{what}; exit code 0, but there is no {', '.join(missing)}"
        again = self.case.run(self.words)
        if again.code:
            return "cannot go on", f"{what}; then: {again.stderr.strip()[-1500:]}"
        after = tree(self.case.folder)
        if strays := after.keys() - self.expected.keys():
            return "strays", f"{what}; {', '.join(sorted(strays))}"
        if other := [path for path in self.expected if after.get(path, b"-") != self.expected[path]]:
            return "wrong bytes", f"{what}; then {', '.join(other)}"
        return verdict, what

    def every(self, step: int) -> Iterator[Outcome]:
        """Disturb every ``step``-th call, in each way."""
        for kind in KINDS:
            yield self._tried(kind, range(1, len(self.calls) + 1, step))

    def sample(self, attempts: int) -> Iterator[Outcome]:
        """Disturb so many calls, spread over all, each in one way; every call once if that many are not made."""
        attempts = min(attempts, len(self.calls))
        numbers = [1 + place * len(self.calls) // attempts for place in range(attempts)]
        for place, kind in enumerate(KINDS):
            yield self._tried(kind, numbers[place :: len(KINDS)])

    def _tried(self, kind: str, numbers: Iterable[int]) -> Outcome:
        outcome = Outcome(self.name, kind, len(self.calls))
        for number in numbers:
            outcome.add(*self.attempt(Fault(number, *KINDS[kind])))
        return outcome


def judged(ended: Ended, fault: Fault) -> str:
    """What the way a command ended is called."""
    if "Traceback" in ended.stderr or ended.code == 70:
        return "traceback"
    if fault.how == KILL and ended.code == -9:
        return "killed"
    if ended.code == 0:
        return "harmless"
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    if ended.code != 1 or len(lines) != 1:
        return "no line"
    if fault.error == errno.ENOSPC and "finished parts are kept" not in lines[0]:
        return "no remedy"
    return "line"


def table(outcomes: list[Outcome]) -> str:
    """The outcomes, a line each."""
    good, bad = (
        ("line", "harmless", "killed"),
        ("traceback", "no line", "no remedy", "wrong bytes", "strays", "cannot go on"),
    )
    columns = ("calls", "tried", *good, *bad)
    lines = [f"{'command':22}{'fault':20}" + "".join(f"{name:>{len(name) + 2}}" for name in columns)]
    for each in outcomes:
        numbers = {"calls": each.calls, "tried": each.counts.total(), **each.counts}
        cells = (f"{numbers.get(name, 0) or '-':>{len(name) + 2}}" for name in columns)
        lines.append(f"{each.command:22}{each.kind:20}" + "".join(cells))
    return "\n".join(lines)
