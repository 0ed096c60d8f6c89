"""The recurrent state along a document, from scans of its pieces.

A state is linear in the state before it. So the state after a piece of a document is the state that the piece leaves if
it begins with zeros, plus the state before it times the piece's decay (Dao & Gu 2024, section 6, compute the states
between chunks in this way). Any scan that returns final states gives the former: its documents are the pieces.

The gradient of a state is, likewise, that through the outputs of the piece after it, plus the gradient of the state
after that piece times the piece's decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from quambase.model.exponential import exp
from quambase.model.operators.differentiable import Padding
from quambase.model.packed_batch import Batch, PlacedBatch, sampled_ends
from quambase.schema.sites import STATE_BY_CHANNEL

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

    @property
    def lengths(self) -> torch.Tensor:
        """(pieces,) int64: the tokens of each."""
        return self.batch.offsets.diff().long()

    def weights(self) -> torch.Tensor:
        """(pieces,): the tokens that the state after each piece stands for, by the trapezoidal rule, under which the
        state before a document counts as without effect: half of the piece's, and half of the following one's.
        """
        found = 0.5 * self.lengths.float()
        for pieces in self.later:
            found[pieces - 1] += 0.5 * self.lengths[pieces]
        return found

    @cached_property
    def padding(self) -> Padding:
        """Pads the pieces to the longest one."""
        return Padding(self.batch)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of each piece's rows of ``values`` (rows, channels): (pieces, channels)."""
        return torch.segment_reduce(values, "sum", lengths=self.lengths, axis=0)

    def joined(self, own: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        """The state (pieces, e, n) after every piece, from the states ``own`` that the pieces leave after zeros.
        ``decay``: what remains of a state after each piece, of a shape that is broadcast to that of the states.
        """
        found = own.clone()
        for pieces in self.later:
            found[pieces] += decay[pieces] * found[pieces - 1]
        return found

    def joined_gradients(self, through: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        """The gradient (pieces, e, n) of the state after every piece, from those ``through`` the outputs of each piece,
        of the state before it. Zero after the last piece of a document.
        """
        found = torch.zeros_like(through)
        for pieces in reversed(self.later):
            found[pieces - 1] = through[pieces] + decay[pieces] * found[pieces]
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


def _pieces(batch: PlacedBatch, documents: slice, ends: list[npt.NDArray[np.int64]]) -> Pieces:
    """The pieces of some documents; ``ends``: of each, after how many tokens its pieces end."""
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


def watch_states(
    y: torch.Tensor,
    batch: PlacedBatch,
    state_values: int,
    state_of: Callable[[Pieces], torch.Tensor],
    gradient_of: Callable[[Pieces, torch.Tensor], torch.Tensor],
    show: Callable[[str, torch.Tensor, slice], None],
) -> None:
    """Show the states along documents of a forward pass that is differentiated, by channel, as tensors whose gradients
    follow from that of the scan's output ``y`` (t, channels). They are multiplied by the root of `Pieces.weights`, so
    that their squares add up to about those at every token. All states are in memory until the backward pass ends.

    state_values  values of one state
    state_of      the states (pieces, e, n) of some pieces; differentiable operators return none
    gradient_of   their gradients, from that of the pieces' rows of ``y``
    """
    watched = list[tuple[Pieces, torch.Tensor]]()
    for pieces in pieces_of(batch, state_values):
        states = state_of(pieces).requires_grad_()
        show(STATE_BY_CHANNEL, states, pieces.documents)
        watched.append((pieces, states))

    def receive(gradient: torch.Tensor) -> None:
        for pieces, states in watched:
            found = gradient_of(pieces, gradient[pieces.rows]) * pieces.weights().sqrt()[:, None, None]
            torch.autograd.backward(states, found)
            states.grad = None

    y.register_hook(receive)  # type: ignore[no-untyped-call]


def decay_of(total: torch.Tensor) -> torch.Tensor:
    """exp(total), the same in every process."""
    return exp(total) if total.device.type == "cpu" else torch.exp(total)


def steps(dt: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The time steps, float32: softplus of dt and its bias."""
    return F.softplus(dt.float() + bias)
