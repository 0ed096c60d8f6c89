"""Counting on CUDA by compiled kernels; `counting.cu` and what it includes say how each works.

Counters are 16 bits wide in shared memory, one table per multiprocessor, and exact: what would overflow is moved out in
time. At each site the activations are read twice: for the counts, and for moments and outliers, whose threshold the
counts give. Sites that follow each other are counted by the same launches: a launch takes the host longer than a small
site takes the device, and a block of threads that goes on to the next site leaves no multiprocessor waiting. What
follows the counting is queued on a stream of its own, beside whatever the caller's stream goes on with.
"""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from quambase.collector.device_statistics import DeviceSite, merged_top
from quambase.collector.kernels import PATTERNS
from quambase.collector.packing import pack
from quambase.collector.site_batch import (
    CANDIDATES,
    COMBINED,
    FORMING,
    RANGES,
    REDUCED,
    SITES,
    Job,
    Shape,
    SiteBatch,
    Tables,
    blocks_of,
    power_of_two,
)
from quambase.collector.statistics import PROBABILITIES, SUMMARY_COLUMNS, Encoding, SiteLayout
from quambase.collector.torch_counter import DeviceCounter, TorchCounter
from quambase.model.cuda import Argument, CompilationFailed, Kernels, multiprocessors, shared_memory

Int64 = npt.NDArray[np.int64]

SOURCE = Path(__file__).with_name("counting.cu")
KERNELS = ("count_items", "reduce_counts", "summarise", "moments", "finish")
KINDS = {
    ("float16", torch.float16): 0,
    ("bfloat16", torch.bfloat16): 1,
    ("float16", torch.float32): 2,
    ("bfloat16", torch.float32): 3,
}
"""KIND in the source, by encoding and type of the activations; others are first brought to float32."""

TABLE = PATTERNS * 2
"""Bytes of a table of 16-bit counters."""

MOST_HALVINGS = 3
SEGMENTS = 1024
"""Documents times groups of one batch at most: each has a table of its own."""

PLANS = 256
"""How many batches' preparations are remembered."""


class Launcher(Protocol):
    """What runs the kernels of one KIND: `quambase.model.cuda.Kernels`."""

    def launch(
        self, name: str, grid: tuple[int, int], threads: int, arguments: Sequence[Argument], shared: int = 0
    ) -> None:
        """Queue a kernel."""


class _Waiting(NamedTuple):
    """A site that was added and is not counted yet; x, contiguous along its rows, of the batch's type."""

    into: DeviceSite
    x: torch.Tensor
    stride: int
    offsets: Int64
    first: int
    summaries: torch.Tensor


@dataclass
class _Queue:
    """The sites that wait; ``into``: what each is counted into, by id; ``segments``: the tables that they take."""

    sites: list[_Waiting] = field(default_factory=list)
    into: set[int] = field(default_factory=set)
    segments: int = 0


@dataclass(frozen=True, eq=False)
class _Plan:
    """What batches of equal layouts, offsets and strides share.

    batch    what of the struct does not differ
    tables   int32, on the device: what it points to
    members  of each site, as there
    rooms    the working memory that it needs: `_rooms`
    groups, summaries, jobs, finishing: blocks of `reduce_counts` (in y), `summarise`, `moments`, `finish`
    """

    batch: SiteBatch
    tables: torch.Tensor
    members: list[torch.Tensor]
    rooms: dict[str, tuple[int, torch.dtype]]
    groups: int
    summaries: int
    jobs: int
    finishing: int


@dataclass
class _Memory:
    """Working memory of one batch at a time: ``rooms``, by name; ``batches``: each plan's, pointing there; ``reads``:
    what the last one's kernels read, ``done``: when they have.
    """

    rooms: dict[str, torch.Tensor] = field(default_factory=dict)
    batches: dict[_Plan, SiteBatch] = field(default_factory=dict)
    reads: list[object] = field(default_factory=list)
    done: torch.cuda.Event | None = None

    def take(self, plan: _Plan, device: torch.device) -> SiteBatch:
        """A plan's batch. The one before has to be through with its memory first, on the current stream; what that one
        read may be given out again there.
        """
        if self.done:
            torch.cuda.current_stream(device).wait_event(self.done)
        self.reads = [plan]
        if plan not in self.batches:
            for name, (size, dtype) in plan.rooms.items():
                if name not in self.rooms or self.rooms[name].numel() < size:
                    self.rooms[name] = torch.zeros(power_of_two(size), dtype=dtype, device=device)
                    self.batches.clear()  # which hold the old address
            if len(self.batches) >= PLANS:
                self.batches.clear()
            batch = self.batches[plan] = SiteBatch.from_buffer_copy(plan.batch)
            for name in plan.rooms:
                setattr(batch, name, self.rooms[name].data_ptr())
        return SiteBatch.from_buffer_copy(self.batches[plan])


