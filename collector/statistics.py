"""The accumulated statistics: arrays of all sites of a run, the same on the host, on a device, in a checkpoint and a
merge.

Counts are integers, whose sum does not depend on the order, and are added to the run's directly. A block's moments and
outliers are computed separately and folded into the run's in block order, so that an interrupted run does the same
float64 additions as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from quambase.collector.host.kernels import PATTERNS
from quambase.schema.sites import SiteKey
from quambase.schema.tables import DOCUMENT_QUANTILES
from quambase.schema.values.arrays import Float32, Int64

_DESCENDING = sorted(DOCUMENT_QUANTILES.items(), key=lambda item: -item[1])
PROBABILITIES = np.array([p for _, p in _DESCENDING], np.float32)

SUMMARY_COLUMNS = ("amax", *(name for name, _ in _DESCENDING))
"""The values of a document's summary of a group, in order: columns of `documents`."""


@dataclass(frozen=True)
class Encoding:
    """A 16-bit float type whose patterns are counted.

    ``limit`` is the smallest magnitude that rounds to infinity: halfway from the largest finite value to the next.
    """

    name: str
    torch_dtype: torch.dtype
    infinity: int
    limit: np.float32

    def values(self) -> Float32:
        """(PATTERNS,) float32: the value of every pattern, with one bit pattern for NaN."""
        # Not with PyTorch, which would start a team of threads in every calling thread.
        patterns = np.arange(PATTERNS, dtype=np.uint32)
        if self.torch_dtype == torch.float16:
            values = patterns.astype(np.uint16).view(np.float16).astype(np.float32)
        else:
            values = (patterns << 16).view(np.float32)
        values[np.isnan(values)] = np.nan  # a quiet NaN: arithmetic with a signaling one warns
        return values


ENCODINGS = {
    "float16": Encoding("float16", torch.float16, 0x7C00, np.float32(65520)),
    "bfloat16": Encoding("bfloat16", torch.bfloat16, 0x7F80, np.float32(3.3961775e38)),
}


@dataclass(frozen=True)
class SiteLayout:
    """A site's groups: ``names[g]`` has ``edges[g + 1] - edges[g]`` channels, those of ``order`` from ``edges[g]`` on.

    ssd_groups  the SSD group of each group; empty at a site that SSD groups share, or of a model without them
    order       the channels group by group, ascending in each; empty if that is 0, 1, 2, ...
    sorted_groups  (head group, channel group) of each group; empty at a site without them
    d_state     at a state site whose groups consist of channels, but whose moments are per group and state index:
                number of state indices. 0 at every other site
    by_channel  at a state site: its rows are state indices and its columns channels, as also where d_state is not 0;
                otherwise the reverse
    every       at a site of states along a document: tokens between them. 0: one state per document, its last
    """

    names: tuple[str, ...]
    edges: tuple[int, ...]
    state: bool = False
    ssd_groups: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    sorted_groups: tuple[tuple[int, int], ...] = ()
    d_state: int = 0
    by_channel: bool = False
    every: int = 0

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        """Computed once: a layout is looked up at every tap, and may contain thousands of channels."""
        return self._hash

    @property
    def rows_are_indices(self) -> bool:
        """Whether the rows of a state are its state indices."""
        return self.by_channel or self.d_state > 0

    @property
    def channels(self) -> int:
        """The site's number of columns: channels, or state indices at a state site whose rows are channels."""
        return self.edges[-1]

    @property
    def moments(self) -> int:
        """The site's number of rows of `channels`."""
        return len(self.names) * self.d_state or self.channels

    @cached_property
    def ordered_groups(self) -> tuple[tuple[str, int], ...]:
        """Group names in the order of the tables, with their numbers."""
        return tuple(sorted((name, g) for g, name in enumerate(self.names)))

    @cached_property
    def widths(self) -> Int64:
        """(groups,) channels of each."""
        return np.diff(self.edges)

    def members(self, g: int) -> Int64:
        """The channels of group ``g``, ascending."""
        span = slice(self.edges[g], self.edges[g + 1])
        return np.array(self.order[span], np.int64) if self.order else np.arange(span.start, span.stop)

    def moment_rows(self, g: int) -> Int64:
        """The places of group ``g`` in the site's moments."""
        return np.arange(g * self.d_state, (g + 1) * self.d_state) if self.d_state else self.members(g)

    @cached_property
    def runs(self) -> tuple[Int64, Int64]:
        """(runs, 2) consecutive channels, first to last + 1, and (groups + 1,) each group's first run."""
        found: list[tuple[int, int]] = []
        firsts = [0]
        for g in range(len(self.names)):
            channels = self.members(g)
            breaks = np.flatnonzero(np.diff(channels) != 1) + 1
            found += [(int(run[0]), int(run[-1]) + 1) for run in np.split(channels, breaks) if run.size]
            firsts.append(len(found))
        return np.array(found, np.int64).reshape(-1, 2), np.array(firsts, np.int64)


