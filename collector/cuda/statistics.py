"""A run's statistics on a device, as `quambase.collector.statistics` has them on the host, and how the two convert.

Counts are integers and are added to the run's at once. Moments and outliers are formed per block and folded into the
run's in block order, by the same additions as on the host, so a resumed run ends in the same bytes. Everything of one
kind lies in one tensor, so that folding a block is a few operations, whatever the number of sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quambase.collector.host_kernels import PATTERNS
from quambase.collector.statistics import (
    EXTREMA,
    INTEGERS,
    SUMMARY_COLUMNS,
    SUMS,
    TOP_FIELDS,
    Moments,
    SiteLayout,
    SiteStatistics,
)
from quambase.schema.sites import SiteKey


@dataclass
class DeviceMoments:
    """integers (3, channels) int64: count, nonfinite, overflow; extrema (2, channels) float32: lowest, highest;
    sums (3, channels) float64: total, squares, mean_abs_max.
    """

    integers: torch.Tensor
    extrema: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> DeviceMoments:
        """Of no values at all."""
        moments = cls(
            torch.zeros(3, channels, dtype=torch.int64, device=device),
            torch.empty(2, channels, device=device),
            torch.zeros(3, channels, dtype=torch.float64, device=device),
        )
        moments.clear()
        return moments

    def clear(self) -> None:
        """Forget everything."""
        self.integers.zero_()
        self.extrema[0].fill_(torch.inf)
        self.extrema[1].fill_(-torch.inf)
        self.sums.zero_()

    def part(self, start: int, stop: int) -> DeviceMoments:
        """A view of some channels."""
        return DeviceMoments(*(getattr(self, field.name)[:, start:stop] for field in fields(self)))

    def fold(self, later: DeviceMoments) -> None:
        """As `Moments.fold`."""
        self.integers += later.integers
        torch.minimum(self.extrema[0], later.extrema[0], out=self.extrema[0])
        torch.maximum(self.extrema[1], later.extrema[1], out=self.extrema[1])
        self.sums[:2] += later.sums[:2]
        torch.maximum(self.sums[2], later.sums[2], out=self.sums[2])

    def named(self) -> dict[str, torch.Tensor]:
        """Every quantity by its name in `Moments`, as views."""
        rows = ((INTEGERS, self.integers), (EXTREMA, self.extrema), (SUMS, self.sums))
        return {name: values[i] for names, values in rows for i, name in enumerate(names)}


@dataclass
class DeviceSite:
    """One site's views: what `SiteStatistics` is to a `Counter` on the host.

    counts (groups, PATTERNS) int64 of the run; moments and top (groups, most, 5: TOP_FIELDS) int64 of the block, the
    latter sorted, magnitude -1 where there are fewer. ``calls`` counts this block's.
    """

    layout: SiteLayout
    counts: torch.Tensor
    moments: DeviceMoments
    top: torch.Tensor
    calls: int = 0

    @cached_property
    def addresses(self) -> tuple[int, int, tuple[int, ...]]:
        """Placement counts, outliers and moments lie, these in the order of `DeviceMoments.named`."""
        moments = tuple(values.data_ptr() for values in self.moments.named().values())
        return self.counts.data_ptr(), self.top.data_ptr(), moments


STAGED = 1 << 22
"""Bytes that are copied to the host at a time."""

COPYING = 4
"""Threads that copy them on: to memory that a process has not had yet, one is slower than the bus."""


def _copies(*tensors: torch.Tensor) -> list[npt.NDArray[Any]]:
    """Of the same shapes and types, on the host. From a CUDA device by way of pinned memory, into which it writes at
    the bus's speed; to get as much of that as a run's counts are takes longer than to copy them.
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
    return [here.numpy() for here in found]


