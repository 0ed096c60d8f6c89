"""Millions of values one core counts per second: the collector's loop beside np.bincount, torch.bincount, absmax."""

from __future__ import annotations

import numba
import numpy as np
import torch
from timing import alternate, table

from quambase.collector.host.counter import HostCounter
from quambase.collector.statistics import ENCODINGS, BlockStatistics, RunStatistics, SiteLayout

DOCUMENTS, LENGTH, CHANNELS = 16, 512, 1536


def main() -> None:
    """Print one table; all sides on one thread, on the same SiLU-shaped values."""
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.silu(torch.randn(DOCUMENTS * LENGTH, CHANNELS, generator=generator) * 2)
    half = x.half()
    patterns = half.view(torch.uint16).numpy().ravel()
    signed = half.view(torch.int16)
    key = (0, "site")
    block = BlockStatistics(RunStatistics.empty({key: SiteLayout(("all",), (0, CHANNELS))}, 64))
    offsets = np.arange(DOCUMENTS + 1, dtype=np.int64) * LENGTH
    site, summaries = block.sites[key], block.summaries(DOCUMENTS)[1][key]
    counter = HostCounter(ENCODINGS["float16"], 64, 1)

    @numba.njit
    def loop(values: np.ndarray, counts: np.ndarray) -> None:
        for value in values:
            counts[value] += 1

    bins = np.zeros(65536, np.uint32)
    sides = {
        "np.bincount on uint16": lambda: np.bincount(patterns, minlength=65536),
        "torch.bincount": lambda: torch.bincount(signed.flatten().to(torch.int32) + 32768, minlength=65536),
        "x.abs().amax() (absmax observer)": lambda: x.abs().amax(),
        "bare counting loop": lambda: loop(patterns, bins),
        "collector on 16-bit values: counts, outliers, document quantiles": lambda: counter.count(
            site, half, offsets, 0, summaries
        ),
        "collector on float32: the same and channel moments": lambda: counter.add(site, x, offsets, 0, summaries),
    }
    seconds = alternate(sides)
    rows = {name: x.numel() / s / 1e6 for name, s in seconds.items()}
    table(f"Counting {x.numel() / 1e6:.1f} M float32 values on one thread", "Mvalues/s", rows, "np.bincount on uint16")


if __name__ == "__main__":
    main()