INTEGERS = ("count", "nonfinite", "overflow")
EXTREMA = ("lowest", "highest")
SUMS = ("total", "squares", "mean_abs_max")
"""The rows of the arrays of `Moments`."""


@dataclass
class Moments:
    """The moments of channels, a column each (a row of the table `channels`).

    integers  (3, channels) int64: INTEGERS
    extrema   (2, channels) float32: EXTREMA
    sums      (3, channels) float64: SUMS
    """

    integers: torch.Tensor
    extrema: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> Moments:
        """Moments of no values."""
        moments = cls(
            torch.empty(len(INTEGERS), channels, dtype=torch.int64, device=device),
            torch.empty(len(EXTREMA), channels, device=device),
            torch.empty(len(SUMS), channels, dtype=torch.float64, device=device),
        )
        moments.clear()
        return moments

    def clear(self) -> None:
        """Set them to the moments of no values."""
        self.integers.zero_()
        self.extrema[0].fill_(torch.inf)
        self.extrema[1].fill_(-torch.inf)
        self.sums.zero_()

    def part(self, start: int, stop: int) -> Moments:
        """A view of some channels."""
        return Moments(*(getattr(self, field.name)[:, start:stop] for field in fields(self)))

    def fold(self, later: Moments) -> None:
        """Add the moments of values that come after these."""
        self.integers += later.integers
        torch.minimum(self.extrema[0], later.extrema[0], out=self.extrema[0])
        torch.maximum(self.extrema[1], later.extrema[1], out=self.extrema[1])
        self.sums[:2] += later.sums[:2]
        torch.maximum(self.sums[2], later.sums[2], out=self.sums[2])

    def named(self) -> dict[str, torch.Tensor]:
        """Every quantity by its name, as a view (channels,)."""
        rows = ((INTEGERS, self.integers), (EXTREMA, self.extrema), (SUMS, self.sums))
        return {name: values[i] for names, values in rows for i, name in enumerate(names)}


TOP_FIELDS = ("magnitude", "pattern", "document", "row", "channel")


def largest(top: Int64, most: int) -> Int64:
    """The first ``most`` rows of each list of ``top`` (..., m, 5: TOP_FIELDS), sorted by descending magnitude, then
    document, row, channel.
    """
    order = np.lexsort((top[..., 4], top[..., 3], top[..., 2], -top[..., 0]), axis=-1)
    return np.take_along_axis(top, order[..., :most, None], axis=-2)


