# mypy: disable-error-code="return-value"
"""Slow twin of the INT8 model: plain NumPy int64 and float64, written from the specification of upstream Quamba.

Every operator takes integer codes and returns the exact value before rounding with a bound on the error that float32
arithmetic in any of the allowed orders can make. ``u`` is float32's unit roundoff: one operation is off by at most
``u`` times its exact result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

U = 2.0**-24
EXP = 6 * U
"""Relative error allowed to a float32 exp: 1 ulp is 2 u; argument reduction and the final product add the rest."""

Int = npt.NDArray[np.int64]
Real = npt.NDArray[np.float64]
Valued = tuple[Real, Real]
"""Exact values and the error bounds of their float32 counterparts."""


def half_even(value: Real) -> Int:
    """Saturating code, ties to even: Python's round, element by element."""
    return np.array([min(127, max(-128, round(float(x)))) for x in value.ravel()], np.int64).reshape(value.shape)


def half_away(value: Real) -> Int:
    """Saturating code, ties away from zero: C's roundf."""
    rounded = [int(abs(x) + 0.5) * (1 if x >= 0 else -1) for x in value.ravel().tolist()]
    return np.array([min(127, max(-128, x)) for x in rounded], np.int64).reshape(value.shape)


def shifted(zero_point: Int) -> Callable[[Real], Int]:
    """Saturating codes with zero points (channels,): ties away from zero, then the zero point is added."""

    def rounding(value: Real) -> Int:
        rounded = [int(abs(x) + 0.5) * (1 if x >= 0 else -1) for x in value.ravel().tolist()]
        found: Int = np.array(rounded, np.int64).reshape(value.shape) + zero_point
        return np.minimum(np.maximum(found, -128), 127)

    return rounding


def wrap(value: Real) -> Int:
    """Upstream's Hadamard quantizer: ties away from zero, then the low byte as a signed number."""
    rounded = [int(abs(x) + 0.5) * (1 if x >= 0 else -1) for x in value.ravel().tolist()]
    return np.array([(x + 128) % 256 - 128 for x in rounded], np.int64).reshape(value.shape)


def check_codes(codes, valued: Valued, rounding) -> int:
    """Codes equal the twin's, except where its value lies within the error of a boundary: there they differ by one.

    Returns how many lie so near a boundary.
    """
    value, error = valued
    low, high = rounding(value - error), rounding(value + error)
    codes = np.asarray(codes, np.int64)
    assert codes.shape == low.shape
    assert ((low <= codes) & (codes <= high)).all(), (codes - rounding(value))[(codes < low) | (codes > high)]
    assert (high - low <= 1).all()
    return int((low != high).sum())


def few(near: int, valued: Valued) -> bool:
    """Whether no more lie near a boundary than chance allows: a share of about 2 x error, here times 4, plus 3."""
    return near <= 3 + 4 * float(np.minimum(2 * valued[1], 1).sum())


def check_half(result, valued: Valued) -> None:
    """Float16 values equal the twin's rounded to float16, up to its error: rounding is monotone."""
    value, error = valued
    with np.errstate(over="ignore"):
        low, high = ((value + sign * error).astype(np.float16).astype(np.float64) for sign in (-1, 1))
    result = np.asarray(result, np.float64)
    assert ((low <= result) & (result <= high)).all()


def quantize_half(weight) -> tuple[Int, float]:
    """Codes and scale in float16 arithmetic, one number at a time."""
    half = np.asarray(weight).astype(np.float16)
    amax = max(max(abs(x) for x in half.ravel()), np.float16(1e-5))
    scale = np.float16(amax / np.float16(127))
    quotients = [float(np.float16(x / scale)) for x in half.ravel()]
    codes = np.array([min(127, max(-128, round(q))) for q in quotients], np.int64)
    return codes.reshape(half.shape), float(scale)


def quantize_float32(weight) -> tuple[Int, float]:
    """Codes and scale in float32 arithmetic (A_log, D, dt bias), where CUDA multiplies by 1 / 127."""
    single = np.asarray(weight, np.float32)
    amax = max(max(abs(x) for x in single.ravel()), np.float32(1e-5))
    scale = np.float32(amax * (np.float32(1) / np.float32(127)))
    codes = np.array([min(127, max(-128, round(float(np.float32(x / scale))))) for x in single.ravel()], np.int64)
    return codes.reshape(single.shape), float(scale)


def gemm(x, weight: Int) -> Int:
    """Integer product of codes: (rows, in) x (out, in) -> (rows, out)."""
    return np.asarray(x, np.int64) @ weight.T


def scaled(acc: Int, factor: float) -> Valued:
    """``acc * factor``: acc to float32, two products, and each of up to two factors rounded once: 5 u."""
    value = acc * factor
    return value, 5 * U * np.abs(value)


