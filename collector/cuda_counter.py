"""Counting on CUDA by compiled kernels; `counting.cu` says how each works.

Counters are 16 bits wide in shared memory, one table per multiprocessor, and exact: what would overflow is moved out in
time. At each site the activations are read twice: for the counts, and for moments and outliers, whose threshold the
counts give.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from quambase.collector.device_statistics import DeviceSite, merged_top
from quambase.collector.kernels import PATTERNS
from quambase.collector.packing import moment_segments, pack
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
CANDIDATES = 1024
"""As in the source: outliers of a group held before they are sorted."""

SEGMENTS = 1024
"""Documents times groups of one call at most: each has a table of its own."""

PLANS = 256
"""How many calls' preparations are remembered."""

_FIELDS: tuple[tuple[str, type], ...] = (
    ("x", ctypes.c_void_p),
    ("stride", ctypes.c_int64),
    *((name, ctypes.c_int64) for name in ("documents", "groups", "most", "first", "infinity")),
    *((name, ctypes.c_void_p) for name in ("offsets", "runs", "run_first", "items", "block_first", "segment_first")),
    *((name, ctypes.c_void_p) for name in ("members", "edges", "group_of", "place_of")),
    *(
        (name, ctypes.c_void_p)
        for name in ("slots", "spill_first", "spill_count", "spills", "call", "counts", "probabilities")
    ),
    ("quantiles", ctypes.c_int64),
    *((name, ctypes.c_void_p) for name in ("summaries", "thresholds", "candidates", "candidate_count", "top")),
    ("emit", ctypes.c_int64),
    ("mx", ctypes.c_void_p),
    *((name, ctypes.c_int64) for name in ("mstride", "mchannels", "mgroups")),
    ("segments", ctypes.c_void_p),
    ("lanes", ctypes.c_int64),
    ("limit", ctypes.c_double),
    *((name, ctypes.c_void_p) for name in ("partial64", "partial32", "partial_counts")),
    ("summed", ctypes.c_int64),
    *((name, ctypes.c_void_p) for name in ("count", "lowest", "highest", "total", "squares", "mean_abs_max")),
    *((name, ctypes.c_void_p) for name in ("nonfinite", "overflow")),
)
_ADDRESSES = {name for name, kind in _FIELDS if kind is ctypes.c_void_p}


class Call(ctypes.Structure):
    """The source's struct of the same name."""

    _fields_ = list(_FIELDS)


class Launcher(Protocol):
    """What runs the kernels of one KIND: `quambase.model.cuda.Kernels`."""

    def launch(
        self, name: str, grid: tuple[int, int], threads: int, arguments: Sequence[Argument], shared: int = 0
    ) -> None:
        """Queue a kernel."""


@dataclass(frozen=True)
class _Moments:
    """How `moments` is launched for (rows, channels) values in segments of rows; the fields of `Call`."""

    mchannels: int
    mgroups: int
    segments: int
    lanes: int
    partial64: int
    partial32: int
    partial_counts: int
    grid: tuple[int, int]

    def set_in(self, call: Call) -> None:
        """Make a call's moments these."""
        call.mchannels, call.mgroups, call.segments, call.lanes = (
            self.mchannels,
            self.mgroups,
            self.segments,
            self.lanes,
        )
        call.partial64, call.partial32, call.partial_counts = self.partial64, self.partial32, self.partial_counts


@dataclass(frozen=True)
class _Plan:
    """What calls of equal layouts and offsets share: ``call`` has what does not differ, ``tables`` on the device are
    what it points to; ``states`` where moments are not of the rows as counted.
    """

    call: Call
    tables: dict[str, torch.Tensor]
    rows: _Moments
    states: _Moments | None
    reduce_grid: tuple[int, int]
    summarise_grid: tuple[int, int]
    finish_grid: tuple[int, int]


def halvings(shared: int) -> int:
    """How often the range of patterns is halved for a table to fit in ``shared`` bytes.

    CompilationFailed if that is too often.
    """
    for count in range(MOST_HALVINGS + 1):
        if TABLE >> count <= shared:
            return count
    raise CompilationFailed(f"{shared} bytes of shared memory hold no table; expected {TABLE >> MOST_HALVINGS} or more")


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()


