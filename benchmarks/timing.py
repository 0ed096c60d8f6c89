"""What the benchmarks share: alternating timed runs of two sides, and a table as the last thing printed."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def machine() -> str:
    """One line on where this ran."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - not a file of ours
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def alternate(sides: Mapping[str, Callable[[], object]], repeats: int = 3) -> dict[str, float]:
    """Median seconds of each side; sides take turns so that a slow moment of the machine hits them all.

    Every side runs once before, for compilation and caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(title: str, unit: str, rows: Mapping[str, float], base: str) -> None:
    """Print the figures with their ratio to ``base``."""
    print(f"\n{title} ({machine()})")
    width = max(len(name) for name in rows)
    print(f"{'':{width}}  {unit:>14}  ratio")
    for name, value in rows.items():
        print(f"{name:{width}}  {value:14,.1f}  {value / rows[base]:5.2f}")
