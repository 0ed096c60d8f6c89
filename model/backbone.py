"""What the Mamba families share: the residual stream around their blocks, its taps, the head, decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from quambase.model.mamba2_weights import Mamba2LayerWeights, Mamba2Weights
from quambase.model.packed_batch import Batch
from quambase.model.weights import LayerWeights, MambaWeights
from quambase.schema.progress import tell
from quambase.schema.sites import HEAD_LAYER

HEAD_ROWS = 512
"""Tokens per chunk of logits when they are observed."""


class Tap(Protocol):
    """Receives every site's activation during a forward pass.

    ``values`` is (rows, channels) float32, the rows of the documents ``documents`` of the batch one after another;
    at the ssm_state sites (documents, e, n). A site may arrive in several calls of ascending documents. The tensor
    must not be changed or kept.
    """

    def __call__(self, layer: int, site: str, values: torch.Tensor, documents: slice) -> None: ...


@dataclass
class State:
    """What a decoding step carries on, for b sequences: per layer the convolution's last k - 1 inputs
    (b, k - 1, channels) and ssm, (b, n, e) in Mamba-1 and (b, e, n) in Mamba-2.
    """

    conv: list[torch.Tensor]
    ssm: list[torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, float32."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


class Backbone(ABC):
    """A language model of one of the Mamba families, in float32 on the CPU.

    ``rotated``: the weights were prepared (`quambase.model.prepare`), so each block's output is Hadamard-transformed
    before out_proj.
    """

    weights: MambaWeights | Mamba2Weights
    rotated: bool

    def _layers(self) -> Iterator[tuple[int, LayerWeights | Mamba2LayerWeights]]:
        yield from enumerate(self.weights.layers)

    @torch.inference_mode()
    def hidden(self, batch: Batch, tap: Tap | None = None) -> torch.Tensor:
        """The normalised final hidden state (t, d), which is lm_head:input; ``tap`` sees every site on the way.

        With a tap the logits are computed too, in chunks, since lm_head:output is a site.
        """
        eps = self.weights.config.norm_eps
        everything = slice(0, batch.documents)
        residual = F.embedding(batch.tokens, self.weights.embedding)
        for index, layer in self._layers():
            residual += self._block(index, rms_norm(residual, layer.norm, eps), batch, tap)
            tell((index + 1) / (len(self.weights.layers) + bool(tap)))
        out = rms_norm(residual, self.weights.norm_f, eps)
        if tap:
            tap(HEAD_LAYER, "lm_head:input", out, everything)
            for documents in batch.chunks(HEAD_ROWS):
                rows = slice(int(batch.offsets[documents.start]), int(batch.offsets[documents.stop]))
                tap(HEAD_LAYER, "lm_head:output", self.logits(out[rows]), documents)
                tell((len(self.weights.layers) + rows.stop / len(out)) / (len(self.weights.layers) + 1))
        return out

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (rows, v) of normalised hidden states (rows, d)."""
        return F.linear(hidden, self.weights.lm_head)

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor, state: State) -> torch.Tensor:
        """Feed one token to each sequence: tokens (b,) int64, ``state`` is updated in place; logits (b, v)."""
        eps = self.weights.config.norm_eps
        residual = F.embedding(tokens, self.weights.embedding)
        for index, layer in self._layers():
            residual = residual + self._block_step(index, rms_norm(residual, layer.norm, eps), state)
        return self.logits(rms_norm(residual, self.weights.norm_f, eps))

    @abstractmethod
    def new_state(self, sequences: int) -> State:
        """The state of ``sequences`` sequences before their first token."""

    @abstractmethod
    def _block(self, index: int, normalised: torch.Tensor, batch: Batch, tap: Tap | None) -> torch.Tensor:
        """Block ``index`` of normalised (t, d): what is added to the residual stream (t, d)."""

    @abstractmethod
    def _block_step(self, index: int, normalised: torch.Tensor, state: State) -> torch.Tensor:
        """The same for one token of each sequence, (b, d); updates ``state``."""
