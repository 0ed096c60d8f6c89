"""The tap of a collection on a device: counts there, and brings to the host, once a block, what its tables need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from quambase.collector.device_statistics import DeviceStatistics
from quambase.collector.gather import Gather
from quambase.collector.kernels import gather_rows
from quambase.collector.plan import PlannedDocument
from quambase.collector.recorder import PIECE, Positions, Rows, activations_rows, check_seen, documents_rows
from quambase.collector.rows import Key, many_keyed_rows
from quambase.collector.statistics import SUMMARY_COLUMNS, SiteLayout
from quambase.collector.torch_counter import DeviceCounter
from quambase.schema.tables import ACTIVATIONS, as_made

Place = tuple[int, int]
"""Document and position."""


class KeptRows(NamedTuple):
    """Raw values (places, width) of a site: float32 on the host where all are kept, otherwise at ``start`` of a block's
    values.
    """

    places: Sequence[Place]
    width: int
    start: int = 0
    rows: torch.Tensor | None = None

    def of(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Them, out of the block's values."""
        if self.rows is not None:
            found: npt.NDArray[np.float32] = self.rows.numpy()
            return found
        return values[self.start : self.start + len(self.places) * self.width].reshape(-1, self.width)


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's blocks are copied to the host."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class ObservedBlock:
    """What a block's tables are made of, on its way to the host: ``values`` is complete once ``copied`` has passed.

    values    float32, flat: summaries of every layout in turn, then what was gathered
    same      a site whose summaries are another's, and which
    kept      in the order in which they were brought
    """

    run: str
    documents: Sequence[PlannedDocument]
    layouts: Mapping[Key, SiteLayout]
    values: torch.Tensor
    copied: torch.cuda.Event | None
    same: Mapping[Key, Key]
    kept: Mapping[Key, Sequence[KeptRows]]

    def is_here(self) -> bool:
        """Whether all is copied, and so folded into the run's statistics."""
        return self.copied is None or bool(self.copied.query())  # type: ignore[no-untyped-call]

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """The rows of `documents` and of `activations`; waits until all is here."""
        if self.copied:
            self.copied.synchronize()
        values = self.values.numpy()
        sizes = [
            len(self.documents) * (len(layout.names) + 1) * len(SUMMARY_COLUMNS) for layout in self.layouts.values()
        ]
        starts = dict(zip(self.layouts, np.cumsum([0, *sizes]).tolist(), strict=False))
        starts |= {key: starts[source] for key, source in self.same.items()}
        documents = documents_rows(
            self.run, self.documents, self.layouts, values, [starts[key] for key in self.layouts]
        )
        parts = [part for parts in self.kept.values() for part in parts]
        size = sum(len(part.places) * part.width for part in parts)
        if size <= PIECE and not any(part.rows is not None for part in parts):
            return documents, gathered_rows(self.run, self.layouts, self.kept, values)
        kept: dict[Key, Rows] = {}
        for key, of_site in self.kept.items():
            rows = [part.of(values) for part in of_site]
            places = [place for part in of_site for place in part.places]
            kept[key] = places, rows[0] if len(rows) == 1 else np.concatenate(rows)
        return documents, activations_rows(self.run, self.layouts, kept)


def gathered_rows(
    run: str,
    layouts: Mapping[Key, SiteLayout],
    kept: Mapping[Key, Sequence[KeptRows]],
    values: npt.NDArray[np.float32],
) -> pa.Table:
    """`activations_rows` of a block's values as they are, PIECE at most, in one go: the thread that makes this table
    has kernels to queue.
    """
    keys = sorted(key for key in kept if any(part.places for part in kept[key]))
    if not keys:
        return as_made(ACTIVATIONS).empty_table()
    order = _groups_order(tuple((key, layouts[key], kept[key][0].width) for key in keys))
    # Of every site's places: where its values begin, and what it is called.
    known: dict[int, npt.NDArray[np.int64]] = {}
    bases, places, counts = [], [], []
    for key in keys:
        for part in kept[key]:
            if id(part.places) not in known:  # of whole models, few are there
                known[id(part.places)] = np.array(part.places, np.int64).reshape(-1, 2)
            places.append(known[id(part.places)])
            bases.append(part.start + part.width * np.arange(len(part.places)))
        counts.append(sum(len(part.places) for part in kept[key]))
    # Every group of a site has all of the site's places, one after the other.
    rows = np.array(counts)[order.sites]
    ends = np.cumsum(rows)
    firsts = (np.cumsum([0, *counts])[order.sites] - (ends - rows)).repeat(rows)
    mine = firsts + np.arange(ends[-1])
    sizes = order.sizes.repeat(rows)
    offsets = np.zeros(sizes.size + 1, np.int32)
    np.cumsum(sizes, dtype=np.int32, out=offsets[1:])
    out = np.empty(offsets[-1], np.float32)
    gather_rows(values, np.concatenate(bases)[mine], order.firsts.repeat(rows), sizes, order.columns, out)
    named = np.concatenate(places)[mine]
    columns: dict[str, object] = {
        "document": named[:, 0].astype(np.int32),
        "position": named[:, 1].astype(np.int32),
        "values": pa.ListArray.from_arrays(offsets, out),
    }
    return many_keyed_rows(run, order.keys, rows.tolist(), columns, ACTIVATIONS)


