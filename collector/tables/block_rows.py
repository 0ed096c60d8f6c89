"""Makes a block's rows of `documents` and `activations` from its summaries and stored values.

While Python makes rows, the thread that queues kernels for a GPU waits for the interpreter. Whatever is equal in all
blocks is therefore computed once, and one compiled loop gathers the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from quambase.collector.documents import TokenizedDocument
from quambase.collector.statistics import SUMMARY_COLUMNS, SiteLayout
from quambase.collector.tables.table_kernels import gather_rows
from quambase.collector.tables.table_rows import Keys, known_keys, table_of, with_whole
from quambase.schema.sites import SiteKey
from quambase.schema.tables import ACTIVATIONS, DOCUMENTS, as_made
from quambase.schema.values.arrays import Float32, Int32, Int64

Layouts = Mapping[SiteKey, SiteLayout]


def documents_rows(
    run: str, documents: Sequence[TokenizedDocument], layouts: Layouts, flat: Float32, starts: Sequence[int]
) -> pa.Table:
    """A block's rows of `documents`. At ``flat[starts[i]:]`` begin the summaries (documents, groups + 1, 1 + q:
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
    """What the rows of `documents` have in common in all blocks of equally many documents.

    keys       the key columns
    documents  (rows,) a row's document in the block
    places     (1 + q, rows) indices of a row's values in the flat summaries
    """

    keys: dict[str, object]
    documents: Int64
    places: Int64


@lru_cache(2)
def _documents_order(
    run: str, layouts: tuple[tuple[SiteKey, SiteLayout], ...], starts: tuple[int, ...], documents: int
) -> _DocumentsOrder:
    """Cached for the blocks of full size and for the last."""
    keyed: list[tuple[SiteKey, str]] = []
    rows: list[Int64] = []
    columns = len(SUMMARY_COLUMNS)
    for (key, layout), start in sorted(zip(layouts, starts, strict=True), key=lambda site: site[0][0]):
        groups = with_whole(layout)
        keyed += [(key, name) for name, _ in groups]
        rows += [start + columns * (np.arange(documents) * (len(layout.names) + 1) + g) for _, g in groups]
    places = np.concatenate([np.empty(0, np.int64), *rows]) + np.arange(columns)[:, None]
    return _DocumentsOrder(
        Keys.of(run, keyed).columns([documents] * len(keyed)), np.tile(np.arange(documents), len(keyed)), places
    )


class KeptRows(NamedTuple):
    """Raw values (places, width) of a site; ``span``: index of the list of their places."""

    key: SiteKey
    span: int
    width: int


PIECE = 1 << 24
"""Number of values after which a new piece of `activations` begins: Arrow's lists have 32-bit offsets."""


def activations_rows(
    run: str,
    layouts: Layouts,
    kept: Sequence[KeptRows],
    same: Mapping[SiteKey, SiteKey],
    places: Sequence[Int64],
    values: Sequence[Float32],
) -> pa.Table:
    """A block's rows of `activations`: raw float32 values, a row for each place and group.

    kept    in the order of their values
    same    maps a site to the site that has the same values
    places  of each span: (places, 2) int64, document and position
    values  flat arrays, each the values of one or more entries of ``kept``
    """
    parts = tuple((part.key, layouts[part.key], part.span, part.width) for part in kept)
    order = _entries_order(parts, tuple((key, layouts[key], source) for key, source in same.items()))
    source = _Source.of(order, places, values)
    # Per group: its number of rows, and the number of their values.
    rows = source.counts[order.parts]
    of_groups = np.bincount(order.groups, rows, len(order.keys)).astype(np.int64)
    sizes = np.bincount(order.groups, rows * order.sizes, len(order.keys)).astype(np.int64)
    pieces = [
        _piece(run, order, source, of_groups, slice(first, last))
        for first, last in _borders(sizes)
        if of_groups[first:last].any()
    ]
    # Empty pieces are left out, since each would add dictionaries that have to be unified.
    return pa.concat_tables(pieces) if pieces else as_made(ACTIVATIONS).empty_table()


def _borders(sizes: Int64) -> list[tuple[int, int]]:
    """Runs of groups, first to last + 1. A run ends with the group that raises its number of values above PIECE."""
    found: list[tuple[int, int]] = []
    first = held = 0
    for group, size in enumerate(sizes.tolist()):
        held += size
        if held > PIECE:
            found.append((first, group + 1))
            first, held = group + 1, 0
    return [*found, (first, len(sizes))]


