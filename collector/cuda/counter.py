"""Counting on CUDA by compiled kernels; `counting.cu` and its headers explain each.

Counters are 16 bits wide in shared memory, one table per multiprocessor, and exact: they are reduced before they
overflow. At each site the activations are read twice: for the counts, and for moments and outliers, whose threshold the
counts give. Consecutive sites are counted by the same launches: a launch takes the host longer than a small site takes
the device, and a thread block that continues with the next site leaves no multiprocessor idle. The kernels after the
counting run on a second stream, in parallel with the caller's.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from quambase.collector.cuda.packing import moment_segments, pack
from quambase.collector.cuda.site_batch import (
    CANDIDATES,
    COMBINED,
    FORMING,
    OF_BATCH,
    RANGES,
    REDUCED,
    SITE,
    SITES,
    Job,
    LayoutTables,
    Shape,
    SiteBatch,
    Tables,
    blocks_of,
    item_rows,
    jobs_of,
    power_of_two,
    to_device,
)
from quambase.collector.cuda.torch_counter import TorchCounter
from quambase.collector.host.kernels import PATTERNS
from quambase.collector.statistics import (
    PROBABILITIES,
    SUMMARY_COLUMNS,
    Counter,
    Encoding,
    SiteLayout,
    SiteStatistics,
    merged_top,
    states_by_channel,
)
from quambase.model.cuda.compiler import CompilationFailed, Kernels, multiprocessors, shared_memory
from quambase.schema.progress import remark
from quambase.schema.values.arrays import Int64

SOURCE = Path(__file__).with_name("counting.cu")
KERNELS = ("count_items", "reduce_counts", "summarise", "moments", "finish")
KINDS = {
    ("float16", torch.float16): 0,
    ("bfloat16", torch.bfloat16): 1,
    ("float16", torch.float32): 2,
    ("bfloat16", torch.float32): 3,
}
"""KIND in the source, by encoding and dtype of the activations; other dtypes are converted to float32."""

TABLE = PATTERNS * 2
"""Bytes of a table of 16-bit counters."""

MOST_HALVINGS = 3
SEGMENTS = 1024
"""Largest number of segments, documents times groups, of a batch: each has its own table."""

PLANS = 256
"""Number of plans that are cached."""


class _PendingSite(NamedTuple):
    """A site that was added but not counted yet; x is contiguous along its rows and has the batch's dtype."""

    into: SiteStatistics
    x: torch.Tensor
    stride: int
    offsets: Int64
    first: int
    summaries: torch.Tensor


@dataclass
class _Queue:
    """The pending sites; ``into``: ids of the statistics that they are counted into; ``segments``: the tables that they
    need.
    """

    sites: list[_PendingSite] = field(default_factory=list)
    into: set[int] = field(default_factory=set)
    segments: int = 0


@dataclass(frozen=True, eq=False)
class _Plan:
    """What batches of equal layouts, offsets and strides have in common.

    batch    the struct without the addresses that differ
    tables   int32 on the device: with ``layouts``, the arrays that the struct points to
    buffers  the working memory that it needs: `_buffer_sizes`
    groups, summaries, jobs, finishing: numbers of blocks of `reduce_counts` (in y), `summarise`, `moments`, `finish`
    """

    batch: SiteBatch
    tables: torch.Tensor
    layouts: list[LayoutTables]
    buffers: dict[str, tuple[int, torch.dtype]]
    groups: int
    summaries: int
    jobs: int
    finishing: int


