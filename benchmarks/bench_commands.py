"""Seconds and peak memory of whole commands on runs with sensitivities of the two bundled models.

Each command is a process of its own, three times; printed is the least of each. To compare two commits, run it in an
environment of each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = {"mamba-5m": 128, "mamba2-8m": 24}
COMMANDS = ("analyze", "compare --layer 3 --site {site}", "converge", "report --force", "stats")
SITES = {"mamba-5m": "x_proj:input", "mamba2-8m": "x_conv_out:input"}
TIMES = 3


def measured(arguments: list[str], folder: Path) -> tuple[float, float]:
    """Seconds, and gigabytes of memory at most, of one quambase command that runs in ``folder``."""
    command = [str(Path(sys.executable).with_name("quambase")), *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed; run it in {folder}")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    """Print a line for each model and command."""
    for model, samples in RUNS.items():
        folder = Path(tempfile.mkdtemp())
        seconds, memory = measured(["collect", "--model", model, "--samples", str(samples), "--sensitivity"], folder)
        print(f"{model}: collect of {samples} samples with sensitivities {seconds:.1f} s, {memory:.2f} GB")
        for command in COMMANDS:
            arguments = command.format(site=SITES[model]).split()
            found = [measured(arguments, folder) for _ in range(TIMES)]
            least = min(seconds for seconds, _ in found), min(memory for _, memory in found)
            print(f"{model}: {command.split()[0]} {least[0]:.2f} s, {least[1]:.2f} GB", flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
