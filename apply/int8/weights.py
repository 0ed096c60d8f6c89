"""The INT8 weights of a model of any kind of block, which the activation scales of all strategies share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypedDict

import torch

from quambase.apply.int8.arithmetic import Int8Weight, quantize_rows, quantize_weight, weight_values
from quambase.apply.int8.block import Int8Block, Int8BlockWeights
from quambase.apply.int8.block_kinds import int8_kind_of
from quambase.apply.int8.operators.interface import Int8Operators
from quambase.model.block import ModelConfig
from quambase.model.weights import ModelWeights
from quambase.schema.errors import ScalesInvalid
from quambase.schema.scale_table import Operator

UPSTREAM = "upstream"
"""The only compatibility mode: upstream's wrapping Hadamard quantizer, and its embedding maximum without abs."""


SecondMoments = Callable[[int], Mapping[str, torch.Tensor]]
"""Reads a layer's second moments: of each site of sites.PRODUCT_SITES the sum over tokens of x x^T, (in, in)."""

WEIGHT_BITS = (8, 4)
"""Bits of the weights of in_proj, x_proj and out_proj; all others have 8."""


@dataclass(frozen=True)
class Int8ModelWeights:
    """A whole model.

    embedding  (v, d) float16, or int8 codes with ``embedding_scales`` (v,) float16
    lm_head    (v, d) float16, or an Int8Weight
    weight_bits  of the blocks' projections: 8, or 4
    gptq         whether they were rounded as GPTQ does (`compensated_codes`), not to nearest
    """

    config: ModelConfig
    embedding: torch.Tensor
    embedding_scales: torch.Tensor | None
    lm_head: torch.Tensor | Int8Weight
    layers: tuple[Int8BlockWeights, ...]
    weight_bits: int = 8
    gptq: bool = False

    @property
    def in_16_bit(self) -> frozenset[Operator]:
        """The operators in 16 bit."""
        return frozenset((i, operator) for i, layer in enumerate(self.layers) for operator in layer.in_16_bit)


class Quantization(TypedDict, total=False):
    """The keyword arguments of `quantize`."""

    quantize_lm_head: bool
    quantize_embedding: bool
    compat: str | None
    weight_bits: int
    second_moments: SecondMoments | None


def quantize(
    prepared: ModelWeights,
    *,
    quantize_lm_head: bool = False,
    quantize_embedding: bool = False,
    compat: str | None = None,
    weight_bits: int = 8,
    second_moments: SecondMoments | None = None,
) -> Int8ModelWeights:
    """INT8 weights of prepared (folded and rotated, `quambase.model.prepare`) float weights; those of 4 bits rounded as
    GPTQ does if there are ``second_moments``.

    ScalesInvalid: ``weight_bits`` is neither 8 nor 4, 4 with ``compat``, or 8 with ``second_moments``.
    """
    if weight_bits not in WEIGHT_BITS or (weight_bits != 8 and compat is not None):
        known = "8 with --compat" if weight_bits in WEIGHT_BITS else " or ".join(map(str, WEIGHT_BITS))
        raise ScalesInvalid(f"weights of {weight_bits} bits are asked for; expected {known}")
    if second_moments is not None and weight_bits != 4:
        raise ScalesInvalid(f"GPTQ is asked for with weights of {weight_bits} bits; expected 4")
    embedding, scales = prepared.embedding.to(torch.float16), None
    if quantize_embedding:
        embedding, scales = quantize_rows(prepared.embedding, signed_max=compat == UPSTREAM)
    head = quantize_weight(prepared.lm_head) if quantize_lm_head else prepared.lm_head.to(torch.float16)
    layers = tuple(
        int8_kind_of(layer).weights.quantized(
            prepared.config, layer, weight_bits, {} if second_moments is None else second_moments(i)
        )
        for i, layer in enumerate(prepared.layers)
    )
    gptq = second_moments is not None
    return Int8ModelWeights(prepared.config, embedding, scales, head, layers, weight_bits, gptq)


def with_16_bit(weights: Int8ModelWeights, prepared: ModelWeights, operators: Collection[Operator]) -> Int8ModelWeights:
    """``weights`` with ``operators`` in 16 bit and no others, made of ``prepared``; layers that have and get none are
    shared. In a layer where an operator is no longer in 16 bit, every weight is rounded to nearest, also of weights by
    GPTQ.

    ScalesInvalid: the model has no such operator.
    """
    by_layer: dict[int, list[str]] = {i: [] for i, layer in enumerate(weights.layers) if layer.in_16_bit}
    for layer, operator in sorted(operators):
        by_layer.setdefault(layer, []).append(operator)
    layers = list(weights.layers)
    for layer, names in by_layer.items():
        if not 0 <= layer < len(layers):
            raise ScalesInvalid(f"layer {layer} is to be in 16 bit; the model has the layers 0 to {len(layers) - 1}")
        int8, original = layers[layer], prepared.layers[layer]
        if not int8.in_16_bit <= set(names):
            int8 = int8_kind_of(original).weights.quantized(prepared.config, original, weights.weight_bits)
        layers[layer] = int8.with_16_bit(original, names)
    return replace(weights, layers=tuple(layers))


def dequantized(weights: Int8ModelWeights, prepared: ModelWeights) -> ModelWeights:
    """Prepared weights with the values of ``weights`` in place of those they were quantized from."""
    layers = tuple(
        replace(layer, **{name: weight_values(weight) for name, weight in vars(codes).items()})
        for layer, codes in zip(prepared.layers, weights.layers, strict=True)
    )
    embedding = weights.embedding.to(torch.float32)
    if weights.embedding_scales is not None:
        embedding = embedding * weights.embedding_scales.to(torch.float32).unsqueeze(-1)
    return replace(prepared, embedding=embedding, lm_head=weight_values(weights.lm_head), layers=layers)


class PlacedWeights:
    """INT8 weights laid out for ``operators`` on first use; all strategies share them."""

    def __init__(self, weights: Int8ModelWeights, operators: Int8Operators) -> None:
        self.weights, self.operators = weights, operators

    @cached_property
    def blocks(self) -> list[Int8Block]:
        """Every block."""
        config, layers = self.weights.config, self.weights.layers
        return [int8_kind_of(layer).block(config, layer, self.operators) for layer in layers]

    @cached_property
    def embedding(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The embedding, and its scales if it is quantized."""
        device, scales = self.operators.device, self.weights.embedding_scales
        return self.weights.embedding.to(device), None if scales is None else scales.to(device)

    @cached_property
    def half_head(self) -> torch.Tensor:
        """The float16 head."""
        assert isinstance(self.weights.lm_head, torch.Tensor)
        return self.operators.half_matrix(self.weights.lm_head)

    @cached_property
    def int8_head(self) -> Int8Weight:
        """The quantized head."""
        assert isinstance(self.weights.lm_head, Int8Weight)
        return self.operators.matrix(self.weights.lm_head)
