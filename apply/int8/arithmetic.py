"""INT8 arithmetic of upstream Quamba's W8A8 model on the CPU: quantization of weights, products of codes.

Every function says how it rounds. Activations and weights are int8 tensors; float32 BLAS accumulates their products
exactly, with the result of int32 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from quambase.schema.values.number_format import INT8

INT8_MIN, INT8_MAX = INT8.qmin, INT8.qmax

EXACT_CHUNK = 1024
"""128 * 128 * 1024 = 2^24: this many products of codes sum exactly in float32, in any order."""

_EXACT = 2**24
_PER_LEVEL = torch.tensor(1.0) / INT8_MAX


@dataclass(frozen=True)
class Int8Weight:
    """A weight tensor as codes and one scale: ``weight ~ codes * scale``.

    codes  int8, any shape; (out, in) for a linear layer
    scale  float32 value (for fp16 arithmetic, a float16 value)
    """

    codes: torch.Tensor
    scale: float

    @cached_property
    def floats(self) -> torch.Tensor:
        """The codes in float32, for BLAS; computed once and shared by every model with this weight."""
        return self.codes.to(torch.float32)

    @cached_property
    def exact_at_once(self) -> bool:
        """Whether no partial sum of a row can exceed 2^24, whatever the input codes, so that no chunks are needed."""
        return int(self.codes.to(torch.int64).abs().sum(-1).max()) * -INT8_MIN <= _EXACT

    def dequantized(self) -> torch.Tensor:
        """``scale * codes`` in float32."""
        return self.floats * torch.tensor(self.scale, dtype=torch.float32)


@dataclass(frozen=True)
class SplitInt8Weight:
    """A weight tensor in parts of consecutive rows, with one scale per part.

    codes   int8 (rows, ...)
    scales  float32 values, one per part
    widths  rows of each part
    """

    codes: torch.Tensor
    scales: tuple[float, ...]
    widths: tuple[int, ...]

    @classmethod
    def of(
        cls, weight: torch.Tensor, widths: tuple[int, ...], quantize: Callable[[torch.Tensor], Int8Weight]
    ) -> SplitInt8Weight:
        """Quantize each part of ``weight`` separately."""
        parts = [quantize(part) for part in torch.split(weight, list(widths))]
        return cls(torch.cat([part.codes for part in parts]), tuple(part.scale for part in parts), widths)

    @cached_property
    def joined(self) -> Int8Weight:
        """All codes as one weight, for the integer product."""
        return Int8Weight(self.codes, 1.0)

    @cached_property
    def row_scales(self) -> torch.Tensor:
        """Each row's scale, float32 (rows,)."""
        return torch.repeat_interleave(torch.tensor(self.scales), torch.tensor(self.widths))


Weight = Int8Weight | SplitInt8Weight | torch.Tensor
"""A weight of a block; a tensor: one that is not quantized, in float16 or float32."""


def scale_of_rows(weight: Weight) -> float | torch.Tensor:
    """The one scale of a quantized matrix, or (out,) float32 of one that has several; 1 where it is not quantized."""
    if isinstance(weight, SplitInt8Weight):
        return weight.row_scales
    return weight.scale if isinstance(weight, Int8Weight) else 1.0


def weight_values(weight: Weight) -> torch.Tensor:
    """The weight in float32, dequantized if it is quantized."""
    if isinstance(weight, torch.Tensor):
        return weight.to(torch.float32)
    if isinstance(weight, Int8Weight):
        return weight.dequantized()
    rows = weight.row_scales
    return weight.joined.floats * rows.view(-1, *[1] * (weight.codes.dim() - 1))


def quantize_weight(weight: torch.Tensor) -> Int8Weight:
    """Per-tensor symmetric absmax in float16 arithmetic (upstream
    quant_utils.quantize_tensor_per_tensor_absmax).

    ``scale = max(amax, 1e-5) / 127`` and ``weight / scale`` are both rounded to float16, then the quotient to
    an integer, half to even. ``weight``: float32 holding float16 values, any shape.
    """
    half = weight.to(torch.float16)
    scale = half.abs().amax().clamp(min=1e-5) / INT8_MAX
    codes = torch.round(half / scale).clamp(INT8_MIN, INT8_MAX).to(torch.int8)
    return Int8Weight(codes, float(scale))


