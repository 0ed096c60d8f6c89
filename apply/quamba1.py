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

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from quambase.apply import kernels
from quambase.apply.int8 import (
    Int8Weight,
    dequantize,
    float32,
    linear_to_half,
    linear_to_int8,
    softplus_delta,
    to_half,
)
from quambase.apply.scales import Scales, check_scales, needed_sites
from quambase.apply.weights import UPSTREAM, Int8Layer, Int8Weights, quantize
from quambase.model.batch import Batch
from quambase.model.hadamard import hadamard
from quambase.model.kernels import selective_scan
from quambase.model.weights import MambaWeights
from quambase.schema.sites import HEAD_LAYER

Array = npt.NDArray[np.float32]


def build(
    prepared: MambaWeights,
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


@dataclass
class Int8State:
    """What b sequences carry on: per layer int8 conv (b, k, e), oldest first, and ssm (b, n, e)."""

    conv: list[torch.Tensor]
    ssm: list[torch.Tensor]


class Int8Mamba:
    """The INT8 model; the same interface as `quambase.model.mamba.Mamba`."""

    def __init__(self, weights: Int8Weights, scales: Scales, *, compat: str | None = None) -> None:
        """ScalesInvalid if ``scales`` lacks a site this model reads or holds one that is not positive."""
        self.weights = weights
        self.config = weights.config
        self.compat = compat
        self.quantized_lm_head = isinstance(weights.lm_head, Int8Weight)
        self.scales = check_scales(scales, needed_sites(weights.config, self.quantized_lm_head))

    def with_scales(self, scales: Scales) -> Int8Mamba:
        """Another strategy on the same INT8 weights; nothing is quantized again."""
        return Int8Mamba(self.weights, scales, compat=self.compat)

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
        for index, layer in enumerate(self.weights.layers):
            x = self._block(index, layer, self._norm(x, residual, index, "in_proj:input"), batch, state)
        return self._last_norm(x, residual)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (rows, v) of rows of `hidden`: float16 values held in float32."""
        if isinstance(self.weights.lm_head, Int8Weight):
            head = self.weights.lm_head
            return linear_to_half(hidden, head, head.scale, self.scales[HEAD_LAYER, "lm_head:input"])
        return to_half(F.linear(hidden, self.weights.lm_head_floats))

    def new_state(self, sequences: int) -> Int8State:
        """The state of ``sequences`` sequences before their first token."""
        c = self.config
        return Int8State(
            [torch.zeros(sequences, c.d_conv, c.d_inner, dtype=torch.int8) for _ in range(c.n_layer)],
            [torch.zeros(sequences, c.d_state, c.d_inner, dtype=torch.int8) for _ in range(c.n_layer)],
        )

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor, state: Int8State) -> torch.Tensor:
        """Feed one token to each sequence: tokens (b,) int64; ``state`` is updated in place; logits (b, v).

        As upstream, the state is rounded to codes after every token, and one sequence alone (b = 1)
        multiplies its products by one combined factor where several multiply by two.
        """
        x = self._embed(tokens)
        residual = torch.zeros_like(x)
        for index, layer in enumerate(self.weights.layers):
            x = self._decode(index, layer, self._norm(x, residual, index, "in_proj:input"), state)
        return self.logits(self._last_norm(x, residual))

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
            np.float32(self.scales[layer, site]),
            out.numpy(),
        )
        return out

    def _last_norm(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self.quantized_lm_head:
            return self._norm(x, residual, HEAD_LAYER, "lm_head:input")
        out = torch.empty_like(x)
        kernels.add_rms_norm(x.numpy(), residual.numpy(), np.float32(self.config.norm_eps), out.numpy())
        return to_half(out)

    def _ratio(self, layer: int, source: str, target: str) -> float:
        """``scale in / scale out`` as upstream computes it: in float64, then float32."""
        return float32(self.scales[layer, source] / self.scales[layer, target])

    def _block(
        self, index: int, layer: Int8Layer, codes: torch.Tensor, batch: Batch, state: Int8State | None
    ) -> torch.Tensor:
        c, s = self.config, self.scales
        offsets = batch.offsets.numpy()
        in_ratio = self._ratio(index, "in_proj:input", "in_proj:output")
        xz = linear_to_int8(codes, layer.in_proj, in_ratio, layer.in_proj.scale)  # (t, 2e)
        u = torch.empty((xz.shape[0], c.d_inner), dtype=torch.int8)
        kernels.conv_silu_int8(xz.numpy(), *self._conv_arguments(index, layer), offsets, u.numpy())
        # Upstream's `forward` multiplies by the weight scale first, its `to_seqlen_last`
        # (in_proj, dt_proj) by the ratio first.
        dt_b_c = linear_to_int8(
            u, layer.x_proj, layer.x_proj.scale, self._ratio(index, "x_proj:input", "x_proj:output")
        )
        dt_ratio = self._ratio(index, "x_proj:output", "dt_proj:output")
        dt = linear_to_int8(dt_b_c[:, : c.dt_rank], layer.dt_proj, dt_ratio, layer.dt_proj.scale)

        last = np.zeros((batch.documents, c.d_state, c.d_inner), np.float32)
        y = torch.empty(u.shape)
        selective_scan(*self._scan_arguments(index, layer, u, dt, dt_b_c, xz), offsets, y.numpy(), last)
        if state is not None:
            stored = torch.empty(last.shape, dtype=torch.int8)
            kernels.state_to_int8(last, np.float32(s[index, "ssm_state_act:input"]), stored.numpy())
            state.ssm.append(stored)
            state.conv.append(self._last_inputs(xz, batch))
        gated = self._rotate(index, y)
        return linear_to_half(gated, layer.out_proj, layer.out_proj.scale, s[index, "out_proj:input"])

    def _decode(self, index: int, layer: Int8Layer, codes: torch.Tensor, state: Int8State) -> torch.Tensor:
        c, s = self.config, self.scales
        xz = self._linear(codes, layer.in_proj, index, "in_proj:input", "in_proj:output")
        u = torch.empty((xz.shape[0], c.d_inner), dtype=torch.int8)
        window = state.conv[index].numpy()
        kernels.conv_update_int8(xz.numpy(), window, *self._conv_arguments(index, layer), u.numpy())
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
        return linear_to_int8(x, weight, weight.scale, self._ratio(layer, source, target))

    def _conv_arguments(self, index: int, layer: Int8Layer) -> tuple[Array, np.float32, Array, np.float32]:
        """weight (k, e), scale_wx, bias (e,), scale_out of the convolution kernels."""
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

    def _rotate(self, index: int, y: torch.Tensor) -> torch.Tensor:
        """The gated output (rows, e) as float16, Hadamard-transformed, to codes (half away from zero)."""
        # 1/sqrt(e) and the scale are one factor, as upstream (qHadamard.py).
        factor = 1.0 / math.sqrt(self.config.d_inner) / self.scales[index, "out_proj:input"]
        rotated = hadamard(to_half(y), factor)
        out = torch.empty(y.shape, dtype=torch.int8)
        kernels.round_to_int8(rotated.numpy(), self.compat == UPSTREAM, out.numpy())
        return out

    def _last_inputs(self, xz: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The last k convolution inputs of each document (documents, k, e), zeros where it was shorter."""
        c = self.config
        window = torch.zeros(batch.documents, c.d_conv, c.d_inner, dtype=torch.int8)
        for document in range(batch.documents):
            rows = batch.rows(document)
            taken = xz[max(rows.start, rows.stop - c.d_conv) : rows.stop, : c.d_inner]
            if taken.shape[0]:
                window[document, -taken.shape[0] :] = taken
        return window
