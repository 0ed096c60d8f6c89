"""Queries that would take hours or all memory: how soon Ctrl-C and the limits end them.

``python tests/schema/heavy_queries.py --db quambase-db`` tries every one both ways and prints a table.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

QUERIES = {
    "count of 10^12": "select count(*) from range(1000000000000)",
    "10^9 rows": "select a from range(1000000000) t(a) order by a desc",
    "a list of 10^8": "select sum(len(range(100000000::bigint)))",
    "three tables multiplied": "select count(*) from range(100000) a, range(100000) b, range(100000) c",
    "sorting 10^9": "select * from range(30000) a, range(30000) b order by random()",
    "recursion": "with recursive t(i) as (select 1 union all select i + 1 from t where i < 1e9) select max(i) from t",
    "long strings": "select repeat('x', 1000000000) || repeat('y', 1000000000)",
    "one list": "select list(a) from range(500000000) t(a)",
    "one string": "select string_agg(a::varchar, ',') from range(200000000) t(a)",
    "distinct products": "select count(distinct a.range * b.range) from range(100000) a, range(100000) b",
    "the counts multiplied": "select sum(a.value * b.value) from counts a, counts b, counts c",
}


class Ended(NamedTuple):
    """How a command ended: seconds from the signal (or the start), peak memory in bytes, exit code, stderr."""

    seconds: float
    peak: int
    code: int
    stderr: str


def ask(db: Path, query: str, *options: str, interrupt_after: float | None = None, most: float = 60) -> Ended:
    """Run `quambase sql`; SIGINT after so many seconds, SIGKILL after ``most``."""
    command = [sys.executable, "-m", "quambase", "sql", "--db", str(db), *options, query]
    begun = time.monotonic()
    signalled, peak = None, 0
    # A job in the background of a shell ignores SIGINT, and so would what it starts.
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        command, **streams, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    ) as process:
        while process.poll() is None:
            time.sleep(0.01)
            try:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                peak = max(peak, pages * os.sysconf("SC_PAGE_SIZE"))
            except (OSError, IndexError):
                pass
            spent = time.monotonic() - begun
            if interrupt_after is not None and signalled is None and spent > interrupt_after:
                signalled = time.monotonic()
                process.send_signal(signal.SIGINT)
            if spent > most:
                process.kill()
        ended = time.monotonic() - (signalled or begun)
        stderr = process.stderr.read() if process.stderr else ""
    return Ended(ended, peak, process.returncode, stderr)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--db", type=Path, required=True)
    db = parser.parse_args().db
    print("| query | Ctrl-C after 4 s: ended in, s | --memory 1GB --timeout 10: ended after, s | peak, GB | how |")
    print("|---|---|---|---|---|")
    for name, query in QUERIES.items():
        stopped = ask(db, query, interrupt_after=4)
        limited = ask(db, query, "--memory", "1GB", "--timeout", "10")
        how = "memory" if "GB of memory" in limited.stderr else "time" if "took longer" in limited.stderr else "?"
        print(
            f"| {name} | {stopped.seconds:.1f} | {limited.seconds:.1f} | {limited.peak / 1e9:.1f} | {how} |", flush=True
        )


if __name__ == "__main__":
    main()