class _Memory:
    """Working memory of one batch at a time. ``buffers``: by name; ``batches``: each plan's struct with their
    addresses; ``reads``: the inputs of the last batch's kernels. Its events: the end of that batch's counting, and of
    all its kernels.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.buffers: dict[str, torch.Tensor] = {}
        self.batches: dict[_Plan, SiteBatch] = {}
        self.reads: list[object] = []
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]

    def acquire(self, plan: _Plan, stream: torch.cuda.Stream | None) -> SiteBatch:
        """A plan's struct. Waits on ``stream``, the current one, until the previous batch has finished with this
        memory; its inputs may then be freed.
        """
        if stream and self._events:
            stream.wait_event(self._events[1])
        self.reads = [plan]
        if plan not in self.batches:
            for name, (size, dtype) in plan.buffers.items():
                if name not in self.buffers or self.buffers[name].numel() < size:
                    self.buffers[name] = torch.zeros(power_of_two(size), dtype=dtype, device=self._device)
                    self.batches.clear()  # they contain the old address
            if len(self.batches) >= PLANS:
                self.batches.clear()
            batch = self.batches[plan] = SiteBatch.from_buffer_copy(plan.batch)
            for name in plan.buffers:
                setattr(batch, name, self.buffers[name].data_ptr())
        return self.batches[plan]

    def mark_counted(self, stream: torch.cuda.Stream | None, beside: torch.cuda.Stream | None) -> int | None:
        """Let ``beside`` wait for the counting, which is queued on ``stream``; the handle of ``beside``, for the later
        kernels.
        """
        if not (stream and beside and self._events):
            return None
        self._events[0].record(stream)
        beside.wait_event(self._events[0])
        return int(beside.cuda_stream)

    def mark_done(self, beside: torch.cuda.Stream | None) -> None:
        """Everything that uses the memory is queued."""
        if beside and self._events:
            self._events[1].record(beside)


def halvings(shared: int) -> int:
    """How often the range of patterns must be halved for a table to fit in ``shared`` bytes.

    CompilationFailed: more than MOST_HALVINGS times.
    """
    for count in range(MOST_HALVINGS + 1):
        if TABLE >> count <= shared:
            return count
    raise CompilationFailed(f"{shared} bytes of shared memory hold no table; expected {TABLE >> MOST_HALVINGS} or more")


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """The second stream of a device's counters. All share it, since freed memory is reused only on its own stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CudaCounter:
    """A `Counter` by compiled kernels; owns their working memory, which every site shares.

    ``most``: outliers per group. ``shared``: bytes of shared memory that a block may use (default: the device's);
    ``blocks``: how many count at a time (default: one per multiprocessor). CompilationFailed: they do not compile.
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
            raise ValueError(f"the number of outliers must be in 1..{CANDIDATES}")
        self.encoding, self.most, self.device = encoding, most, device
        self._halvings = halvings(shared_memory(device) if shared is None else shared)
        self._blocks = blocks or multiprocessors(device)
        self._launchers: dict[int, Kernels] = {}
        self._plans: dict[tuple[tuple[SiteLayout, bytes, int], ...], _Plan] = {}
        self._pending: defaultdict[int, _Queue] = defaultdict(_Queue)
        self._memories = deque([_Memory(device), _Memory(device)])
        self._layouts: dict[SiteLayout, LayoutTables] = {}
        self._beside = _beside(device) if device.type == "cuda" else None
        self._current: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._index = torch.cuda.current_device() if device.index is None else device.index
        self._probabilities = torch.from_numpy(PROBABILITIES).to(device)
        self._kernels(KINDS[encoding.name, encoding.torch_dtype])  # now, so that a failure is reported at once

    def _kernels(self, kind: int) -> Kernels:
        if kind not in self._launchers:
            defines = {"KIND": kind, "HALVINGS": self._halvings}
            kernels = Kernels(SOURCE, KERNELS, defines, self.device)
            kernels.allow_shared("count_items", TABLE >> self._halvings)
            self._launchers[kind] = kernels
        return self._launchers[kind]

    def add(self, into: SiteStatistics, x: torch.Tensor, offsets: Int64, first: int, summaries: torch.Tensor) -> None:
        """As `Counter.add`."""
        documents = len(offsets) - 1
        most = max(1, SEGMENTS // len(into.layout.names))
        if documents <= most:
            self._add(into, x, offsets, first, summaries)
            return
        for start in range(0, documents, most):
            stop = min(start + most, documents)
            rows = x[offsets[start] : offsets[stop]]
            self._add(into, rows, offsets[start : stop + 1] - offsets[start], first + start, summaries[start:stop])

    def _add(self, into: SiteStatistics, x: torch.Tensor, offsets: Int64, first: int, summaries: torch.Tensor) -> None:
        kind = KINDS.get((self.encoding.name, x.dtype))
        if kind is None:
            x, kind = x.float(), KINDS[self.encoding.name, torch.float32]
        rows, channels = x.shape
        stride, along = x.stride()
        if along != 1 or (rows > 1 and stride < channels):
            x = x.contiguous()
            stride = channels
        segments = (len(offsets) - 1) * len(into.layout.names)
        pending = self._pending[kind]
        if len(pending.sites) == SITES or pending.segments + segments > SEGMENTS or id(into) in pending.into:
            self._count(kind)
            pending = self._pending[kind]
        pending.sites.append(_PendingSite(into, x, stride if rows > 1 else channels, offsets, first, summaries))
        pending.into.add(id(into))
        pending.segments += segments

    def flush(self, *, partly: bool = False) -> None:
        """As `Counter.flush`."""
        for kind in list(self._pending):
            # As many more might not fit into the same batch.
            if not partly or 2 * len(self._pending[kind].sites) > SITES:
                self._count(kind)
        stream = self._stream()
        if not partly and stream and self._beside:
            stream.wait_stream(self._beside)

    def _stream(self) -> torch.cuda.Stream | None:
        """The current stream; torch.cuda.current_stream takes as long as queueing two kernels."""
        if self.device.type != "cuda":
            return None
        raw = torch._C._cuda_getCurrentRawStream(self._index)
        if self._current is None or self._current.cuda_stream != raw:
            self._current = torch.cuda.current_stream(self.device)
        return self._current

    def _count(self, kind: int) -> None:
        """Queue the counting of a kind's pending sites."""
        pending = self._pending.pop(kind).sites
        if not pending:
            return
        plan = self._plan(pending)
        launch = self._kernels(kind).launch
        memory, stream = self._memories[0], self._stream()
        self._memories.rotate()
        batch = memory.acquire(plan, stream)
        memory.reads.append(pending)
        tops: list[tuple[SiteStatistics, torch.Tensor]] = []
        for number, (into, x, _, _, first, summaries) in enumerate(pending):
            counts, top, moments = into.addresses
            if into.calls:
                tops.append((into, torch.empty_like(into.top)))
                memory.reads.append(tops[-1])
                top = tops[-1][1].data_ptr()
            states = 0
            if into.layout.d_state:
                # Outliers refer to the rows as counted; moments are formed over each group's own channels.
                apart = states_by_channel(x, into.layout.d_state).index_select(1, plan.layouts[number].members)
                memory.reads.append(apart)
                states = apart.data_ptr()
            place = SiteBatch.sites.offset + number * SITE.size
            SITE.pack_into(batch, place, x.data_ptr(), states, first, counts, summaries.data_ptr(), top, *moments)
            into.calls += 1
        arguments = [batch]
        launch("count_items", (self._blocks, 1), 1024, arguments, TABLE >> self._halvings)
        beside = memory.mark_counted(stream, self._beside)
        launch("reduce_counts", (PATTERNS // REDUCED, plan.groups), 256, arguments, 0, beside)
        launch("summarise", (plan.summaries, 1), 1024, arguments, 0, beside)
        launch("moments", (plan.jobs, 1), FORMING, arguments, 0, beside)
        launch("finish", (plan.finishing, 1), 256, arguments, 0, beside)
        if tops:
            with torch.cuda.stream(self._beside):  # the current one if it is None
                for into, later in tops:
                    into.top.copy_(merged_top(into.top, later))
        memory.mark_done(self._beside)

    def _plan(self, pending: Sequence[_PendingSite]) -> _Plan:
        key = tuple((one.into.layout, one.offsets.tobytes(), one.stride) for one in pending)
        if key not in self._plans:
            made = self._new_plan([(one.into.layout, one.offsets, one.stride) for one in pending])
            if len(self._plans) >= PLANS:
                self._plans.clear()
            self._plans[key] = made
        return self._plans[key]

    def _new_plan(self, sites: Sequence[tuple[SiteLayout, Int64, int]]) -> _Plan:
        packing = pack([(layout, offsets) for layout, offsets, _ in sites], self._blocks)
        items, spill_limits = item_rows(packing, [(layout, stride) for layout, _, stride in sites])
        layouts = [self._layout(layout) for layout, _, _ in sites]
        tables = Tables()
        of_batch = items, packing.block_first, packing.segment_first, np.cumsum([0, *spill_limits])
        places = {name: tables.append(values) for name, values in zip(OF_BATCH, of_batch, strict=True)}
        shapes, jobs = (Shape * len(sites))(), list[Job]()
        firsts = {name: [0] for name in ("group_first", "summary_first", "finish_first", "job_first")}
        segments = partial = 0
        known: dict[bytes, tuple[int, int]] = {}  # by offsets: places of offsets and segments, which most sites share
        for number, ((layout, offsets, stride), of_layout) in enumerate(zip(sites, layouts, strict=True)):
            groups, documents = len(layout.names), len(offsets) - 1
            first_group = firsts["group_first"][-1]
            lengths = offsets.tobytes()
            if lengths not in known:
                known[lengths] = tables.append(offsets), tables.append(np.stack([offsets[:-1], offsets[1:]], axis=1))
            place, whole = known[lengths]
            shapes[number] = Shape(stride, documents, groups, first_group, segments, place, **of_layout.places)
            segments += groups * documents
            apart = tables.append(moment_segments(layout, offsets)) if layout.d_state else 0
            for job in jobs_of(number, layout, stride, whole, apart):
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
            # Unused parts begin at the end, where there are no blocks.
            array[:] = [*starts, *[starts[-1]] * (len(array) - len(starts))]
        there = to_device(tables, self.device, batch, places, shapes, jobs)
        buffers = _buffer_sizes(len(packing.items), int(spill_limits.sum()), firsts["group_first"][-1], partial)
        blocks = (firsts[name][-1] for name in ("group_first", "summary_first", "job_first", "finish_first"))
        return _Plan(batch, there, layouts, buffers, *blocks)

    def _layout(self, layout: SiteLayout) -> LayoutTables:
        if layout not in self._layouts:
            self._layouts[layout] = LayoutTables(layout, self.device)
        return self._layouts[layout]


def _buffer_sizes(items: int, spills: int, groups: int, partial: int) -> dict[str, tuple[int, torch.dtype]]:
    """The working memory of a batch: number of elements and dtype of each buffer that its struct points to."""
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


def choose_counter(encoding: Encoding, most: int, device: torch.device) -> Counter:
    """Compiled kernels on CUDA, else plain PyTorch; also, after a warning on stderr, if the kernels do not compile."""
    if device.type == "cuda":
        try:
            return CudaCounter(encoding, most, device)
        except CompilationFailed as error:
            remark(f"warning: activations are counted in plain PyTorch, which is slow: {error}")
    return TorchCounter(encoding, most, device)
