"""Counting on the CPU by compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
import torch

from quambase.collector.host.kernels import PATTERNS, SIGN, WIDEST, channel_moments, count_documents, take_counts
from quambase.collector.statistics import (
    PROBABILITIES,
    TOP_FIELDS,
    Encoding,
    Moments,
    SiteStatistics,
    largest,
    states_by_channel,
)
from quambase.schema.values.arrays import Int64

LARGEST_COUNT = 2**32 - 1
"""Largest count of a worker's table."""

NEARBY = 8 << 20
"""About how many bytes of float32 values are processed at a time: three passes read them from a cache."""


class HostCounter:
    """A `Counter` on the CPU; owns the kernel's working tables, which all sites share.

    ``most``: outliers per group. ``groups``: largest number of groups of a site.
    """

    def __init__(self, encoding: Encoding, most: int, groups: int) -> None:
        if most < 1:
            raise ValueError("the number of outliers must be at least 1")
        self.encoding = encoding
        self.most = most
        workers = numba.get_num_threads()
        self._magnitudes = encoding.values()[:SIGN]
        self._counts = np.zeros((workers, groups, PATTERNS), np.uint32)
        self._scratch = np.zeros((workers, groups, PATTERNS), np.uint32)
        self._top = np.zeros((workers, groups, most, len(TOP_FIELDS)), np.int64)
        self._top_sizes = np.zeros((workers, groups), np.int64)
        self._buffer = torch.empty(0, dtype=encoding.torch_dtype)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        """x in the 16-bit type, contiguous, in a reused buffer: allocating memory takes longer than the rounding."""
        if self._buffer.numel() < x.numel():
            self._buffer = torch.empty(x.numel(), dtype=self.encoding.torch_dtype)
        return self._buffer[: x.numel()].view(x.shape).copy_(x)

    def add(self, into: SiteStatistics, x: torch.Tensor, offsets: Int64, first: int, summaries: torch.Tensor) -> None:
        """As `Counter.add`, at once. ValueError: the site has more than ``groups`` groups, or x no whole states."""
        d_state = into.layout.d_state
        if d_state and len(x) != d_state * (len(offsets) - 1):  # compiled code would read beyond x
            raise ValueError(f"{len(x)} rows are not {len(offsets) - 1} states of {d_state}")
        self.count(into, x, offsets, first, summaries, moments=not d_state)
        if not d_state:
            return
        states = states_by_channel(x, d_state)
        for g in range(len(into.layout.names)):
            members = into.layout.members(g)
            mine = states[:, torch.from_numpy(members)].reshape(-1, d_state)
            part = into.moments.part(g * d_state, (g + 1) * d_state)
            self._add_moments(mine, np.arange(len(offsets)) * members.size, part)

    def flush(self, *, partly: bool = False) -> None:
        """As `Counter.flush`; nothing is pending."""

    def _add_moments(self, x: torch.Tensor, offsets: Int64, into: Moments) -> None:
        """Add the documents of x (rows, channels) to ``into``."""
        moments = {name: values.numpy() for name, values in into.named().items()}
        channel_moments(
            x.to(torch.float32).contiguous().numpy(),
            offsets,
            self.encoding.limit,
            min(WIDEST, -(-x.shape[1] // numba.get_num_threads())),
            moments["count"],
            moments["lowest"],
            moments["highest"],
            moments["total"],
            moments["squares"],
            moments["mean_abs_max"],
            moments["nonfinite"],
            moments["overflow"],
        )

    def count(
        self,
        into: SiteStatistics,
        x: torch.Tensor,
        offsets: Int64,
        first: int,
        summaries: torch.Tensor,
        *,
        moments: bool = False,
    ) -> None:
        """The counts, outliers and summaries of `add`; the moments of x's channels if ``moments``."""
        workers, groups = self._counts.shape[0], len(into.layout.names)
        if groups > self._counts.shape[1]:  # compiled code would write beyond the tables
            raise ValueError(f"a site has {groups} groups; this counter was made for {self._counts.shape[1]} at most")
        counts, top_sizes = self._counts[:, :groups], self._top_sizes[:, :groups]
        counted = 0
        for start, stop in self._nearby(offsets, x.shape[1]):
            values = int(offsets[stop] - offsets[start]) * x.shape[1]
            if counted + values > LARGEST_COUNT:
                take_counts(counts, into.counts.numpy())
                counted = 0
            counted += values
            rows, borders = x[offsets[start] : offsets[stop]], offsets[start : stop + 1] - offsets[start]
            # Shares of about equal work: the bounds are documents nearest to even shares of the rows.
            even = np.linspace(0, len(rows), workers + 1)[1:-1]
            bounds = np.searchsorted(borders, even).clip(0, stop - start)
            count_documents(
                self._rounded(rows).view(torch.uint16).numpy(),
                borders,
                first + start,
                np.array([0, *bounds, stop - start], np.int64),
                *into.layout.runs,
                self.encoding.infinity,
                self._magnitudes,
                PROBABILITIES,
                counts,
                self._scratch[:, :groups],
                summaries[start:stop].numpy(),
                self._top[:, :groups],
                top_sizes,
            )
            if moments:
                self._add_moments(rows, borders, into.moments)
        take_counts(counts, into.counts.numpy())
        for g in range(groups):
            found = [self._top[w, g, : top_sizes[w, g]] for w in range(workers)]
            best = largest(np.concatenate([into.outliers(g), *found]), self.most)
            into.top[g, : len(best)] = torch.from_numpy(best)
        top_sizes[:] = 0

    def _nearby(self, offsets: Int64, channels: int) -> Iterator[tuple[int, int]]:
        """Runs of documents, first to last + 1, whose values stay in a cache while they are rounded, counted and
        summed; at least two documents per worker.
        """
        documents, rows = offsets.size - 1, NEARBY // (4 * channels)
        start = 0
        while start < documents:
            stop = int(np.searchsorted(offsets, offsets[start] + rows, side="right")) - 1
            stop = min(max(stop, start + 2 * self._counts.shape[0]), documents)
            yield start, stop
            start = stop
