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

from quambase.collector.cuda.gather import Gather
from quambase.collector.cuda.statistics import DeviceStatistics
from quambase.collector.cuda.torch_counter import DeviceCounter
from quambase.collector.documents import TokenizedDocument
from quambase.collector.statistics import SUMMARY_COLUMNS, SiteLayout
from quambase.collector.table_kernels import gather_rows
from quambase.collector.table_rows import Float32, Int64, known_keys, table_of
from quambase.collector.taps import PIECE, Positions, Rows, activations_rows, check_seen, documents_rows
from quambase.schema.sites import SiteKey
from quambase.schema.tables import ACTIVATIONS, as_made


class KeptRows(NamedTuple):
    """Raw values (places, width) of a site at the places of a ``span`` of documents; ``rows``: them, float32 on the
    host, where all are kept. Otherwise they are among a block's values, in the order in which they were brought.
    """

    key: SiteKey
    span: int
    width: int
    rows: torch.Tensor | None = None


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's blocks are copied to the host."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class ObservedBlock:
    """What a block's tables are made of, on its way to the host: ``values`` is complete once ``copied`` has passed.

    values    float32, flat: summaries of every layout in turn, then what was gathered
    same      a site whose summaries and raw values are another's, and which
    kept      in the order in which they were brought
    places    of each span: (places, 2) int64, document and position
    """

    run: str
    documents: Sequence[TokenizedDocument]
    layouts: Mapping[SiteKey, SiteLayout]
    values: torch.Tensor
    copied: torch.cuda.Event | None
    same: Mapping[SiteKey, SiteKey]
    kept: Sequence[KeptRows]
    places: Sequence[Int64]

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
        rest = values[sum(sizes) :]
        if rest.size <= PIECE and not any(part.rows is not None for part in self.kept):
            activations = gathered_rows(self.run, self.layouts, self.kept, self.same, self.places, rest)
        else:
            activations = activations_rows(self.run, self.layouts, self._matrices(rest))
        return documents, activations

    def _matrices(self, values: Float32) -> dict[SiteKey, Rows]:
        """The places of every site that has some, and its values there."""
        found: dict[SiteKey, list[tuple[Int64, Float32]]] = {}
        start = 0
        for part in self.kept:
            places = self.places[part.span]
            if part.rows is not None:
                rows: Float32 = part.rows.numpy()
            else:
                stop = start + len(places) * part.width
                rows, start = values[start:stop].reshape(-1, part.width), stop
            if len(places):
                found.setdefault(part.key, []).append((places, rows))
        found |= {key: found[source] for key, source in self.same.items() if source in found}
        return {
            key: (
                [(document, position) for places, _ in of_site for document, position in places.tolist()],
                of_site[0][1] if len(of_site) == 1 else np.concatenate([rows for _, rows in of_site]),
            )
            for key, of_site in found.items()
        }


def gathered_rows(
    run: str,
    layouts: Mapping[SiteKey, SiteLayout],
    kept: Sequence[KeptRows],
    same: Mapping[SiteKey, SiteKey],
    places: Sequence[Int64],
    values: Float32,
) -> pa.Table:
    """`activations_rows` of a block's values as they are, PIECE at most, in one go: while Python makes this, the
    thread that queues kernels waits.

    kept, same, places  as in `ObservedBlock`
    values              flat, of ``kept`` in turn
    """
    parts = tuple((part.key, layouts[part.key], part.span, part.width) for part in kept)
    order = _entries_order(parts, tuple((key, layouts[key], source) for key, source in same.items()))
    # Of every span and part: how many places, and where they and their values begin.
    sizes = np.array([len(of_span) for of_span in places], np.int64)
    counts = sizes[order.spans]
    named = (np.cumsum(sizes) - sizes)[order.spans]
    bases = np.cumsum(counts * order.widths) - counts * order.widths
    # Of every entry: how many rows; of every row: its entry, and which of the part's places it is.
    rows = counts[order.parts]
    of_groups = np.bincount(order.groups, rows, len(order.keys)).astype(np.int64)
    if not of_groups.any():
        return as_made(ACTIVATIONS).empty_table()
    entries = np.arange(rows.size).repeat(rows)
    within = np.arange(entries.size) - (np.cumsum(rows) - rows)[entries]
    mine = order.parts[entries]
    lengths = order.sizes[entries]
    offsets = np.zeros(lengths.size + 1, np.int32)
    np.cumsum(lengths, dtype=np.int32, out=offsets[1:])
    out = np.empty(offsets[-1], np.float32)
    starts = bases[mine] + within * order.widths[mine]
    gather_rows(values, starts, order.firsts[entries], lengths, order.columns, out)
    documents, positions = np.concatenate(places)[named[mine] + within].T.astype(np.int32, order="C")
    columns: dict[str, object] = {
        "document": documents,
        "position": positions,
        "values": pa.ListArray.from_arrays(offsets, out),
    }
    # Words of no row would be in the file's dictionaries.
    keys = tuple(key for key, count in zip(order.keys, of_groups.tolist(), strict=True) if count)
    return table_of(known_keys(run, keys).columns(of_groups[of_groups > 0]) | columns, ACTIVATIONS)


