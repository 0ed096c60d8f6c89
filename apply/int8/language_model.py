"""What the INT8 models share: embedding, norms, the residual stream around the blocks, the head, decoding."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from quambase.apply.int8 import host_kernels as kernels
from quambase.apply.int8.arithmetic import Int8Weight, float32, linear_to_half, to_half
from quambase.apply.int8.weights import UPSTREAM, Int8Ends
from quambase.model.hadamard import hadamard
from quambase.model.mamba1 import MambaConfig
from quambase.model.mamba2 import Mamba2Config
from quambase.model.packed_batch import Batch
from quambase.schema.progress import tell
from quambase.schema.scale_table import Scale
from quambase.schema.sites import HEAD_LAYER


@dataclass
class Int8State:
    """What b sequences carry on: per layer int8 conv (b, k, channels), oldest first, and ssm, (b, n, e) in Mamba-1
    and (b, e, n) in Mamba-2.
    """

    conv: list[torch.Tensor]
    ssm: list[torch.Tensor]


class Int8Backbone(ABC):
    """An INT8 language model of one of the Mamba families, with the interface of
    `quambase.model.language_model.LanguageModel`.
    """

    config: MambaConfig | Mamba2Config
    scales: Mapping[tuple[int, str], Scale]
    weights: Int8Ends
    compat: str | None

    @property
    def quantized_lm_head(self) -> bool:
        """Whether the head multiplies codes."""
        return isinstance(self.weights.lm_head, Int8Weight)

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> torch.Tensor:
        """What lm_head reads (t, d): float16 values in float32, or int8 codes if the head is quantized."""
        return self._prefill(batch, None)

    @torch.inference_mode()
    def prefill(self, batch: Batch) -> tuple[torch.Tensor, Int8State]:
        """`hidden` and the state after each document, to go on with `step`."""
        state = Int8State([], [])
        return self._prefill(batch, state), state

    def _prefill(self, batch: Batch, state: Int8State | None) -> torch.Tensor:
        x = self._embed(batch.tokens)
        residual = torch.zeros_like(x)
        for index in range(self.config.n_layer):
            x = self._block(index, self._norm(x, residual, index, "in_proj:input"), batch, state)
            tell((index + 1) / self.config.n_layer)
        return self._last_norm(x, residual)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (rows, v) of rows of `hidden`: float16 values held in float32."""
        head = self.weights.lm_head
        if isinstance(head, Int8Weight):
            return linear_to_half(hidden, head, head.scale, self.whole_scale(HEAD_LAYER, "lm_head:input"))
        return to_half(F.linear(hidden, self.weights.lm_head_floats))

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor, state: Int8State) -> torch.Tensor:
        """Feed one token to each sequence: tokens (b,) int64; ``state`` is updated in place; logits (b, v).

        As upstream, the state is rounded to codes after every token, and one sequence alone (b = 1)
        multiplies its products by one combined factor where several multiply by two.
        """
        x = self._embed(tokens)
        residual = torch.zeros_like(x)
        for index in range(self.config.n_layer):
            x = self._decode(index, self._norm(x, residual, index, "in_proj:input"), state)
        hidden, head = self._last_norm(x, residual), self.weights.lm_head
        if len(tokens) == 1 and isinstance(head, Int8Weight):
            factor = float32(head.scale * self.whole_scale(HEAD_LAYER, "lm_head:input"))
            return linear_to_half(hidden, head, factor, 1.0)
        return self.logits(hidden)

    @abstractmethod
    def new_state(self, sequences: int) -> Int8State:
        """The state of ``sequences`` sequences before their first token."""

    @abstractmethod
    def _block(self, index: int, codes: torch.Tensor, batch: Batch, state: Int8State | None) -> torch.Tensor:
        """Block ``index`` of codes (t, d): float16 values (t, d) in float32; appends to ``state`` if there is one."""

    @abstractmethod
    def _decode(self, index: int, codes: torch.Tensor, state: Int8State) -> torch.Tensor:
        """The same for one token of each sequence, (b, d); updates ``state``."""

    def whole_scale(self, layer: int, site: str) -> float:
        """The one scale of an undivided site."""
        scale = self.scales[layer, site]
        assert isinstance(scale, float)
        return scale

    def rotation_factor(self, layer: int) -> float:
        """The Hadamard quantizer's: 1/sqrt(e) and the scale are one factor, as upstream (qHadamard.py)."""
        return 1.0 / math.sqrt(self.config.d_inner) / self.whole_scale(layer, "out_proj:input")

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = self.weights.embedding[tokens].to(torch.float16)
        if self.weights.embedding_scales is not None:
            rows = rows * self.weights.embedding_scales[tokens].unsqueeze(-1)  # float16 product
        return rows.to(torch.float32)

    def _norm(self, x: torch.Tensor, residual: torch.Tensor, layer: int, site: str) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=torch.int8)
        kernels.add_rms_norm_int8(
            x.numpy(),
            residual.numpy(),
            np.float32(self.config.norm_eps),
            np.float32(self.whole_scale(layer, site)),
            out.numpy(),
        )
        return out

    def _last_norm(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self.quantized_lm_head:
            return self._norm(x, residual, HEAD_LAYER, "lm_head:input")
        out = torch.empty_like(x)
        kernels.add_rms_norm(x.numpy(), residual.numpy(), np.float32(self.config.norm_eps), out.numpy())
        return to_half(out)

    def _rotate(self, index: int, y: torch.Tensor) -> torch.Tensor:
        """The gated output (rows, e) as float16, Hadamard-transformed, to codes (half away from zero)."""
        rotated = hadamard(to_half(y), self.rotation_factor(index))
        out = torch.empty(y.shape, dtype=torch.int8)
        kernels.round_to_int8(rotated.numpy(), self.compat == UPSTREAM, out.numpy())
        return out


def last_inputs(inputs: torch.Tensor, batch: Batch, width: int) -> torch.Tensor:
    """The last ``width`` rows of each document's (t, channels): (documents, width, channels), zeros where shorter."""
    window = torch.zeros(batch.documents, width, inputs.shape[1], dtype=torch.int8)
    for document in range(batch.documents):
        rows = batch.rows(document)
        taken = inputs[max(rows.start, rows.stop - width) : rows.stop]
        if taken.shape[0]:
            window[document, -taken.shape[0] :] = taken
    return window
