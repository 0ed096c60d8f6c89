"""`collect` by a process per GPU under torchrun, and in three shards, beside the run in one piece: times and bytes.

python benchmarks/bench_ranks.py [samples] [processes]

A process per GPU unless said otherwise; more than there are share them. Times are of whole commands, starting Python
and preparing the weights included.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from timing import machine

MODELS = ("mamba-5m", "mamba2-8m")
SHARDS = 3


def python(call: str) -> list[str]:
    """A command of the package as a process, wherever its entry points lie."""
    return [sys.executable, "-c", f"from quambase.cli.main import {call}; {call}()"]


def seconds(*commands: list[str]) -> float:
    """Of commands that run at the same time; what they print goes to stderr."""
    start = time.perf_counter()
    started = [subprocess.Popen(command, stdout=sys.stderr) for command in commands]
    for process in started:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)
    return time.perf_counter() - start


def bytes_of(db: Path) -> dict[str, str]:
    """SHA-256 of every table of the only run."""
    (run,) = (db / "runs").iterdir()
    tables = sorted(run.rglob("*.parquet"))
    return {f"{run.name}/{path.relative_to(run)}": hashlib.sha256(path.read_bytes()).hexdigest() for path in tables}


def main(samples: str = "128", processes: str = "") -> None:
    """Print one table, a row per way of collecting."""
    count = processes or str(torch.cuda.device_count())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node", count]
    lines: list[str] = []
    for model in MODELS:
        arguments = ["--model", model, "--data", "sample:calibration", "--samples", samples, "--device", "cuda"]
        with tempfile.TemporaryDirectory() as name:
            alone, ranks, apart = (Path(name) / part for part in ("alone", "ranks", "apart"))
            dbs = [str(apart / str(shard)) for shard in range(SHARDS)]
            collect = python("collect") + arguments
            took = {
                "one process": (alone, seconds([*collect, "--db", str(alone)])),
                f"{count} under torchrun": (ranks, seconds([*launcher, *collect, "--db", str(ranks)])),
            }
            sharded = seconds(
                *([*collect, "--db", db, "--shard", f"{shard}/{SHARDS}"] for shard, db in enumerate(dbs))
            ) + seconds([*python("quambase"), "merge", "--db", dbs[0], *dbs[1:]])
            took[f"{SHARDS} shards, merged"] = Path(dbs[0]), sharded
            wanted = bytes_of(alone)
            for what, (db, time_taken) in took.items():
                same = "the same bytes" if bytes_of(db) == wanted else "OTHER BYTES"
                lines.append(f"{model:12}{what:20}{time_taken:8.1f} s   {len(wanted)} tables, {same}")
    cards = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    print(f"\ncollect of {samples} documents of the bundled text ({machine()}, {cards})")
    print("\n".join(lines))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("needs a CUDA device")
    else:
        main(*sys.argv[1:])