class CudaCounter:
    """A `DeviceCounter` by compiled kernels; owns their working memory, which every site shares.

    ``most``: outliers kept per group. ``shared``: bytes of shared memory a block may have (default: the device's).
    CompilationFailed where they cannot be compiled.
    """

    def __init__(self, encoding: Encoding, most: int, device: torch.device, *, shared: int | None = None) -> None:
        if not 1 <= most <= CANDIDATES:
            raise ValueError(f"the number of outliers kept must lie in 1..{CANDIDATES}")
        self.encoding, self.most, self.device = encoding, most, device
        self._halvings = halvings(shared_memory(device) if shared is None else shared)
        self._blocks = multiprocessors(device)
        self._launchers: dict[int, Launcher] = {}
        self._plans: dict[tuple[SiteLayout, bytes], _Plan] = {}
        self._scratch: dict[str, torch.Tensor] = {}
        self._probabilities = torch.from_numpy(PROBABILITIES).to(device)
        self._kernels(KINDS[encoding.name, encoding.torch_dtype])  # so that a failure is told at once

    def _kernels(self, kind: int) -> Launcher:
        if kind not in self._launchers:
            defines = {"KIND": kind, "HALVINGS": self._halvings}
            kernels = Kernels(SOURCE, KERNELS, defines, self.device)
            kernels.allow_shared("count_items", TABLE >> self._halvings)
            self._launchers[kind] = kernels
        return self._launchers[kind]

    def _room(self, name: str, size: int, dtype: torch.dtype, *, zero: bool = False) -> int:
        """The address of working memory for ``size`` elements. torch gives freed memory out in the stream's order."""
        held = self._scratch.get(name)
        if held is None or held.numel() < size:
            held = torch.empty(_power_of_two(size), dtype=dtype, device=self.device)
            if zero:
                held.zero_()
            self._scratch[name] = held
            self._plans.clear()  # which hold the old address
        return held.data_ptr()

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
        layout = into.layout
        kind = KINDS.get((self.encoding.name, x.dtype))
        if kind is None:
            x, kind = x.float(), KINDS[self.encoding.name, torch.float32]
        rows, channels = x.shape
        stride, along = x.stride()
        if along != 1 or (rows > 1 and stride < channels):
            x = x.contiguous()
            stride = channels
        plan = self._plan(layout, offsets)
        launch = self._kernels(kind).launch
        top = torch.empty_like(into.top) if into.calls else into.top

        call = Call.from_buffer_copy(plan.call)
        call.x = call.mx = x.data_ptr()
        call.stride = call.mstride = stride if rows > 1 else channels
        call.first, call.summaries, call.top = first, summaries.data_ptr(), top.data_ptr()
        for name, address in into.addresses.items():
            setattr(call, name, address)
        arguments = [call]
        launch("count_items", (self._blocks, 1), 1024, arguments, TABLE >> self._halvings)
        launch("reduce_counts", plan.reduce_grid, 256, arguments)
        launch("summarise", plan.summarise_grid, 1024, arguments)
        launch("moments", plan.rows.grid, 256, arguments)
        if plan.states:
            # The outliers were of the rows as counted; the moments are of each group's channels apart.
            states = x.reshape(len(offsets) - 1, layout.d_state, channels).transpose(1, 2)
            states = states.index_select(1, plan.tables["members"]).reshape(-1, layout.d_state)
            plan.states.set_in(call)
            call.mx, call.mstride, call.emit, call.summed = states.data_ptr(), layout.d_state, 0, 1
            launch("moments", plan.states.grid, 256, arguments)
            call.emit = 1
        launch("finish", plan.finish_grid, 256, arguments)
        if into.calls:
            into.top.copy_(merged_top(into.top, top))
        into.calls += 1

    def _plan(self, layout: SiteLayout, offsets: Int64) -> _Plan:
        key = layout, offsets.tobytes()
        if key not in self._plans:
            made = self._new_plan(layout, offsets)
            if len(self._plans) >= PLANS:
                self._plans.clear()
            self._plans[key] = made
        return self._plans[key]

    def _new_plan(self, layout: SiteLayout, offsets: Int64) -> _Plan:
        groups, documents = len(layout.names), len(offsets) - 1
        packing = pack(layout, offsets, self._blocks)
        runs, run_first = layout.runs
        members = np.concatenate([layout.members(g) for g in range(groups)])
        widths = np.diff(layout.edges)
        group_of, place_of = np.empty(layout.channels, np.int64), np.empty(layout.channels, np.int64)
        for g in range(groups):
            group_of[layout.members(g)] = g
            place_of[layout.members(g)] = np.arange(layout.edges[g + 1] - layout.edges[g])
        named: dict[str, npt.NDArray[np.integer[Any]]] = {
            "offsets": offsets,
            "runs": runs,
            "run_first": run_first,
            "items": packing.items,
            "block_first": packing.block_first,
            "segment_first": packing.segment_first,
            "spill_first": np.cumsum(
                [0, *(packing.items[:, 2].astype(np.int64) * widths[packing.items[:, 0]] // 0x8000)]
            ),
            "members": members,
            "edges": np.array(layout.edges),
            "group_of": group_of,
            "place_of": place_of,
            "row_segments": np.stack([offsets[:-1], offsets[1:]], axis=1),
            "moment_segments": moment_segments(layout, offsets),
        }
        flat = np.concatenate([values.ravel() for values in named.values()]).astype(np.int32)
        # One copy, and none that waits for the device.
        there = torch.from_numpy(flat).to(self.device, non_blocking=True)
        sizes = [values.size for values in named.values()]
        tables = dict(zip(named, torch.split(there, sizes), strict=True))
        rows = self._moments(documents, layout.channels, 1, tables["row_segments"])
        states = self._moments(documents, layout.d_state, groups, tables["moment_segments"]) if layout.d_state else None
        call = Call(
            documents=documents,
            groups=groups,
            most=self.most,
            infinity=self.encoding.infinity,
            quantiles=len(SUMMARY_COLUMNS) - 1,
            limit=float(self.encoding.limit),
            probabilities=self._probabilities.data_ptr(),
            slots=self._room("slots", len(packing.items) * PATTERNS // 2, torch.int32),
            spills=self._room("spills", int(named["spill_first"][-1]) + 1, torch.int32),
            call=self._room("call", groups * PATTERNS, torch.int64),
            thresholds=self._room("thresholds", 4 * groups, torch.int32),
            candidates=self._room("candidates", 2 * CANDIDATES * groups, torch.int64),
            spill_count=self._room("spill_count", len(packing.items) + 1, torch.int32),
            candidate_count=self._room("candidate_count", groups, torch.int32, zero=True),
            emit=1,
            summed=int(not layout.d_state),
            **{name: values.data_ptr() for name, values in tables.items() if name in _ADDRESSES},
        )
        rows.set_in(call)
        return _Plan(
            call,
            tables,
            rows,
            states,
            (PATTERNS // 2 // 256, groups),
            ((documents if groups == 1 else documents * (groups + 1)) + groups, 1),
            (groups + -(-layout.moments // 256), 1),
        )

    def _moments(self, documents: int, channels: int, groups: int, segments: torch.Tensor) -> _Moments:
        count = documents * groups
        lanes = min(32, _power_of_two(-(-channels // 2)))
        return _Moments(
            channels,
            groups,
            segments.data_ptr(),
            lanes,
            self._room("partial64", 3 * count * channels, torch.float64),
            self._room("partial32", 2 * count * channels, torch.float32),
            self._room("partial_counts", 3 * count * channels, torch.int32),
            (count, -(-channels // (2 * lanes))),
        )


def choose_counter(encoding: Encoding, most: int, device: torch.device) -> DeviceCounter:
    """Compiled kernels on CUDA; plain PyTorch elsewhere, and, after a warning on stderr, where they do not compile."""
    if device.type == "cuda":
        try:
            return CudaCounter(encoding, most, device)
        except CompilationFailed as error:
            print(f"warning: activations are counted in plain PyTorch, which is slow: {error}", file=sys.stderr)
    return TorchCounter(encoding, most, device)