def quantize_weight_float32(weight: torch.Tensor) -> Int8Weight:
    """The same in float32 arithmetic, as upstream does for A_log, D and the dt bias (qSelectiveScan.py).

    Upstream quantizes on CUDA, where ``x / 127`` is ``x * (1 / 127)``: in float32 the last bit often differs
    (`quambase.analyzer.upstream_observers`), in float16 never. It decides whether half of the maximum becomes 63 or 64.
    """
    scale = weight.abs().amax().clamp(min=1e-5) * _PER_LEVEL
    codes = torch.round(weight / scale).clamp(INT8_MIN, INT8_MAX).to(torch.int8)
    return Int8Weight(codes, float(scale))


WEIGHT_GROUP = 128
"""Input channels that share a scale of 4-bit weights."""

CODES_4BIT = -8, 7
"""Least and largest code of a 4-bit weight."""


def quantize_weight_4bit(weight: torch.Tensor, second_moments: torch.Tensor | None = None) -> SplitInt8Weight:
    """A matrix (out, in) in 4 bits, as the int8 codes that a W4A8 product reads, one scale a row; rounded to nearest,
    or with the ``second_moments`` (in, in) of its input as `compensated_codes` does.

    Each row's groups of WEIGHT_GROUP inputs have the scale ``2 amax / 15`` and codes -8..7, half to even. The product
    reads them as int8: ``round(code * group scale / row scale)``, where the row scale maps the row's largest value to
    127, and the ratio of the scales is rounded to float16. So upstream's W4A8 kernel (Marlin, QQQ) has it.
    """
    rows, width = weight.shape
    if second_moments is None:
        groups = _by_group(weight)
        scales = _group_scale(groups)
        codes = torch.round(groups / scales).clamp(*CODES_4BIT)
    else:
        codes, scales = compensated_codes(weight, second_moments)
    of_rows = (codes * scales).abs().amax((1, 2)).clamp(min=1e-5) / INT8_MAX
    ratios = to_half(scales / of_rows.view(-1, 1, 1))
    wide = torch.round(codes * ratios).clamp(INT8_MIN, INT8_MAX).to(torch.int8)
    return SplitInt8Weight(wide.view(rows, -1)[:, :width].contiguous(), tuple(of_rows.tolist()), (1,) * rows)


def _by_group(weight: torch.Tensor) -> torch.Tensor:
    """(out, groups, WEIGHT_GROUP) of a matrix (out, in), the last group filled up with zeros."""
    return F.pad(weight, (0, -weight.shape[1] % WEIGHT_GROUP)).view(len(weight), -1, WEIGHT_GROUP)


def _group_scale(group: torch.Tensor) -> torch.Tensor:
    """The scale of 4-bit weights (..., inputs) float32 of a group, (..., 1)."""
    return 2 * group.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 15


DAMPING = 0.01
"""What GPTQ adds to the diagonal of the second moments, relative to its mean."""


