"""The INT8 weights of a Mamba-2: what one set of activation scales after another is run with."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from quambase.apply.int8.arithmetic import Int8Weight, quantize_weight, quantize_weight_float32
from quambase.apply.int8.weights import Int8Ends
from quambase.model.exponential import exp
from quambase.model.mamba2 import Mamba2Config
from quambase.model.weights import ModelWeights


@dataclass(frozen=True)
class SplitInt8Weight:
    """A weight tensor whose consecutive rows fall in parts with a scale each.

    codes   int8 (rows, ...)
    scales  float32 values, one per part
    widths  rows of each part
    """

    codes: torch.Tensor
    scales: tuple[float, ...]
    widths: tuple[int, ...]

    @classmethod
    def of(
        cls, weight: torch.Tensor, widths: tuple[int, ...], quantize: Callable[[torch.Tensor], Int8Weight]
    ) -> SplitInt8Weight:
        """Quantize each part of ``weight`` for itself."""
        parts = [quantize(part) for part in torch.split(weight, list(widths))]
        return cls(torch.cat([part.codes for part in parts]), tuple(part.scale for part in parts), widths)

    @cached_property
    def joined(self) -> Int8Weight:
        """All codes as one weight, for the integer product."""
        return Int8Weight(self.codes, 1.0)

    @cached_property
    def row_scales(self) -> torch.Tensor:
        """Each row's scale, float32 (rows,)."""
        return torch.repeat_interleave(torch.tensor(self.scales), torch.tensor(self.widths))


def in_proj_widths(config: Mamba2Config) -> tuple[int, ...]:
    """Rows of z, x, B, C and dt in in_proj."""
    edges = config.in_proj_edges
    return tuple(end - start for start, end in itertools.pairwise(edges))


def conv_widths(config: Mamba2Config) -> tuple[int, ...]:
    """Channels of x, B and C in the convolution."""
    return (config.d_inner, config.bc_width, config.bc_width)


@dataclass(frozen=True)
class Int8Mamba2Layer:
    """One block's weights as codes, shapes as in `Mamba2BlockWeights`; dt_bias and gated_norm stay float16."""

    in_proj: SplitInt8Weight
    conv_weight: SplitInt8Weight
    conv_bias: SplitInt8Weight
    A_log: Int8Weight
    D: Int8Weight
    out_proj: Int8Weight
    dt_bias: torch.Tensor
    gated_norm: torch.Tensor

    @classmethod
    def of(cls, config: Any, layer: Any) -> Int8Mamba2Layer:
        """Quantize prepared weights: float16 arithmetic, but float32 for the convolution and D, as upstream."""
        return cls(
            in_proj=SplitInt8Weight.of(layer.in_proj, in_proj_widths(config), quantize_weight),
            conv_weight=SplitInt8Weight.of(layer.conv_weight, conv_widths(config), quantize_weight_float32),
            conv_bias=SplitInt8Weight.of(layer.conv_bias, conv_widths(config), quantize_weight_float32),
            A_log=quantize_weight(layer.A_log),
            D=quantize_weight_float32(layer.D),
            out_proj=quantize_weight(layer.out_proj),
            dt_bias=layer.dt_bias.to(torch.float16),
            gated_norm=layer.gated_norm.to(torch.float16),
        )

    @cached_property
    def conv_taps(self) -> torch.Tensor:
        """Convolution codes (k, channels) in float32."""
        return self.conv_weight.joined.floats.T.contiguous()

    @cached_property
    def conv_bias_floats(self) -> torch.Tensor:
        """The convolution's bias, dequantized, float32 (channels,)."""
        return self.conv_bias.joined.floats * self.conv_bias.row_scales

    @cached_property
    def a(self) -> torch.Tensor:
        """A (h,) = -exp(scale * A_log codes): quantized before the exponential."""
        return -exp(self.A_log.dequantized())


@dataclass(frozen=True)
class Int8Mamba2Weights(Int8Ends):
    """A whole Mamba-2."""

    config: Any
    layers: tuple[Int8Mamba2Layer, ...]


def quantize(
    prepared: ModelWeights,
    *,
    quantize_lm_head: bool = False,
    quantize_embedding: bool = False,
    compat: str | None = None,
) -> Int8Mamba2Weights:
    """INT8 weights of prepared (folded and rotated, `quambase.model.prepare`) float weights."""
    ends = Int8Ends.arguments(
        prepared, quantize_lm_head=quantize_lm_head, quantize_embedding=quantize_embedding, compat=compat
    )
    layers = tuple(Int8Mamba2Layer.of(prepared.config, layer) for layer in prepared.layers)
    return Int8Mamba2Weights(**ends, config=prepared.config, layers=layers)
