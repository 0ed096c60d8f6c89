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

An operator may be in 16 bit: its weights are float16, and it reads float16 values, unless another operator reads the
codes of the same site: then it reads those, decoded.

Declared differences from upstream: the Hadamard quantizer saturates (``compat="upstream"`` wraps modulo 256),
and exp and division are not the GPU's approximations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch

from quambase.apply.int8.arithmetic import (
    Int8Weight,
    Weight,
    float32,
    quantize_weight,
    quantize_weight_4bit,
    quantize_weight_float32,
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
    zero_point,
)
from quambase.apply.int8.operators.interface import (
    Convolution,
    Factors,
    Int8BlockState,
    Int8Operators,
    Multipliers,
    ScanScales,
)
from quambase.apply.int8.state_formats import StateLayout
from quambase.model.exponential import exp
from quambase.model.mamba1 import Mamba1BlockWeights, MambaConfig
from quambase.model.operators.interface import BlockState, ScanInputs
from quambase.model.packed_batch import PlacedBatch
from quambase.schema.scale_table import Scale
from quambase.schema.sites import CONV_SCAN, IN_PROJ, MAMBA1, OUT_PROJ, X_PROJ


@dataclass(frozen=True)
class Int8Mamba1Weights(Int8BlockWeights):
    """One block's weights; shapes as in `Mamba1BlockWeights`. A tensor: of an operator in 16 bit."""

    kind = MAMBA1
    fields_of: ClassVar = {
        IN_PROJ: ("in_proj",),
        CONV_SCAN: ("conv_weight", "conv_bias", "dt_bias", "A_log", "D"),
        X_PROJ: ("x_proj", "dt_proj"),
        OUT_PROJ: ("out_proj",),
    }
    in_proj: Weight
    conv_weight: Int8Weight | torch.Tensor
    conv_bias: Int8Weight | torch.Tensor
    x_proj: Weight
    dt_proj: Int8Weight | torch.Tensor
    dt_bias: Int8Weight | torch.Tensor
    A_log: Int8Weight | torch.Tensor
    D: Int8Weight | torch.Tensor
    out_proj: Weight

    @classmethod
    def quantized(
        cls,
        config: MambaConfig,
        layer: Mamba1BlockWeights,
        weight_bits: int = 8,
        moments: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> Int8Mamba1Weights:
        """Quantize prepared weights: float16 arithmetic, float32 for what upstream keeps in float32."""
        how: dict[str, Callable[[torch.Tensor], Weight]] = dict.fromkeys(
            ("dt_bias", "A_log", "D"), quantize_weight_float32
        )
        if weight_bits == 4:
            how |= {
                name: partial(quantize_weight_4bit, second_moments=moments.get(f"{name}:input"))
                for name in ("in_proj", "x_proj", "out_proj")
            }
        names = [f.name for f in fields(cls)]
        return cls(**{name: how.get(name, quantize_weight)(getattr(layer, name)) for name in names})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Mamba1Scales(BlockScales):
    """As `BlockScales`.

    in_proj_half, dt_proj_half  of products that a convolution and scan in 16 bit read
    x_proj_offset  (r + 2n,) int32: what the zero point of the convolution's codes adds to the integer product of
                   x_proj; None without one
    """

    in_proj: Factors
    in_proj_half: Factors
    x_proj: Factors
    dt_proj: Factors
    dt_proj_half: Factors
    conv: Convolution
    x_proj_offset: torch.Tensor | None
    scan: ScanScales


class Int8Mamba1Block(Int8Block):
    """The INT8 block; `quambase.model.mamba1.Mamba1Block` is the floating-point one."""

    def __init__(self, config: MambaConfig, weights: Int8Mamba1Weights, operators: Int8Operators) -> None:
        """As `Int8Block`."""
        self.config, self.weights, self.operators, self.in_16_bit = config, weights, operators, weights.in_16_bit
        self.in_proj, self.out_proj = self.matrix(weights.in_proj), self.matrix(weights.out_proj)
        self.x_proj, self.dt_proj = self.matrix(weights.x_proj), self.matrix(weights.dt_proj)
        # (k, e); of an INT8 convolution, codes
        taps = weights.conv_weight.floats if isinstance(weights.conv_weight, Int8Weight) else weights.conv_weight
        self.taps = operators.vector(taps.T.to(torch.float32))
        self.conv_bias = operators.vector(weight_values(weights.conv_bias))
        # A (n, e) = -exp(scale * A_log codes): quantized before the exponential.
        self.a = operators.vector(-exp(weight_values(weights.A_log).T.contiguous()))
        self.d, self.dt_bias = (operators.vector(weight_values(w)) for w in (weights.D, weights.dt_bias))

    def lay_out(self, scales: Mapping[str, Scale], divisions: Sequence[torch.Tensor], wrap: bool) -> Mamba1Scales:
        """As `Int8Block.lay_out`."""
        w, s, e = self.weights, {site: whole(scale) for site, scale in scales.items()}, self.config.d_inner
        names = ("in_proj:input", "in_proj:output", "x_proj:input", "x_proj:output", "dt_proj:output")
        read, xz, u, dt_b_c, dt = (s[name] for name in names)
        zero = zero_point(scales["x_proj:input"])

        def filled(value: float) -> torch.Tensor:
            return self.operators.vector(torch.full((e,), value))

        # Of operators in 16 bit, the factors are not used.
        in_proj, x_proj, dt_proj, out_proj = (
            self.scale_of(weight) for weight in (w.in_proj, w.x_proj, w.dt_proj, w.out_proj)
        )
        conv = w.conv_weight.scale if isinstance(w.conv_weight, Int8Weight) else 1.0
        conv_in = np.float32(conv) * np.float32(xz)
        offset = (
            zero * w.x_proj.codes.sum(1, dtype=torch.int32) if zero and not isinstance(w.x_proj, torch.Tensor) else None
        )
        return Mamba1Scales(
            input=None if IN_PROJ in self.in_16_bit else read,
            # Upstream's `forward` multiplies by the weight scale first, its `to_seqlen_last`
            # (in_proj, dt_proj) by the ratio first.
            in_proj=_factors(in_proj, read, xz, ratio_first=True),
            in_proj_half=half_factors(in_proj, read),
            x_proj=_factors(x_proj, u, dt_b_c, ratio_first=False),
            dt_proj=_factors(dt_proj, dt_b_c, dt, ratio_first=True),
            dt_proj_half=half_factors(dt_proj, dt_b_c),
            conv=Convolution(
                self.taps, filled(float(conv_in)), self.conv_bias, filled(u), filled(float(zero)) if zero else None
            ),
            x_proj_offset=None if offset is None else self.operators.vector(offset),
            scan=ScanScales(u, dt, dt_b_c, xz, s["ssm_state_act:input"], zero),
            out_proj=half_factors(out_proj, s["out_proj:input"]),
            rotation=rotation_factor(e, s["out_proj:input"]),
            wrap=wrap,
        )

    def forward(
        self,
        ops: Int8Operators,
        x: torch.Tensor,
        scales: Mamba1Scales,
        batch: PlacedBatch,
        state: BlockState | None = None,
    ) -> torch.Tensor:
        """As `Int8Block.forward`."""
        scan = self._half_conv_scan if CONV_SCAN in self.in_16_bit else self._conv_scan
        y = scan(ops, x, scales, batch, state)  # (t, e)
        if OUT_PROJ in self.in_16_bit:
            return ops.half_product(ops.half.hadamard(y), self.out_proj)
        gated = ops.rotate(y, scales.rotation, scales.wrap)
        return ops.linear_to_half(gated, self.out_proj, scales.out_proj.of(ops, gated))

    def _conv_scan(
        self,
        ops: Int8Operators,
        x: torch.Tensor,
        s: Mamba1Scales,
        batch: PlacedBatch,
        state: BlockState | None,
    ) -> torch.Tensor:
        """The gated output of the scan (t, e), float16 values, by a convolution and scan of codes."""
        assert state is None or isinstance(state, Int8BlockState)
        e, r, scan = self.config.d_inner, self.config.dt_rank, s.scan
        if IN_PROJ in self.in_16_bit:
            xz = ops.encode(ops.half_product(x, self.in_proj), scan.z)  # (t, 2e)
        else:
            xz = ops.linear_to_int8(x, self.in_proj, s.in_proj.of(ops, x))
        u = ops.conv_silu(xz[:, :e], s.conv, batch, state)
        if X_PROJ in self.in_16_bit:
            read = ops.decode(u, scan.u, float(scan.u_zero))
            dt_b_c = ops.encode(ops.half_product(read, self.x_proj), scan.bc)  # (t, r + 2n)
            dt = ops.encode(ops.half_product(ops.decode(dt_b_c[:, :r], scan.bc), self.dt_proj), scan.delta)
        else:
            dt_b_c = ops.linear_to_int8(u, self.x_proj, s.x_proj.of(ops, u), s.x_proj_offset)
            dt = ops.linear_to_int8(dt_b_c[:, :r], self.dt_proj, s.dt_proj.of(ops, u))
        inputs = ScanInputs(u, dt, dt_b_c[:, r:], xz[:, e:], self.a, self.d, self.dt_bias)
        return ops.selective_scan(inputs, scan, batch, state)

    def _half_conv_scan(
        self,
        ops: Int8Operators,
        x: torch.Tensor,
        s: Mamba1Scales,
        batch: PlacedBatch,
        state: BlockState | None,
    ) -> torch.Tensor:
        """The same by a convolution and scan in 16 bit. They read codes where x_proj makes or reads them."""
        e, r, scan = self.config.d_inner, self.config.dt_rank, s.scan
        if IN_PROJ in self.in_16_bit:
            xz = ops.half_product(x, self.in_proj)
        else:
            xz = ops.linear_to_half(x, self.in_proj, s.in_proj_half.of(ops, x))
        u = ops.half.conv_silu(xz[:, :e], self.taps, self.conv_bias, batch, state)
        if X_PROJ in self.in_16_bit:
            dt_b_c = ops.half_product(u, self.x_proj)
            dt = ops.half_product(dt_b_c[:, :r], self.dt_proj)
        else:
            zero = float(scan.u_zero)
            codes = ops.encode(u, scan.u, zero)
            products = ops.linear_to_int8(codes, self.x_proj, s.x_proj.of(ops, codes), s.x_proj_offset)
            dt = ops.linear_to_half(products[:, :r], self.dt_proj, s.dt_proj_half.of(ops, codes))
            u, dt_b_c = ops.decode(codes, scan.u, zero), ops.decode(products, scan.bc)
        inputs = ScanInputs(u, dt, dt_b_c[:, r:], xz[:, e:], self.a, self.d, self.dt_bias)
        return ops.half.selective_scan(inputs, batch, state)

    def state_layout(self, scales: Mamba1Scales) -> StateLayout:
        """As `Int8Block.state_layout`; the state is (b, n, e)."""
        return StateLayout(torch.tensor(scales.scan.state, device=self.operators.device), channels=2)

    def new_state(self, sequences: int) -> BlockState:
        """As `Int8Block.new_state`."""
        c, ops = self.config, self.operators
        if CONV_SCAN in self.in_16_bit:
            return BlockState(
                torch.zeros(sequences, c.d_conv - 1, c.d_inner, dtype=ops.half.dtype, device=ops.device),
                torch.zeros(sequences, c.d_state, c.d_inner, device=ops.device).transpose(1, 2),
            )
        return Int8BlockState(
            torch.zeros(sequences, c.d_conv, c.d_inner, dtype=torch.int8, device=ops.device),
            torch.zeros(sequences, c.d_state, c.d_inner, dtype=torch.int8, device=ops.device),
        )


def _factors(weight: float | torch.Tensor, source: float, target: float, *, ratio_first: bool) -> Factors:
    """Of a product that becomes codes: the weight's scale, and the ratio of the scales of the codes that it reads and
    makes, as upstream computes it: in float64, then float32.

    weight  one scale, or (out,) float32 on the operators' device, which is then the first factor
    """
    ratio = float32(source / target)
    if isinstance(weight, torch.Tensor):
        return Factors(*[Multipliers(weight, ratio)] * 3)
    weight_first = Multipliers(weight, ratio)
    return Factors(
        prefill=Multipliers(ratio, weight) if ratio_first else weight_first,
        several=weight_first,
        alone=Multipliers(float32(float32(weight * source) / target), 1.0),
    )


KIND = Int8BlockKind(MAMBA1, "quamba1-w8a8", Int8Mamba1Weights, Int8Mamba1Block)