def compensated_codes(weight: torch.Tensor, second_moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ (Frantar et al. 2022): 4-bit codes (out, groups, WEIGHT_GROUP) and scales (out, groups, 1), float32, of a
    matrix W (out, in), by the second moments H (in, in) of its input.

    Rounds column after column; each time the columns that are left take on what minimizes ``tr((W - Q) H (W - Q)^T)``.
    With the upper Cholesky factor U of the inverse of H, the error of column i times ``U[i, i:] / U[i, i]`` is
    subtracted. A group's scale is that of its weights when its turn comes. An input that was always 0 has neither
    effect nor correction: its weights are rounded to nearest (the authors set them to 0, which a text in which it is
    not 0 would notice).
    """
    moments = second_moments.to(torch.float64)
    mean = moments.diagonal().mean()
    damped = moments + torch.eye(len(moments), dtype=torch.float64) * (DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left = weight.to(torch.float64, copy=True)
    codes, scales = torch.zeros(weight.shape), []
    for start in range(0, weight.shape[1], WEIGHT_GROUP):
        group = slice(start, min(start + WEIGHT_GROUP, weight.shape[1]))
        scale = _group_scale(left[:, group].to(torch.float32))
        errors = torch.zeros(len(weight), group.stop - start, dtype=torch.float64)
        for i in range(start, group.stop):
            code = torch.round(left[:, i].to(torch.float32) / scale[:, 0]).clamp(*CODES_4BIT)
            error = (left[:, i] - code * scale[:, 0]) / factor[i, i]
            left[:, i : group.stop] -= error[:, None] * factor[i, i : group.stop]
            codes[:, i], errors[:, i - start] = code, error
        left[:, group.stop :] -= errors @ factor[group, group.stop :]  # of all columns at once, which is much faster
        scales.append(scale)
    return _by_group(codes), torch.stack(scales, dim=1)


def quantize_rows(weight: torch.Tensor, *, signed_max: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding (v, d) with one scale per row, in float16 arithmetic: int8 codes (v, d), float16 scales
    (v,).

    ``signed_max``: use the row's largest value instead of its largest absolute value, as upstream's W8O16Embedding
    does, which clips rows whose largest magnitude is negative.
    """
    half = weight.to(torch.float16)
    if signed_max:
        scales = half.amax(dim=-1, keepdim=True) / INT8_MAX
    else:
        scales = half.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / INT8_MAX
    # A row whose largest value is 0 has scale 0 upstream: it dequantizes to 0 whatever its codes.
    quotient = torch.nan_to_num(half / scales, nan=0.0)
    codes = torch.round(quotient).clamp(INT8_MIN, INT8_MAX).to(torch.int8)
    return codes, scales.flatten()


def matmul(x: torch.Tensor, weight: Int8Weight, offset: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ codes.T - offset`` of int8 codes: the int32 result, rounded to float32 (exact below 2^24). (rows, in) ->
    (rows, out); offset (out,) int32.

    If a row's sum could exceed 2^24, the product is computed in chunks of EXACT_CHUNK, which are added as int32.
    """
    floats = x.to(torch.float32)
    subtracted = offset is not None and bool(offset.any())
    if weight.exact_at_once and not subtracted:
        return F.linear(floats, weight.floats)
    total = torch.zeros(x.shape[0], weight.codes.shape[0], dtype=torch.int32)
    if offset is not None:
        total -= offset
    for low in range(0, x.shape[1], EXACT_CHUNK):
        part = slice(low, low + EXACT_CHUNK)
        total += F.linear(floats[:, part], weight.floats[:, part]).to(torch.int32)
    return total.to(torch.float32)


def to_half(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to float16 values (half to even), as a float32 tensor."""
    return x.to(torch.float16).to(torch.float32)


def encoded(x: torch.Tensor, scale: float | torch.Tensor, zero: float | torch.Tensor | None = None) -> torch.Tensor:
    """round(x / scale) + zero, half to even, clamped to INT8's codes; float32, of x (rows, c) and scale, zero (c,)."""
    codes = (x.to(torch.float32) / scale).round_()
    return (codes if zero is None else codes.add_(zero)).clamp_(INT8_MIN, INT8_MAX)


def decoded(codes: torch.Tensor, scale: float | torch.Tensor, zero: float | torch.Tensor | None = None) -> torch.Tensor:
    """(code - zero) * scale in float32, contiguous: (rows, c) of codes (rows, c) and scale, zero (c,)."""
    values = codes.to(torch.float32, memory_format=torch.contiguous_format)
    return (values if zero is None else values.sub_(zero)).mul_(scale)


def softplus_delta(codes: torch.Tensor, scale: float, bias: torch.Tensor) -> torch.Tensor:
    """``softplus(scale * codes + bias)`` in float32, the identity above 20; codes (t, e), bias (e,)."""
    return F.softplus(decoded(codes, scale).add_(bias))


def float32(value: float) -> float:
    """``value`` rounded to float32 (half to even), as a Python float."""
    return float(np.float32(value))
