"""The structs that a CUDA counter's kernels are given (batch.cuh), and the tables on the device that they point to."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quambase.collector.kernels import PATTERNS
from quambase.collector.packing import Packing, moment_segments
from quambase.collector.statistics import SiteLayout

Int64 = npt.NDArray[np.int64]

SITES = 16
"""As in the source: sites of a batch at most."""

CANDIDATES = 1024
"""As in the source: outliers of a group held before they are sorted."""

ALONG = 4
"""As in the source: channels whose moments one thread forms."""

FORMING = 256
"""As in the source: threads of a block of `moments`."""

REDUCED = 1024
"""As in the source: patterns of a block of `reduce_counts`."""

COMBINED = 32
"""As in the source: channels of a block of `finish`."""

RANGES = PATTERNS // 32
"""As in the source: runs of neighbouring patterns whose counts are summed too."""

_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p

OF_SITE = ("offsets", "runs", "members", "edges", "group_of", "place_of")
"""Arrays that a `Shape` points to."""

OF_BATCH = ("items", "block_first", "segment_first", "spill_first")
"""Arrays that a `SiteBatch` points to."""


class Shape(ctypes.Structure):
    """The source's struct of the same name."""

    _fields_ = [
        *((name, _I64) for name in ("stride", "documents", "groups", "first_group", "first_segment")),
        *((name, _POINTER) for name in OF_SITE),
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


@lru_cache(maxsize=1024)
def _of_layout(layout: SiteLayout) -> tuple[Int64, ...]:
    """What of OF_SITE is the same whatever the documents."""
    groups, widths = len(layout.names), np.diff(layout.edges)
    order = np.concatenate([layout.members(g) for g in range(groups)])
    group_of, place_of = np.empty(layout.channels, np.int64), np.empty(layout.channels, np.int64)
    group_of[order] = np.repeat(np.arange(groups), widths)
    place_of[order] = np.concatenate([np.arange(width) for width in widths])
    return layout.runs[0], order, np.array(layout.edges), group_of, place_of


def item_rows(packing: Packing, sites: Sequence[tuple[SiteLayout, int]]) -> Int64:
    """(items, 8): the members of the source's Item, of sites' layouts and strides."""
    found = np.empty((len(packing.items), 8), np.int64)
    for number, (layout, stride) in enumerate(sites):
        mine = packing.items[:, 0] == number
        site, group, first_row, rows = packing.items[mine].T
        runs, run_first = layout.runs
        first, last = run_first[group], run_first[group + 1]
        # A group without channels has none.
        low, high = np.append(runs, [[0, 0]], axis=0)[np.where(first < last, first, -1)].T
        found[mine] = np.stack([site, first_row, rows, np.full(site.size, stride), first, last, low, high], axis=1)
    return found


class Tables:
    """What a plan's structs point to: arrays of int32 one after the other, each at a multiple of 16 bytes, as a struct
    may need.
    """

    def __init__(self) -> None:
        self.parts: list[npt.NDArray[np.int32]] = []
        self.places: dict[str, int] = {}
        self.size = 0
        self.sites = self.jobs = 0

    def put(self, name: str, values: npt.NDArray[np.integer[Any]]) -> None:
        """Append an array."""
        flat = values.astype(np.int32).ravel()
        padding = -flat.size % 4
        self.places[name] = self.size
        self.parts += [flat, np.zeros(padding, np.int32)]
        self.size += flat.size + padding

    def put_items(self, packing: Packing, sites: Sequence[tuple[SiteLayout, int]]) -> int:
        """Append OF_BATCH, of sites' layouts and strides; how many spills all items could bring."""
        widths = [np.diff(layout.edges) for layout, _ in sites]
        brought = [rows * int(widths[site][group]) // 0x8000 for site, group, _, rows in packing.items.tolist()]
        self.put("items", item_rows(packing, sites))
        self.put("block_first", packing.block_first)
        self.put("segment_first", packing.segment_first)
        self.put("spill_first", np.cumsum([0, *brought]))
        return sum(brought)

    def put_site(self, number: int, layout: SiteLayout, offsets: Int64) -> None:
        """Append what a site's `Shape` points to."""
        for name, values in zip(OF_SITE, (offsets, *_of_layout(layout)), strict=True):
            self.put(f"{name} {number}", values)
        self.sites += 1

    def of_sites(self, name: str) -> list[int]:
        """Where every site's array of a name is."""
        return [self.places[f"{name} {number}"] for number in range(self.sites)]

    def put_jobs(self, site: int, layout: SiteLayout, offsets: Int64, stride: int) -> list[Job]:
        """Append what a site's jobs point to, and return them, not placed yet."""
        rows = np.stack([offsets[:-1], offsets[1:]], axis=1)
        found = [self._put_job(site, rows, stride, layout.channels, 1, summed=not layout.d_state)]
        if layout.d_state:
            apart = moment_segments(layout, offsets)
            found.append(self._put_job(site, apart, layout.d_state, layout.d_state, len(layout.names), states=True))
        return found

    def _put_job(
        self,
        site: int,
        segments: npt.NDArray[np.integer[Any]],
        stride: int,
        channels: int,
        groups: int,
        *,
        states: bool = False,
        summed: bool = True,
    ) -> Job:
        """A job of (rows, channels) values in segments of rows."""
        self.put(f"segments {self.jobs}", segments)
        self.jobs += 1
        return Job(
            site=site,
            states=states,
            stride=stride,
            channels=channels,
            groups=groups,
            lanes=min(32, power_of_two(-(-channels // ALONG))),
            emit=not states,
            summed=summed,
        )

    def to_device(
        self, device: torch.device, batch: SiteBatch, shapes: ctypes.Array[Shape], jobs: Sequence[Job]
    ) -> torch.Tensor:
        """Copy them there, shapes and jobs behind them, and let structs point to where they are."""
        words = (ctypes.sizeof(shapes) + len(jobs) * ctypes.sizeof(Job)) // 4
        there = torch.empty(self.size + words, dtype=torch.int32, device=device)
        base = there.data_ptr()
        for name in OF_SITE:
            for shape, place in zip(shapes, self.of_sites(name), strict=True):
                setattr(shape, name, base + 4 * place)
        for number, job in enumerate(jobs):
            job.segments = base + 4 * self.places[f"segments {number}"]
        for name in OF_BATCH:
            setattr(batch, name, base + 4 * self.places[name])
        batch.shapes = base + 4 * self.size
        batch.jobs = batch.shapes + ctypes.sizeof(shapes)
        structs = bytes(shapes) + b"".join(bytes(job) for job in jobs)
        flat = np.concatenate([*self.parts, np.frombuffer(structs, np.int32)])
        there.copy_(torch.from_numpy(flat), non_blocking=True)
        return there


def blocks_of(job: Job, documents: int) -> int:
    """How many blocks of `moments` a job has: each segment's, run of channels after run of channels."""
    return int(documents * job.groups * -(-job.channels // (ALONG * job.lanes)))


def power_of_two(least: int) -> int:
    """The smallest that is no less; 1 for 0."""
    return 1 << max(least - 1, 0).bit_length()