def halvings(shared: int) -> int:
    """How often the range of patterns is halved for a table to fit in ``shared`` bytes.

    CompilationFailed if that is too often.
    """
    for count in range(MOST_HALVINGS + 1):
        if TABLE >> count <= shared:
            return count
    raise CompilationFailed(f"{shared} bytes of shared memory hold no table; expected {TABLE >> MOST_HALVINGS} or more")


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device's counters for what follows the counting; one for all, which share the memory it frees."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CudaCounter:
    """A `DeviceCounter` by compiled kernels; owns their working memory, which every site shares.

    ``most``: outliers kept per group. ``shared``: bytes of shared memory a block may have (default: the device's);
    ``blocks``: how many count at a time (default: one per multiprocessor). CompilationFailed where they cannot be
    compiled.
    """

    def __init__(
        self,
        encoding: Encoding,
        most: int,
        device: torch.device,
        *,
        shared: int | None = None,
        blocks: int | None = None,
    ) -> None:
        if not 1 <= most <= CANDIDATES:
            raise ValueError(f"the number of outliers kept must lie in 1..{CANDIDATES}")
        self.encoding, self.most, self.device = encoding, most, device
        self._halvings = halvings(shared_memory(device) if shared is None else shared)
        self._blocks = blocks or multiprocessors(device)
        self._launchers: dict[int, Launcher] = {}
        self._plans: dict[tuple[tuple[SiteLayout, bytes, int], ...], _Plan] = {}
        self._waiting: defaultdict[int, _Queue] = defaultdict(_Queue)
        self._memories = deque([_Memory(), _Memory()])
        self._beside = _beside(device) if device.type == "cuda" else None
        self._probabilities = torch.from_numpy(PROBABILITIES).to(device)
        self._kernels(KINDS[encoding.name, encoding.torch_dtype])  # so that a failure is told at once

    def _kernels(self, kind: int) -> Launcher:
        if kind not in self._launchers:
            defines = {"KIND": kind, "HALVINGS": self._halvings}
            kernels = Kernels(SOURCE, KERNELS, defines, self.device)
            kernels.allow_shared("count_items", TABLE >> self._halvings)
            self._launchers[kind] = kernels
        return self._launchers[kind]

    def add(self, into: DeviceSite, x: torch.Tensor, offsets: Int64, first: int, summaries: torch.Tensor) -> None:
        """As `DeviceCounter.add`."""
        documents = len(offsets) - 1
        most = max(1, SEGMENTS // len(into.layout.names))
        if documents <= most:
            self._add(into, x, offsets, first, summaries)
            return
        for start in range(0, documents, most):
            stop = min(start + most, documents)
            rows = x[offsets[start] : offsets[stop]]
            self._add(into, rows, offsets[start : stop + 1] - offsets[start], first + start, summaries[start:stop])

    def _add(self, into: DeviceSite, x: torch.Tensor, offsets: Int64, first: int, summaries: torch.Tensor) -> None:
        kind = KINDS.get((self.encoding.name, x.dtype))
        if kind is None:
            x, kind = x.float(), KINDS[self.encoding.name, torch.float32]
        rows, channels = x.shape
        stride, along = x.stride()
        if along != 1 or (rows > 1 and stride < channels):
            x = x.contiguous()
            stride = channels
        segments = (len(offsets) - 1) * len(into.layout.names)
        waiting = self._waiting[kind]
        if len(waiting.sites) == SITES or waiting.segments + segments > SEGMENTS or id(into) in waiting.into:
            self._count(kind)
            waiting = self._waiting[kind]
        waiting.sites.append(_Waiting(into, x, stride if rows > 1 else channels, offsets, first, summaries))
        waiting.into.add(id(into))
        waiting.segments += segments

    def flush(self, *, partly: bool = False) -> None:
        """As `DeviceCounter.flush`."""
        for kind in list(self._waiting):
            # As many more might not fit beside them.
            if not partly or 2 * len(self._waiting[kind].sites) > SITES:
                self._count(kind)
        if not partly and self._beside:
            torch.cuda.current_stream(self.device).wait_stream(self._beside)

    def _count(self, kind: int) -> None:
        """Queue the counting of what waits of a kind."""
        waiting = self._waiting.pop(kind).sites
        if not waiting:
            return
        plan = self._plan(waiting)
        launch = self._kernels(kind).launch
        memory = self._memories[0]
        self._memories.rotate()
        batch = memory.take(plan, self.device)
        memory.reads.append(waiting)
        tops: list[tuple[DeviceSite, torch.Tensor]] = []
        for number, one in enumerate(waiting):
            site, into = batch.sites[number], one.into
            for name, address in into.addresses.items():
                setattr(site, name, address)
            site.x, site.first, site.summaries = one.x.data_ptr(), one.first, one.summaries.data_ptr()
            if into.calls:
                tops.append((into, torch.empty_like(into.top)))
                memory.reads.append(tops[-1])
                site.top = tops[-1][1].data_ptr()
            if into.layout.d_state:
                # The outliers are of the rows as counted; the moments are of each group's channels apart.
                states = one.x.reshape(len(one.offsets) - 1, into.layout.d_state, -1).transpose(1, 2)
                apart = states.index_select(1, plan.members[number])
                memory.reads.append(apart)
                site.states = apart.data_ptr()
        arguments = [batch]
        launch("count_items", (self._blocks, 1), 1024, arguments, TABLE >> self._halvings)
        if self._beside:
            self._beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._beside):  # nothing else than the current one where there is none
            launch("reduce_counts", (PATTERNS // REDUCED, plan.groups), 256, arguments)
            launch("summarise", (plan.summaries, 1), 1024, arguments)
            launch("moments", (plan.jobs, 1), FORMING, arguments)
            launch("finish", (plan.finishing, 1), 256, arguments)
            for into, top in tops:
                into.top.copy_(merged_top(into.top, top))
            if self._beside:
                memory.done = self._beside.record_event()
        for one in waiting:
            one.into.calls += 1

    def _plan(self, waiting: Sequence[_Waiting]) -> _Plan:
        key = tuple((one.into.layout, one.offsets.tobytes(), one.stride) for one in waiting)
        if key not in self._plans:
            made = self._new_plan([(one.into.layout, one.offsets, one.stride) for one in waiting])
            if len(self._plans) >= PLANS:
                self._plans.clear()
            self._plans[key] = made
        return self._plans[key]

    def _new_plan(self, sites: Sequence[tuple[SiteLayout, Int64, int]]) -> _Plan:
        packing = pack([(layout, offsets) for layout, offsets, _ in sites], self._blocks)
        tables = Tables()
        spills = tables.put_items(packing, [(layout, stride) for layout, _, stride in sites])
        shapes, jobs = (Shape * len(sites))(), list[Job]()
        firsts = {name: [0] for name in ("group_first", "summary_first", "finish_first", "job_first")}
        segments = partial = 0
        for number, (layout, offsets, stride) in enumerate(sites):
            groups, documents = len(layout.names), len(offsets) - 1
            first_group = firsts["group_first"][-1]
            shapes[number] = Shape(stride, documents, groups, first_group, segments)
            segments += groups * documents
            tables.put_site(number, layout, offsets)
            for job in tables.put_jobs(number, layout, offsets, stride):
                job.partial = partial
                partial += documents * job.groups * job.channels
                jobs.append(job)
                firsts["job_first"].append(firsts["job_first"][-1] + blocks_of(job, documents))
            firsts["group_first"].append(first_group + groups)
            parts = documents if groups == 1 else documents * (groups + 1)
            firsts["summary_first"].append(firsts["summary_first"][-1] + parts + groups)
            firsts["finish_first"].append(firsts["finish_first"][-1] + groups + -(-layout.moments // COMBINED))
        batch = SiteBatch(
            probabilities=self._probabilities.data_ptr(),
            quantiles=len(SUMMARY_COLUMNS) - 1,
            most=self.most,
            infinity=self.encoding.infinity,
            limit=float(self.encoding.limit),
        )
        for name, starts in firsts.items():
            array = getattr(batch, name)
            # A part that is not used begins at the end, where no block is.
            array[:] = [*starts, *[starts[-1]] * (len(array) - len(starts))]
        there = tables.to_device(self.device, batch, shapes, jobs)
        members = [
            there[place : place + layout.channels]
            for place, (layout, _, _) in zip(tables.of_sites("members"), sites, strict=True)
        ]
        blocks = (firsts[name][-1] for name in ("group_first", "summary_first", "job_first", "finish_first"))
        rooms = _rooms(len(packing.items), spills, firsts["group_first"][-1], partial)
        return _Plan(batch, there, members, rooms, *blocks)


def _rooms(items: int, spills: int, groups: int, partial: int) -> dict[str, tuple[int, torch.dtype]]:
    """The working memory of a batch: elements and type of what its struct points to, by name."""
    return {
        "slots": (items * PATTERNS // 2, torch.int32),
        "ranges": (items * RANGES, torch.int32),
        "spill_count": (items, torch.int32),
        "spills": (spills + 1, torch.int32),
        "call": (groups * PATTERNS, torch.int64),
        "call_ranges": (groups * RANGES, torch.int64),
        "thresholds": (4 * groups, torch.int32),
        "candidates": (2 * CANDIDATES * groups, torch.int64),
        "candidate_count": (groups, torch.int32),
        "partial64": (3 * partial, torch.float64),
        "partial32": (2 * partial, torch.float32),
        "partial_counts": (3 * partial, torch.int32),
    }


def choose_counter(encoding: Encoding, most: int, device: torch.device) -> DeviceCounter:
    """Compiled kernels on CUDA; plain PyTorch elsewhere, and, after a warning on stderr, where they do not compile."""
    if device.type == "cuda":
        try:
            return CudaCounter(encoding, most, device)
        except CompilationFailed as error:
            print(f"warning: activations are counted in plain PyTorch, which is slow: {error}", file=sys.stderr)
    return TorchCounter(encoding, most, device)
