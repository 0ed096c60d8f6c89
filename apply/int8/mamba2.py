"""Quamba 2: the Mamba-2 block with INT8 weights and activations (W8A8), static scales per tensor or scale group.

Producers and consumers of the codes of each scale:

    in_proj:input                    norm -> in_proj
    z_act:input                      in_proj -> gated norm
    x_conv_in, B_conv_in, C_conv_in:input   in_proj -> convolution
    dt_act:input                     in_proj -> delta of the scan
    x_conv_out, B_conv_out, C_conv_out:input  convolution -> scan, by scale group
    ssm_state_act:input              the cached state (decoding only), by scale group (and state index)
    out_proj:input                   Hadamard quantizer -> out_proj
    lm_head:input                    last norm -> lm_head (only with a quantized head)

Declared differences from upstream: those of `mamba1`; and the scan is recurrent in float32. Upstream computes C B^T of
its chunks (256 tokens) in TF32, which truncates the operands, so the part of y from the same chunk is some 5e-4 too
small; and it rounds C B^T with its decay, B with its decay, C, and the state between chunks to float16. The cached
state has one scale per group and state index, as upstream, if the strategy has them (absmax, quamba), else one per
group.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quambase.apply.int8.arithmetic import Int8Weight, SplitInt8Weight, quantize_weight, quantize_weight_float32
from quambase.apply.int8.block import (
    BlockScales,
    Int8Block,
    Int8BlockKind,
    Int8BlockWeights,
    half_factors,
    rotation_factor,
    whole,
)
from quambase.apply.int8.group_scales import channel_groups_of, scale_of_channels, values_of, zero_point_of_channels
from quambase.apply.int8.operators import Factors, Int8BlockState, Int8Operators, Multipliers, SsdScales
from quambase.model.exponential import exp
from quambase.model.mamba2 import Mamba2BlockWeights, Mamba2Config
from quambase.model.packed_batch import PlacedBatch
from quambase.schema.scale_table import Scale
from quambase.schema.sites import MAMBA2


@dataclass(frozen=True)
class Int8Mamba2Weights(Int8BlockWeights):
    """One block's weights as codes, shapes as in `Mamba2BlockWeights`; dt_bias and gated_norm stay float16."""

    kind = MAMBA2
    in_proj: SplitInt8Weight
    conv_weight: SplitInt8Weight
    conv_bias: SplitInt8Weight
    A_log: Int8Weight
    D: Int8Weight
    out_proj: Int8Weight
    dt_bias: torch.Tensor
    gated_norm: torch.Tensor

    @classmethod
    def of(cls, config: Mamba2Config, layer: Mamba2BlockWeights) -> Int8Mamba2Weights:
        """Quantize prepared weights: float16 arithmetic, but float32 for the convolution and D, as upstream."""
        widths = cls.widths(config)
        return cls(
            in_proj=SplitInt8Weight.of(layer.in_proj, widths["in_proj"], quantize_weight),
            conv_weight=SplitInt8Weight.of(layer.conv_weight, widths["conv_weight"], quantize_weight_float32),
            conv_bias=SplitInt8Weight.of(layer.conv_bias, widths["conv_bias"], quantize_weight_float32),
            A_log=quantize_weight(layer.A_log),
            D=quantize_weight_float32(layer.D),
            out_proj=quantize_weight(layer.out_proj),
            dt_bias=layer.dt_bias.to(torch.float16),
            gated_norm=layer.gated_norm.to(torch.float16),
        )

    @classmethod
    def widths(cls, config: Mamba2Config) -> dict[str, tuple[int, ...]]:
        """z, x, B, C and dt in in_proj; x, B and C in the convolution."""
        conv = (config.d_inner, config.bc_width, config.bc_width)
        in_proj = tuple(end - start for start, end in itertools.pairwise(config.in_proj_edges))
        return {"in_proj": in_proj, "conv_weight": conv, "conv_bias": conv}


@dataclass(frozen=True)
class Mamba2Scales(BlockScales):
    """As `BlockScales`.

    conv_in  (e + 2gn,) weight scale times input scale
    """

    in_proj: Factors
    z: float
    conv_in: torch.Tensor
    scan: SsdScales


