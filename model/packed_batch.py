"""Packed batches: documents concatenated without padding, on the host and on a model's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_NO_TOKENS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Batch:
    """Documents that share a forward pass.

    tokens   (t,) int64, the documents' token ids, concatenated
    offsets  (documents + 1,) int64, document i being ``tokens[offsets[i]:offsets[i + 1]]``
    state_every  a tap also receives the state after every so many tokens of each document (`sampled_ends`); 0: it does
                 not
    """

    tokens: torch.Tensor
    offsets: torch.Tensor
    state_every: int = 0

    @classmethod
    def pack(cls, documents: Sequence[Sequence[int]]) -> Batch:
        """Concatenate token lists."""
        return cls.join([np.array(document, np.int64) for document in documents])

    @classmethod
    def join(cls, documents: Sequence[npt.NDArray[np.integer[Any]]], state_every: int = 0) -> Batch:
        """Concatenate arrays of token ids."""
        lengths = torch.tensor([0, *(document.size for document in documents)], dtype=torch.int64)
        return cls(torch.from_numpy(np.concatenate([_NO_TOKENS, *documents])), lengths.cumsum(0), state_every)

    @property
    def documents(self) -> int:
        """How many documents."""
        return self.offsets.numel() - 1

    def rows(self, document: int) -> slice:
        """The rows of one document."""
        return slice(int(self.offsets[document]), int(self.offsets[document + 1]))

    def chunks(self, rows: int) -> list[slice]:
        """Runs of whole documents (slices of document numbers) of about ``rows`` tokens, one document at least.

        Logits, which are much wider than hidden states, are computed chunk by chunk.
        """
        found: list[slice] = []
        first = 0
        for document in range(self.documents):
            if int(self.offsets[document + 1] - self.offsets[first]) >= rows or document == self.documents - 1:
                found.append(slice(first, document + 1))
                first = document + 1
        return found


def sampled_ends(tokens: int, every: int) -> npt.NDArray[np.int64]:
    """After how many tokens the state of a document of ``tokens`` tokens is seen: every ``every``, and all of them."""
    return np.unique(np.append(np.arange(every, tokens + 1, every), tokens)) if tokens else _NO_TOKENS


@dataclass(frozen=True)
class PlacedBatch:
    """A batch on a model's device.

    tokens   (t,) int64
    offsets  (documents + 1,) int32
    starts   (t,) int32: the first row of each row's document
    decodes  every document is the next token of a sequence, whose state is given
    """

    host: Batch
    tokens: torch.Tensor
    offsets: torch.Tensor
    starts: torch.Tensor
    decodes: bool = False

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> PlacedBatch:
        """Copy a batch to ``device`` without waiting for work queued on it."""
        offsets = batch.offsets.numpy()
        starts = torch.from_numpy(np.repeat(offsets[:-1].astype(np.int32), np.diff(offsets)))
        parts = (batch.tokens, batch.offsets.to(torch.int32), starts)
        tokens, offsets_there, starts_there = (part.to(device, non_blocking=True) for part in parts)
        return cls(batch, tokens, offsets_there, starts_there)

    @classmethod
    def next_tokens(cls, tokens: torch.Tensor, device: torch.device) -> PlacedBatch:
        """The next token of each sequence, tokens (b,) int64 on the host or on ``device``. Of tokens on ``device``
        nothing is copied, so that a CUDA graph can contain it.
        """
        offsets, on_device = _one_each(len(tokens), device)
        return cls(Batch(tokens, offsets), tokens.to(device, non_blocking=True), on_device, on_device[:-1], True)


@cache
def _one_each(documents: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets of documents of one token each: int64 on the host, int32 on ``device``."""
    offsets = torch.arange(documents + 1)
    return offsets, offsets.to(device, torch.int32)


def last_rows(values: torch.Tensor, batch: PlacedBatch, width: int) -> torch.Tensor:
    """The last ``width`` rows of each document's (t, channels): (documents, width, channels), zeros where shorter."""
    if not len(values):
        return values.new_zeros(batch.host.documents, width, values.shape[1])
    starts, stops = batch.offsets[:-1, None], batch.offsets[1:, None]
    rows = stops - width + torch.arange(width, device=values.device)
    return torch.where((rows >= starts)[:, :, None], values[rows.clamp(min=0)], 0)