@dataclass(frozen=True)
class _EntriesOrder:
    """What is alike in blocks of which the same was kept. An entry is a group of a site and one of the site's parts; in
    the order of the tables.

    spans, widths  (parts,) of each part
    keys           of the groups, and their names
    groups, parts  (entries,) the numbers of an entry's group and part
    columns        flat: which of a place's values are a group's; ``sizes`` (entries,) from ``firsts`` (entries,) on
    """

    spans: Int64
    widths: Int64
    keys: list[tuple[SiteKey, str]]
    groups: Int64
    parts: Int64
    firsts: Int64
    sizes: Int64
    columns: npt.NDArray[np.int32]


@lru_cache(8)
def _entries_order(
    parts: tuple[tuple[SiteKey, SiteLayout, int, int], ...], same: tuple[tuple[SiteKey, SiteLayout, SiteKey], ...]
) -> _EntriesOrder:
    """Kept of blocks whose head comes in as many pieces; parts: key, layout, span, width; same: key, layout, source."""
    sites: dict[SiteKey, SiteLayout] = {key: layout for key, layout, _, _ in parts}
    numbers: dict[SiteKey, list[int]] = {key: [] for key in sites}
    for number, (key, _, _, _) in enumerate(parts):
        numbers[key].append(number)
    for key, layout, source in same:
        if source in numbers:
            sites[key], numbers[key] = layout, numbers[source]
    keys: list[tuple[SiteKey, str]] = []
    entries: list[tuple[int, int, int, int]] = []
    columns: list[Int64] = []
    known: dict[tuple[SiteLayout, int, int], tuple[int, int]] = {}
    size = 0
    for key in sorted(sites):
        layout = sites[key]
        for name, g in layout.ordered_groups:
            for number in numbers[key]:
                width = parts[number][3]
                if (layout, width, g) not in known:
                    if layout.d_state:
                        mine = (layout.members(g)[:, None] * layout.d_state + np.arange(layout.d_state)).reshape(-1)
                    else:
                        # The flat (e, n) state of an undivided site has no channel slices; every other row has.
                        mine = np.arange(width) if layout.state else layout.members(g)
                    known[layout, width, g] = size, mine.size
                    columns.append(mine)
                    size += mine.size
                entries.append((len(keys), number, *known[layout, width, g]))
            keys.append((key, name))
    groups, of_parts, firsts, sizes = np.array(entries, np.int64).reshape(-1, 4).T
    spans, widths = np.array([(span, width) for _, _, span, width in parts], np.int64).reshape(-1, 2).T
    flat = np.concatenate([np.empty(0, np.int64), *columns]).astype(np.int32)
    return _EntriesOrder(spans, widths, keys, groups, of_parts, firsts, sizes, flat)