def rms_norm(residual, eps: float, scale: float) -> Valued:
    """residual / rms / scale: mean u, + eps u, halved by the root, root u, reciprocal u, two more: 5 u and a spare."""
    x = np.asarray(residual, np.float64)
    value = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) / scale
    return value, 6 * U * np.abs(value)


def silu(valued: Valued) -> Valued:
    """x / (1 + exp(-x)); its slope is at most 1.1; exp, the sum and the division add to the relative error."""
    x, error = valued
    value = x / (1 + np.exp(-x))
    return value, 1.1 * error + (EXP + 2 * U) * np.abs(value)


def conv(x, weight: Int, bias: Int, s_x: float, s_w: float, s_b: float, s_out: float, offsets) -> Valued:
    """Causal depthwise convolution of codes (t, e) with (e, k), zeros before each document; SiLU; / s_out."""
    x = np.asarray(x, np.int64)
    width = weight.shape[1]
    total = np.zeros(x.shape, np.int64)
    for start, end in itertools.pairwise(offsets):
        for row in range(start, end):
            for tap in range(width):
                source = row - (width - 1 - tap)
                if source >= start:
                    total[row] += weight[:, tap] * x[source]
    product, shift = s_w * s_x * total, s_b * bias
    # s_w s_x and its product with the sum (2 u), the bias (u), the sum of both (u). The
    # decoding kernel rounds each term instead: (2 + k) u of the sum of magnitudes.
    magnitude = np.abs(s_w * s_x) * 128 * np.abs(weight).sum(1)
    before = product + shift
    error = 6 * U * np.maximum(np.abs(product), magnitude) + 6 * U * np.abs(shift) + U * np.abs(before)
    value, error = silu((before, error))
    return value / s_out, (error + U * np.abs(value)) / s_out


def softplus_delta(codes, scale: float, bias: Int, s_bias: float) -> Valued:
    """softplus(scale dt + s_bias bias), the identity above 20; slope at most 1; log1p and exp to 2 EXP."""
    first, second = scale * np.asarray(codes, np.int64), s_bias * bias
    x = first + second
    error = U * (np.abs(first) + np.abs(second) + np.abs(x))
    value = np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))
    return value, error + 2 * EXP * np.abs(value)


def scan(u, delta: Valued, a: Valued, b, c, d, z, offsets, scales) -> tuple[Valued, list[Valued]]:
    """Selective scan with a running error bound: gated y (t, e), and the last state (e, n) of each document.

    u, z (t, e), b, c (t, n) and d (e,) are codes; ``scales`` their scales.
    """
    u, b, c, d, z = (s * np.asarray(x, np.int64) for x, s in zip((u, b, c, d, z), scales, strict=True))
    y, y_error, states = np.zeros(u.shape), np.zeros(u.shape), []
    for start, end in itertools.pairwise(offsets):
        h, e_h = np.zeros((u.shape[1], b.shape[1])), np.zeros((u.shape[1], b.shape[1]))
        for t in range(start, end):
            step, e_step = delta[0][t][:, None], delta[1][t][:, None]
            exponent = step * a[0]
            e_exponent = e_step * np.abs(a[0]) + step * a[1] + U * np.abs(exponent)
            decay = np.exp(exponent)
            e_decay = decay * (np.expm1(e_exponent) + EXP)
            gain = step * (b[t] * u[t][:, None])
            # Dequantized b and u are rounded once each, and two products follow.
            e_gain = e_step * np.abs(b[t] * u[t][:, None]) + 5 * U * np.abs(gain)
            e_h = decay * e_h + e_decay * np.abs(h) + e_gain
            h = decay * h + gain
            e_h += 3 * U * (np.abs(h) + np.abs(gain))
            skip = d * u[t]
            total = (c[t] * h).sum(1) + skip
            magnitude = np.abs(c[t] * h).sum(1) + np.abs(skip)
            e_total = (np.abs(c[t]) * e_h).sum(1) + (h.shape[1] + 4) * U * magnitude
            gate, e_gate = silu((z[t], U * np.abs(z[t])))
            y[t] = total * gate
            y_error[t] = np.abs(gate) * e_total + np.abs(total) * e_gate + 2 * U * np.abs(y[t])
        states.append((h, e_h))
    return (y, y_error), states


def hadamard_matrix(order: int) -> Real:
    """Sylvester's matrix: the sign is the parity of the common bits of row and column."""
    return np.array([[(-1.0) ** bin(i & j).count("1") for j in range(order)] for i in range(order)])


def hadamard(y, scale: float, matrix: Real) -> Valued:
    """Transform of float16 values over ``scale``; each of log2(e) (at most 12) additions errs by u of the magnitude."""
    y = np.asarray(y, np.float64)
    factor = 1 / np.sqrt(y.shape[-1]) / scale
    magnitude = np.abs(y) @ np.abs(matrix).T * factor
    return y @ matrix.T * factor, 14 * U * magnitude
