"""The argument structs of the CUDA counter's kernels (site_batch.cuh), and the device tables that they point to."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quambase.collector.cuda.packing import Packing
from quambase.collector.host.kernels import PATTERNS
from quambase.collector.statistics import SiteLayout
from quambase.schema.values.arrays import Int32, Int64

SITES = 16
"""As in the source: largest number of sites of a batch."""

CANDIDATES = 1024
"""As in the source: candidates for a group's outliers."""

ALONG = 4
"""As in the source: channels per thread of `moments`."""

FORMING = 256
"""As in the source: threads per block of `moments`."""

REDUCED = 1024
"""As in the source: patterns per block of `reduce_counts`."""

COMBINED = 32
"""As in the source: channels per block of `finish`."""

RANGES = PATTERNS // 32
"""As in the source: ranges of neighbouring patterns, whose counts are also summed."""

_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p

OF_LAYOUT = ("runs", "members", "edges", "group_of", "place_of")
"""Arrays that a `Shape` points to and that depend only on the layout."""

OF_BATCH = ("items", "block_first", "segment_first", "spill_first")
"""Arrays that a `SiteBatch` points to."""


class Shape(ctypes.Structure):
    """The source's struct of the same name."""

    _fields_ = [
        *((name, _I64) for name in ("stride", "documents", "groups", "first_group", "first_segment")),
        ("offsets", _POINTER),
        *((name, _POINTER) for name in OF_LAYOUT),
    ]


class Job(ctypes.Structure):
    """The source's struct of the same name."""

    _fields_ = [
        *((name, _I64) for name in ("site", "states", "stride", "channels", "groups")),
        ("segments", _POINTER),
        *((name, _I64) for name in ("lanes", "emit", "summed", "partial")),
    ]


class Site(ctypes.Structure):
    """The source's struct of the same name."""

    _fields_ = [
        *((name, _POINTER) for name in ("x", "states")),
        ("first", _I64),
        *((name, _POINTER) for name in ("counts", "summaries", "top", "count", "nonfinite", "overflow")),
        *((name, _POINTER) for name in ("lowest", "highest", "total", "squares", "mean_abs_max")),
    ]


class SiteBatch(ctypes.Structure):
    """The source's struct of the same name."""

    _fields_ = [
        *((name, _POINTER) for name in ("shapes", "jobs", "items", "block_first", "segment_first", "slots", "ranges")),
        *((name, _POINTER) for name in ("spill_first", "spill_count", "spills", "call", "call_ranges", "thresholds")),
        *((name, _POINTER) for name in ("candidates", "candidate_count", "partial64", "partial32", "partial_counts")),
        ("probabilities", _POINTER),
        *((name, _I64) for name in ("quantiles", "most", "infinity")),
        ("limit", ctypes.c_double),
        ("sites", Site * SITES),
        *((name, ctypes.c_int32 * (SITES + 1)) for name in ("group_first", "summary_first", "finish_first")),
        ("job_first", ctypes.c_int32 * (2 * SITES + 1)),
    ]


SITE = struct.Struct(f"@{len(Site._fields_)}q")
"""The layout of `Site`, which is faster to write than the structure."""


class Tables:
    """Concatenated arrays of int32, each aligned to 16 bytes, as a struct may need."""

    def __init__(self) -> None:
        self.parts: list[Int32] = []
        self.size = 0

    def append(self, values: npt.NDArray[np.integer[Any]]) -> int:
        """Append an array; returns its offset in bytes."""
        flat = values.astype(np.int32).ravel()
        padding = -flat.size % 4
        place = self.size
        self.parts += [flat, _PADDING[:padding]]
        self.size += flat.size + padding
        return 4 * place

    def flat(self, structs: bytes = b"") -> torch.Tensor:
        """All arrays, then ``structs``, on the host."""
        return torch.from_numpy(np.concatenate([*self.parts, np.frombuffer(structs, np.int32)]))


_PADDING = np.zeros(4, np.int32)