class DeviceRecorder:
    """A `quambase.model.block.Tap` for the documents of one block, as `quambase.collector.taps.BlockRecorder`.

    Nothing here waits for the device, unless every activation is kept.
    """

    def __init__(
        self,
        run: str,
        documents: Sequence[TokenizedDocument],
        statistics: DeviceStatistics,
        counter: DeviceCounter,
        gather: Gather,
        positions: Positions | None,
        states: set[int] | None,
    ) -> None:
        self.run, self.documents, self.statistics = run, documents, statistics
        self.counter, self.gather = counter, gather
        self.positions, self.states = positions, states
        self._flat, self.summaries = statistics.summaries(len(documents))
        self._seen = dict.fromkeys(statistics.layouts, 0)
        self._last: tuple[SiteKey, torch.Tensor] | None = None
        self._same: dict[SiteKey, SiteKey] = {}
        self._layer: int | None = None
        self._kept: list[KeptRows] = []
        self._borders: dict[tuple[int, int, int], Int64] = {}
        self._spans: dict[tuple[int, int, bool], tuple[int, torch.Tensor]] = {}
        self._places: list[Int64] = []

    def __call__(self, layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        """Count one site's activations; see `quambase.model.block.Tap` for the shapes."""
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
            return
        assert key not in self.statistics.shared, f"{key} was {self.statistics.shared[key]} in an earlier block"
        summaries = self.summaries[key]
        if here != len(self.documents):
            summaries = summaries[documents]
        self.counter.add(self.statistics.sites[key], rows, offsets, documents.start, summaries)
        self._keep(key, layout, values, offsets, documents)

    def _offsets(self, documents: slice, length: int) -> Int64:
        """The borders of some documents' rows: ``length`` each, or, if that is 0, one for each token."""
        span = documents.start, documents.stop, length
        if span not in self._borders:
            lengths = [length or document.tokens.size for document in self.documents[documents]]
            self._borders[span] = np.cumsum([0, *lengths], dtype=np.int64)
        return self._borders[span]

    def _identity(self, key: SiteKey, values: torch.Tensor, documents: int) -> SiteKey | None:
        """As `BlockRecorder`: the site that the call before brought this very tensor for, of every document."""
        if self._last is None or self._last[1] is not values or documents != len(self.documents):
            return None
        source = self._same.get(self._last[0], self._last[0])
        return source if self.statistics.layouts[source] == self.statistics.layouts[key] else None

    def _keep(self, key: SiteKey, layout: SiteLayout, values: torch.Tensor, offsets: Int64, documents: slice) -> None:
        name = (documents.start, documents.stop, layout.state)
        if name not in self._spans:
            places, rows = self._sampled_states(documents) if layout.state else self._sampled(documents, offsets)
            index = torch.tensor(rows, dtype=torch.int64).to(values.device, non_blocking=True)
            self._spans[name] = len(self._places), index
            self._places.append(np.array(places, np.int64).reshape(-1, 2))
        span, index = self._spans[name]
        flat = values if values.ndim == 2 else values.flatten(1)  # a state is (documents, e, n)
        rows_here = None
        if (self.states if layout.state else self.positions) is None:
            # Every activation of a block fits in no device: these are not held until the block ends.
            rows_here = flat.to("cpu", torch.float32, copy=True)
        elif index.numel():
            self.gather.add(flat, index)
        self._kept.append(KeptRows(key, span, flat.shape[1], rows_here))

    def _sampled(self, documents: slice, offsets: Int64) -> tuple[list[tuple[int, int]], list[int]]:
        """The sampled tokens of some documents, document and position, and their rows."""
        places: list[tuple[int, int]] = []
        rows: list[int] = []
        for start, document in zip(offsets.tolist(), self.documents[documents], strict=False):
            if self.positions is None:
                wanted = range(document.tokens.size)
            else:
                wanted = self.positions.get(document.index, np.empty(0, np.int64)).tolist()
            places += [(document.index, position) for position in wanted]
            rows += [start + position for position in wanted]
        return places, rows

    def _sampled_states(self, documents: slice) -> tuple[list[tuple[int, int]], list[int]]:
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
        return ObservedBlock(
            self.run, self.documents, self.statistics.layouts, values, copied, self._same, self._kept, self._places
        )