@dataclass(frozen=True)
class _GroupsOrder:
    """The groups of some sites in the order of the tables.

    keys     and their names
    sites    (groups,) the number of each one's site
    columns  flat: which values of a place are a group's, ``sizes`` (groups,) of them from ``firsts`` (groups,) on
    """

    keys: list[tuple[Key, str]]
    sites: npt.NDArray[np.int64]
    firsts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int32]


@lru_cache(2)
def _groups_order(sites: tuple[tuple[Key, SiteLayout, int], ...]) -> _GroupsOrder:
    """Kept of blocks with a final state and without; sites: key, layout, values of a place."""
    keys: list[tuple[Key, str]] = []
    numbers: list[int] = []
    found: list[tuple[int, int]] = []
    columns: list[npt.NDArray[np.int64]] = []
    known: dict[tuple[SiteLayout, int, int], tuple[int, int]] = {}
    size = 0
    for number, (key, layout, width) in enumerate(sites):
        for name, g in layout.ordered_groups:
            keys.append((key, name))
            numbers.append(number)
            if (layout, width, g) not in known:
                if layout.d_state:
                    mine = (layout.members(g)[:, None] * layout.d_state + np.arange(layout.d_state)).reshape(-1)
                else:
                    # The flat (e, n) state of an undivided site has no channel slices; every other row has.
                    mine = np.arange(width) if layout.state else layout.members(g)
                known[layout, width, g] = size, mine.size
                columns.append(mine)
                size += mine.size
            found.append(known[layout, width, g])
    firsts, sizes = np.array(found, np.int64).T
    return _GroupsOrder(keys, np.array(numbers), firsts, sizes, np.concatenate(columns).astype(np.int32))