def merged_top(earlier: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """The largest values of two sorted lists (groups, m, 5), ``later`` of later documents; as many as ``earlier`` has.

    Of equal values the earlier come first, as in `largest`.
    """
    both = torch.cat([earlier, later], dim=1)
    order = torch.argsort(both[..., 0], dim=1, descending=True, stable=True)[:, : earlier.shape[1]]
    return both.gather(1, order[..., None].expand(-1, -1, both.shape[2]))


class SiteIndex:
    """Locates every site in a run's arrays; sites in sorted order.

    layouts   equal layouts are one object, which makes comparing them fast
    groups    each site's rows of counts and outliers, one per group
    channels  each site's columns of the moments
    shared    maps a site to the one whose places it uses, since in every block both have the same tensor
    """

    def __init__(self, layouts: Mapping[SiteKey, SiteLayout]) -> None:
        distinct: dict[SiteLayout, SiteLayout] = {}
        self.layouts = {key: distinct.setdefault(layout, layout) for key, layout in sorted(layouts.items())}
        self.groups, self.group_count = _spans({key: len(layout.names) for key, layout in self.layouts.items()})
        self.channels, self.channel_count = _spans({key: layout.moments for key, layout in self.layouts.items()})
        self.shared: dict[SiteKey, SiteKey] = {}

    def share(self, key: SiteKey, source: SiteKey) -> None:
        """Let ``key`` use the places of ``source``, which has an equal layout; its own places remain empty."""
        self.shared[key] = source
        self.groups[key], self.channels[key] = self.groups[source], self.channels[source]


def _spans(sizes: Mapping[SiteKey, int]) -> tuple[dict[SiteKey, slice], int]:
    """Consecutive slices of the given sizes, and the end of the last one."""
    found: dict[SiteKey, slice] = {}
    end = 0
    for key, size in sizes.items():
        found[key] = slice(end, end + size)
        end += size
    return found, end


@dataclass
class SiteStatistics:
    """One site's part of a run's or a block's arrays, as views.

    counts   (groups, PATTERNS) int64, of the run
    moments  of its channels
    top      (groups, most, 5: TOP_FIELDS) int64, sorted, magnitude -1 where there are fewer
    calls    how often a `Counter` has added to the block's statistics
    """

    layout: SiteLayout
    counts: torch.Tensor
    moments: Moments
    top: torch.Tensor
    calls: int = 0

    @cached_property
    def addresses(self) -> tuple[int, int, tuple[int, ...]]:
        """Addresses of counts, outliers and moments, the last in the order of `Moments.named`."""
        moments = tuple(values.data_ptr() for values in self.moments.named().values())
        return self.counts.data_ptr(), self.top.data_ptr(), moments

    def outliers(self, g: int) -> Int64:
        """(m, 5: TOP_FIELDS), m <= most: group ``g``'s; on the host."""
        return _present(self.top[g])


def _present(top: torch.Tensor) -> Int64:
    """The rows of (most, 5: TOP_FIELDS) that have a value."""
    rows: Int64 = top.numpy()
    return rows[rows[:, 0] >= 0]


@dataclass
class RunStatistics:
    """The statistics of every site of a run, or of some of its blocks, on one device.

    counts   (groups, PATTERNS) int64
    moments  of (channels,)
    top      (groups, most, 5: TOP_FIELDS) int64, sorted, magnitude -1 where there are fewer
    buckets  the statistics of the positions of each bucket of `quambase.schema.values.positions` alone, with the same
             index; empty unless they are wanted. Of their moments only integers and extrema are used, which do not
             depend on the order
    """

    index: SiteIndex
    counts: torch.Tensor
    moments: Moments
    top: torch.Tensor
    buckets: tuple[RunStatistics, ...] = ()

    @classmethod
    def empty(cls, layouts: Mapping[SiteKey, SiteLayout], most: int, buckets: int = 0) -> RunStatistics:
        """Statistics of no values, on the host; ``most``: outliers per group; ``buckets``: of positions."""
        index = SiteIndex(layouts)
        return cls._of_index(index, most, tuple(cls._of_index(index, most) for _ in range(buckets)))

    @classmethod
    def _of_index(cls, index: SiteIndex, most: int, buckets: tuple[RunStatistics, ...] = ()) -> RunStatistics:
        host = torch.device("cpu")
        # NumPy's zeros are allocated on first use, in huge pages.
        counts = torch.from_numpy(np.zeros((index.group_count, PATTERNS), np.int64))
        moments, top = Moments.empty(index.channel_count, host), _no_top(index.group_count, most, host)
        return cls(index, counts, moments, top, buckets)

    @property
    def most(self) -> int:
        """Largest number of outliers per group."""
        return self.top.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of all arrays."""
        return self.counts.device

    def site(self, key: SiteKey) -> SiteStatistics:
        """One site's part."""
        groups, channels = self.index.groups[key], self.index.channels[key]
        moments = self.moments.part(channels.start, channels.stop)
        return SiteStatistics(self.index.layouts[key], self.counts[groups], moments, self.top[groups])

    def outliers(self, group: int) -> Int64:
        """(m, 5: TOP_FIELDS), m <= most: the outliers of a row of ``top``; on the host."""
        return _present(self.top[group])

    def add(self, other: RunStatistics) -> None:
        """Add the statistics of other blocks, anywhere in the run, with the same ``shared``; on the host."""
        self.counts += other.counts
        self.moments.fold(other.moments)
        for mine, theirs in zip(self.buckets, other.buckets, strict=True):
            mine.add(theirs)
        both = np.concatenate([self.top.numpy(), other.top.numpy()], axis=1)
        self.top.copy_(torch.from_numpy(largest(both, self.most)))


def _no_top(groups: int, most: int, device: torch.device) -> torch.Tensor:
    return torch.full((groups, most, len(TOP_FIELDS)), -1, dtype=torch.int64, device=device)


class BlockStatistics:
    """The statistics of the current block, which are then folded into the run's.

    sites  what a `Counter` adds to: the run's counts, and the block's moments and outliers, whose documents are
           numbered within the block
    sums   (2, channels) float64: the last folded block's totals and squares, whose sum depends on the order
    buckets  those of the run's buckets of positions
    """

    def __init__(self, run: RunStatistics) -> None:
        self.run, self.layouts, self.shared = run, run.index.layouts, run.index.shared
        self._moments = Moments.empty(run.index.channel_count, run.device)
        self._top = _no_top(run.index.group_count, run.most, run.device)
        self.sums = self._moments.sums[:2]
        self._summaries: dict[int, tuple[torch.Tensor, dict[SiteKey, torch.Tensor]]] = {}
        block = RunStatistics(run.index, run.counts, self._moments, self._top)
        self.sites = {key: block.site(key) for key in self.layouts}
        for key, source in self.shared.items():
            self.sites[key] = self.sites[source]
        self.buckets = [BlockStatistics(bucket) for bucket in run.buckets]

    def summaries(self, documents: int) -> tuple[torch.Tensor, dict[SiteKey, torch.Tensor]]:
        """Memory for a block's summaries, reused by the next block of equally many documents: flat, and as each site's
        part (documents, groups + 1, 1 + q: SUMMARY_COLUMNS), in order.
        """
        if documents not in self._summaries:
            shapes = [(documents, len(layout.names) + 1, len(SUMMARY_COLUMNS)) for layout in self.layouts.values()]
            sizes = [a * b * c for a, b, c in shapes]
            flat = torch.empty(sum(sizes), device=self.run.device)
            parts = [part.view(shape) for part, shape in zip(torch.split(flat, sizes), shapes, strict=True)]
            self._summaries[documents] = flat, dict(zip(self.layouts, parts, strict=True))
        return self._summaries[documents]

    def share(self, key: SiteKey, source: SiteKey) -> None:
        """`SiteIndex.share`, unless ``key`` is shared already."""
        if key not in self.shared:
            self.run.index.share(key, source)
            self.sites[key] = self.sites[source]

    def fold(self, numbers: Int64) -> None:
        """End the block, whose documents are ``numbers`` in the file: add its statistics to the run's."""
        named = torch.from_numpy(numbers).to(self.run.device, non_blocking=True)
        self._top[..., 2] = named[self._top[..., 2].clamp_(min=0)]
        self.run.top.copy_(merged_top(self.run.top, self._top))
        self._end()
        for bucket in self.buckets:
            bucket._end()  # without its largest values, which say nothing of their places

    def _end(self) -> None:
        """Add the moments to the run's, and begin again with no values."""
        self.run.moments.fold(self._moments)
        self.sums = self._moments.sums[:2].clone()
        self._top.fill_(-1)
        self._moments.clear()
        for site in self.sites.values():
            site.calls = 0


class Counter(Protocol):
    """Counts tensors of any site on their device."""

    most: int

    def add(self, into: SiteStatistics, x: torch.Tensor, offsets: Int64, first: int, summaries: torch.Tensor) -> None:
        """Add documents ``first`` onwards of a block to ``into``: their counts, and their channels' moments.

        x (rows, channels) float; offsets (documents + 1,) of its rows (if the layout has a d_state, that many per
        document); summaries (documents, groups + 1, 1 + q), written: amax and quantiles (SUMMARY_COLUMNS) of each
        document, the whole site last. May be deferred: x must not change until the next `flush`.
        """

    def flush(self, *, partly: bool = False) -> None:
        """Queue the counting of all that was added; ``partly``: unless as many sites again would fit into the batch."""


def counted_rows(layout: SiteLayout, values: torch.Tensor) -> torch.Tensor:
    """A site's ``values``, as a tap receives them, as the rows (rows, columns) that are counted."""
    if layout.rows_are_indices:
        return values.transpose(1, 2).reshape(-1, values.shape[1])  # (states n, e)
    return values.reshape(-1, values.shape[-1]) if layout.state else values  # (states e, n)


def states_by_channel(x: torch.Tensor, d_state: int) -> torch.Tensor:
    """The states (documents, e, n) whose rows, as they are counted, are x (documents n, e)."""
    return x.reshape(-1, d_state, x.shape[1]).transpose(1, 2)
