"""The tap of a collection: counts every site of a block, on the host or a device, and gathers the data of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch

from quambase.collector.documents import TokenizedDocument
from quambase.collector.statistics import (
    SUMMARY_COLUMNS,
    BlockStatistics,
    Counter,
    SiteLayout,
    counted_rows,
)
from quambase.collector.tables.block_rows import KeptRows, activations_rows, documents_rows
from quambase.model.packed_batch import sampled_ends
from quambase.schema.errors import TapNeverFired
from quambase.schema.sites import SiteKey
from quambase.schema.values.arrays import Int64
from quambase.schema.values.positions import bucket_of

Positions = Mapping[int, Int64]


@dataclass(frozen=True)
class KeptTokens:
    """What raw activations are stored: ``positions`` by document, final ``states`` of documents; both None: all.

    ValueError: one of the two is None.
    """

    positions: Positions | None
    states: set[int] | None

    def __post_init__(self) -> None:
        if (self.positions is None) != (self.states is None):
            raise ValueError("either all tokens and states are kept, or some of both")

    @property
    def everything(self) -> bool:
        """Whether every token's activations are kept."""
        return self.positions is None


NOTHING = KeptTokens({}, set())


class Gather(Protocol):
    """Copies rows of several tensors as float32 to ``device``."""

    device: torch.device

    def add(self, x: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Rows ``rows`` (count,) int64, None for all, of x (t, width), float16 or float32.

        May be deferred: x must not change until the next `gathered`.
        """

    def gathered(self) -> list[torch.Tensor]:
        """The rows added since the last call, in order, as flat tensors, each of the rows of one or more `add`."""


CHUNK_VALUES = 1 << 24
"""Values per allocation of `TorchGather`: large enough that the allocator maps each separately."""


class TorchGather:
    """A `Gather` in plain PyTorch.

    Memory is allocated in large chunks. Small ones between short-lived activations would fragment the heap, and every
    layer would have to request memory from the system.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: list[torch.Tensor] = []
        self._chunk, self._used = torch.empty(0, device=device), 0

    def add(self, x: torch.Tensor, rows: torch.Tensor | None) -> None:
        """As `Gather.add`, at once; x may be on another device."""
        shape = len(x) if rows is None else len(rows), x.shape[1]
        size = shape[0] * shape[1]
        if self._used + size > len(self._chunk):
            self._end_tensor()
            self._chunk = torch.empty(max(size, CHUNK_VALUES), device=self.device)
        self._chunk[self._used : self._used + size].view(shape).copy_(x if rows is None else x.index_select(0, rows))
        self._used += size

    def gathered(self) -> list[torch.Tensor]:
        """As `Gather.gathered`."""
        self._end_tensor()
        found, self._tensors = self._tensors, []
        return found

    def _end_tensor(self) -> None:
        """End the current tensor; the next one may be in the same chunk."""
        if self._used:
            self._tensors.append(self._chunk[: self._used])
            self._chunk, self._used = self._chunk[self._used :], 0


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's blocks are copied to the host."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class ObservedBlock:
    """The data of a block's rows, which is being copied to the host: complete when the event ``copied`` has passed.

    summaries  float32, flat: of every layout in order
    raw        float32, flat: the gathered values of ``kept``, in order
    same       maps a site to the site that has the same summaries and raw values
    places     of each span: (places, 2) int64, document and position
    """

    run: str
    documents: Sequence[TokenizedDocument]
    layouts: Mapping[SiteKey, SiteLayout]
    summaries: torch.Tensor
    raw: Sequence[torch.Tensor]
    copied: torch.cuda.Event | None
    same: Mapping[SiteKey, SiteKey]
    kept: Sequence[KeptRows]
    places: Sequence[Int64]

    def is_here(self) -> bool:
        """Whether everything is copied, and thus also folded into the run's statistics."""
        return self.copied is None or bool(self.copied.query())  # type: ignore[no-untyped-call]

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """The rows of `documents` and of `activations`; waits for the copies."""
        if self.copied:
            self.copied.synchronize()
        sizes = [
            len(self.documents) * (len(layout.names) + 1) * len(SUMMARY_COLUMNS) for layout in self.layouts.values()
        ]
        starts = dict(zip(self.layouts, np.cumsum([0, *sizes]).tolist(), strict=False))
        starts |= {key: starts[source] for key, source in self.same.items()}
        places = [starts[key] for key in self.layouts]
        documents = documents_rows(self.run, self.documents, self.layouts, self.summaries.numpy(), places)
        raw = [values.numpy() for values in self.raw]
        return documents, activations_rows(self.run, self.layouts, self.kept, self.same, self.places, raw)


class BucketRows(NamedTuple):
    """The rows of a bucket of positions: their numbers (rows,) on the device of the values, and the borders of the
    parts that are counted as if they were documents.
    """

    bucket: int
    rows: torch.Tensor
    offsets: Int64


def _tokens_read(tokens: int, length: int, every: int) -> Int64:
    """How many tokens of a document of ``tokens`` tokens were read at each row or state that a site has of it: all
    rows if ``length`` is 0, else states of ``length`` rows, after ``every`` tokens each or, if that is 0, the last.
    """
    if not length:
        return np.arange(1, tokens + 1)
    return sampled_ends(tokens, every or tokens)


def _bucket_rows(read: Sequence[Int64], length: int, device: torch.device, *, by_state: bool) -> Iterator[BucketRows]:
    """The rows of every bucket that is reached; ``read``: of each document, how many tokens were read at each of its
    states, or rows if ``length`` is 1.

    Nothing is stored of a document here. So there are only as many parts as the host's threads divide among them: the
    quantiles of each, which nothing reads, would take longer than the counting. ``by_state``: a part is a state, since
    a counter forms the moments of final states from whole ones.
    """
    buckets = np.repeat(bucket_of(np.concatenate(read)), length)
    parts = 2 * torch.get_num_threads() if device.type == "cpu" else 1
    for bucket in np.unique(buckets):
        index = np.flatnonzero(buckets == bucket)
        there = torch.from_numpy(index).to(device, non_blocking=True)
        even = np.linspace(0, len(index), parts + 1).astype(np.int64)
        yield BucketRows(int(bucket), there, np.arange(0, len(index) + 1, length) if by_state else np.unique(even))


def check_seen(seen: Mapping[SiteKey, int], documents: int) -> None:
    """TapNeverFired for a site that was not reached for every one of a block's documents."""
    for (layer, site), count in seen.items():
        if count != documents:
            raise TapNeverFired(
                f"the tap {site} of layer {layer} saw {count} of {documents} documents: the forward"
                " pass does not reach it; leave the site out with --site, or report the model"
            )


class BlockRecorder:
    """A `quambase.model.block.Tap` for the documents of one block; sites without a layout are ignored.

    Does not wait for a device, unless every activation is stored.
    """

    def __init__(
        self,
        run: str,
        documents: Sequence[TokenizedDocument],
        statistics: BlockStatistics,
        counter: Counter,
        gather: Gather,
        kept: KeptTokens,
    ) -> None:
        self.run, self.documents, self.statistics = run, documents, statistics
        self.counter, self.gather = counter, gather
        self.positions, self.states = kept.positions, kept.states
        self._flat, self.summaries = statistics.summaries(len(documents))
        self._seen = dict.fromkeys(statistics.layouts, 0)
        self._last: tuple[SiteKey, torch.Tensor] | None = None
        self._same: dict[SiteKey, SiteKey] = {}
        self._layer: int | None = None
        self._kept: list[KeptRows] = []
        self._read: dict[tuple[int, int, int, int], tuple[Int64, list[BucketRows]]] = {}
        self._spans: dict[tuple[int, int, bool], tuple[int, torch.Tensor | None]] = {}
        self._places: list[Int64] = []

    def __call__(self, layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        """Count one site's activations; see `quambase.model.block.Tap` for the shapes."""
        key = (layer, site)
        layout = self.statistics.layouts.get(key)
        if layout is None:
            return
        if layer != self._layer:  # batches of whole layers are alike, and so share a plan
            self.counter.flush(partly=True)
            self._layer = layer
        rows = counted_rows(layout, values)
        length = len(rows) // len(values) if layout.state else 0  # of each state
        offsets, buckets = self._rows(documents, length, layout.every, rows.device)
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
        for bucket, index, borders in buckets:
            into = self.statistics.buckets[bucket].sites[key]
            unread = torch.empty(len(borders) - 1, len(layout.names) + 1, len(SUMMARY_COLUMNS), device=rows.device)
            self.counter.add(into, rows.index_select(0, index), borders, 0, unread)
        if not layout.every:
            self._keep(key, layout, values, offsets, documents)

    def _rows(self, documents: slice, length: int, every: int, device: torch.device) -> tuple[Int64, list[BucketRows]]:
        """The borders of some documents' rows, ``length`` for each state or, if that is 0, one for each token; and the
        rows of each bucket of positions, if there are buckets.
        """
        span = documents.start, documents.stop, length, every
        if span not in self._read:
            read = [_tokens_read(document.tokens.size, length, every) for document in self.documents[documents]]
            borders = np.cumsum([0, *map(len, read)], dtype=np.int64) * (length or 1)
            buckets: list[BucketRows] = []
            if self.statistics.buckets:
                buckets += _bucket_rows(read, length or 1, device, by_state=length > 0 and not every)
            self._read[span] = borders, buckets
        return self._read[span]

    def _identity(self, key: SiteKey, values: torch.Tensor, documents: int) -> SiteKey | None:
        """The site for which the previous call had this same tensor, with every document: an identity's output is its
        input, and counting it again would cost the most of a collection.
        """
        if self._last is None or self._last[1] is not values or documents != len(self.documents):
            return None
        source = self._same.get(self._last[0], self._last[0])
        return source if self.statistics.layouts[source] == self.statistics.layouts[key] else None

    def _keep(self, key: SiteKey, layout: SiteLayout, values: torch.Tensor, offsets: Int64, documents: slice) -> None:
        name = (documents.start, documents.stop, layout.state)
        if name not in self._spans:
            places, rows = self._sampled_states(documents) if layout.state else self._sampled(documents, offsets)
            index = None
            if self.positions is not None:
                index = torch.tensor(rows, dtype=torch.int64).to(values.device, non_blocking=True)
            self._spans[name] = len(self._places), index
            self._places.append(np.array(places, np.int64).reshape(-1, 2))
        span, index = self._spans[name]
        flat = values if values.ndim == 2 else values.flatten(1)  # a state is (documents, e, n)
        if index is None or index.numel():
            self.gather.add(flat, index)
        self._kept.append(KeptRows(key, span, flat.shape[1]))

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
        """Fold the block into the run's statistics and send what its rows are made of to the host.

        TapNeverFired if a site was not reached for every document.
        """
        self._last = None
        check_seen(self._seen, len(self.documents))
        self.counter.flush()
        for key, source in self._same.items():
            self.statistics.share(key, source)
        self.statistics.fold(np.array([document.index for document in self.documents], np.int64))
        summaries, raw, copied = self._flat, self.gather.gathered(), None
        if summaries.device.type == "cuda":
            summaries, raw, copied = _queue_copies(summaries, raw)
        else:
            summaries = summaries.clone()  # the next block reuses its memory
        return ObservedBlock(
            self.run, self.documents, self.statistics.layouts, summaries, raw, copied, self._same, self._kept,
            self._places,
        )  # fmt: skip


def _queue_copies(
    summaries: torch.Tensor, raw: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor], torch.cuda.Event]:
    """Start copying both to the host; the copies are complete when the event has passed."""
    device, size = summaries.device, len(summaries)
    there = [values for values in raw if values.device.type == "cuda"]
    flat = torch.cat([summaries, *there])
    here = torch.empty(flat.shape, pin_memory=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    # On a stream of its own, so that the next block does not wait for it.
    copies = _copies(device)
    copies.wait_stream(torch.cuda.current_stream(device))
    flat.record_stream(copies)
    with torch.cuda.stream(copies):
        here.copy_(flat, non_blocking=True)
        copied.record(copies)
    return here[:size], [here[size:]] if there else raw, copied
