"""The four commands as a user types them, one after another, on a model of mamba-130m's shape with random weights.

python benchmarks/bench_whole_run.py [samples] [evaluated documents] [auto | cpu | cuda]

Times are of whole processes: starting Python, loading and preparing the weights and compiling kernels included. The
text is the bundled one, or DATA if that variable of the environment names another.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_collect import write_130m
from timing import machine

COMMAND = "import sys; from quambase.cli import main; sys.exit(getattr(main, sys.argv.pop(1))())"


def seconds(command: str, *arguments: str) -> float:
    """Of one command in a process of its own; what it prints goes to stderr."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", COMMAND, command, *arguments], check=True, stdout=sys.stderr)
    return time.perf_counter() - start


def megabytes(folder: Path, *, without: str = "") -> float:
    """Of a run's Parquet files."""
    return sum(path.stat().st_size for path in folder.rglob("*.parquet") if without not in path.parts) / 1e6


def main(samples: str = "64", evaluated: str = "4", device: str = "auto") -> None:
    data = os.environ.get("DATA", "sample:calibration")
    with tempfile.TemporaryDirectory() as name:
        model, db, scales = write_130m(Path(name) / "model"), Path(name) / "db", Path(name) / "scales.parquet"
        at = ("--db", str(db))
        text = ("--data", data, "--samples", samples, "--device", device)
        times = {
            f"collect, {samples} documents": seconds("collect", "--model", str(model), *text, *at),
            "analyze": seconds("analyze", *at, "--out", str(scales)),
            "apply": seconds("apply", "--scales", str(scales), *at),
        }
        documents = ("--data", "sample:evaluation", "--samples", evaluated, "--device", device)
        for labels in (("quamba",), ("quamba", "absmax", "mse", "percentile")):
            chosen = [part for label in labels for part in ("--strategy", label)]
            name_of = f"evaluate, {evaluated} documents, {', '.join(labels)}"
            times[name_of] = seconds("evaluate", "--scales", str(scales), *chosen, *documents, *at)
        sizes = megabytes(db / "runs"), megabytes(db / "runs", without="activations")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\nmamba-130m's shape, random weights, {data}, device {device} ({machine()})")
    for what, value in times.items():
        print(f"{what:60}{value:9.1f} s")
    print(f"{'database, and without activations':60}{sizes[0]:9.1f} MB{sizes[1]:9.1f} MB")
    print(f"{'most memory of one of these processes, on the host':60}{peak:9.2f} GiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
