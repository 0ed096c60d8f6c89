"""Billions of values a CUDA device counts per second: the kernels beside absmax, bincount, histc and a plain copy."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timing import machine

from quambase.collector.cuda.counter import CudaCounter
from quambase.collector.cuda.transfer import to_device
from quambase.collector.statistics import ENCODINGS, SUMMARY_COLUMNS, BlockStatistics, RunStatistics, SiteLayout

DOCUMENTS, LENGTH, CHANNELS = 128, 1024, 1536
MOST = 64
IN_A_ROW = 24
"""Calls between two events: until the first is queued, for up to 0.4 ms, the device has nothing to do."""

SLOW = ("bincount", "histc")
"""Sides that are called once between two events: they take a hundred times as long."""


class Only:
    """Launches some of the kernels only."""

    def __init__(self, counter: CudaCounter, kind: int, names: tuple[str, ...]) -> None:
        self._launch, self._names = counter._kernels(kind).launch, names

    def launch(self, name: str, *arguments: Any) -> None:
        """As `quambase.model.cuda.compiler.Kernels.launch`, of the others nothing."""
        if name in self._names:
            self._launch(name, *arguments)


def seconds(
    sides: dict[str, Callable[[], object]], flushes: dict[str, Callable[[], None]], repeats: int = 5
) -> dict[str, float]:
    """Median seconds on the device of each side, in turns, after a round of each; several in a row, then its flush."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, repeats):
        for name, side in sides.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            in_a_row = 1 if name in SLOW else IN_A_ROW
            for _ in range(in_a_row):
                side()
            flushes.get(name, lambda: None)()
            stop.record()
            stop.synchronize()
            if turn >= 0:
                found[name].append(start.elapsed_time(stop) / 1e3 / in_a_row)
    return {name: statistics.median(values) for name, values in found.items()}


def data(kind: str, rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(rows, CHANNELS) of some distribution."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, CHANNELS, device=device, generator=generator)
    if kind == "SiLU":
        x = torch.nn.functional.silu(x * 2)
    elif kind == "10 % zeros":
        x = torch.where(torch.rand(x.shape, device=device, generator=generator) < 0.1, 0.0, x)
    elif kind == "50 % zeros":
        x = torch.where(torch.rand(x.shape, device=device, generator=generator) < 0.5, 0.0, x)
    elif kind == "all zeros":
        x = torch.zeros_like(x)
    elif kind == "one value":
        x = torch.full_like(x, -1.5)
    return x.to(dtype)


def measured(encoding: str, kind: int, name: str, device: torch.device) -> dict[str, float]:
    """Gvalues/s of every side on one distribution."""
    layout = SiteLayout(("all",), (0, CHANNELS))
    statistics = to_device(RunStatistics.empty({(0, "site"): layout}, MOST), device)
    site = BlockStatistics(statistics).sites[0, "site"]
    offsets = np.arange(DOCUMENTS + 1, dtype=np.int64) * LENGTH
    summaries = torch.empty(DOCUMENTS, 2, len(SUMMARY_COLUMNS), device=device)
    whole, count, table = (CudaCounter(ENCODINGS[encoding], MOST, device) for _ in range(3))
    count._launchers[kind] = Only(count, kind, ("count_items",))
    table._launchers[kind] = Only(table, kind, ("count_items", "reduce_counts"))
    x = data(name, DOCUMENTS * LENGTH, ENCODINGS[encoding].torch_dtype, device)
    copy = torch.empty_like(x)

    def add(counter: CudaCounter) -> None:
        site.calls = 0
        counter.add(site, x, offsets, 0, summaries)

    took = seconds(
        {
            "counting": lambda: add(count),
            "+ table": lambda: add(table),
            "everything": lambda: add(whole),
            "amax": lambda: x.abs().amax(),
            "aminmax": lambda: torch.aminmax(x),
            "copy": lambda: copy.copy_(x),
            "bincount": lambda: torch.bincount(x.flatten().view(torch.int16).to(torch.int32) + 32768, minlength=65536),
            "histc": lambda: torch.histc(x.float(), 2048),
        },
        {"counting": count.flush, "+ table": table.flush, "everything": whole.flush},
    )
    return {side: x.numel() / s / 1e9 for side, s in took.items()}


def main() -> None:
    """Print one table; every side of a row ran in turns on the same values."""
    device = torch.device("cuda", torch.cuda.current_device())
    lines: list[str] = []
    for encoding, kind in (("float16", 0), ("bfloat16", 1)):
        for name in ("normal", "SiLU", "10 % zeros", "50 % zeros", "all zeros", "one value"):
            rates = measured(encoding, kind, name, device)
            if not lines:
                lines.append(f"{'':21}" + "".join(f"{side:>11}" for side in rates))
            lines.append(f"{encoding:9} {name:11}" + "".join(f"{rate:11,.1f}" for rate in rates.values()))
    where = f"{machine()}, {torch.cuda.get_device_name()}"
    print(f"\nGvalues/s, {DOCUMENTS} documents of {LENGTH} x {CHANNELS} values ({where})")
    print("counting: the counting kernel; + table: and the run's 64-bit table; everything: and per-document quantiles,")
    print("channel moments, outliers")
    print("\n".join(lines))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("needs a CUDA device")
    else:
        main()
