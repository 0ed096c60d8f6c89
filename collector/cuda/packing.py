"""How a batch of sites is dealt out to the CUDA counter's blocks: which counts which rows of which group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quambase.collector.statistics import SiteLayout

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

FLUSH = 60_000
"""What an item takes beside its values, in values counted meanwhile: a table to write, its first values to wait for."""


@dataclass(frozen=True)
class Packing:
    """Items of work, all int32. A segment is one document of one group of one site; they are numbered in that order
    from the last to the first: document by document of a group, group by group of a site, site by site.

    items          (items, 4): site, group in it, first row, rows; in the order of segments, and of rows within
    block_first    (blocks + 1,) of items: block b counts items block_first[b]:block_first[b + 1]
    segment_first  (segments + 1,) of items, likewise
    """

    items: Int32
    block_first: Int32
    segment_first: Int32


def pack(sites: Sequence[tuple[SiteLayout, Int64]], blocks: int) -> Packing:
    """Deal every group's rows of every document out to ``blocks`` blocks of about equal work; sites: layout, and
    offsets (documents + 1,) of rows.

    A block's share is consecutive and is cut at whole rows and where segments meet, so there are fewer than segments +
    blocks items, whatever the lengths of documents and the widths of groups.
    """
    parts = [_segments(site, layout, offsets) for site, (layout, offsets) in enumerate(sites)]
    site, group, width, start, rows = np.concatenate(parts, axis=1)
    after = np.cumsum(FLUSH + width * rows)  # the work until each segment's end
    before = after - width * rows
    # Each border lies in the first segment at whose end no row more would bring the work nearer to its share.
    shares = after[-1] / blocks * np.arange(1, blocks)
    bordering = np.searchsorted(np.maximum.accumulate(after + width / 2), shares)
    rows_before = np.rint((shares - before[bordering]) / np.maximum(width[bordering], 1)).astype(np.int64)
    # Rows are numbered through all segments, with a number more after each one's last.
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
    """(moment groups documents, 2): the rows, first and last + 1, whose moments are formed together.

    Where the layout has a d_state, rows are the documents' channels in the layout's order, and each group is apart.
    """
    if not layout.d_state:
        return np.stack([offsets[:-1], offsets[1:]], axis=1).astype(np.int32)
    starts = np.arange(len(offsets) - 1)[None, :] * layout.channels + np.array(layout.edges)[:, None]
    return np.stack([starts[:-1], starts[1:]], axis=2).reshape(-1, 2).astype(np.int32)
