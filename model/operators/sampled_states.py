"""The recurrent state along a document, from scans of its pieces.

A state is linear in the state before it. So the state after a piece of a document is the state that the piece leaves if
it begins with zeros, plus the state before it times the piece's decay (Dao & Gu 2024, section 6, compute the states
between chunks in this way). Any scan that returns final states gives the former: its documents are the pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from quambase.model.exponential import exp
from quambase.model.packed_batch import Batch, PlacedBatch, sampled_ends

MOST_VALUES = 1 << 26
"""About how many values of states are in memory at a time, 256 MB; those of one document at least."""


@dataclass(frozen=True)
class Pieces:
    """The pieces of some documents of a batch, between tokens whose state is seen.

    documents  of the batch
    rows       theirs in the batch
    batch      the pieces, as the documents of a batch of these rows
    later      of the second, third, ... pieces of documents: their numbers among all
    """

    documents: slice
    rows: slice
    batch: PlacedBatch
    later: list[torch.Tensor]

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of each piece's rows of ``values`` (rows, channels): (pieces, channels)."""
        return torch.segment_reduce(values, "sum", lengths=self.batch.offsets.diff().long(), axis=0)

    def joined(self, own: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        """The state (pieces, e, n) after every piece, from the states ``own`` that the pieces leave after zeros.
        ``decay``: what remains of a state after each piece, of a shape that is broadcast to that of the states.
        """
        found = own.clone()
        for pieces in self.later:
            found[pieces] += decay[pieces] * found[pieces - 1]
        return found


def pieces_of(batch: PlacedBatch, state_values: int) -> Iterator[Pieces]:
    """The pieces of all documents that have tokens, in order; ``state_values``: of one state."""
    every, offsets = batch.host.state_every, batch.host.offsets.numpy()
    ends = [sampled_ends(int(tokens), every) for tokens in np.diff(offsets)]
    most, first = max(1, MOST_VALUES // state_values), 0
    while first < len(ends):
        counts = np.cumsum([len(of) for of in ends[first:]])
        last = first + max(1, int(np.searchsorted(counts, most, side="right")))
        if counts[last - first - 1]:
            yield _pieces(batch, slice(first, last), ends[first:last])
        first = last


def _pieces(batch: PlacedBatch, documents: slice, ends: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> Pieces:
    offsets = batch.host.offsets.numpy()
    start, stop = int(offsets[documents.start]), int(offsets[documents.stop])
    starts = offsets[documents] - start
    borders = np.concatenate([[0], *(first + of for first, of in zip(starts, ends, strict=True))]).astype(np.int64)
    of_batch = Batch(batch.host.tokens[start:stop], torch.from_numpy(borders))
    place = np.concatenate([np.arange(len(of)) for of in ends])  # of a piece in its document
    later = [
        torch.from_numpy(np.flatnonzero(place == k)).to(batch.tokens.device, non_blocking=True)
        for k in range(1, int(place.max()) + 1)
    ]
    return Pieces(documents, slice(start, stop), PlacedBatch.of(of_batch, batch.tokens.device), later)


def decay_of(total: torch.Tensor) -> torch.Tensor:
    """exp(total), the same in every process."""
    return exp(total) if total.device.type == "cpu" else torch.exp(total)


def steps(dt: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The time steps, float32: softplus of dt and its bias."""
    return F.softplus(dt.float() + bias)
