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

An operator may be in 16 bit, as in `mamba1`.

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
from types import MappingProxyType
from typing import ClassVar

import torch

from quambase.apply.int8.arithmetic import (
    Int8Weight,
    SplitInt8Weight,
    Weight,
    quantize_weight,
    quantize_weight_4bit,
    quantize_weight_float32,
    scale_of_rows,
    weight_values,
)
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
from quambase.apply.int8.operators.interface import (
    Convolution,
    Factors,
    Int8BlockState,
    Int8Operators,
    Multipliers,
    SsdCodes,
    SsdScales,
)
from quambase.apply.int8.state_formats import StateLayout
from quambase.model.exponential import exp
from quambase.model.mamba2 import Mamba2BlockWeights, Mamba2Config
from quambase.model.operators.interface import BlockState, SsdInputs
from quambase.model.packed_batch import PlacedBatch
from quambase.schema.scale_table import Scale
from quambase.schema.sites import CONV_SCAN, IN_PROJ, MAMBA2, OUT_PROJ


@dataclass(frozen=True)
class Int8Mamba2Weights(Int8BlockWeights):
    """One block's weights, shapes as in `Mamba2BlockWeights`. A tensor: of an operator in 16 bit; dt_bias and
    gated_norm are float16 always.
    """

    kind = MAMBA2
    fields_of: ClassVar = {
        IN_PROJ: ("in_proj",),
        CONV_SCAN: ("conv_weight", "conv_bias", "A_log", "D"),
        OUT_PROJ: ("out_proj",),
    }
    in_proj: SplitInt8Weight | torch.Tensor
    conv_weight: SplitInt8Weight | torch.Tensor
    conv_bias: SplitInt8Weight | torch.Tensor
    A_log: Int8Weight | torch.Tensor
    D: Int8Weight | torch.Tensor
    out_proj: Weight
    dt_bias: torch.Tensor
    gated_norm: torch.Tensor

    @classmethod
    def quantized(
        cls,
        config: Mamba2Config,
        layer: Mamba2BlockWeights,
        weight_bits: int = 8,
        moments: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> Int8Mamba2Weights:
        """Quantize prepared weights: float16 arithmetic, but float32 for the convolution and D, as upstream."""
        widths = cls.widths(config)
        return cls(
            in_proj=quantize_weight_4bit(layer.in_proj, moments.get("in_proj:input"))
            if weight_bits == 4
            else SplitInt8Weight.of(layer.in_proj, widths["in_proj"], quantize_weight),
            conv_weight=SplitInt8Weight.of(layer.conv_weight, widths["conv_weight"], quantize_weight_float32),
            conv_bias=SplitInt8Weight.of(layer.conv_bias, widths["conv_bias"], quantize_weight_float32),
            A_log=quantize_weight(layer.A_log),
            D=quantize_weight_float32(layer.D),
            out_proj=quantize_weight_4bit(layer.out_proj, moments.get("out_proj:input"))
            if weight_bits == 4
            else quantize_weight(layer.out_proj),
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

    in_proj_half  of a product that a convolution and scan in 16 bit read
    in_proj_out   (2e + 2gn + h,) the scale of each column of in_proj's output
    out      the scale of out_proj's input
    """

    in_proj: Factors
    in_proj_half: Factors
    in_proj_out: torch.Tensor
    z: float
    conv: Convolution
    scan: SsdScales
    out: float


class Int8Mamba2Block(Int8Block):
    """The INT8 block; `quambase.model.mamba2.Mamba2Block` is the floating-point one."""

    def __init__(self, config: Mamba2Config, weights: Int8Mamba2Weights, operators: Int8Operators) -> None:
        """As `Int8Block`."""
        self.config, self.weights, self.operators, self.in_16_bit = config, weights, operators, weights.in_16_bit
        self.in_proj, self.out_proj = self.matrix(weights.in_proj), self.matrix(weights.out_proj)
        conv = weights.conv_weight
        taps = conv if isinstance(conv, torch.Tensor) else conv.joined.floats  # of an INT8 convolution, codes
        self.taps = operators.vector(taps.T.to(torch.float32))  # (k, e + 2gn)
        self.conv_bias = operators.vector(weight_values(weights.conv_bias))
        # A (h,) = -exp(scale * A_log codes): quantized before the exponential.
        self.a = operators.vector(-exp(weight_values(weights.A_log)))
        others = (weights.D, weights.dt_bias, weights.gated_norm)
        self.d, self.dt_bias, self.gated_norm = (operators.vector(weight_values(weight)) for weight in others)

    def lay_out(self, scales: Mapping[str, Scale], divisions: Sequence[torch.Tensor], wrap: bool) -> Mamba2Scales:
        """As `Int8Block.lay_out`."""
        c, w, vector, one = self.config, self.weights, self.operators.vector, torch.ones(1)
        read, z, *conv, dt = (
            whole(scales[f"{site}:input"])
            for site in ("in_proj", "z_act", "x_conv_in", "B_conv_in", "C_conv_in", "dt_act")
        )
        widths = {name: torch.tensor(found) for name, found in w.widths(c).items()}
        outputs = torch.tensor([z, *conv, dt], dtype=torch.float64).repeat_interleave(widths["in_proj"])
        # Of operators in 16 bit, the factors are not used.
        of_in_proj = torch.as_tensor(scale_of_rows(w.in_proj)).expand(len(outputs))
        # Upstream divides two Python floats, then stores float32.
        columns = vector((of_in_proj.to(torch.float64) / outputs).to(torch.float32))
        several = Multipliers(columns, read)
        half = Multipliers(vector(of_in_proj.to(torch.float32)), read)
        conv_in = torch.repeat_interleave(torch.tensor(conv), widths["conv_weight"])
        of_rows = one if isinstance(w.conv_weight, torch.Tensor) else w.conv_weight.row_scales
        out = whole(scales["out_proj:input"])
        scan = self._scan_scales(scales, divisions, dt)
        return Mamba2Scales(
            input=None if IN_PROJ in self.in_16_bit else read,
            in_proj=Factors(several, several, Multipliers(columns * read, 1.0, away=True)),
            in_proj_half=Factors(half, half, half),
            in_proj_out=vector(outputs.to(torch.float32)),
            z=z,
            conv=Convolution(self.taps, vector(of_rows * conv_in), self.conv_bias, scan.conv_out, scan.zero),
            scan=scan,
            out=out,
            out_proj=half_factors(self.scale_of(w.out_proj), out),
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
        x: torch.Tensor,
        scales: Mamba2Scales,
        batch: PlacedBatch,
        state: BlockState | None = None,
    ) -> torch.Tensor:
        """As `Int8Block.forward`."""
        c, s = self.config, scales
        norm = (self.gated_norm, c.norm_eps)
        if CONV_SCAN in self.in_16_bit:
            gated = ops.half.gated_norm(*self._half_conv_scan(ops, x, s, batch, state), *norm)
            if OUT_PROJ not in self.in_16_bit:
                gated = ops.encode(gated, s.out)
        else:
            y, z = self._conv_scan(ops, x, s, batch, state)
            if OUT_PROJ in self.in_16_bit:
                gated = ops.half.gated_norm(y, ops.decode(z, s.z), *norm)
            else:
                gated = ops.gated_rotate(y, z, s.z, *norm, s.rotation, s.wrap)
        if OUT_PROJ in self.in_16_bit:
            return ops.half_product(gated, self.out_proj)
        return ops.linear_to_half(gated, self.out_proj, s.out_proj.of(ops, gated))

    def _conv_scan(
        self, ops: Int8Operators, x: torch.Tensor, s: Mamba2Scales, batch: PlacedBatch, state: BlockState | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scan's output (t, e), float16 values, by a convolution and scan of codes; and codes of z (t, e)."""
        assert state is None or isinstance(state, Int8BlockState)
        c = self.config
        if IN_PROJ in self.in_16_bit:
            projected = ops.encode(ops.half_product(x, self.in_proj), s.in_proj_out)  # (t, 2e + 2gn + h)
        else:
            projected = ops.linear_to_int8(x, self.in_proj, s.in_proj.of(ops, x))
        z, conv_in, dt = torch.split(projected, [c.d_inner, c.conv_width, c.heads], dim=1)
        conv_out = ops.conv_silu(conv_in, s.conv, batch, state)
        return ops.ssd_scan(SsdCodes(conv_out, dt, self.a, self.d, self.dt_bias), s.scan, batch, state), z

    def _half_conv_scan(
        self, ops: Int8Operators, x: torch.Tensor, s: Mamba2Scales, batch: PlacedBatch, state: BlockState | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by a convolution and scan in 16 bit; and z, float16 values."""
        c = self.config
        if IN_PROJ in self.in_16_bit:
            projected = ops.half_product(x, self.in_proj)
        else:
            projected = ops.linear_to_half(x, self.in_proj, s.in_proj_half.of(ops, x))
        z, conv_in, dt = torch.split(projected, [c.d_inner, c.conv_width, c.heads], dim=1)
        conv_out = ops.half.conv_silu(conv_in, self.taps, self.conv_bias, batch, state)
        x, b, c_out = torch.split(conv_out, [c.d_inner, c.bc_width, c.bc_width], dim=1)
        return ops.half.ssd_scan(SsdInputs(x, b, c_out, dt, self.a, self.d, self.dt_bias), batch, state), z

    def state_layout(self, scales: Mamba2Scales) -> StateLayout:
        """As `Int8Block.state_layout`; the state is (b, e, n)."""
        return StateLayout(scales.scan.state[scales.scan.groups], channels=1, heads=self.config.heads)

    def new_state(self, sequences: int) -> BlockState:
        """As `Int8Block.new_state`."""
        c, ops = self.config, self.operators
        if CONV_SCAN in self.in_16_bit:
            return BlockState(
                torch.zeros(sequences, c.d_conv - 1, c.conv_width, dtype=ops.half.dtype, device=ops.device),
                torch.zeros(sequences, c.d_inner, c.d_state, device=ops.device),
            )
        return Int8BlockState(
            torch.zeros(sequences, c.d_conv, c.conv_width, dtype=torch.int8, device=ops.device),
            torch.zeros(sequences, c.d_inner, c.d_state, dtype=torch.int8, device=ops.device),
        )


KIND = Int8BlockKind(MAMBA2, "quamba2-w8a8", Int8Mamba2Weights, Int8Mamba2Block)
