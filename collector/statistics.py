"""What is accumulated at one site, for one block or a whole run, and how two of these add up.

A block's statistics are formed on their own and folded into the run's in block order, so that a run that was killed
and resumed, and one that was not, do the same float64 additions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import numba
import numpy as np
import numpy.typing as npt
import torch

from quambase.collector.host_kernels import PATTERNS, SIGN, WIDEST, channel_moments, count_documents
from quambase.schema.tables import DOCUMENT_QUANTILES

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_DESCENDING = sorted(DOCUMENT_QUANTILES.items(), key=lambda item: -item[1])
PROBABILITIES = np.array([p for _, p in _DESCENDING], np.float32)

SUMMARY_COLUMNS = ("amax", *(name for name, _ in _DESCENDING))
"""What `BlockStatistics.summaries` holds, in order."""


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
        """(PATTERNS,) float32: the value of every pattern, NaN being one."""
        # PyTorch would start a team of threads for it in every thread that asks.
        patterns = np.arange(PATTERNS, dtype=np.uint32)
        if self.torch_dtype == torch.float16:
            values = patterns.astype(np.uint16).view(np.float16).astype(np.float32)
        else:
            values = (patterns << 16).view(np.float32)
        values[np.isnan(values)] = np.nan  # none that warns when it is computed with
        return values


ENCODINGS = {
    "float16": Encoding("float16", torch.float16, 0x7C00, np.float32(65520)),
    "bfloat16": Encoding("bfloat16", torch.bfloat16, 0x7F80, np.float32(3.3961775e38)),
}


@dataclass(frozen=True)
class SiteLayout:
    """Where a site's groups lie: group ``names[g]`` is ``edges[g + 1] - edges[g]`` channels from ``edges[g]`` on.

    ssd_groups  the SSD group of each group; none at a site that SSD groups share, or of a model without them
    order       the channels group by group, ascending in each; none where that is 0, 1, 2, ...
    sorted_groups  (head group, channel group) of each group; none at a site without them
    d_state     of a state site whose groups are of channels: the state indices that each channel has. Its rows are
                state indices then, and its moments are by group and state index. 0 at every other site
    """

    names: tuple[str, ...]
    edges: tuple[int, ...]
    state: bool = False
    ssd_groups: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    sorted_groups: tuple[tuple[int, int], ...] = ()
    d_state: int = 0

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        """Formed once: a layout is looked up at every tap, and may name thousands of channels."""
        return self._hash

    @property
    def channels(self) -> int:
        """How many channels (state indices at an undivided state site) the site has."""
        return self.edges[-1]

    @property
    def moments(self) -> int:
        """How many rows of `channels` the site has."""
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
"""The fields of `Moments`: int64, float32, float64."""


@dataclass
class Moments:
    """Per channel: count, lowest, highest, total, squares, mean_abs_max, nonfinite, overflow, each (channels,)."""

    count: Int64
    lowest: Float32
    highest: Float32
    total: Float64
    squares: Float64
    mean_abs_max: Float64
    nonfinite: Int64
    overflow: Int64

    @classmethod
    def empty(cls, channels: int) -> Moments:
        """Of no values at all."""
        integers = [np.zeros(channels, np.int64) for _ in range(3)]
        floats = [np.zeros(channels) for _ in range(3)]
        infinity = np.full(channels, np.inf, np.float32)
        return cls(integers[0], infinity, -infinity, floats[0], floats[1], floats[2], integers[1], integers[2])

    def fold(self, later: Moments) -> None:
        """Add the moments of values that come after these."""
        self.count += later.count
        np.minimum(self.lowest, later.lowest, out=self.lowest)
        np.maximum(self.highest, later.highest, out=self.highest)
        self.total += later.total
        self.squares += later.squares
        np.maximum(self.mean_abs_max, later.mean_abs_max, out=self.mean_abs_max)
        self.nonfinite += later.nonfinite
        self.overflow += later.overflow


TOP_FIELDS = ("magnitude", "pattern", "document", "row", "channel")


def largest(top: Int64, most: int) -> Int64:
    """The first ``most`` rows of ``top`` (m, 5: TOP_FIELDS) by descending magnitude, then document, row, channel."""
    order = np.lexsort((top[:, 4], top[:, 3], top[:, 2], -top[:, 0]))
    return top[order[:most]]


@dataclass
class SiteStatistics:
    """A site's statistics: counts (groups, PATTERNS) int64, moments per channel, top per group (m <= most, 5)."""

    layout: SiteLayout
    most: int
    counts: Int64
    moments: Moments
    top: list[Int64]

    @classmethod
    def empty(cls, layout: SiteLayout, most: int) -> SiteStatistics:
        """Of no values at all."""
        groups = len(layout.names)
        return cls(
            layout,
            most,
            np.zeros((groups, PATTERNS), np.int64),
            Moments.empty(layout.moments),
            [np.empty((0, len(TOP_FIELDS)), np.int64) for _ in range(groups)],
        )

    def fold(self, later: SiteStatistics) -> None:
        """Add the statistics of documents that come after these."""
        self.counts += later.counts
        self.moments.fold(later.moments)
        self.top = [
            largest(np.concatenate([mine, theirs]), self.most) for mine, theirs in zip(self.top, later.top, strict=True)
        ]


