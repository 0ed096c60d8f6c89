"""What a counter made of one site, as NumPy arrays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from quambase.collector.cuda.transfer import to_device, to_host
from quambase.collector.statistics import BlockStatistics, Counter, RunStatistics, SiteLayout
from quambase.schema.sites import SiteKey

KEY = (0, "site")


class Counted(NamedTuple):
    """counts (groups, 65536); moments: arrays (channels,) by name; top: (m, 5) of each group."""

    layout: SiteLayout
    counts: np.ndarray
    moments: SimpleNamespace
    top: list[np.ndarray]


def counted(statistics: RunStatistics, key: SiteKey = KEY) -> Counted:
    """One site's, on the host, copied."""
    site = to_host(statistics).site(key)
    moments = {name: values.numpy() for name, values in site.moments.named().items()}
    return Counted(
        site.layout,
        site.counts.numpy(),
        SimpleNamespace(**moments),
        [site.outliers(g) for g in range(len(site.layout.names))],
    )


def new_statistics(layouts: dict[SiteKey, SiteLayout], most: int, device: torch.device) -> RunStatistics:
    """Of no values, on a device."""
    return to_device(RunStatistics.empty(layouts, most), device)


def count_site(
    counter: Counter,
    x: torch.Tensor,
    lengths: list[int],
    layout: SiteLayout,
    cuts: tuple[int, ...] = (),
) -> tuple[Counted, np.ndarray]:
    """What a counter makes of x (rows, channels) in one block, and the summaries that it wrote.

    x is added in one call, or in several that end at the documents ``cuts``.
    """
    statistics = new_statistics({KEY: layout}, counter.most, x.device)
    block = BlockStatistics(statistics)
    _, summaries = block.summaries(len(lengths))
    summaries[KEY].fill_(-1)
    offsets = np.cumsum([0, *lengths])
    with torch.inference_mode():
        for start, stop in zip((0, *cuts), (*cuts, len(lengths)), strict=True):
            part = offsets[start : stop + 1]
            rows = x[part[0] : part[-1]]
            counter.add(block.sites[KEY], rows, part - part[0], start, summaries[KEY][start:stop])
        counter.flush()
        block.fold(np.arange(len(lengths)))
    return counted(statistics), summaries[KEY].cpu().numpy()