class Int8Mamba2Block(Int8Block):
    """The INT8 block; `quambase.model.mamba2.Mamba2Block` is the floating-point one."""

    def __init__(self, config: Mamba2Config, weights: Int8Mamba2Weights, operators: Int8Operators) -> None:
        """As `Int8Block`."""
        self.config, self.weights, self.operators = config, weights, operators
        self.in_proj, self.out_proj = operators.matrix(weights.in_proj.joined), operators.matrix(weights.out_proj)
        self.taps = operators.vector(weights.conv_weight.joined.floats.T)  # codes (k, e + 2gn)
        self.conv_bias = operators.vector(weights.conv_bias.joined.floats * weights.conv_bias.row_scales)
        # A (h,) = -exp(scale * A_log codes): quantized before the exponential.
        self.a, self.d = operators.vector(-exp(weights.A_log.dequantized())), operators.vector(weights.D.dequantized())
        halves = (weights.dt_bias, weights.gated_norm)
        self.dt_bias, self.gated_norm = (operators.vector(half.to(torch.float32)) for half in halves)

    def lay_out(self, scales: Mapping[str, Scale], divisions: Sequence[torch.Tensor], wrap: bool) -> Mamba2Scales:
        """As `Int8Block.lay_out`."""
        c, w, vector = self.config, self.weights, self.operators.vector
        read, z, *conv, dt = (
            whole(scales[f"{site}:input"])
            for site in ("in_proj", "z_act", "x_conv_in", "B_conv_in", "C_conv_in", "dt_act")
        )
        outputs = torch.tensor([z, *conv, dt], dtype=torch.float64)
        # Upstream divides two Python floats, then stores float32.
        ratios = (torch.tensor(w.in_proj.scales, dtype=torch.float64) / outputs).to(torch.float32)
        columns = vector(torch.repeat_interleave(ratios, torch.tensor(w.in_proj.widths)))
        several = Multipliers(columns, read)
        conv_in = torch.repeat_interleave(torch.tensor(conv), torch.tensor(w.conv_weight.widths))
        out = whole(scales["out_proj:input"])
        return Mamba2Scales(
            input=read,
            in_proj=Factors(several, several, Multipliers(columns * read, 1.0, away=True)),
            z=z,
            conv_in=vector(w.conv_weight.row_scales * conv_in),
            scan=self._scan_scales(scales, divisions, dt),
            out_proj=half_factors(w.out_proj.scale, out),
            rotation=rotation_factor(c.d_inner, out),
            wrap=wrap,
        )

    def _scan_scales(self, scales: Mapping[str, Scale], divisions: Sequence[torch.Tensor], dt: float) -> SsdScales:
        c, vector = self.config, self.operators.vector
        sites = ("x_conv_out:input", "B_conv_out:input", "C_conv_out:input")
        parts = [scale_of_channels(c, divisions, site, scales[site]) for site in sites]
        zeros = torch.cat([zero_point_of_channels(c, divisions, site, scales[site]) for site in sites])
        shifted = vector(zeros) if zeros.any() else None
        state = values_of(scales["ssm_state_act:input"])
        by_index = state if state.dim() == 2 else state.unsqueeze(1).repeat(1, c.d_state)
        groups = channel_groups_of(c, divisions, len(state))
        return SsdScales(vector(torch.cat(parts)), shifted, dt, vector(by_index), vector(groups))

    def forward(
        self,
        ops: Int8Operators,
        codes: torch.Tensor,
        scales: Mamba2Scales,
        batch: PlacedBatch,
        state: Int8BlockState | None = None,
    ) -> torch.Tensor:
        """As `Int8Block.forward`."""
        c, s = self.config, scales
        projected = ops.linear_to_int8(codes, self.in_proj, *s.in_proj.of(ops, codes))  # (t, 2e + 2gn + h)
        z, conv_in, dt = torch.split(projected, [c.d_inner, c.conv_width, c.heads], dim=1)
        produced = s.scan.conv_out, s.scan.zero
        conv_out = ops.conv_silu(conv_in, self.taps, s.conv_in, self.conv_bias, *produced, batch, state)
        y = ops.ssd_scan(conv_out, dt, s.scan, self.a, self.d, self.dt_bias, batch, state)
        gated = ops.gated_rotate(y, z, s.z, self.gated_norm, c.norm_eps, s.rotation, s.wrap)
        return ops.linear_to_half(gated, self.out_proj, *s.out_proj.of(ops, gated))

    def new_state(self, sequences: int) -> Int8BlockState:
        """As `Int8Block.new_state`."""
        c = self.config
        return Int8BlockState(
            torch.zeros(sequences, c.d_conv, c.conv_width, dtype=torch.int8),
            torch.zeros(sequences, c.d_inner, c.d_state, dtype=torch.int8),
        )


KIND = Int8BlockKind(MAMBA2, "quamba2-w8a8", Int8Mamba2Weights, Int8Mamba2Block)
