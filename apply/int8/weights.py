"""The INT8 weights of a Mamba-1: what one set of activation scales after another is run with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch

from quambase.apply.int8.arithmetic import Int8Weight, quantize_rows, quantize_weight, quantize_weight_float32
from quambase.model.block import BlockWeights, ModelConfig
from quambase.model.exponential import exp
from quambase.model.weights import ModelWeights

UPSTREAM = "upstream"
"""The one compatibility mode: upstream's wrapping Hadamard quantizer and embedding maximum without abs."""


@dataclass(frozen=True)
class Int8Layer:
    """One block's weights as codes; shapes as in `Mamba1BlockWeights`."""

    in_proj: Int8Weight
    conv_weight: Int8Weight
    conv_bias: Int8Weight
    x_proj: Int8Weight
    dt_proj: Int8Weight
    dt_bias: Int8Weight
    A_log: Int8Weight
    D: Int8Weight
    out_proj: Int8Weight

    @classmethod
    def of(cls, layer: BlockWeights) -> Int8Layer:
        """Quantize prepared weights: float16 arithmetic, float32 for what upstream keeps in float32."""
        wide = ("dt_bias", "A_log", "D")
        return cls(
            **{
                f.name: (quantize_weight_float32 if f.name in wide else quantize_weight)(getattr(layer, f.name))
                for f in fields(cls)
            }
        )

    @cached_property
    def conv_taps(self) -> torch.Tensor:
        """Convolution codes (k, e) in float32."""
        return self.conv_weight.floats.T.contiguous()

    @cached_property
    def a(self) -> torch.Tensor:
        """A (n, e) = -exp(scale * A_log codes): quantized before the exponential."""
        return -exp(self.A_log.dequantized().T.contiguous())


@dataclass(frozen=True)
class Int8Ends:
    """What is not in a block.

    embedding  (v, d) float16, or int8 codes with ``embedding_scales`` (v,) float16
    lm_head    (v, d) float16, or an Int8Weight
    """

    embedding: torch.Tensor
    embedding_scales: torch.Tensor | None
    lm_head: torch.Tensor | Int8Weight

    @cached_property
    def lm_head_floats(self) -> torch.Tensor:
        """The float16 head held in float32 for BLAS."""
        assert isinstance(self.lm_head, torch.Tensor)
        return self.lm_head.to(torch.float32)

    @classmethod
    def arguments(
        cls,
        prepared: ModelWeights,
        *,
        quantize_lm_head: bool,
        quantize_embedding: bool,
        compat: str | None,
    ) -> dict[str, Any]:
        """Quantize embedding and head of prepared weights, by field."""
        embedding, scales = prepared.embedding.to(torch.float16), None
        if quantize_embedding:
            embedding, scales = quantize_rows(prepared.embedding, signed_max=compat == UPSTREAM)
        head = quantize_weight(prepared.lm_head) if quantize_lm_head else prepared.lm_head.to(torch.float16)
        return {"embedding": embedding, "embedding_scales": scales, "lm_head": head}


@dataclass(frozen=True)
class Int8Weights(Int8Ends):
    """A whole Mamba-1."""

    config: ModelConfig
    layers: tuple[Int8Layer, ...]


def quantize(
    prepared: ModelWeights,
    *,
    quantize_lm_head: bool = False,
    quantize_embedding: bool = False,
    compat: str | None = None,
) -> Int8Weights:
    """INT8 weights of prepared (folded and rotated, `quambase.model.prepare`) float weights."""
    ends = Int8Ends.arguments(
        prepared, quantize_lm_head=quantize_lm_head, quantize_embedding=quantize_embedding, compat=compat
    )
    return Int8Weights(**ends, config=prepared.config, layers=tuple(map(Int8Layer.of, prepared.layers)))
