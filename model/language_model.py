"""A language model of any kind of block on any device: residual stream, taps, head, decoding.

On the CPU everything is float32. On CUDA in float16 it computes what upstream runs: matrix products in float16
(accumulated in float32), the residual stream and its norms in float32, convolution, scans and Hadamard transforms in
float32 inside and rounded once at their end. Prepared weights (`quambase.model.prepare`) lose nothing by rounding to
float16. A state is float32 either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F

from quambase.model.block import Block, Show, Tap, unchanged
from quambase.model.block_kinds import kind_of
from quambase.model.operators.choice import choose_operators
from quambase.model.operators.interface import BlockState, Operators
from quambase.model.operators.torch import CPU
from quambase.model.packed_batch import Batch, PlacedBatch
from quambase.model.weights import ModelWeights
from quambase.schema.progress import tell
from quambase.schema.sites import HEAD_LAYER

LayerChange = Callable[[int, str, torch.Tensor], torch.Tensor]
"""`quambase.model.block.Change` that also takes the layer."""

State = list[BlockState]
"""The decoding state: one `BlockState` per block."""


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute matrix products of float32 without TF32, whatever the process's setting."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


class LanguageModel:
    """A language model ready to run; its blocks may be of different kinds.

    ``rotated``: the weights were prepared, so each block's output is Hadamard-transformed before out_proj.
    """

    def __init__(self, weights: ModelWeights, operators: Operators, *, rotated: bool = False) -> None:
        config = weights.config
        self.config, self.operators, self.rotated = config, operators, rotated
        self.device, self.dtype = operators.device, operators.dtype
        self.embedding, self.lm_head = operators.matrix(weights.embedding), operators.matrix(weights.lm_head)
        self.norms = [operators.vector(layer.norm) for layer in weights.layers]
        self.norm_f = operators.vector(weights.norm_f)
        self.blocks: list[Block] = [
            kind_of(layer).block(config, layer, operators, rotated=rotated) for layer in weights.layers
        ]

    @torch.inference_mode()
    def hidden(self, batch: Batch, tap: Tap | None = None, change: LayerChange | None = None) -> torch.Tensor:
        """The normalised final hidden state (t, d), which is lm_head:input; ``tap`` receives every site, and the blocks
        continue with the values that ``change`` returns for a site.

        With a tap the logits are computed too, in chunks, since lm_head:output is a site.
        """
        with without_tf32():
            out = self._normalised(PlacedBatch.of(batch, self.device), tap=tap, change=change)
            if tap:
                self._show_head(tap, out, batch)
        return out

    def differentiable_hidden(self, batch: Batch, tap: Tap) -> torch.Tensor:
        """As `hidden`, differentiable by PyTorch; the model must have `DifferentiableOperators`. ``tap`` receives
        tensors of the autograd graph, or slices of them; of the head's sites only the input.
        """
        with torch.enable_grad(), without_tf32():
            out = self._normalised(PlacedBatch.of(batch, self.device), tap=tap)
            tap(HEAD_LAYER, "lm_head:input", out, slice(0, batch.documents))
        return out

    @torch.inference_mode()
    def prefill(self, batch: Batch) -> tuple[torch.Tensor, State]:
        """`hidden`, and the state after each document, from which `step` continues."""
        state = self.new_state(batch.documents)
        with without_tf32():
            return self._normalised(PlacedBatch.of(batch, self.device), state), state

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (rows, v) of normalised hidden states (rows, d)."""
        with without_tf32():
            return F.linear(hidden, self.lm_head)

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor, state: State) -> torch.Tensor:
        """Feed one token to each sequence: tokens (b,) int64, ``state`` is updated in place; logits (b, v)."""
        with without_tf32():
            return self.logits(self._normalised(PlacedBatch.next_tokens(tokens, self.device), state))

    def new_state(self, sequences: int) -> State:
        """The state of ``sequences`` sequences before their first token."""
        return [block.new_state(sequences) for block in self.blocks]

    def _normalised(
        self,
        batch: PlacedBatch,
        state: State | None = None,
        tap: Tap | None = None,
        change: LayerChange | None = None,
    ) -> torch.Tensor:
        """The final hidden state (t, d)."""
        config, add_norm = self.config, self.operators.add_norm
        documents = slice(0, batch.host.documents)
        x = F.embedding(batch.tokens, self.embedding)
        residual = torch.zeros(x.shape, device=self.device)
        for index, (norm, block) in enumerate(zip(self.norms, self.blocks, strict=True)):
            normalised = add_norm(x, residual, norm, config.norm_eps)
            show = None if tap is None else _of_layer(tap, index, documents)
            changes = unchanged if change is None else partial(change, index)
            x = block.forward(normalised, batch, None if state is None else state[index], show, changes)
            if self.device.type == "cpu" and not batch.decodes:  # on a device the work is only queued
                tell((index + 1) / (len(self.blocks) + bool(tap)))
        return add_norm(x, residual, self.norm_f, config.norm_eps)

    def _show_head(self, tap: Tap, out: torch.Tensor, batch: Batch) -> None:
        """Call ``tap`` with the head's sites."""
        layers = len(self.blocks)
        tap(HEAD_LAYER, "lm_head:input", out, slice(0, batch.documents))
        for documents in batch.chunks(self.operators.head_rows):
            rows = slice(int(batch.offsets[documents.start]), int(batch.offsets[documents.stop]))
            tap(HEAD_LAYER, "lm_head:output", self.logits(out[rows]), documents)
            if self.device.type == "cpu":
                tell((layers + rows.stop / len(out)) / (layers + 1))


def _of_layer(tap: Tap, layer: int, every: slice) -> Show:
    def show(site: str, values: torch.Tensor, documents: slice | None = None) -> None:
        tap(layer, site, values, every if documents is None else documents)

    return show


def floating_model(
    weights: ModelWeights, device: torch.device = CPU, dtype: torch.dtype = torch.float32, *, rotated: bool = False
) -> LanguageModel:
    """The forward pass of ``weights`` on ``device``; ``rotated``: they were prepared."""
    operators = choose_operators(weights.config.operator_sizes, device, dtype)
    return LanguageModel(weights, operators, rotated=rotated)