def merged_top(earlier: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """The largest of two sorted lists (groups, m, 5) of which one is of later documents, as many as ``earlier`` has.

    Ties go to the earlier, as `quambase.collector.statistics.largest` orders them.
    """
    both = torch.cat([earlier, later], dim=1)
    order = torch.argsort(both[..., 0], dim=1, descending=True, stable=True)[:, : earlier.shape[1]]
    return both.gather(1, order[..., None].expand(-1, -1, both.shape[2]))


class DeviceStatistics:
    """The statistics of every site of a run on one device. ``most``: outliers kept per group; ``block_sums``: the last
    folded block's totals and squares, (2, channels) float64, for `sums_of`; ``shared``: the sites that are another's.
    """

    def __init__(self, layouts: Mapping[SiteKey, SiteLayout], most: int, device: torch.device) -> None:
        # Equal layouts become one object, so that comparing them costs nothing.
        distinct: dict[SiteLayout, SiteLayout] = {}
        self.layouts = {key: distinct.setdefault(layout, layout) for key, layout in layouts.items()}
        self.most, self.device = most, device
        keys = list(self.layouts)
        groups = np.cumsum([0, *(len(layout.names) for layout in self.layouts.values())]).tolist()
        channels = np.cumsum([0, *(layout.moments for layout in self.layouts.values())]).tolist()
        self._groups = dict(zip(keys, pairwise(groups), strict=True))
        self._channels = dict(zip(keys, pairwise(channels), strict=True))
        self._counts = torch.zeros(groups[-1], PATTERNS, dtype=torch.int64, device=device)
        self._moments = DeviceMoments.empty(channels[-1], device)
        self._block_moments = DeviceMoments.empty(channels[-1], device)
        self._top = torch.full((groups[-1], most, len(TOP_FIELDS)), -1, dtype=torch.int64, device=device)
        self._block_top = self._top.clone()
        self.block_sums = self._block_moments.sums[:2]
        self.shared: dict[SiteKey, SiteKey] = {}
        self._summaries: dict[int, tuple[torch.Tensor, dict[SiteKey, torch.Tensor]]] = {}
        self.sites = {
            key: DeviceSite(
                layout,
                self._counts[slice(*self._groups[key])],
                self._block_moments.part(*self._channels[key]),
                self._block_top[slice(*self._groups[key])],
            )
            for key, layout in self.layouts.items()
        }

    def summaries(self, documents: int) -> tuple[torch.Tensor, dict[SiteKey, torch.Tensor]]:
        """Room for a block's summaries, which the next block of as many documents has again: flat, and each site's part
        (documents, groups + 1, 1 + q: SUMMARY_COLUMNS).
        """
        if documents not in self._summaries:
            shapes = [(documents, len(layout.names) + 1, len(SUMMARY_COLUMNS)) for layout in self.layouts.values()]
            sizes = [a * b * c for a, b, c in shapes]
            flat = torch.empty(sum(sizes), device=self.device)
            parts = [part.view(shape) for part, shape in zip(torch.split(flat, sizes), shapes, strict=True)]
            self._summaries[documents] = flat, dict(zip(self.layouts, parts, strict=True))
        return self._summaries[documents]

    def share(self, key: SiteKey, source: SiteKey) -> None:
        """Make ``key`` the same as ``source``, of an equal layout: every block brings both of them one tensor."""
        if key not in self.shared:
            self.shared[key] = source
            self.sites[key] = self.sites[source]
            self._groups[key], self._channels[key] = self._groups[source], self._channels[source]

    def fold(self, numbers: npt.NDArray[np.int64]) -> None:
        """Close the block, whose documents are ``numbers`` in the file: add its statistics to the run's."""
        named = torch.from_numpy(numbers).to(self.device, non_blocking=True)
        self._block_top[..., 2] = named[self._block_top[..., 2].clamp_(min=0)]
        self._top.copy_(merged_top(self._top, self._block_top))
        self._moments.fold(self._block_moments)
        self.block_sums = self._block_moments.sums[:2].clone()
        self._block_top.fill_(-1)
        self._block_moments.clear()
        for site in self.sites.values():
            site.calls = 0

    def sums_of(self, block_sums: torch.Tensor) -> npt.NDArray[np.float64]:
        """What `quambase.collector.statistics.sums_of` says of the block after whose folding ``block_sums`` was taken;
        waits for the device.
        """
        (found,) = _copies(block_sums)
        return np.concatenate([found[:, slice(*self._channels[key])] for key in sorted(self.layouts)], axis=1)

    def to_host(self) -> dict[SiteKey, SiteStatistics]:
        """A copy of the run's statistics, arrays of sites that are shared being the same; waits for the device."""
        named = self._moments.named()
        counts, top, *values = _copies(self._counts, self._top, *named.values())
        moments = dict(zip(named, values, strict=True))
        found = {}
        for key, layout in self.layouts.items():
            span = slice(*self._channels[key])
            found[key] = SiteStatistics(
                layout,
                self.most,
                counts[slice(*self._groups[key])],
                Moments(**{name: values[span] for name, values in moments.items()}),
                [rows[rows[:, 0] >= 0] for rows in top[slice(*self._groups[key])]],
            )
        return found

    def load(self, statistics: Mapping[SiteKey, SiteStatistics]) -> None:
        """Take over what `to_host` gave, or a checkpoint."""
        named = self._moments.named()
        moments = dict(zip(named, _copies(*named.values()), strict=True))
        top = np.full(self._top.shape, -1, np.int64)
        counts = np.empty(self._counts.shape, np.int64)
        for key, stats in statistics.items():
            start, stop = self._groups[key]
            counts[start:stop] = stats.counts
            for g, rows in enumerate(stats.top):
                top[start + g, : len(rows)] = rows
            for name, values in moments.items():
                values[slice(*self._channels[key])] = getattr(stats.moments, name)
        self._counts.copy_(torch.from_numpy(counts))
        self._top.copy_(torch.from_numpy(top))
        for name, there in named.items():
            there.copy_(torch.from_numpy(moments[name]))
