"""The tap of a collection: sees every site of one block and keeps what the tables need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from quambase.collector.documents import TokenizedDocument
from quambase.collector.statistics import SUMMARY_COLUMNS, Counter, SiteLayout, SiteStatistics
from quambase.collector.table_rows import Keys, many_keyed_rows, table_of, with_whole
from quambase.schema.errors import TapNeverFired
from quambase.schema.sites import SiteKey
from quambase.schema.tables import ACTIVATIONS, DOCUMENTS, as_made

Positions = Mapping[int, npt.NDArray[np.int64]]


def documents_rows(
    run: str,
    documents: Sequence[TokenizedDocument],
    layouts: Mapping[SiteKey, SiteLayout],
    flat: npt.NDArray[np.float32],
    starts: Sequence[int],
) -> pa.Table:
    """A block's rows of `documents`; flat from ``starts[i]`` on: the summaries (documents, groups + 1, 1 + q:
    SUMMARY_COLUMNS) of the i-th site of ``layouts``, the whole site last.
    """
    order = _documents_order(run, tuple(layouts.items()), tuple(starts), len(documents))
    columns: dict[str, object] = {
        "document": np.array([document.index for document in documents], np.int32)[order.documents],
        "tokens": np.array([document.tokens.size for document in documents], np.int32)[order.documents],
        "sha256": pa.array([document.sha256 for document in documents], pa.string()).take(order.documents),
        **dict(zip(SUMMARY_COLUMNS, flat[order.places], strict=True)),
    }
    return table_of(order.keys | columns, DOCUMENTS)


@dataclass(frozen=True)
class _DocumentsOrder:
    """Of a block's rows of `documents`, what is alike in every block of as many documents.

    keys       the columns of the key
    documents  (rows,) a row's document in the block
    places     (1 + q, rows) of its values among the summaries
    """

    keys: dict[str, object]
    documents: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]


@lru_cache(2)
def _documents_order(
    run: str, layouts: tuple[tuple[SiteKey, SiteLayout], ...], starts: tuple[int, ...], documents: int
) -> _DocumentsOrder:
    """Kept of the blocks of full size and of the last."""
    keyed: list[tuple[SiteKey, str]] = []
    rows: list[npt.NDArray[np.int64]] = []
    columns = len(SUMMARY_COLUMNS)
    for (key, layout), start in sorted(zip(layouts, starts, strict=True), key=lambda site: site[0][0]):
        groups = with_whole(layout)
        keyed += [(key, name) for name, _ in groups]
        rows += [start + columns * (np.arange(documents) * (len(layout.names) + 1) + g) for _, g in groups]
    places = np.concatenate([np.empty(0, np.int64), *rows]) + np.arange(columns)[:, None]
    return _DocumentsOrder(
        Keys.of(run, keyed).columns([documents] * len(keyed)), np.tile(np.arange(documents), len(keyed)), places
    )


def check_seen(seen: Mapping[SiteKey, int], documents: int) -> None:
    """TapNeverFired for a site that was not reached for every one of a block's documents."""
    for (layer, site), count in seen.items():
        if count != documents:
            raise TapNeverFired(
                f"the tap {site} of layer {layer} saw {count} of {documents} documents: the forward"
                " pass does not reach it; leave the site out with --site, or report the model"
            )


KeptRow = tuple[int, int, npt.NDArray[np.float32]]
"""Document, position, and the values of a token at a site, or of a final state, flat (e, n)."""

Rows = tuple[Sequence[tuple[int, int]], npt.NDArray[np.float32]]
"""Documents and positions, and their values (places, width)."""


PIECE = 1 << 24
"""Values that are joined to one piece of `activations`: Arrow's lists have 32-bit offsets."""


def activations_rows(run: str, layouts: Mapping[SiteKey, SiteLayout], kept: Mapping[SiteKey, Rows]) -> pa.Table:
    """A block's rows of `activations`: raw float32 values, a row per sampled token and group."""
    pieces: list[pa.Table] = []
    parts: list[tuple[SiteKey, str, Sequence[tuple[int, int]], npt.NDArray[np.float32]]] = []

    def join() -> None:
        """Make a piece of ``parts``: key, group, whose rows, values (rows, width)."""
        rows = [len(values) for _, _, _, values in parts]
        ends = np.zeros(sum(rows) + 1, np.int32)
        np.cumsum(np.repeat([values.shape[1] for _, _, _, values in parts], rows), dtype=np.int32, out=ends[1:])
        places = np.array([place for _, _, of_rows, _ in parts for place in of_rows], np.int32).reshape(-1, 2)
        columns: dict[str, object] = {
            "document": np.ascontiguousarray(places[:, 0]),
            "position": np.ascontiguousarray(places[:, 1]),
            "values": pa.ListArray.from_arrays(ends, np.concatenate([values.reshape(-1) for _, _, _, values in parts])),
        }
        keys = [(key, name) for key, name, _, _ in parts]
        pieces.append(many_keyed_rows(run, keys, rows, columns, ACTIVATIONS))
        parts.clear()

    held = 0
    for key in sorted(kept):
        layout = layouts[key]
        places, matrix = kept[key]
        for name, g in layout.ordered_groups:
            if layout.d_state:
                states = matrix.reshape(len(matrix), -1, layout.d_state)
                part = states[:, layout.members(g)].reshape(len(matrix), -1)
            elif layout.order:
                part = matrix[:, layout.members(g)]
            else:
                # The flat (e, n) state of an undivided site has no channel slices; every other row has.
                part = matrix if layout.state else matrix[:, layout.edges[g] : layout.edges[g + 1]]
            parts.append((key, name, places, part))
            held += part.size
            if held > PIECE:
                join()
                held = 0
    if parts:
        join()
    # An empty piece beside the others would have dictionaries of its own to be unified.
    return pa.concat_tables(pieces) if pieces else as_made(ACTIVATIONS).empty_table()


