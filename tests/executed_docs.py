"""The examples of README, docs/ and --help: found, run as a reader would, and compared with what is shown.

A block ```console holds commands after ``$ `` and, under each, what it prints. A block ```python is run as it stands. A
block without a language is shown only: what it needs is not here (a GPU, the network, upstream's package).

``python tests/executed_docs.py`` writes what the commands print now into the files.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

# In the order in which they are run, in one folder: later pages use what the README's session made.
PAGES = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("cookbook", "pictures", "database", "quamba-checkout", "python", "questions", "mamba2")
    ),
)

RELATIVE, ABSOLUTE = 0.1, 0.05
"""Tolerance of a number that is shown. Another kind of CPU sums float32 in another order: single codes differ, which
moves KL by up to 6 % and differences of perplexity by some hundredths."""

NOISE = 0.2
"""Tolerance of a difference of perplexity in percent that the line itself calls indistinguishable. Two kinds of CPU
gave -0.097 and -0.017 for the same command, both with the verdict "same", which has to be equal."""

_SAME = re.compile(r"[-+]?\d[\d.,]*(?= %(?: same|, not\b))")

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?")

_MACHINE = re.compile(
    r"\b[0-9a-f]{12,64}\b"  # ids: they hold torch's version
    r"|\d[\d.,:]*(?= ?(?:s|ms|MB|GB|min|tokens/s)\b)"  # times and sizes
    r"|\d{4}-\d\d-\d\d[ T][\d:]+"
    r"|(?<=about )[\d,]+(?= would be needed)"  # goes with 1 over the square of such a difference
)

_PROGRESS = re.compile(
    r"^(?:collect|sensitivity|evaluate|analyze|converge|groups|verify|merge|generate|query|compiling)\b.*: |.* left$"
)


@dataclass
class Example:
    """A command or a Python block of a page: its text, what is shown under it, and where (line numbers from 0)."""

    page: str
    line: int
    python: bool
    text: str
    shown: list[str]

    def __str__(self) -> str:
        return f"{self.page}:{self.line + 1}"


def examples(page: str) -> Iterator[Example]:
    """The examples of one page, in order."""
    language: str | None = None
    current: Example | None = None
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines()):
        if line.startswith("```"):
            if current is not None:
                yield current
            current = None
            language = None if language is not None else line[3:].strip()
            if language == "python":
                current = Example(page, number + 1, True, "", [])
        elif language == "python" and current is not None:
            current.text += line + "\n"
        elif language == "console" and line.startswith("$ "):
            if current is not None:
                yield current
            current = Example(page, number, False, line[2:], [])
        elif language == "console" and current is not None:
            current.shown.append(line)


def run(example: Example, folder: Path) -> tuple[int, list[str]]:
    """Exit code and what a reader sees, without progress and trailing space."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "100",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, "-c", example.text] if example.python else ["bash", "-c", example.text]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    return done.returncode, readable(done.stdout.decode())


def readable(output: str) -> list[str]:
    """Lines as a reader sees them once the command has ended."""
    lines = [line.split("\r")[-1].rstrip() for line in output.split("\n")]
    kept = [line for line in lines if not _PROGRESS.match(line)]
    while kept and not kept[-1]:
        kept.pop()
    return kept


def difference(shown: list[str], found: list[str]) -> str | None:
    """What of ``shown`` is not in ``found``, line by line; None where all is. A line ``...`` stands for any lines."""
    place = 0
    free = False
    for line in shown:
        if line.strip() == "...":
            free = True
            continue
        while place < len(found) and free and not same(line, found[place]):
            place += 1
        if place >= len(found):
            return f"shown, but not printed: {line!r}"
        if not same(line, found[place]):
            return f"shown:   {line!r}\nprinted: {found[place]!r}"
        place, free = place + 1, False
    if not free and place < len(found):
        return f"printed, but not shown: {found[place]!r}"
    return None


def same(shown: str, found: str) -> bool:
    """Equal words, and numbers within the tolerance; ids, times and sizes are the machine's own."""
    a, b = (_MACHINE.sub("#", line) for line in (shown, found))
    small = [[_value(number) for number in _SAME.findall(line)] for line in (a, b)]
    if len(small[0]) != len(small[1]) or any(abs(x - y) > NOISE for x, y in zip(*small, strict=True)):
        return False
    a, b = (_SAME.sub("#", line) for line in (a, b))
    words = [re.sub(r"[\s─-]+", " ", _NUMBER.sub("0", line)).strip() for line in (a, b)]
    if words[0] != words[1]:
        return False
    pairs = zip(*(map(_value, _NUMBER.findall(line)) for line in (a, b)), strict=True)
    return all(abs(x - y) <= ABSOLUTE + RELATIVE * abs(x) for x, y in pairs)


def _value(text: str) -> float:
    return float(text.replace(",", "").rstrip("."))


def update(page: str, folder: Path) -> None:
    """Write what the commands of ``page`` print now under them."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    for example in reversed([(e, *run(e, folder)) for e in examples(page)]):
        found, code, output = example
        print(f"{found}: exit {code}", flush=True)
        # What is shown in part stays as it is while it is right.
        if not found.python and ("..." not in found.shown or difference(found.shown, output)):
            lines[found.line + 1 : found.line + 1 + len(found.shown)] = output
    (ROOT / page).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for name in PAGES:
            if (ROOT / name).exists():
                update(name, Path(temporary))
