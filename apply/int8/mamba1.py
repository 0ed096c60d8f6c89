"""Quamba 1 on the CPU: a Mamba-1 with INT8 weights and activations (W8A8), static per-tensor scales.

Weights never depend on activation scales, so one set of INT8 weights serves every strategy
(`Int8Mamba.with_scales`). One scale feeds several places:

    in_proj:input      norm -> in_proj
    in_proj:output     in_proj -> conv, z
    x_proj:input       conv -> x_proj, u of the scan
    x_proj:output      x_proj -> dt_proj, B and C of the scan
    dt_proj:output     dt_proj -> delta of the scan
    ssm_state_act:input  the cached state (decoding only)
    out_proj:input     Hadamard quantizer -> out_proj
    lm_head:input      last norm -> lm_head (only with a quantized head)

Declared differences from upstream: the Hadamard quantizer saturates (``compat="upstream"`` wraps modulo 256),
and exp and division are not the GPU's approximations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quambase.apply.int8 import host_kernels as kernels
from quambase.apply.int8.arithmetic import (
    Int8Weight,
    dequantize,
    float32,
    linear_to_half,
    linear_to_int8,
    softplus_delta,
)
from quambase.apply.int8.language_model import Int8Backbone, Int8State, last_inputs
from quambase.apply.int8.needed_scales import Scales, check_scales, needed_sites
from quambase.apply.int8.weights import Int8Layer, Int8Weights, quantize
from quambase.model.operators.host_kernels import selective_scan
from quambase.model.packed_batch import Batch
from quambase.model.weights import ModelWeights

Array = npt.NDArray[np.float32]


def build(
    prepared: ModelWeights,
    scales: Scales,
    *,
    quantize_lm_head: bool = False,
    quantize_embedding: bool = False,
    compat: str | None = None,
) -> Int8Mamba:
    """The INT8 model of prepared weights; ScalesInvalid if a scale it reads is missing or not positive."""
    weights = quantize(
        prepared, quantize_lm_head=quantize_lm_head, quantize_embedding=quantize_embedding, compat=compat
    )
    return Int8Mamba(weights, scales, compat=compat)


class Int8Mamba(Int8Backbone):
    """The INT8 model; the same interface as `quambase.model.language_model.LanguageModel`."""

    config: Any
    weights: Int8Weights
    scales: dict[tuple[int, str], float]

    def __init__(self, weights: Int8Weights, scales: Scales, *, compat: str | None = None) -> None:
        """ScalesInvalid if ``scales`` lacks a site this model reads or holds one that is not positive."""
        self.weights = weights
        self.config = weights.config
        self.compat = compat
        self.scales = check_scales(scales, needed_sites(weights.config, self.quantized_lm_head))

    def with_scales(self, scales: Scales) -> Int8Mamba:
        """Another strategy on the same INT8 weights; nothing is quantized again."""
        return Int8Mamba(self.weights, scales, compat=self.compat)

    def new_state(self, sequences: int) -> Int8State:
        """The state of ``sequences`` sequences before their first token."""
        c = self.config
        return Int8State(
            [torch.zeros(sequences, c.d_conv, c.d_inner, dtype=torch.int8) for _ in range(c.n_layer)],
            [torch.zeros(sequences, c.d_state, c.d_inner, dtype=torch.int8) for _ in range(c.n_layer)],
        )

    def ratio(self, layer: int, source: str, target: str) -> float:
        """``scale in / scale out`` as upstream computes it: in float64, then float32."""
        return float32(self.scales[layer, source] / self.scales[layer, target])

    def _block(self, index: int, codes: torch.Tensor, batch: Batch, state: Int8State | None) -> torch.Tensor:
        c, s, layer = self.config, self.scales, self.weights.layers[index]
        offsets = batch.offsets.numpy()
        in_ratio = self.ratio(index, "in_proj:input", "in_proj:output")
        xz = linear_to_int8(codes, layer.in_proj, in_ratio, layer.in_proj.scale)  # (t, 2e)
        u = torch.empty((xz.shape[0], c.d_inner), dtype=torch.int8)
        kernels.conv_silu_int8(xz.numpy(), *self.conv_arguments(index), offsets, u.numpy())
        # Upstream's `forward` multiplies by the weight scale first, its `to_seqlen_last`
        # (in_proj, dt_proj) by the ratio first.
        dt_b_c = linear_to_int8(u, layer.x_proj, layer.x_proj.scale, self.ratio(index, "x_proj:input", "x_proj:output"))
        dt_ratio = self.ratio(index, "x_proj:output", "dt_proj:output")
        dt = linear_to_int8(dt_b_c[:, : c.dt_rank], layer.dt_proj, dt_ratio, layer.dt_proj.scale)

        last = np.zeros((batch.documents, c.d_state, c.d_inner), np.float32)
        y = torch.empty(u.shape)
        selective_scan(*self._scan_arguments(index, layer, u, dt, dt_b_c, xz), offsets, y.numpy(), last)
        if state is not None:
            stored = torch.empty(last.shape, dtype=torch.int8)
            kernels.state_to_int8(last, np.float32(s[index, "ssm_state_act:input"]), stored.numpy())
            state.ssm.append(stored)
            state.conv.append(last_inputs(xz[:, : c.d_inner], batch, c.d_conv))
        gated = self._rotate(index, y)
        return linear_to_half(gated, layer.out_proj, layer.out_proj.scale, s[index, "out_proj:input"])

    def _decode(self, index: int, codes: torch.Tensor, state: Int8State) -> torch.Tensor:
        c, s, layer = self.config, self.scales, self.weights.layers[index]
        xz = self._linear(codes, layer.in_proj, index, "in_proj:input", "in_proj:output")
        u = torch.empty((xz.shape[0], c.d_inner), dtype=torch.int8)
        window = state.conv[index].numpy()
        kernels.conv_update_int8(xz.numpy(), window, *self.conv_arguments(index), u.numpy())
        dt_b_c = self._linear(u, layer.x_proj, index, "x_proj:input", "x_proj:output")
        dt = self._linear(dt_b_c[:, : c.dt_rank], layer.dt_proj, index, "x_proj:output", "dt_proj:output")
        y = torch.empty(u.shape)
        kernels.scan_update_int8(
            *self._scan_arguments(index, layer, u, dt, dt_b_c, xz),
            np.float32(s[index, "ssm_state_act:input"]),
            state.ssm[index].numpy(),
            y.numpy(),
        )
        gated, scale = self._rotate(index, y), s[index, "out_proj:input"]
        if gated.shape[0] == 1:
            return linear_to_half(gated, layer.out_proj, float32(layer.out_proj.scale * scale), 1.0)
        return linear_to_half(gated, layer.out_proj, layer.out_proj.scale, scale)

    def _linear(self, x: torch.Tensor, weight: Int8Weight, layer: int, source: str, target: str) -> torch.Tensor:
        """A projection while decoding: one row alone goes through upstream's matrix-vector kernel."""
        if x.shape[0] == 1:
            product = float32(weight.scale * self.scales[layer, source])
            return linear_to_int8(x, weight, float32(product / self.scales[layer, target]), 1.0)
        return linear_to_int8(x, weight, weight.scale, self.ratio(layer, source, target))

    def conv_arguments(self, index: int) -> tuple[Array, np.float32, Array, np.float32]:
        """weight (k, e), scale_wx, bias (e,), scale_out of the convolution kernels."""
        layer = self.weights.layers[index]
        return (
            layer.conv_taps.numpy(),
            np.float32(layer.conv_weight.scale) * np.float32(self.scales[index, "in_proj:output"]),
            layer.conv_bias.dequantized().numpy(),
            np.float32(self.scales[index, "x_proj:input"]),
        )

    def _scan_arguments(
        self,
        index: int,
        layer: Int8Layer,
        u: torch.Tensor,
        dt: torch.Tensor,
        dt_b_c: torch.Tensor,
        xz: torch.Tensor,
    ) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
        """u, delta, A, B, C, D, z of the scan kernels, dequantized to float32."""
        c, s = self.config, self.scales
        b_c = dequantize(dt_b_c[:, c.dt_rank :], s[index, "x_proj:output"])
        return (
            dequantize(u, s[index, "x_proj:input"]).numpy(),
            softplus_delta(dt, s[index, "dt_proj:output"], layer.dt_bias.dequantized()).numpy(),
            layer.a.numpy(),
            b_c[:, : c.d_state].contiguous().numpy(),
            b_c[:, c.d_state :].contiguous().numpy(),
            layer.D.dequantized().numpy(),
            dequantize(xz[:, c.d_inner :], s[index, "in_proj:output"]).numpy(),
        )
