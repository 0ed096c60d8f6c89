"""The INT8 model of two-segment codes (strategy `outlier_piecewise`), which two multipliers decode.

A magnitude up to ``120 * inner`` has the code ``round(a / inner)``; a larger one
``120 + round((a - 120 * inner) / outer)``, at most 127; the sign is kept. So the value is not a multiple of the code,
and no integer product can read it: every operator decodes its codes first and computes in floating point, with weights
that are decoded, too. That is slower than INT8; what it costs in accuracy is what this model is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch

from quambase.apply.int8.arithmetic import Int8Weight
from quambase.apply.int8.group_scales import ChannelGroups, scale_of_channels
from quambase.apply.int8.needed_scales import missing_scale, needed_sites
from quambase.apply.int8.weights import Int8ModelWeights, dequantized
from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.operators.torch import CPU
from quambase.model.packed_batch import Batch
from quambase.model.weights import ModelWeights
from quambase.schema.scale_table import Operator, Segments
from quambase.schema.sites import HEAD_LAYER
from quambase.schema.values.number_format import INT8, OUTLIER_CODE


def encode(values: torch.Tensor, inner: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """Codes, int8, of values (rows, c), by the scales of each channel (c,); ``outer`` is not positive where nothing was
    beyond the inner segment: it then clips there. Half to even, in float32.
    """
    magnitude, edge = values.to(torch.float32).abs(), OUTLIER_CODE * inner
    code = (magnitude / inner).round().clamp(max=OUTLIER_CODE)
    beyond = (OUTLIER_CODE + ((magnitude - edge) / outer).round()).clamp(max=INT8.qmax)
    code = torch.where((magnitude > edge) & (outer > 0), beyond, code)
    return torch.copysign(code, values.to(torch.float32)).to(torch.int8)


def decode(codes: torch.Tensor, inner: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """The values, float32, of such codes."""
    magnitude = codes.to(torch.float32).abs()
    values = magnitude.clamp(max=OUTLIER_CODE) * inner + (magnitude - OUTLIER_CODE).clamp(min=0) * outer
    return torch.copysign(values, codes.to(torch.float32))


class TwoSegmentModel:
    """The model of one strategy; the part of `Int8LanguageModel`'s interface that an evaluation needs."""

    compat = None
    in_16_bit: frozenset[Operator] = frozenset()

    def __init__(
        self,
        weights: Int8ModelWeights,
        prepared: ModelWeights,
        scales: Mapping[tuple[int, str], Segments],
        *,
        channel_groups: ChannelGroups = (),
        device: torch.device = CPU,
    ) -> None:
        """``weights``: as quantized from ``prepared``. ``channel_groups``: as of `Int8LanguageModel`.

        ScalesInvalid: ``scales`` lacks a site that acts.
        """
        self.weights, self.prepared, self.channel_groups, self.device = weights, prepared, channel_groups, device
        self.config, self.quantized_lm_head = weights.config, isinstance(weights.lm_head, Int8Weight)
        needed = needed_sites(self.config, self.quantized_lm_head)
        if missing := [key for key in needed if key not in scales]:
            raise missing_scale(missing, needed)
        self.scales: dict[tuple[int, str], Segments] = {key: scales[key] for key in needed}

    state_format = None
    """No kernel decodes such codes."""

    def on(self, device: torch.device) -> TwoSegmentModel:
        """The same strategy on ``device``."""
        return TwoSegmentModel(
            self.weights, self.prepared, self.scales, channel_groups=self.channel_groups, device=device
        )

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The input of lm_head (t, d) float32, as it is decoded if the head is quantized."""
        found = self._model.hidden(batch, change=self._coded)
        return self._coded(HEAD_LAYER, "lm_head:input", found) if self.quantized_lm_head else found

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (rows, v) of rows of `hidden`, float32."""
        return self._model.logits(hidden)

    @cached_property
    def _model(self) -> LanguageModel:
        return floating_model(dequantized(self.weights, self.prepared), self.device, rotated=True)

    @cached_property
    def _laid_out(self) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
        """The scales of both segments by channel."""
        return {key: (self._by_channel(*key, 0), self._by_channel(*key, 1)) for key in self.scales}

    def _by_channel(self, layer: int, site: str, segment: int) -> torch.Tensor:
        divisions = self.channel_groups[layer] if self.channel_groups and layer != HEAD_LAYER else []
        values = tuple(pair[segment] for pair in self.scales[layer, site])
        return scale_of_channels(self.config, divisions, site, values).to(self.device)

    def _coded(self, layer: int, site: str, values: torch.Tensor) -> torch.Tensor:
        inner, outer = self._laid_out[layer, site]
        return decode(encode(values, inner, outer), inner, outer).to(values.dtype)
