"""An INT8 language model of any kind of block on any device: embedding, residual stream, norms, head, decoding.

Codes on CUDA equal the CPU's, except that another order of float32 sums or the device's exp can change a code by one.
The tests count those.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from quambase.apply.int8.arithmetic import Int8Weight
from quambase.apply.int8.block import BlockScales, half_factors, whole
from quambase.apply.int8.group_scales import ChannelGroups, check_scales
from quambase.apply.int8.needed_scales import Scales
from quambase.apply.int8.operators.interface import Factors, Int8BlockState, Int8Operators
from quambase.apply.int8.state_formats import SimulatedState, StateFormat, StateLayout
from quambase.apply.int8.weights import UPSTREAM, Int8ModelWeights, PlacedWeights
from quambase.model.block import ModelConfig
from quambase.model.operators.interface import BlockState
from quambase.model.packed_batch import Batch, PlacedBatch
from quambase.schema.errors import ScalesInvalid
from quambase.schema.progress import tell
from quambase.schema.scale_table import Operator, Scale
from quambase.schema.sites import HEAD_LAYER

Int8State = list[BlockState]
"""The decoding state: one `BlockState` per block."""


class Int8LanguageModel:
    """The INT8 model of one strategy; the interface of `quambase.model.language_model.LanguageModel`.

    Weights do not depend on activation scales, so all strategies share one set of INT8 weights (`with_scales`).
    """

    def __init__(
        self,
        placed: PlacedWeights,
        scales: Scales,
        *,
        channel_groups: ChannelGroups = (),
        compat: str | None = None,
        state_format: StateFormat | None = None,
    ) -> None:
        """``channel_groups``: per layer the divisions of x into scale groups; not needed for one scale per tensor or
        per SSD group. ``compat``: None, or "upstream". ``state_format``: of the state between decoded tokens,
        simulated; None: INT8 with the table's scales, as codes.

        ScalesInvalid: ``scales`` lacks a site that the model reads, a scale is not positive, a site's number of scales
        is not that of any of its divisions, or ``compat`` is asked of a model with operators in 16 bit.
        """
        self.placed, self.channel_groups, self.compat = placed, channel_groups, compat
        self.state_format = state_format
        if compat is not None and self.in_16_bit:
            raise ScalesInvalid(
                "upstream's INT8 model has no operator in 16 bit; leave out --compat, or the strategy mixed"
            )
        self.scales: Mapping[tuple[int, str], Scale] = check_scales(
            scales, self.config, channel_groups, self.quantized_lm_head
        )

    @property
    def weights(self) -> Int8ModelWeights:
        """The model's codes, shared by every strategy."""
        return self.placed.weights

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.placed.operators.device

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        return self.placed.weights.config

    @property
    def quantized_lm_head(self) -> bool:
        """Whether the head multiplies codes."""
        return isinstance(self.weights.lm_head, Int8Weight)

    @property
    def in_16_bit(self) -> frozenset[Operator]:
        """The operators in 16 bit."""
        return self.weights.in_16_bit

    def with_scales(self, scales: Scales) -> Int8LanguageModel:
        """Another strategy on the same INT8 weights and groups; nothing is quantized again."""
        return self._changed(scales=scales)

    def with_state(self, state_format: StateFormat) -> Int8LanguageModel:
        """The same strategy with another format of the state."""
        return self._changed(state_format=state_format)

    def on(self, placed: PlacedWeights) -> Int8LanguageModel:
        """The same strategy on another copy of the same weights."""
        return self._changed(placed=placed)

    def _changed(self, **changes: Any) -> Int8LanguageModel:
        """A model of the same arguments but for ``changes``."""
        own = {name: getattr(self, name) for name in ("placed", "scales", "channel_groups", "compat", "state_format")}
        return Int8LanguageModel(**(own | changes))

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> torch.Tensor:
        """The input of lm_head (t, d): float16 values (on the CPU as float32), int8 codes if the head is quantized."""
        return self._run(PlacedBatch.of(batch, self.device), self.placed.operators)

    @torch.inference_mode()
    def prefill(self, batch: Batch) -> tuple[torch.Tensor, Int8State]:
        """`hidden`, and the state after each document, rounded once, from which `step` continues."""
        state = self.new_state(batch.documents)
        return self._run(PlacedBatch.of(batch, self.device), self.placed.operators, state), state

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (rows, v) of rows of `hidden`: float16 values, on the CPU in float32."""
        return self._logits(hidden, self.placed.operators)

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor, state: Int8State) -> torch.Tensor:
        """Feed one token to each sequence: tokens (b,) int64; ``state`` is updated in place; logits (b, v).

        As upstream, the state is rounded to codes after every token. The products of a single sequence (b = 1) are
        multiplied by one combined factor, those of several sequences by two factors in turn.
        """
        return self._logits(self.step_hidden(tokens, state), self.placed.operators.decoding())

    @torch.inference_mode()
    def step_hidden(self, tokens: torch.Tensor, state: Int8State) -> torch.Tensor:
        """As `step`, but the input of lm_head (b, d), as `hidden` has it."""
        return self._run(PlacedBatch.next_tokens(tokens, self.device), self.placed.operators.decoding(), state)

    def new_state(self, sequences: int) -> Int8State:
        """The state of ``sequences`` sequences before their first token."""
        found = [block.new_state(sequences) for block in self.placed.blocks]
        if self.state_format is None:
            return found
        generator = torch.Generator(self.placed.operators.device).manual_seed(0)
        return [
            self._simulated(state, block.state_layout(scales), generator)
            for state, block, scales in zip(found, self.placed.blocks, self.laid_out, strict=True)
        ]

    def _simulated(self, state: BlockState, layout: StateLayout, generator: torch.Generator) -> BlockState:
        """The state in the format; itself if its convolution and scan are in 16 bit."""
        if not isinstance(state, Int8BlockState) or self.state_format is None:
            return state
        zeros = torch.zeros(state.ssm.shape, device=state.ssm.device)
        return SimulatedState(state.conv, zeros, layout, self.state_format, generator)

    @cached_property
    def laid_out(self) -> list[BlockScales]:
        """Every block's scales, as its operators read them."""
        of_layers: list[dict[str, Scale]] = [{} for _ in self.placed.blocks]
        for (layer, site), scale in self.scales.items():
            if layer != HEAD_LAYER:
                of_layers[layer][site] = scale
        divisions = self.channel_groups or [()] * len(of_layers)
        wrap = self.compat == UPSTREAM
        return [
            block.lay_out(scales, of_layer, wrap)
            for block, scales, of_layer in zip(self.placed.blocks, of_layers, divisions, strict=True)
        ]

    def _run(self, batch: PlacedBatch, ops: Int8Operators, state: Int8State | None = None) -> torch.Tensor:
        """As `hidden`, with ``ops``."""
        eps = self.config.norm_eps
        x = ops.halves(self._embedded(batch.tokens))
        residual = ops.new_residual(x)
        blocks = self.placed.blocks
        for index, (block, scales) in enumerate(zip(blocks, self.laid_out, strict=True)):
            if scales.input is None:
                normed = ops.add_norm_to_half(x, residual, eps)
            else:
                normed = ops.add_norm_to_int8(x, residual, eps, scales.input)
            x = block.forward(ops, normed, scales, batch, None if state is None else state[index])
            if ops.device.type == "cpu" and not ops.decodes:  # on a device the work is only queued
                tell((index + 1) / len(blocks))
        if self.quantized_lm_head:
            return ops.add_norm_to_int8(x, residual, eps, self._head_scale)
        return ops.add_norm_to_half(x, residual, eps)

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding (t, d) float16."""
        embedding, scales = self.placed.embedding
        rows = embedding[tokens].to(torch.float16)
        return rows if scales is None else rows * scales[tokens].unsqueeze(-1)  # float16 product

    def _logits(self, hidden: torch.Tensor, ops: Int8Operators) -> torch.Tensor:
        if not self.quantized_lm_head:
            return ops.half_product(hidden, self.placed.half_head)
        head = self.placed.int8_head
        factors: Factors = half_factors(head.scale, self._head_scale)
        return ops.linear_to_half(hidden, head, factors.of(ops, hidden))

    @property
    def _head_scale(self) -> float:
        return whole(self.scales[HEAD_LAYER, "lm_head:input"])