ROOM = 1 << 24
"""Values that a `_Room` gets at a time: so many bytes that the allocator maps them apart from its heap."""


class _Room:
    """Where a block's raw activations are kept. On the allocator's heap, among the activations that come and go, they
    would keep its memory from being used again, and each layer would wait for new.
    """

    def __init__(self) -> None:
        self._free = np.empty(0, np.float32)

    def take(self, rows: int, width: int) -> npt.NDArray[np.float32]:
        """(rows, width) float32, to be written; never handed out again."""
        size = rows * width
        if self._free.size < size:
            self._free = np.empty(max(size, ROOM), np.float32)
        taken, self._free = self._free[:size], self._free[size:]
        return taken.reshape(rows, width)


@dataclass
class BlockRecorder:
    """A `quambase.model.block.Tap` for the documents of one block; sites without a layout are not looked at.

    ``positions``: document number to the positions whose activations are kept (None: every one);
    ``states``: the documents whose final state is kept (None: all).
    """

    run: str
    documents: Sequence[TokenizedDocument]
    layouts: Mapping[SiteKey, SiteLayout]
    counter: Counter
    positions: Positions | None
    states: set[int] | None
    statistics: dict[SiteKey, SiteStatistics] = field(init=False)
    summaries: dict[SiteKey, npt.NDArray[np.float32]] = field(init=False)

    def __post_init__(self) -> None:
        shapes = {key: (len(self.documents), len(layout.names) + 1) for key, layout in self.layouts.items()}
        self.statistics = {k: SiteStatistics.empty(layout, self.counter.most) for k, layout in self.layouts.items()}
        self.summaries = {k: np.empty((*shape, len(SUMMARY_COLUMNS)), np.float32) for k, shape in shapes.items()}
        self._seen = dict.fromkeys(self.layouts, 0)
        self._last: tuple[SiteKey, torch.Tensor] | None = None
        self._kept: dict[SiteKey, list[KeptRow]] = {key: [] for key in self.layouts}
        self._room = _Room()

    def __call__(self, layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        """Count one site's activations; see `quambase.model.block.Tap` for the shapes."""
        key = (layer, site)
        layout = self.layouts.get(key)
        if layout is None:
            return
        here = self.documents[documents]
        if layout.d_state:
            rows = values.transpose(1, 2).reshape(-1, values.shape[1])  # (documents n, e)
            lengths = [layout.d_state] * len(here)
        elif layout.state:
            rows = values.reshape(-1, values.shape[-1])  # (documents e, n)
            lengths = [values.shape[1]] * len(here)
        else:
            rows = values
            lengths = [document.tokens.size for document in here]
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        if not self._copied(key, values, len(here)):
            summaries = self.summaries[key][documents]
            self.counter.add(self.statistics[key], rows, offsets, documents.start, summaries)
        self._seen[key] += len(here)
        self._last = key, values
        self._keep(key, layout, values, offsets, here)

    def _copied(self, key: SiteKey, values: torch.Tensor, documents: int) -> bool:
        """Take over the statistics of the call before if it brought this very tensor for every document: an identity's
        output is its input, and counting is what a collection costs.
        """
        if self._last is None or self._last[1] is not values or documents != len(self.documents):
            return False
        source = self._last[0]
        if self.layouts[source] != self.layouts[key]:
            return False
        self.statistics[key] = deepcopy(self.statistics[source])
        self.summaries[key] = self.summaries[source].copy()
        return True

    def _keep(
        self,
        key: SiteKey,
        layout: SiteLayout,
        values: torch.Tensor,
        offsets: npt.NDArray[np.int64],
        documents: Sequence[TokenizedDocument],
    ) -> None:
        kept = self._kept[key]
        for place, document in enumerate(documents):
            if layout.state:
                if self.states is None or document.index in self.states:
                    state = self._room.take(*values[place].shape)
                    state[:] = values[place].numpy()
                    kept.append((document.index, document.tokens.size - 1, state.reshape(-1)))
                continue
            if self.positions is None:
                wanted = np.arange(document.tokens.size)
            elif document.index in self.positions:
                wanted = self.positions[document.index]
            else:
                continue
            picked = self._room.take(len(wanted), values.shape[1])
            torch.index_select(values, 0, torch.from_numpy(offsets[place] + wanted), out=torch.from_numpy(picked))
            kept.extend((document.index, int(position), row) for position, row in zip(wanted, picked, strict=True))

    def finish(self) -> dict[SiteKey, SiteStatistics]:
        """The block's statistics, documents numbered as in the file.

        TapNeverFired if a site was not reached for every document.
        """
        self._last = None
        check_seen(self._seen, len(self.documents))
        numbers = np.array([document.index for document in self.documents], np.int64)
        for stats in self.statistics.values():
            for top in stats.top:
                top[:, 2] = numbers[top[:, 2]]
        return self.statistics

    def documents_table(self) -> pa.Table:
        """The block's rows of `documents`."""
        flat = np.concatenate([np.empty(0, np.float32), *self.summaries.values()], axis=None)
        starts = np.cumsum([0, *(summaries.size for summaries in self.summaries.values())])[:-1]
        return documents_rows(self.run, self.documents, self.layouts, flat, starts.tolist())

    def activations_table(self) -> pa.Table:
        """The block's rows of `activations`."""
        kept = {
            key: ([(document, position) for document, position, _ in rows], np.stack([row for _, _, row in rows]))
            for key, rows in self._kept.items()
            if rows
        }
        return activations_rows(self.run, self.layouts, kept)
