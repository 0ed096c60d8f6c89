"""How a call of the CUDA counter is dealt out: which block counts which rows of which group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quambase.collector.statistics import SiteLayout

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Items of work, all int32. A segment is one document of one group, number ``group documents + document``.

    items          (items, 3): group, first row, rows; in the order of segments, and of rows within
    block_first    (blocks + 1,) of items: block b counts items block_first[b]:block_first[b + 1]
    segment_first  (groups documents + 1,) of items, likewise
    """

    items: Int32
    block_first: Int32
    segment_first: Int32


def pack(layout: SiteLayout, offsets: Int64, blocks: int) -> Packing:
    """Deal every group's rows of every document out to ``blocks`` blocks of about equal numbers of values.

    A block's share is consecutive and is cut at whole rows and where segments meet, so there are fewer than segments +
    blocks items, whatever the lengths of documents and the widths of groups.
    """
    widths = np.diff(layout.edges).tolist()
    spans = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    total = sum(widths) * int(offsets[-1] - offsets[0])
    items: list[tuple[int, int, int]] = []
    block_first, segment_first = [0], [0]
    before = 0  # values of the segments so far
    for group, width in enumerate(widths):
        for start, stop in spans:
            row, rows = 0, stop - start
            while True:
                last = len(block_first) == blocks
                border = rows + 1 if last else round((total * len(block_first) / blocks - before) / max(width, 1))
                if min(border, rows) > row:
                    items.append((group, start + row, min(border, rows) - row))
                    row = min(border, rows)
                if border > rows:
                    break
                block_first.append(len(items))
            before += rows * width
            segment_first.append(len(items))
    block_first += [len(items)] * (blocks + 1 - len(block_first))
    return Packing(
        np.array(items, np.int32).reshape(-1, 3), np.array(block_first, np.int32), np.array(segment_first, np.int32)
    )


def moment_segments(layout: SiteLayout, offsets: Int64) -> Int32:
    """(moment groups documents, 2): the rows, first and last + 1, whose moments are formed together.

    Where the layout has a d_state, rows are the documents' channels in the layout's order, and each group is apart.
    """
    if not layout.d_state:
        return np.stack([offsets[:-1], offsets[1:]], axis=1).astype(np.int32)
    starts = np.arange(len(offsets) - 1)[None, :] * layout.channels + np.array(layout.edges)[:, None]
    return np.stack([starts[:-1], starts[1:]], axis=2).reshape(-1, 2).astype(np.int32)
