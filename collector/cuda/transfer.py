"""Copies a run's statistics between the host and a device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import torch

from quambase.collector.statistics import Moments, RunStatistics

STAGED = 1 << 22
"""Bytes that are copied to the host at a time."""

COPYING = 4
"""Threads that copy from pinned memory: one is slower than the bus if the target is newly allocated."""


def copied_to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies of tensors on the host. From a CUDA device they pass through small pinned buffers at the bus's speed;
    pinning all the memory that a run's counts need would take longer than copying them.
    """
    # NumPy asks for huge pages, torch does not.
    found = [torch.from_numpy(np.empty(t.shape, torch.empty(0, dtype=t.dtype).numpy().dtype)) for t in tensors]
    parts = [
        part
        for there, here in zip(tensors, found, strict=True)
        for part in zip(*(torch.split(x.reshape(-1), STAGED // x.element_size()) for x in (there, here)), strict=True)
    ]

    def copy(part: tuple[torch.Tensor, torch.Tensor]) -> None:
        there, here = part
        pinned = torch.empty(there.shape, dtype=there.dtype, pin_memory=there.device.type == "cuda")
        here.copy_(pinned.copy_(there))

    with ThreadPoolExecutor(COPYING) as pool:
        list(pool.map(copy, parts))
    return found


def to_host(statistics: RunStatistics) -> RunStatistics:
    """A copy on the host; waits for the device."""
    arrays = [getattr(statistics.moments, field.name) for field in fields(Moments)]
    counts, top, *moments = copied_to_host(statistics.counts, statistics.top, *arrays)
    return RunStatistics(statistics.index, counts, Moments(*moments), top, tuple(map(to_host, statistics.buckets)))


def to_device(statistics: RunStatistics, device: torch.device) -> RunStatistics:
    """A copy on ``device``."""

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, copy=True)

    moments = Moments(*(there(getattr(statistics.moments, field.name)) for field in fields(Moments)))
    buckets = tuple(to_device(bucket, device) for bucket in statistics.buckets)
    return RunStatistics(statistics.index, there(statistics.counts), moments, there(statistics.top), buckets)
