"""`quambase report` as a command: its time beside `quambase analyze` of the same run, and the page's size.

python benchmarks/bench_report.py [documents]

The bundled models, and models of the 130m shapes (24 layers) with random weights, on the bundled calibration text: the
figures of docs/report.md.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_collect import write_130m
from timing import machine

from quambase.model.inputs.names import bundled_models


def seconds(*words: str | Path) -> float:
    """Of one command in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "quambase", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - start


def main(documents: str = "16") -> None:
    """Print a row for each model; each command has run before, so that its kernels are compiled."""
    print(f"{documents} documents; {machine()}")
    print(f"{'model':32}{'analyze, s':>12}{'report, s':>12}{'ratio':>8}{'page, MB':>10}")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        large = {
            "mamba-130m's shape": write_130m(root / "m1"),
            "mamba2-130m's shape": write_130m(root / "m2", mamba2=True),
        }
        models = {model: model for model in bundled_models()} | {name: str(path) for name, path in large.items()}
        for number, (label, model) in enumerate(models.items()):
            db, scales, page = root / f"db{number}", root / f"{number}.parquet", root / f"{number}.html"
            sensitive = ["--sensitivity", "4"] if label not in large else []
            text = ["--data", "sample:calibration", "--samples", documents]
            seconds("collect", "--model", model, *text, *sensitive, "--db", db)
            analyzed = [seconds("analyze", "--db", db, "--out", scales, "--force") for _ in range(2)][1]
            made = ["report", "--db", db, "--scales", scales, "--out", page]
            reported = [seconds(*made) for _ in range(2)][1]
            size = page.stat().st_size / 1e6
            print(f"{label:32}{analyzed:12.1f}{reported:12.1f}{reported / analyzed:8.2f}{size:10.2f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
