"""``python tests/fuzz --inputs 1000000 --seed 1 --jobs 2``: damaged files for every reader, and what came of them.

``--target NAME --only NUMBER`` repeats one input and shows what the reader raised; ``--write FILE`` keeps its bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "support")]

from fuzz_judge import FINDINGS, OUTCOMES, limit_address_space  # noqa: E402
from fuzz_runner import ADDRESS_SPACE, Counts, Limits, repeat, run  # noqa: E402
from fuzz_seeds import make_seeds  # noqa: E402
from fuzz_targets import TARGETS  # noqa: E402

COLUMNS = ("target", "tried", *OUTCOMES)


def table(counts: Counts) -> list[dict[str, object]]:
    """A row for each target, and one for all."""
    rows: list[dict[str, object]] = [
        {"target": name, "tried": sum(found.values()), **found} for name, found in counts.tried.items()
    ]
    whole = {key: sum(int(str(row[key])) for row in rows) for key in COLUMNS[1:]}
    return [*rows, {"target": "all", **whole}]


def shown(rows: Sequence[dict[str, object]], style: str) -> str:
    """The rows as text."""
    if style == "json":
        return json.dumps(list(rows), indent=1)
    cells = [[f"{row[key]:,}" if isinstance(row[key], int) else str(row[key]) for key in COLUMNS] for row in rows]
    if style == "markdown":
        rule = "|" + "|".join("---" if i == 0 else "--:" for i in range(len(COLUMNS))) + "|"
        return "\n".join(["| " + " | ".join(COLUMNS) + " |", rule, *("| " + " | ".join(row) + " |" for row in cells)])
    names = [name.split()[0] for name in COLUMNS]
    widths = [max(len(row[i]) for row in [names, *cells]) for i in range(len(COLUMNS))]
    lines = [
        " ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [names, *cells]
    ]
    return "\n".join(lines)


class Shown:
    """One line of progress on stderr, every two seconds."""

    def __init__(self, inputs: int) -> None:
        self.inputs, self.begun, self.last = inputs, time.monotonic(), 0.0

    def tell(self, counts: Counts) -> None:
        now = time.monotonic()
        if now - self.last < 2:
            return
        self.last = now
        rate = counts.total / (now - self.begun)
        left = (self.inputs - counts.total) / rate if rate else 0
        found = sum(counts.times.values())
        end = "\r" if sys.stderr.isatty() else "\n"
        print(
            f"{counts.total:,} of {self.inputs:,} inputs, {rate:,.0f}/s, {left:,.0f} s left, {found} findings",
            end=end,
            file=sys.stderr,
        )


def faults(counts: Counts, seed: int, made: Path, story: bool) -> list[str]:
    """Each fault with the command that repeats its first input."""
    lines = []
    for key, examples in sorted(counts.faults.items()):
        first = examples[0]
        lines.append(f"{key[1]}, {counts.times[key]} times, target {key[0]} ({first.kind}): {key[2]}")
        lines.append(f"  python tests/fuzz --seeds {made} --seed {seed} --target '{key[0]}' --only {first.number}")
        if story:
            lines += ["    " + line for line in first.story.splitlines()[-12:]]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this reader; once for each")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long, with what was tried")
    parser.add_argument("--seconds", type=float, default=10.0, help="a longer reading counts as a hang")
    parser.add_argument("--seeds", type=Path, help="folder of the real files; made anew if it is not there")
    parser.add_argument("--only", type=int, help="repeat this input of the one --target, with its traceback")
    parser.add_argument("--write", type=Path, help="with --only: keep the input")
    parser.add_argument("--story", action="store_true", help="show the end of each fault's traceback")
    parser.add_argument("--format", choices=("table", "markdown", "json"), default="table")
    asked = parser.parse_args()
    made = asked.seeds or Path(tempfile.mkdtemp(prefix="quambase-fuzz-")) / "seeds"
    if not made.exists():
        print(f"making the real files in {made}", file=sys.stderr)
        make_seeds(made)
    names, limits = asked.target or list(TARGETS), Limits(asked.seconds)
    if asked.only is not None:
        limit_address_space(ADDRESS_SPACE)
        found, verdict = repeat(made, names[0], asked.seed, asked.only, limits)
        if asked.write:
            asked.write.write_bytes(found.data)
        print(f"{found.seed.file.name}, changed as {found.kind}, {len(found.data):,} bytes: {verdict.outcome}")
        print(verdict.story or verdict.where)
        return int(verdict.outcome in FINDINGS)
    options = {"jobs": asked.jobs, "limits": limits, "minutes": asked.minutes, "tell": Shown(asked.inputs).tell}
    counts = run(made, names, asked.inputs, asked.seed, **options)
    print(shown(table(counts), asked.format))
    print("\n".join(faults(counts, asked.seed, made, asked.story)), file=sys.stderr)
    return int(bool(counts.times))


if __name__ == "__main__":
    sys.exit(main())