@dataclass(frozen=True)
class _Source:
    """Locates the values of the parts, which are the entries of ``kept``.

    values  flat arrays
    array   (parts,) the array that has a part's values; ``bases`` (parts,): their offset in it
    counts  (parts,) a part's number of places; ``named`` (parts,): their offset in ``places``
    places  (all, 2) document and position
    """

    values: Sequence[Float32]
    array: Int64
    bases: Int64
    counts: Int64
    named: Int64
    places: Int64

    @classmethod
    def of(cls, order: _EntriesOrder, places: Sequence[Int64], values: Sequence[Float32]) -> _Source:
        """For the parts of ``order``."""
        sizes = np.array([len(of_span) for of_span in places], np.int64)
        counts = sizes[order.spans]
        starts = np.cumsum(counts * order.widths) - counts * order.widths
        ends = np.cumsum([0, *(array.size for array in values)])
        # The offset of a part without values may be beyond the last array.
        array = (np.searchsorted(ends, starts, side="right") - 1).clip(max=max(len(values) - 1, 0))
        named = (np.cumsum(sizes) - sizes)[order.spans]
        return cls(values, array, starts - ends[array], counts, named, np.concatenate([_NO_PLACES, *places]))


_NO_PLACES = np.empty((0, 2), np.int64)


def _piece(run: str, order: _EntriesOrder, source: _Source, of_groups: Int64, groups: slice) -> pa.Table:
    """The rows of some consecutive groups."""
    entries = slice(*np.searchsorted(order.groups, [groups.start, groups.stop]))
    parts, firsts, sizes = order.parts[entries], order.firsts[entries], order.sizes[entries]
    # Per entry: its number of rows. Per row: its entry, and its index among the part's places.
    rows = source.counts[parts]
    of_rows = np.arange(rows.size, dtype=np.int64).repeat(rows)
    within: Int64 = np.arange(of_rows.size, dtype=np.int64) - (np.cumsum(rows) - rows)[of_rows]
    mine, lengths = parts[of_rows], sizes[of_rows]
    offsets = np.zeros(lengths.size + 1, np.int32)
    np.cumsum(lengths, dtype=np.int32, out=offsets[1:])
    out = np.empty(offsets[-1], np.float32)
    bases = source.bases[mine] + within * order.widths[mine]
    arrays = source.array[mine]
    for number in np.unique(arrays):
        here = slice(None) if len(source.values) == 1 else arrays == number
        gather_rows(
            source.values[number],
            bases[here],
            firsts[of_rows][here],
            lengths[here],
            order.columns,
            offsets[:-1][here],
            out,
        )
    documents, positions = source.places[source.named[mine] + within].T.astype(np.int32, order="C")
    columns: dict[str, object] = {
        "document": documents,
        "position": positions,
        "values": pa.ListArray.from_arrays(offsets, out),
    }
    # Groups without rows are left out, or their names would be in the file's dictionaries.
    counts = of_groups[groups]
    keys = tuple(key for key, count in zip(order.keys[groups], counts.tolist(), strict=True) if count)
    return table_of(known_keys(run, keys).columns(counts[counts > 0]) | columns, ACTIVATIONS)


@dataclass(frozen=True)
class _EntriesOrder:
    """What blocks with equal ``kept`` have in common. An entry is a site's group in one of the site's parts; entries
    are in the order of the tables.

    spans, widths  (parts,) as in `KeptRows`
    keys           each group's site and name
    groups, parts  (entries,) indices of an entry's group and part
    columns        flat: indices of a group's values among those of a place; an entry has ``sizes`` of them, from
                   ``firsts`` on, both (entries,)
    """

    spans: Int64
    widths: Int64
    keys: list[tuple[SiteKey, str]]
    groups: Int64
    parts: Int64
    firsts: Int64
    sizes: Int64
    columns: Int32


@lru_cache(8)
def _entries_order(
    parts: tuple[tuple[SiteKey, SiteLayout, int, int], ...], same: tuple[tuple[SiteKey, SiteLayout, SiteKey], ...]
) -> _EntriesOrder:
    """Cached, since blocks differ only in the number of the head's chunks; parts: key, layout, span, width; same: key,
    layout, source.
    """
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
