"""Divides a batch of sites among the CUDA counter's blocks: which block counts which rows of which group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quambase.collector.statistics import SiteLayout
from quambase.schema.values.arrays import Int32, Int64

FLUSH = 60_000
"""Fixed cost of an item (writing its table, waiting for its first loads), as the number of values counted in that time.
"""


@dataclass(frozen=True)
class Packing:
    """Items of work, all int32. A segment is one document of one group of one site; they are numbered by site, then
    group, then document.

    items          (items, 4): site, group in it, first row, number of rows; in the order of segments, then rows
    block_first    (blocks + 1,) of items: block b counts items block_first[b]:block_first[b + 1]
    segment_first  (segments + 1,) of items, in the same way
    """

    items: Int32
    block_first: Int32
    segment_first: Int32


def pack(sites: Sequence[tuple[SiteLayout, Int64]], blocks: int) -> Packing:
    """Divide every group's rows of every document among ``blocks`` blocks of about equal work; sites: layout, and
    offsets (documents + 1,) of rows.

    A block's share is contiguous and is split between rows and at the ends of segments, so there are fewer than
    segments + blocks items, whatever the lengths of documents and the widths of groups.
    """
    parts = [_segments(site, layout, offsets) for site, (layout, offsets) in enumerate(sites)]
    site, group, width, start, rows = np.concatenate(parts, axis=1)
    after = np.cumsum(FLUSH + width * rows)  # the work until each segment's end
    before = after - width * rows
    # Each border is in the first segment at whose end another row would not bring the work nearer to its share.
    shares = after[-1] / blocks * np.arange(1, blocks)
    bordering = np.searchsorted(np.maximum.accumulate(after + width / 2), shares)
    rows_before = np.rint((shares - before[bordering]) / np.maximum(width[bordering], 1)).astype(np.int64)
    # Rows are numbered over all segments, with one extra number after each segment's last row.
    base = np.cumsum([0, *(rows + 1)])
    borders = base[bordering] + rows_before.clip(0, rows[bordering])
    firsts = np.sort(np.concatenate([base[:-1], borders]))
    firsts = firsts[np.diff(firsts, prepend=-1) > 0]
    of = np.searchsorted(base, firsts, side="right") - 1
    ends = np.minimum(np.append(firsts[1:], base[-1]), base[of] + rows[of])
    some = ends > firsts
    firsts, of, ends = firsts[some], of[some], ends[some]
    items = np.stack([site[of], group[of], start[of] + firsts - base[of], ends - firsts], axis=1)
    block_first = np.concatenate([[0], np.searchsorted(firsts, borders), [len(items)]])
    return Packing(items.astype(np.int32), block_first.astype(np.int32), np.searchsorted(firsts, base).astype(np.int32))


def _segments(site: int, layout: SiteLayout, offsets: Int64) -> Int64:
    """(5, segments): site, group, its width, first row, rows."""
    groups, documents = len(layout.names), len(offsets) - 1
    found = np.empty((5, groups, documents), np.int64)
    found[0], found[1] = site, np.arange(groups)[:, None]
    found[2] = layout.widths[:, None]
    found[3], found[4] = offsets[:-1], offsets[1:] - offsets[:-1]
    return found.reshape(5, -1)


def moment_segments(layout: SiteLayout, offsets: Int64) -> Int32:
    """(groups documents, 2): the rows, first and last + 1, whose moments are formed together, of a layout with a
    d_state. Rows are the documents' channels in the layout's order.
    """
    starts = np.arange(len(offsets) - 1)[None, :] * layout.channels + np.array(layout.edges)[:, None]
    return np.stack([starts[:-1], starts[1:]], axis=2).reshape(-1, 2).astype(np.int32)
