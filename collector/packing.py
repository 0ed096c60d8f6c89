"""How a batch of sites is dealt out to the CUDA counter's blocks: which counts which rows of which group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quambase.collector.statistics import SiteLayout

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

FLUSH = 100_000
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
    segments = [
        (site, group, width, start, stop - start)
        for site, (layout, offsets) in enumerate(sites)
        for group, width in enumerate(np.diff(layout.edges).tolist())
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]
    total = sum(FLUSH + width * rows for _, _, width, _, rows in segments)
    items: list[tuple[int, int, int, int]] = []
    block_first, segment_first = [0], [0]
    before = 0  # the work of the segments so far
    for site, group, width, start, rows in segments:
        row = 0
        before += FLUSH
        while True:
            last = len(block_first) == blocks
            border = rows + 1 if last else round((total * len(block_first) / blocks - before) / max(width, 1))
            if min(border, rows) > row:
                items.append((site, group, start + row, min(border, rows) - row))
                row = min(border, rows)
            if border > rows:
                break
            block_first.append(len(items))
        before += rows * width
        segment_first.append(len(items))
    block_first += [len(items)] * (blocks + 1 - len(block_first))
    return Packing(
        np.array(items, np.int32).reshape(-1, 4), np.array(block_first, np.int32), np.array(segment_first, np.int32)
    )


def moment_segments(layout: SiteLayout, offsets: Int64) -> Int32:
    """(moment groups documents, 2): the rows, first and last + 1, whose moments are formed together.

    Where the layout has a d_state, rows are the documents' channels in the layout's order, and each group is apart.
    """
    if not layout.d_state:
        return np.stack([offsets[:-1], offsets[1:]], axis=1).astype(np.int32)
    starts = np.arange(len(offsets) - 1)[None, :] * layout.channels + np.array(layout.edges)[:, None]
    return np.stack([starts[:-1], starts[1:]], axis=2).reshape(-1, 2).astype(np.int32)