def sums_of(statistics: Mapping[tuple[int, str], SiteStatistics]) -> Float64:
    """(2, moments of every site in sorted order): the totals and the squares, which do not add up in any order."""
    moments = [statistics[key].moments for key in sorted(statistics)]
    return np.stack([np.concatenate([m.total for m in moments]), np.concatenate([m.squares for m in moments])])


NEARBY = 8 << 20
"""Bytes of float32 values that are read three times before the next are, about."""


class Counter:
    """Counts tensors of any site; owns the kernel's working tables, which every site shares.

    ``most``: outliers kept per group. ``groups``: of a site at most; more are a ValueError.
    """

    def __init__(self, encoding: Encoding, most: int, groups: int) -> None:
        if most < 1:
            raise ValueError("the number of outliers kept must be at least 1")
        self.encoding = encoding
        self.most = most
        workers = numba.get_num_threads()
        self._magnitudes = encoding.values()[:SIGN]
        self._counts = np.zeros((workers, groups, PATTERNS), np.int64)
        self._scratch = np.zeros((workers, groups, PATTERNS), np.uint32)
        self._top = np.zeros((workers, groups, most, len(TOP_FIELDS)), np.int64)
        self._top_sizes = np.zeros((workers, groups), np.int64)
        self._buffer = torch.empty(0, dtype=encoding.torch_dtype)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        """x in the 16-bit type, contiguous, in a buffer used again: fresh memory costs more than the rounding."""
        if self._buffer.numel() < x.numel():
            self._buffer = torch.empty(x.numel(), dtype=self.encoding.torch_dtype)
        return self._buffer[: x.numel()].view(x.shape).copy_(x)

    def add(self, into: SiteStatistics, x: torch.Tensor, offsets: Int64, first: int, summaries: Float32) -> None:
        """Add documents ``first`` onwards of a block to ``into``: their counts, and their channels' moments.

        x (rows, channels) float; offsets (documents + 1,) of its rows, where the layout has a d_state that many of each
        document; summaries (documents, groups + 1, 1 + q), written: amax and quantiles (SUMMARY_COLUMNS) of each
        document, the whole site last. ValueError: more groups than this was made for.
        """
        self.count(into, x, offsets, first, summaries, moments=not into.layout.d_state)
        if not into.layout.d_state:
            return
        moments = into.moments
        # (documents, n, e) to each group's (documents channels, n).
        states = x.view(len(offsets) - 1, into.layout.d_state, -1).transpose(1, 2)
        for g in range(len(into.layout.names)):
            members = into.layout.members(g)
            mine = states[:, torch.from_numpy(members)].reshape(-1, into.layout.d_state)
            rows = slice(g * into.layout.d_state, (g + 1) * into.layout.d_state)
            part = Moments(**{field.name: getattr(moments, field.name)[rows] for field in fields(Moments)})
            self._add_moments(mine, np.arange(len(offsets)) * members.size, part)

    def _add_moments(self, x: torch.Tensor, offsets: Int64, into: Moments) -> None:
        """Add the documents of x (rows, channels) to ``into``, whose arrays may be views."""
        channel_moments(
            x.to(torch.float32).contiguous().numpy(),
            offsets,
            self.encoding.limit,
            min(WIDEST, -(-x.shape[1] // numba.get_num_threads())),
            into.count,
            into.lowest,
            into.highest,
            into.total,
            into.squares,
            into.mean_abs_max,
            into.nonfinite,
            into.overflow,
        )

    def count(
        self,
        into: SiteStatistics,
        x: torch.Tensor,
        offsets: Int64,
        first: int,
        summaries: Float32,
        *,
        moments: bool = False,
    ) -> None:
        """The counts, outliers and summaries of `add`, and, if ``moments``, those of x's channels."""
        workers, groups = self._counts.shape[0], len(into.layout.names)
        if groups > self._counts.shape[1]:  # compiled code would write beyond the tables
            raise ValueError(
                f"a site has {groups} groups; expected {self._counts.shape[1]} at most, as this was made for"
            )
        counts, top_sizes = self._counts[:, :groups], self._top_sizes[:, :groups]
        for start, stop in self._nearby(offsets, x.shape[1]):
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
                summaries[start:stop],
                self._top[:, :groups],
                top_sizes,
            )
            if moments:
                self._add_moments(rows, borders, into.moments)
        into.counts += counts.sum(axis=0)
        counts[:] = 0
        for g in range(groups):
            found = [self._top[w, g, : top_sizes[w, g]] for w in range(workers)]
            into.top[g] = largest(np.concatenate([into.top[g], *found]), self.most)
        top_sizes[:] = 0

    def _nearby(self, offsets: Int64, channels: int) -> Iterator[tuple[int, int]]:
        """Runs of documents, first to last + 1, whose values stay in a cache until they are rounded, counted and added
        up; two documents for each worker at least.
        """
        documents, rows = offsets.size - 1, NEARBY // (4 * channels)
        start = 0
        while start < documents:
            stop = int(np.searchsorted(offsets, offsets[start] + rows, side="right")) - 1
            stop = min(max(stop, start + 2 * self._counts.shape[0]), documents)
            yield start, stop
            start = stop
