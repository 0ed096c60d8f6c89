"""Builds the INT8 model of a float model and activation scales, on the CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Unpack

import torch

from quambase.apply.int8.group_scales import ChannelGroups, channel_maps, check_scales
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.apply.int8.needed_scales import Scales
from quambase.apply.int8.operators.cuda import CudaInt8Operators
from quambase.apply.int8.operators.host import HostInt8Operators
from quambase.apply.int8.two_segments import TwoSegmentModel
from quambase.apply.int8.weights import Int8ModelWeights, PlacedWeights, Quantization, quantize, with_16_bit
from quambase.model.prepare import prepare, reorder
from quambase.model.weights import ModelWeights
from quambase.schema.scale_table import Operator, ScaleTable


def build(
    prepared: ModelWeights,
    scales: Scales,
    *,
    channel_groups: ChannelGroups = (),
    in_16_bit: Collection[Operator] = (),
    **how: Unpack[Quantization],
) -> Int8LanguageModel:
    """The INT8 model of prepared weights on the CPU, quantized as `quantize` says, with the operators ``in_16_bit`` in
    16 bit.

    ScalesInvalid as `Int8LanguageModel`, `quantize` and `with_16_bit`.
    """
    weights = quantize(prepared, **how)
    if in_16_bit:
        weights = with_16_bit(weights, prepared, in_16_bit)
    return Int8LanguageModel(on_host(weights), scales, channel_groups=channel_groups, compat=how.get("compat"))


def on_host(weights: Int8ModelWeights) -> PlacedWeights:
    """Weights laid out for the CPU's operators."""
    return PlacedWeights(weights, HostInt8Operators(weights.config.operator_sizes))


def prepared_for(weights: ModelWeights, table: ScaleTable) -> ModelWeights:
    """``weights`` folded and rotated, in the order that the table's run sorted heads and channels.

    CheckpointInvalid: the table's groups are another model's.
    """
    groups = table.model.layer_groups
    return prepare(weights if groups is None else reorder(weights, groups))


def build_model(
    weights: ModelWeights,
    table: ScaleTable,
    scales: Scales,
    *,
    in_16_bit: Collection[Operator] = (),
    **how: Unpack[Quantization],
) -> Int8LanguageModel:
    """`build` of what `prepared_for` gives. CheckpointInvalid."""
    maps = channel_maps(table.model.layer_groups or ())
    return build(prepared_for(weights, table), scales, channel_groups=maps, in_16_bit=in_16_bit, **how)


def leaving_in_16_bit(
    model: Int8LanguageModel, prepared: ModelWeights, in_16_bit: Collection[Operator]
) -> Int8LanguageModel:
    """A model on the CPU as `build` makes it of ``prepared``, with the same scales and INT8 weights but for
    ``in_16_bit``.
    """
    weights = with_16_bit(model.weights, prepared, in_16_bit)
    return model.on(on_host(weights))


def check_any_scales(weights: ModelWeights, table: ScaleTable, scales: Scales, quantize_lm_head: bool) -> Scales:
    """The scales that `build_model` reads, rounded to float32. Reports ScalesInvalid before the slow part."""
    maps = channel_maps(table.model.layer_groups or ())
    return check_scales(scales, weights.config, maps, quantize_lm_head)


AnyInt8Model = Int8LanguageModel | TwoSegmentModel
"""What an evaluation compares with the floating-point model."""


def int8_on_cuda(models: Mapping[str, AnyInt8Model], device: torch.device) -> dict[str, AnyInt8Model]:
    """Copies of ``models``, which are strategies of one model by label, on a CUDA device, where they share the weights.

    CompilationFailed: the kernels do not compile.
    """
    found: dict[str, AnyInt8Model] = {}
    shared: dict[int, PlacedWeights] = {}
    operators: CudaInt8Operators | None = None
    for label, host in models.items():
        if isinstance(host, TwoSegmentModel):
            found[label] = host.on(device)
            continue
        operators = operators or CudaInt8Operators(device, host.config.operator_sizes)
        key = id(host.weights)
        shared[key] = shared.get(key) or PlacedWeights(host.weights, operators)
        found[label] = host.on(shared[key])
    return found