class DeviceRecorder:
    """A `quambase.model.backbone.Tap` for the documents of one block, as `quambase.collector.recorder.BlockRecorder`.

    Nothing here waits for the device, unless every activation is kept.
    """

    def __init__(
        self,
        run: str,
        documents: Sequence[PlannedDocument],
        statistics: DeviceStatistics,
        counter: DeviceCounter,
        gather: Gather,
        positions: Positions | None,
        states: set[int] | None,
    ) -> None:
        self.run, self.documents, self.statistics = run, documents, statistics
        self.counter, self.gather = counter, gather
        self.positions, self.states = positions, states
        layouts = statistics.layouts
        shapes = [(len(documents), len(layout.names) + 1, len(SUMMARY_COLUMNS)) for layout in layouts.values()]
        sizes = [a * b * c for a, b, c in shapes]
        self._flat = torch.empty(sum(sizes), device=statistics.device)
        parts = torch.split(self._flat, sizes)
        self.summaries = {k: p.view(s) for k, p, s in zip(layouts, parts, shapes, strict=True)}
        self._seen = dict.fromkeys(layouts, 0)
        self._last: tuple[Key, torch.Tensor] | None = None
        self._same: dict[Key, Key] = {}
        self._layer: int | None = None
        self._kept: dict[Key, list[KeptRows]] = {}
        self._gathered = self._flat.numel()
        self._borders: dict[tuple[int, int, int], npt.NDArray[np.int64]] = {}
        self._wanted: dict[tuple[int, int, bool], tuple[list[Place], torch.Tensor]] = {}

    def __call__(self, layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        """Count one site's activations; see `quambase.model.backbone.Tap` for the shapes."""
        key = (layer, site)
        layout = self.statistics.layouts.get(key)
        if layout is None:
            return
        if layer != self._layer:  # layers are alike, and so are batches of whole layers: one is prepared for all
            self.counter.flush(partly=True)
            self._layer = layer
        if layout.d_state:
            rows = values.transpose(1, 2).reshape(-1, values.shape[1])  # (documents n, e)
            length = layout.d_state
        elif layout.state:
            rows = values.reshape(-1, values.shape[-1])  # (documents e, n)
            length = values.shape[1]
        else:
            rows = values
            length = 0
        offsets = self._offsets(documents, length)
        here = documents.stop - documents.start
        self._seen[key] += here
        source = self._identity(key, values, here)
        self._last = key, values
        if source:
            self._same[key] = source
            if source in self._kept:
                self._kept[key] = self._kept[source]
            return
        assert key not in self.statistics.shared, f"{key} was {self.statistics.shared[key]} in an earlier block"
        self.counter.add(self.statistics.sites[key], rows, offsets, documents.start, self.summaries[key][documents])
        self._keep(key, layout, values, offsets, documents)

    def _offsets(self, documents: slice, length: int) -> npt.NDArray[np.int64]:
        """The borders of some documents' rows: ``length`` each, or, if that is 0, one for each token."""
        span = documents.start, documents.stop, length
        if span not in self._borders:
            lengths = [length or document.tokens.size for document in self.documents[documents]]
            self._borders[span] = np.cumsum([0, *lengths], dtype=np.int64)
        return self._borders[span]

    def _identity(self, key: Key, values: torch.Tensor, documents: int) -> Key | None:
        """As `BlockRecorder`: the site that the call before brought this very tensor for, of every document."""
        if self._last is None or self._last[1] is not values or documents != len(self.documents):
            return None
        source = self._same.get(self._last[0], self._last[0])
        return source if self.statistics.layouts[source] == self.statistics.layouts[key] else None

    def _keep(
        self, key: Key, layout: SiteLayout, values: torch.Tensor, offsets: npt.NDArray[np.int64], documents: slice
    ) -> None:
        span = (documents.start, documents.stop, layout.state)
        if span not in self._wanted:
            found, rows = self._sampled_states(documents) if layout.state else self._sampled(documents, offsets)
            self._wanted[span] = found, torch.tensor(rows, dtype=torch.int64).to(values.device, non_blocking=True)
        places, index = self._wanted[span]
        if not places:
            return
        flat = values if values.ndim == 2 else values.flatten(1)  # a state is (documents, e, n)
        width = flat.shape[1]
        if (self.states if layout.state else self.positions) is None:
            # Every activation of a block fits in no device: these are not held until the block ends.
            kept = KeptRows(places, width, rows=flat.to("cpu", torch.float32, copy=True))
        else:
            kept = KeptRows(places, width, self._gathered)
            self.gather.add(flat, index)
            self._gathered += len(places) * width
        self._kept.setdefault(key, []).append(kept)

    def _sampled(self, documents: slice, offsets: npt.NDArray[np.int64]) -> tuple[list[Place], list[int]]:
        """The sampled tokens of some documents and their rows."""
        places: list[Place] = []
        rows: list[int] = []
        for start, document in zip(offsets.tolist(), self.documents[documents], strict=False):
            if self.positions is None:
                wanted = range(document.tokens.size)
            else:
                wanted = self.positions.get(document.index, np.empty(0, np.int64)).tolist()
            places += [(document.index, position) for position in wanted]
            rows += [start + position for position in wanted]
        return places, rows

    def _sampled_states(self, documents: slice) -> tuple[list[Place], list[int]]:
        """The last tokens of the documents whose states are kept, and their numbers among some documents."""
        here = self.documents[documents]
        rows = [i for i, document in enumerate(here) if self.states is None or document.index in self.states]
        return [(here[i].index, here[i].tokens.size - 1) for i in rows], rows

    def finish(self) -> ObservedBlock:
        """Fold the block into the run's statistics and send its tables' content to the host.

        TapNeverFired if a site was not reached for every document.
        """
        self._last = None
        check_seen(self._seen, len(self.documents))
        self.counter.flush()
        for key, source in self._same.items():
            self.statistics.share(key, source)
        self.statistics.fold(np.array([document.index for document in self.documents], np.int64))
        flat = torch.cat([self._flat, *self.gather.taken()])
        values, copied = flat, None
        if flat.device.type == "cuda":
            values = torch.empty(flat.shape, pin_memory=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # On a stream of its own, so that the next block does not wait for it.
            copies = _copies(flat.device)
            copies.wait_stream(torch.cuda.current_stream(flat.device))
            flat.record_stream(copies)
            with torch.cuda.stream(copies):
                values.copy_(flat, non_blocking=True)
                copied.record(copies)
        return ObservedBlock(self.run, self.documents, self.statistics.layouts, values, copied, self._same, self._kept)