class LayoutTables:
    """The arrays of a `Shape` that depend only on the layout, on the device: their addresses by name (``places``), and
    one of them, ``members`` (channels,) int32.
    """

    def __init__(self, layout: SiteLayout, device: torch.device) -> None:
        groups = len(layout.names)
        order = np.concatenate([layout.members(g) for g in range(groups)])
        group_of, place_of = np.empty(layout.channels, np.int64), np.empty(layout.channels, np.int64)
        group_of[order] = np.repeat(np.arange(groups), layout.widths)
        place_of[order] = np.concatenate([np.arange(width) for width in layout.widths])
        tables = Tables()
        arrays = layout.runs[0], order, np.array(layout.edges), group_of, place_of
        places = [tables.append(array) for array in arrays]
        self._there = tables.flat().to(device, non_blocking=True)
        self.places = {name: self._there.data_ptr() + place for name, place in zip(OF_LAYOUT, places, strict=True)}
        first = places[OF_LAYOUT.index("members")] // 4
        self.members = self._there[first : first + layout.channels]


@lru_cache(maxsize=1024)
def _of_groups(layout: SiteLayout) -> Int64:
    """(groups, 5): the last four members of the source's Item, and the width."""
    runs, run_first = layout.runs
    first, last = run_first[:-1], run_first[1:]
    # A group without channels has no run.
    low_high = np.append(runs, [[0, 0]], axis=0)[np.where(first < last, first, -1)]
    return np.column_stack([first, last, low_high, layout.widths])


def item_rows(packing: Packing, sites: Sequence[tuple[SiteLayout, int]]) -> tuple[Int32, Int64]:
    """(items, 8): the members of the source's Item, for sites' layouts and strides; (items,): how many spills each can
    cause at most.
    """
    of_groups = [_of_groups(layout) for layout, _ in sites]
    groups_before = np.cumsum([0, *(len(rows) for rows in of_groups)])
    site, group, first_row, rows = packing.items.T
    mine = np.concatenate(of_groups)[groups_before[site] + group]
    found = np.empty((len(site), 8), np.int32)
    found[:, 0], found[:, 1], found[:, 2] = site, first_row, rows
    found[:, 3] = np.array([stride for _, stride in sites])[site]
    found[:, 4:] = mine[:, :4]
    return found, rows * mine[:, 4] // 0x8000


def jobs_of(site: int, layout: SiteLayout, stride: int, segments: int, apart: int) -> list[Job]:
    """A site's jobs; ``segments``, ``apart``: places in the tables of its documents' rows and, if it has a d_state, of
    its `moment_segments`. ``partial`` of the jobs is not set yet.
    """
    n = layout.d_state
    found = [Job(segments=segments, stride=stride, channels=layout.channels, groups=1, emit=True, summed=not n)]
    if n:
        found.append(Job(segments=apart, stride=n, channels=n, groups=len(layout.names), states=True, summed=True))
    for job in found:
        job.site, job.lanes = site, min(32, power_of_two(-(-job.channels // ALONG)))
    return found


def to_device(
    tables: Tables,
    device: torch.device,
    batch: SiteBatch,
    places: Mapping[str, int],
    shapes: ctypes.Array[Shape],
    jobs: Sequence[Job],
) -> torch.Tensor:
    """Copy the tables, shapes and jobs to the device in one int32 transfer, and turn the byte offsets in the structs
    into device addresses. ``places`` maps an array of the batch to its offset.
    """
    words = (ctypes.sizeof(shapes) + len(jobs) * ctypes.sizeof(Job)) // 4
    there = torch.empty(tables.size + words, dtype=torch.int32, device=device)
    base = there.data_ptr()
    for shape in shapes:
        shape.offsets += base
    for job in jobs:
        job.segments += base
    for name, place in places.items():
        setattr(batch, name, base + place)
    batch.shapes = base + 4 * tables.size
    batch.jobs = batch.shapes + ctypes.sizeof(shapes)
    there.copy_(tables.flat(bytes(shapes) + b"".join(bytes(job) for job in jobs)), non_blocking=True)
    return there


def blocks_of(job: Job, documents: int) -> int:
    """A job's number of blocks of `moments`: one per segment and run of channels."""
    return int(documents * job.groups * -(-job.channels // (ALONG * job.lanes)))


def power_of_two(least: int) -> int:
    """The smallest power of two that is not below ``least``; 1 for 0."""
    return 1 << max(least - 1, 0).bit_length()
