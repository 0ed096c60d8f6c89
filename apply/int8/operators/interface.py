"""The operators of the INT8 blocks: the interface that the CPU and CUDA implement.

Operators exchange int8 codes, whose rows may be strided, and float16 values, which are float32 tensors on the CPU. They
compute in float32 and round a result once. Six operations round to codes: `add_norm_to_int8`, `linear_to_int8`,
`conv_silu`, the Hadamard quantizer (`rotate`, `gated_rotate`), the states, and `encode`.

Convolution and scans take a ``state`` or None. Over whole documents they set it to the state after each document;
operators that decode read and update it.

An operator in 16 bit reads and makes float16 values: `half_product`, and `half`, which has convolution, scans, norm and
Hadamard transform. `encode` and `decode` stand between it and its neighbours of codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from quambase.apply.int8.arithmetic import Int8Weight
from quambase.apply.int8.operators.half import HalfOperators
from quambase.model.operators.interface import BlockState, ScanInputs
from quambase.model.packed_batch import PlacedBatch


class Int8BlockState(BlockState):
    """A block's decoding state of b sequences, as codes; of a block whose conv_scan is in 16 bit it is a `BlockState`.

    conv  (b, k, channels): the convolution's last inputs, oldest first
    ssm   (b, n, e) in Mamba-1, (b, e, n) in Mamba-2
    """


class Convolution(NamedTuple):
    """A convolution of codes: weights, and the scales of its codes by channel.

    taps      (k, c) codes in float32, the last row for the current token
    scale_wx  (c,) float32: the weight's scale times that of the input
    bias      (c,) float32, dequantized
    scale_out, zero_out  (c,) float32 of the output; None without a zero point
    """

    taps: torch.Tensor
    scale_wx: torch.Tensor
    bias: torch.Tensor
    scale_out: torch.Tensor
    zero_out: torch.Tensor | None


class SsdCodes(NamedTuple):
    """What Mamba-2's scan reads: codes, and the constants of a block.

    conv_out (t, e + 2gn), x, B, C; dt (t, h) before bias and softplus; a (h,) negative; d, bias (h,).
    """

    conv_out: torch.Tensor
    dt: torch.Tensor
    a: torch.Tensor
    d: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class ScanScales:
    """The scales of a Mamba-1 scan's inputs and of its state's codes. ``u_zero``: the zero point of u."""

    u: float
    delta: float
    bc: float
    z: float
    state: float
    u_zero: int = 0


@dataclass(frozen=True)
class SsdScales:
    """The scales of a Mamba-2 scan's inputs and of its state's codes.

    conv_out  (e + 2gn,): of x, B, C by channel
    zero      (e + 2gn,) float32: their zero points; None where there are none
    state     (groups, n), and ``groups`` (e,) int64: each channel's
    """

    conv_out: torch.Tensor
    zero: torch.Tensor | None
    dt: float
    state: torch.Tensor
    groups: torch.Tensor


class Multipliers(NamedTuple):
    """The factors by which an integer product is multiplied in turn, with a rounding to float32 each time; ``first``
    may be one per column (out,). ``away``: codes are rounded half away from zero, otherwise half to even.
    """

    first: float | torch.Tensor
    second: float
    away: bool = False


@dataclass(frozen=True)
class Factors:
    """The multipliers of one product. Upstream has three kernels, whose results differ in the last bits.

    prefill  of whole documents
    several  while several sequences decode
    alone    while one sequence decodes: the matrix-vector kernel multiplies by one combined factor
    """

    prefill: Multipliers
    several: Multipliers
    alone: Multipliers

    def of(self, operators: Int8Operators, x: torch.Tensor) -> Multipliers:
        """The multipliers for x (rows, in) and ``operators``."""
        if not operators.decodes:
            return self.prefill
        return self.alone if len(x) == 1 else self.several


class Int8Operators(Protocol):
    """The operators of one model on one device. ``decodes``: every document is the next token of a sequence."""

    device: torch.device
    decodes: bool

    def decoding(self) -> Int8Operators:
        """The operators for decoding."""

    def matrix(self, weight: Int8Weight) -> Int8Weight:
        """A matrix of codes (out, in), laid out for products on the device."""

    def half_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """A matrix of float16 (out, in), laid out for `half_product`."""

    def vector(self, values: torch.Tensor) -> torch.Tensor:
        """An argument of the other operators: float32 or int64, contiguous on the device."""

    def halves(self, rows: torch.Tensor) -> torch.Tensor:
        """Float16 rows (t, d) in the operators' form of float16 values."""

    def new_residual(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream before the first block: zeros (t, d) float32; x as from `halves`."""

    def add_norm_to_int8(self, x: torch.Tensor, residual: torch.Tensor, eps: float, scale: float) -> torch.Tensor:
        """``residual`` += x, then the codes (t, d), half to even, of its RMS norm divided by ``scale``.

        x (t, d) float16 values; residual (t, d) float32, updated. The norm's weight was folded into the next
        projection.
        """

    def add_norm_to_half(self, x: torch.Tensor, residual: torch.Tensor, eps: float) -> torch.Tensor:
        """The same norm, not divided by a scale, as float16 values."""

    def linear_to_int8(
        self, x: torch.Tensor, weight: Int8Weight, by: Multipliers, offset: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Codes (rows, out), saturating, of the integer product of codes x (rows, in), multiplied ``by``.

        offset (out,) int32: subtracted from the integer sums; of codes with a zero point z, z times the row's sum.
        """

    def linear_to_half(self, x: torch.Tensor, weight: Int8Weight, by: Multipliers) -> torch.Tensor:
        """The same as float16 values, half to even."""

    def half_product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product (rows, out) of float16 values x (rows, in), rounded to float16."""

    @property
    def half(self) -> HalfOperators:
        """The operators in 16 bit, made on first use."""

    def encode(
        self, x: torch.Tensor, scale: float | torch.Tensor, zero: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Codes (rows, c), saturating, half to even, of float16 values x (rows, c), whose rows may be strided.

        scale, zero  one for all, or (c,) float32; the zero point is added to the rounded quotient of float32
        """

    def decode(
        self, codes: torch.Tensor, scale: float | torch.Tensor, zero: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float16 values (rows, c), contiguous, of such codes: (code - zero) times scale in float32, then rounded."""

    def conv_silu(
        self, x: torch.Tensor, conv: Convolution, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """Depthwise causal convolution of codes x (t, c), SiLU, and codes (t, c), half away from zero. The zero point,
        unless there is none, is added to the rounded quotient.
        """

    def selective_scan(
        self, inputs: ScanInputs, scales: ScanScales, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """Mamba-1's scan of codes, gated: float16 values (t, e).

        States: half away from zero after whole documents, half to even while decoding.
        """

    def ssd_scan(
        self, inputs: SsdCodes, scales: SsdScales, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """Mamba-2's scan of codes, not gated: float16 values (t, e).

        Over whole documents x, B and C are rounded to float16, as upstream's tensor cores read them, except for the
        skip connection. States: half to even.
        """

    def rotate(self, y: torch.Tensor, factor: float, wrap: bool) -> torch.Tensor:
        """The Hadamard quantizer: codes, half away from zero, of ``factor`` times the transform of y (t, e), float16
        values; saturating, or modulo 256 if ``wrap``.
        """

    def gated_rotate(
        self,
        y: torch.Tensor,
        z: torch.Tensor,
        z_scale: float,
        weight: torch.Tensor,
        eps: float,
        factor: float,
        wrap: bool,
    ) -> torch.Tensor:
        """`quambase.model.operators.torch.gated_rms_norm`, rounded to float16, then `rotate`.

        y (t, e) float16 values; z (t, e) codes; weight (e,).
        """
