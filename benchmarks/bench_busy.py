"""Commands with threads that spin for long, as GNU's OpenMP does by default, and briefly, as ours do: alone and beside
programs that keep a core busy each.

python benchmarks/bench_busy.py [--others 0 --others 1 --others 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPINS = {"long (default of OpenMP)": "300000", "brief (ours)": "1000"}
ROUNDS = 3
COMMANDS = {
    "collect": ["collect", "--model", "mamba-5m", "--samples", "64"],
    "generate": ["generate", "--model", "mamba2-8m", "--prompt", "The old man", "--tokens", "300"],
}


def seconds(words: list[str], spins: str, folder: Path) -> float:
    """The time of a whole command."""
    variables = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    start = time.perf_counter()
    command = [sys.executable, "-m", "quambase", *words]
    environment = variables | {"GOMP_SPINCOUNT": spins}
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Print a row for each command and number of other programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=int, action="append", help="busy programs beside [0, 1 and 2]")
    others = parser.parse_args().others or [0, 1, 2]
    print(f"medians of {ROUNDS} turns, {os.cpu_count()} cores\n")
    print("| command | others | " + " | ".join(f"{name}, s" for name in SPINS) + " | ratio |\n|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in others:
            for kind in COMMANDS:
                found: dict[str, list[float]] = {name: [] for name in SPINS}
                busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
                try:
                    for turn in range(ROUNDS):
                        for name, spins in SPINS.items():
                            db = f"{count}-{turn}-{spins}"
                            words = [*COMMANDS[kind], *(["--db", db] if kind == "collect" else [])]
                            found[name].append(seconds(words, spins, folder))
                finally:
                    for process in busy:
                        process.kill()
                long, brief = (statistics.median(values) for values in found.values())
                print(f"| `{kind}` | {count} | {long:.3g} | {brief:.3g} | {long / brief:.2f} |", flush=True)


if __name__ == "__main__":
    main()
