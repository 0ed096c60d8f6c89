"""Quamba 1: the Mamba-1 block with INT8 weights and activations (W8A8), static per-tensor scales.

Producers and consumers of the codes of each scale:

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from quambase.apply.int8.arithmetic import Int8Weight, float32, quantize_weight, quantize_weight_float32
from quambase.apply.int8.block import (
    BlockScales,
    Int8Block,
    Int8BlockKind,
    Int8BlockWeights,
    half_factors,
    rotation_factor,
    whole,
    zero_point,
)
from quambase.apply.int8.operators import Factors, Int8BlockState, Int8Operators, Multipliers, ScanScales
from quambase.model.exponential import exp
from quambase.model.mamba1 import Mamba1BlockWeights, MambaConfig
from quambase.model.packed_batch import PlacedBatch
from quambase.schema.scale_table import Scale
from quambase.schema.sites import MAMBA1


@dataclass(frozen=True)
class Int8Mamba1Weights(Int8BlockWeights):
    """One block's weights as codes; shapes as in `Mamba1BlockWeights`."""

    kind = MAMBA1
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
    def of(cls, config: MambaConfig, layer: Mamba1BlockWeights) -> Int8Mamba1Weights:
        """Quantize prepared weights: float16 arithmetic, float32 for what upstream keeps in float32."""
        wide = ("dt_bias", "A_log", "D")
        return cls(
            **{
                f.name: (quantize_weight_float32 if f.name in wide else quantize_weight)(getattr(layer, f.name))
                for f in fields(cls)
            }
        )


@dataclass(frozen=True)
class Mamba1Scales(BlockScales):
    """As `BlockScales`.

    conv_in   (e,) weight scale times input scale
    conv_out  (e,)
    conv_zero  (e,) zero point of the convolution's codes; None without one
    x_proj_offset  (r + 2n,) int32: what that zero point adds to the integer product of x_proj; None without one
    """

    in_proj: Factors
    x_proj: Factors
    dt_proj: Factors
    conv_in: torch.Tensor
    conv_out: torch.Tensor
    conv_zero: torch.Tensor | None
    x_proj_offset: torch.Tensor | None
    scan: ScanScales


class Int8Mamba1Block(Int8Block):
    """The INT8 block; `quambase.model.mamba1.Mamba1Block` is the floating-point one."""

    def __init__(self, config: MambaConfig, weights: Int8Mamba1Weights, operators: Int8Operators) -> None:
        """As `Int8Block`."""
        self.config, self.weights, self.operators = config, weights, operators
        self.in_proj, self.out_proj = operators.matrix(weights.in_proj), operators.matrix(weights.out_proj)
        self.x_proj, self.dt_proj = operators.matrix(weights.x_proj), operators.matrix(weights.dt_proj)
        self.taps = operators.vector(weights.conv_weight.floats.T)  # codes (k, e)
        self.conv_bias = operators.vector(weights.conv_bias.dequantized())
        # A (n, e) = -exp(scale * A_log codes): quantized before the exponential.
        self.a = operators.vector(-exp(weights.A_log.dequantized().T.contiguous()))
        self.d, self.dt_bias = (operators.vector(w.dequantized()) for w in (weights.D, weights.dt_bias))

    def lay_out(self, scales: Mapping[str, Scale], divisions: Sequence[torch.Tensor], wrap: bool) -> Mamba1Scales:
        """As `Int8Block.lay_out`."""
        w, s, e = self.weights, {site: whole(scale) for site, scale in scales.items()}, self.config.d_inner
        names = ("in_proj:input", "in_proj:output", "x_proj:input", "x_proj:output", "dt_proj:output")
        read, xz, u, dt_b_c, dt = (s[name] for name in names)
        zero = zero_point(scales["x_proj:input"])
        conv_in = np.float32(w.conv_weight.scale) * np.float32(xz)
        return Mamba1Scales(
            input=read,
            # Upstream's `forward` multiplies by the weight scale first, its `to_seqlen_last`
            # (in_proj, dt_proj) by the ratio first.
            in_proj=_factors(w.in_proj.scale, read, xz, ratio_first=True),
            x_proj=_factors(w.x_proj.scale, u, dt_b_c, ratio_first=False),
            dt_proj=_factors(w.dt_proj.scale, dt_b_c, dt, ratio_first=True),
            conv_in=self.operators.vector(torch.full((e,), float(conv_in))),
            conv_out=self.operators.vector(torch.full((e,), u)),
            conv_zero=self.operators.vector(torch.full((e,), float(zero))) if zero else None,
            x_proj_offset=self.operators.vector(zero * w.x_proj.codes.sum(1, dtype=torch.int32)) if zero else None,
            scan=ScanScales(u, dt, dt_b_c, xz, s["ssm_state_act:input"], zero),
            out_proj=half_factors(w.out_proj.scale, s["out_proj:input"]),
            rotation=rotation_factor(e, s["out_proj:input"]),
            wrap=wrap,
        )

    def forward(
        self,
        ops: Int8Operators,
        codes: torch.Tensor,
        scales: Mamba1Scales,
        batch: PlacedBatch,
        state: Int8BlockState | None = None,
    ) -> torch.Tensor:
        """As `Int8Block.forward`."""
        s, e, r = scales, self.config.d_inner, self.config.dt_rank
        xz = ops.linear_to_int8(codes, self.in_proj, *s.in_proj.of(ops, codes))  # (t, 2e)
        u = ops.conv_silu(xz[:, :e], self.taps, s.conv_in, self.conv_bias, s.conv_out, s.conv_zero, batch, state)
        dt_b_c = ops.linear_to_int8(u, self.x_proj, *s.x_proj.of(ops, u), s.x_proj_offset)  # (t, r + 2n)
        dt = ops.linear_to_int8(dt_b_c[:, :r], self.dt_proj, *s.dt_proj.of(ops, u))
        y = ops.selective_scan(u, dt, dt_b_c[:, r:], xz[:, e:], s.scan, self.a, self.d, self.dt_bias, batch, state)
        gated = ops.rotate(y, s.rotation, s.wrap)
        return ops.linear_to_half(gated, self.out_proj, *s.out_proj.of(ops, gated))

    def new_state(self, sequences: int) -> Int8BlockState:
        """As `Int8Block.new_state`."""
        c = self.config
        return Int8BlockState(
            torch.zeros(sequences, c.d_conv, c.d_inner, dtype=torch.int8),
            torch.zeros(sequences, c.d_state, c.d_inner, dtype=torch.int8),
        )


def _factors(weight: float, source: float, target: float, *, ratio_first: bool) -> Factors:
    """Of a product that becomes codes: the weight's scale, and the ratio of the scales of the codes that it reads and
    makes, as upstream computes it: in float64, then float32.
    """
    ratio = float32(source / target)
    weight_first = Multipliers(weight, ratio)
    return Factors(
        prefill=Multipliers(ratio, weight) if ratio_first else weight_first,
        several=weight_first,
        alone=Multipliers(float32(float32(weight * source) / target), 1.0),
    )


KIND = Int8BlockKind(MAMBA1, "quamba1-w8a8", Int8Mamba1Weights, Int8Mamba1Block)
