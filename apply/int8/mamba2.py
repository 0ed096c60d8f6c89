"""Quamba 2 on the CPU: a Mamba-2 with INT8 weights and activations (W8A8), static scales per tensor or scale group.

Weights never depend on activation scales, so one set of INT8 weights serves every strategy
(`Int8Mamba2.with_scales`). What each scale feeds:

    in_proj:input                    norm -> in_proj
    z_act:input                      in_proj -> gated norm
    x_conv_in, B_conv_in, C_conv_in:input   in_proj -> convolution
    dt_act:input                     in_proj -> delta of the scan
    x_conv_out, B_conv_out, C_conv_out:input  convolution -> scan, by scale group
    ssm_state_act:input              the cached state (decoding only), by scale group (and state index)
    out_proj:input                   Hadamard quantizer -> out_proj
    lm_head:input                    last norm -> lm_head (only with a quantized head)

Declared differences from upstream: those of `mamba1`; and the scan is recurrent in float32. Upstream's
chunks (256 tokens) form C B^T in TF32, whose operands are cut, so that what a chunk gives itself is some 5e-4 too
small; and round C B^T with its decay, B with its decay, C and the state between chunks to float16. The cached state has
upstream's one scale per group and state index where the strategy has them (absmax, quamba), else one per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from quambase.apply.int8 import channel_kernels as kernels2
from quambase.apply.int8.arithmetic import dequantize, float32, linear_to_half, matmul, softplus_delta, to_half
from quambase.apply.int8.group_scales import ChannelGroups, channel_groups_of, check_group_scales, values_of
from quambase.apply.int8.language_model import Int8Backbone, Int8State, last_inputs
from quambase.apply.int8.mamba2_weights import Int8Mamba2Layer, Int8Mamba2Weights, quantize
from quambase.apply.int8.needed_scales import Scales
from quambase.model.exponential import exp
from quambase.model.mamba2 import Mamba2Config
from quambase.model.operators.host_kernels import ssd_scan
from quambase.model.operators.torch import gated_rms_norm
from quambase.model.packed_batch import Batch
from quambase.model.weights import ModelWeights
from quambase.schema.scale_table import Scale

Array = npt.NDArray[np.float32]


def build(
    prepared: ModelWeights,
    scales: Scales,
    *,
    channel_groups: ChannelGroups = (),
    quantize_lm_head: bool = False,
    quantize_embedding: bool = False,
    compat: str | None = None,
) -> Int8Mamba2:
    """The INT8 model of prepared weights; ScalesInvalid as for `Int8Mamba2`."""
    weights = quantize(
        prepared, quantize_lm_head=quantize_lm_head, quantize_embedding=quantize_embedding, compat=compat
    )
    return Int8Mamba2(weights, scales, channel_groups=channel_groups, compat=compat)


@dataclass(frozen=True)
class LayerScales:
    """One layer's scales laid out for the kernels, float32.

    columns    (2e + 2gn + h,) weight scale over output scale of in_proj
    conv_in    (e + 2gn,) weight scale times input scale
    conv_out   (e + 2gn,)
    state      (groups, n), and ``groups`` (e,): each channel's group
    """

    columns: torch.Tensor
    conv_in: torch.Tensor
    conv_out: torch.Tensor
    state: torch.Tensor
    groups: torch.Tensor


class Int8Mamba2(Int8Backbone):
    """The INT8 model; the same interface as `quambase.model.language_model.LanguageModel`."""

    config: Mamba2Config
    weights: Int8Mamba2Weights
    scales: dict[tuple[int, str], Scale]

    def __init__(
        self,
        weights: Int8Mamba2Weights,
        scales: Scales,
        *,
        channel_groups: ChannelGroups = (),
        compat: str | None = None,
    ) -> None:
        """``channel_groups``: per layer the divisions of x in scale groups; not needed for one scale per tensor or per
        SSD group.

        ScalesInvalid: ``scales`` lacks a site this model reads, holds one that is not positive, or as many for a
        site as there are no groups of.
        """
        self.weights = weights
        self.config = weights.config
        self.compat = compat
        self.channel_groups = channel_groups
        self.scales = check_group_scales(scales, weights.config, channel_groups, self.quantized_lm_head)
        self.laid_out = [self._lay_out(index) for index in range(self.config.n_layer)]

    def with_scales(self, scales: Scales) -> Int8Mamba2:
        """Another strategy on the same INT8 weights and groups; nothing is quantized again."""
        return Int8Mamba2(self.weights, scales, channel_groups=self.channel_groups, compat=self.compat)

    def _lay_out(self, index: int) -> LayerScales:
        c, layer = self.config, self.weights.layers[index]
        inputs = [self.whole_scale(index, f"{site}:input") for site in ("z_act", "x_conv_in", "B_conv_in", "C_conv_in")]
        outputs = torch.tensor([*inputs, self.whole_scale(index, "dt_act:input")], dtype=torch.float64)
        # Upstream divides two Python floats, then stores float32.
        ratios = torch.tensor(layer.in_proj.scales, dtype=torch.float64) / outputs
        widths = torch.tensor(layer.in_proj.widths)
        conv_in = torch.repeat_interleave(torch.tensor(inputs[1:]), torch.tensor(layer.conv_weight.widths))
        x = values_of(self.scales[index, "x_conv_out:input"])
        parts = [x[channel_groups_of(c, self.channel_groups, index, len(x))]]
        for site in ("B_conv_out:input", "C_conv_out:input"):
            values = values_of(self.scales[index, site])
            parts.append(torch.repeat_interleave(values, c.bc_width // len(values)))
        state = values_of(self.scales[index, "ssm_state_act:input"])
        return LayerScales(
            torch.repeat_interleave(ratios.to(torch.float32), widths),
            layer.conv_weight.row_scales * conv_in,
            torch.cat(parts),
            state if state.dim() == 2 else state.unsqueeze(1).repeat(1, c.d_state),
            channel_groups_of(c, self.channel_groups, index, len(state)),
        )

    def new_state(self, sequences: int) -> Int8State:
        """The state of ``sequences`` sequences before their first token."""
        c = self.config
        return Int8State(
            [torch.zeros(sequences, c.d_conv, c.conv_width, dtype=torch.int8) for _ in range(c.n_layer)],
            [torch.zeros(sequences, c.d_inner, c.d_state, dtype=torch.int8) for _ in range(c.n_layer)],
        )

    def _block(self, index: int, codes: torch.Tensor, batch: Batch, state: Int8State | None) -> torch.Tensor:
        c, layer, laid_out = self.config, self.weights.layers[index], self.laid_out[index]
        offsets = batch.offsets.numpy()
        projected = self._project(index, codes)
        conv_out = torch.empty(len(codes), c.conv_width, dtype=torch.int8)
        kernels2.conv_channels_int8(
            projected.numpy(), c.d_inner, *self.conv_arguments(index), offsets, conv_out.numpy()
        )
        values = conv_out.to(torch.float32) * laid_out.conv_out
        x = values[:, : c.d_inner]
        # Upstream's tensor cores take float16; its skip connection the unrounded float32.
        x16, b16, c16 = self._parts(to_half(values))
        delta = softplus_delta(projected[:, -c.heads :], self.whole_scale(index, "dt_act:input"), self._dt_bias(layer))
        y = torch.empty(x16.shape)
        last = torch.zeros(batch.documents, c.d_inner, c.d_state)
        no_skip = np.zeros(c.heads, np.float32)
        ssd_scan(
            x16.numpy(),
            delta.numpy(),
            exp(delta * layer.a).numpy(),
            b16.numpy(),
            c16.numpy(),
            no_skip,
            offsets,
            y.numpy(),
            last.numpy(),
        )
        y += x * torch.repeat_interleave(layer.D.dequantized(), c.headdim)
        if state is not None:
            stored = torch.empty(last.shape, dtype=torch.int8)
            kernels2.state_groups_to_int8(
                to_half(last).numpy(), laid_out.state.numpy(), laid_out.groups.numpy(), stored.numpy()
            )
            state.ssm.append(stored)
            state.conv.append(last_inputs(projected[:, c.d_inner : c.d_inner + c.conv_width], batch, c.d_conv))
        return self._finish(index, projected, y)

    def _decode(self, index: int, codes: torch.Tensor, state: Int8State) -> torch.Tensor:
        c, layer, laid_out = self.config, self.weights.layers[index], self.laid_out[index]
        projected = self._project(index, codes, alone=len(codes) == 1)
        conv_out = torch.empty(len(codes), c.conv_width, dtype=torch.int8)
        kernels2.conv_update_channels_int8(
            projected.numpy(), c.d_inner, state.conv[index].numpy(), *self.conv_arguments(index), conv_out.numpy()
        )
        x, b, read = self._parts(conv_out.to(torch.float32) * laid_out.conv_out)
        delta = softplus_delta(projected[:, -c.heads :], self.whole_scale(index, "dt_act:input"), self._dt_bias(layer))
        y = torch.empty(x.shape)
        kernels2.ssd_update_int8(
            x.numpy(),
            delta.numpy(),
            exp(delta * layer.a).numpy(),
            b.numpy(),
            read.numpy(),
            layer.D.dequantized().numpy(),
            laid_out.state.numpy(),
            laid_out.groups.numpy(),
            state.ssm[index].numpy(),
            y.numpy(),
        )
        return self._finish(index, projected, y, alone=len(codes) == 1)

    def _project(self, index: int, codes: torch.Tensor, alone: bool = False) -> torch.Tensor:
        """in_proj: codes (rows, 2e + 2gn + h) of z, x, B, C, dt. ``alone``: upstream's matrix-vector kernel, which
        multiplies by one combined factor and rounds half away from zero."""
        acc = matmul(codes, self.weights.layers[index].in_proj.joined)
        out = torch.empty(acc.shape, dtype=torch.int8)
        columns, scale = self.laid_out[index].columns.numpy(), np.float32(self.whole_scale(index, "in_proj:input"))
        if alone:
            columns, scale = columns * scale, np.float32(1)
        kernels2.scale_columns_to_int8(acc.numpy(), columns, scale, alone, out.numpy())
        return out

    def conv_arguments(self, index: int) -> tuple[Array, Array, Array, Array]:
        """weight (k, channels), scale_wx, bias, scale_out (channels,) of the convolution kernels."""
        layer, laid_out = self.weights.layers[index], self.laid_out[index]
        parts = (layer.conv_taps, laid_out.conv_in, layer.conv_bias_floats, laid_out.conv_out)
        first, second, third, fourth = (part.numpy() for part in parts)
        return first, second, third, fourth

    def _parts(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (rows, e), B and C (rows, gn) of the convolution's output."""
        c = self.config
        x, b, read = torch.split(values, [c.d_inner, c.bc_width, c.bc_width], dim=1)
        return x.contiguous(), b.contiguous(), read.contiguous()

    @staticmethod
    def _dt_bias(layer: Int8Mamba2Layer) -> torch.Tensor:
        return layer.dt_bias.to(torch.float32)

    def _finish(self, index: int, projected: torch.Tensor, y: torch.Tensor, alone: bool = False) -> torch.Tensor:
        """Gated norm (float16 in and out), Hadamard quantizer and out_proj of y (rows, e): (rows, d)."""
        c, layer = self.config, self.weights.layers[index]
        z = dequantize(projected[:, : c.d_inner], self.whole_scale(index, "z_act:input"))
        weight = layer.gated_norm.to(torch.float32)
        rotated = self._rotate(index, gated_rms_norm(to_half(y), z, weight, c.ngroups, c.norm_eps))
        scale = self.whole_scale(index, "out_proj:input")
        if alone:
            return linear_to_half(rotated, layer.out_proj, float32(layer.out_proj.scale * scale), 1.0)
        return linear_to_half(rotated, layer.out_proj, layer.out_proj.scale, scale)
