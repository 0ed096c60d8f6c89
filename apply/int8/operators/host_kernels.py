"""Compiled CPU kernels of the INT8 blocks: the steps between the integer matrix products.

Rounding is written out in each: half to even (`half_even`) in the norm, the GEMM epilogue and the decoded state; half
away from zero (`half_away`) in the convolution, the Hadamard quantizer, Mamba-1's prefill state and if a single row is
projected. Scales are one per channel or group, all equal for a whole tensor. All arithmetic is float32 in upstream's
order; no product is contracted with a sum, so results do not depend on the compiler. Packed batches as in
`quambase.model.operators.host_kernels`.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from quambase.model.operators.host_kernels import BLOCK, exp32, silu32
from quambase.schema.compiled import kept_njit
from quambase.schema.values.arrays import Float32, Int64
from quambase.schema.values.number_format import INT8

Int8 = npt.NDArray[np.int8]

_LOWEST = np.float32(INT8.qmin)
_HIGHEST = np.float32(INT8.qmax)
_HALF = np.float32(0.5)
_ZERO = np.float32(0)
_ONE = np.float32(1)
# Adding 1.5 * 2^23 leaves no fraction bits, so the sum is rounded to an integer, half
# to even, by the addition itself; exact for |x| < 2^22, and it vectorises.
_SHIFTER = np.float32(12582912)
# Upstream multiplies a decoded state and its scale by these before it divides them, in Mamba-1 and in Mamba-2
# (quant_ssm_states.py).
_SCAN_FACTOR = np.float32(1e2)
_SSD_FACTOR = np.float32(1e6)
_INT32_EDGE = np.float32(2147483648)


@numba.njit(inline="always")
def half_even(x: np.float32) -> np.int8:
    """The INT8 code of x: rounded half to even, saturating at -128 and 127."""
    # Both limits are integers, so clamping first gives the same code as clamping last.
    return np.int8(min(max(x, _LOWEST), _HIGHEST) + _SHIFTER - _SHIFTER)


@numba.njit(inline="always")
def round_half_away(x: np.float32) -> np.float32:
    """C's roundf for |x| < 2^31: half away from zero. (floor(|x| + 0.5) would round 0.49999997 up.)"""
    whole = np.float32(np.int32(x))
    rest = x - whole
    return whole + (_ONE if rest >= _HALF else _ZERO) - (_ONE if rest <= -_HALF else _ZERO)


@numba.njit(inline="always")
def half_away(x: np.float32) -> np.int8:
    """The INT8 code of x: rounded half away from zero, saturating at -128 and 127."""
    return np.int8(round_half_away(min(max(x, _LOWEST), _HIGHEST)))


@numba.njit(inline="always")
def shifted_code(x: np.float32, zero: np.float32) -> np.int8:
    """The INT8 code of x with the zero point ``zero``: rounded half away from zero, then shifted, saturating."""
    # The limits are integers, so clamping first gives the same code as clamping last.
    return np.int8(round_half_away(min(max(x, _LOWEST - zero), _HIGHEST - zero)) + zero)


@kept_njit(parallel=True)
def scale_columns_to_int8(acc: Float32, first: Float32, second: np.float32, away: bool, out: Int8) -> None:
    """GEMM epilogue: the code of ``(acc * first[column]) * second``, half to even, or half away from zero if ``away``.

    acc, out (rows, columns); first (columns,).
    """
    rows, columns = acc.shape
    for row in numba.prange(rows):
        if away:
            for i in range(columns):
                out[row, i] = half_away(np.float32(np.float32(acc[row, i] * first[i]) * second))
        else:
            for i in range(columns):
                out[row, i] = half_even(np.float32(np.float32(acc[row, i] * first[i]) * second))


@numba.njit(fastmath={"reassoc"})
def _sum_of_squares(line: Float32) -> float:
    total = 0.0
    for i in range(line.size):
        value = float(line[i])
        total += value * value
    return total


@kept_njit()
def _add_and_measure(x: Float32, line: Float32, eps: np.float32) -> np.float32:
    """``line += x``, then the reciprocal of its root mean square; x, line (d,)."""
    for i in range(line.size):
        line[i] += x[i]
    mean = np.float32(_sum_of_squares(line) / line.size)
    return np.float32(_ONE / np.sqrt(np.float32(mean + eps)))


@kept_njit(parallel=True)
def add_rms_norm_int8(x: Float32, residual: Float32, eps: np.float32, scale: np.float32, out: Int8) -> None:
    """``residual += x``, then the INT8 code (half to even) of ``residual / rms(residual) / scale``.

    x, residual, out (t, d); the norm's weight was folded into the next projection.
    """
    rows, width = x.shape
    for row in numba.prange(rows):
        line = residual[row]
        rstd = _add_and_measure(x[row], line, eps)
        for i in range(width):
            out[row, i] = half_even(np.float32(np.float32(line[i] * rstd) / scale))


@kept_njit(parallel=True)
def add_rms_norm(x: Float32, residual: Float32, eps: np.float32, out: Float32) -> None:
    """``residual += x``, then ``residual / rms(residual)`` in float32. x, residual, out (t, d)."""
    rows, width = x.shape
    for row in numba.prange(rows):
        line = residual[row]
        rstd = _add_and_measure(x[row], line, eps)
        for i in range(width):
            out[row, i] = line[i] * rstd


@kept_njit(parallel=True)
def conv_silu_int8(
    x: Int8,
    first: int,
    weight: Float32,
    scale_wx: Float32,
    bias: Float32,
    scale_out: Float32,
    zero_out: Float32,
    offsets: Int64,
    out: Int8,
) -> None:
    """Depthwise causal convolution of codes, SiLU, and one rounding (half away from zero, saturating).

    ``v = scale_wx * sum(weight * x) + bias; code = round(v / (1 + exp(-v)) / scale_out) + zero_out``.

    x (t, >= first + c): columns from ``first`` are read; weight (k, c) codes held in float32 (the sum of k products is
    exact), its last row multiplying the current token; scale_wx, bias (dequantized), scale_out, zero_out (c,);
    out (t, c). Zeros before every document.
    """
    documents = offsets.size - 1
    width, channels = weight.shape
    blocks = (channels + BLOCK - 1) // BLOCK
    for piece in numba.prange(documents * blocks):
        document = piece // blocks
        low = (piece % blocks) * BLOCK
        size = min(low + BLOCK, channels) - low
        total = np.empty(BLOCK, np.float32)
        start = offsets[document]
        for row in range(start, offsets[document + 1]):
            for i in range(size):
                total[i] = _ZERO
            for tap in range(max(0, width - 1 - (row - start)), width):
                source = row - (width - 1 - tap)
                for i in range(size):
                    total[i] += weight[tap, low + i] * np.float32(x[source, first + low + i])
            for i in range(size):
                value = np.float32(np.float32(scale_wx[low + i] * total[i]) + bias[low + i])
                out[row, low + i] = shifted_code(np.float32(silu32(value) / scale_out[low + i]), zero_out[low + i])


@kept_njit()
def conv_update_int8(
    x: Int8,
    first: int,
    window: Int8,
    weight: Float32,
    scale_wx: Float32,
    bias: Float32,
    scale_out: Float32,
    zero_out: Float32,
    out: Int8,
) -> None:
    """One decoded token through the convolution: shifts ``window``, then sums from the bias in float32.

    x (b, >= first + c); window (b, k, c), oldest first, updated in place; the rest as in conv_silu_int8. Terms are
    added in upstream's order, so the sum is rounded differently from the prefill's.
    """
    documents, width, channels = window.shape
    for document in range(documents):
        for tap in range(width - 1):
            for i in range(channels):
                window[document, tap, i] = window[document, tap + 1, i]
        for i in range(channels):
            window[document, width - 1, i] = x[document, first + i]
        for i in range(channels):
            value = bias[i]
            for tap in range(width):
                scaled = np.float32(scale_wx[i] * weight[tap, i])
                value = np.float32(value + np.float32(scaled * np.float32(window[document, tap, i])))
            out[document, i] = shifted_code(np.float32(silu32(value) / scale_out[i]), zero_out[i])


@kept_njit(parallel=True)
def round_to_int8(x: Float32, wrap: bool, out: Int8) -> None:
    """The Hadamard quantizer's last step: half away from zero, saturating; or modulo 256 if ``wrap``.

    x, out (rows, columns). Wrapping is upstream's float -> int32 (saturating) -> int8 (low byte).
    """
    rows, columns = x.shape
    for row in numba.prange(rows):
        if wrap:
            for i in range(columns):
                value = x[row, i]
                if value >= _INT32_EDGE:
                    code = np.int64(2147483647)
                elif value <= -_INT32_EDGE:
                    code = np.int64(-2147483648)
                else:
                    code = np.int64(round_half_away(value))
                code &= 255
                out[row, i] = np.int8(code - 256 if code > 127 else code)
        else:
            for i in range(columns):
                out[row, i] = half_away(x[row, i])


@kept_njit(parallel=True)
def state_to_int8(state: Float32, scale: np.float32, out: Int8) -> None:
    """Codes (half away from zero) of ``state / scale`` after a prefill. Both (documents, n, e)."""
    for document in numba.prange(state.shape[0]):
        for n in range(state.shape[1]):
            for i in range(state.shape[2]):
                out[document, n, i] = half_away(np.float32(state[document, n, i] / scale))


@kept_njit()
def scan_update_int8(
    u: Float32,
    delta: Float32,
    a: Float32,
    b: Float32,
    c: Float32,
    d: Float32,
    z: Float32,
    scale: np.float32,
    state: Int8,
    y: Float32,
) -> None:
    """One decoded token through the selective scan; ``state`` is dequantized, advanced and rounded (half to
    even).

    u, delta, z, y (b, e); a (n, e), negative; b, c (b, n); d (e,); state (b, n, e) codes with ``scale``. The
    output reads the state before it is rounded.
    """
    documents, states, channels = state.shape
    divisor = np.float32(scale * _SCAN_FACTOR)
    total = np.empty(channels, np.float32)
    for document in range(documents):
        for i in range(channels):
            total[i] = _ZERO
        for n in range(states):
            for i in range(channels):
                step = delta[document, i]
                decay = exp32(np.float32(a[n, i] * step))
                gain = np.float32(np.float32(b[document, n] * step) * u[document, i])
                old = np.float32(scale * np.float32(state[document, n, i]))
                new = np.float32(np.float32(old * decay) + gain)
                state[document, n, i] = half_even(np.float32(np.float32(new * _SCAN_FACTOR) / divisor))
                total[i] = np.float32(total[i] + np.float32(new * c[document, n]))
        for i in range(channels):
            skipped = np.float32(total[i] + np.float32(u[document, i] * d[i]))
            y[document, i] = skipped * silu32(z[document, i])


@kept_njit(parallel=True)
def state_groups_to_int8(state: Float32, scales: Float32, groups: Int64, out: Int8) -> None:
    """Codes (half to even) of a prefill's last state: ``(state * 1e6) / (scale * 1e6)``.

    state, out (documents, e, n); scales (g, n) of the scale groups; groups (e,): each channel's.
    """
    for document in numba.prange(state.shape[0]):
        for i in range(state.shape[1]):
            line = scales[groups[i]]
            for n in range(state.shape[2]):
                divisor = np.float32(line[n] * _SSD_FACTOR)
                out[document, i, n] = half_even(np.float32(np.float32(state[document, i, n] * _SSD_FACTOR) / divisor))


_SUMMED = 8
"""Channels whose sums over the states are formed side by side, each in its order, as a vector has them."""


@kept_njit(parallel=True)
def ssd_update_int8(
    x: Float32,
    delta: Float32,
    decay: Float32,
    b: Float32,
    c: Float32,
    d: Float32,
    scales: Float32,
    groups: Int64,
    state: Int8,
    y: Float32,
) -> None:
    """One decoded token through the state space dual scan; ``state`` is dequantized, advanced, rounded half to even.

    x, y (batch, e); delta, decay (batch, h); b, c (batch, g n); d (h,); state (batch, e, n) codes; scales and groups
    as in state_groups_to_int8. The output reads the state before it is rounded.
    """
    documents, channels, states = state.shape
    heads = d.size
    headdim = channels // heads
    ssd_groups = b.shape[1] // states
    for piece in numba.prange(documents * heads):
        document, head = piece // heads, piece % heads
        first = head * ssd_groups // heads * states
        kept = decay[document, head]
        terms = np.empty((_SUMMED, states), np.float32)
        total = np.empty(_SUMMED, np.float32)
        read = c[document, first : first + states]
        stepped = b[document, first : first + states] * delta[document, head]
        for start in range(head * headdim, (head + 1) * headdim, _SUMMED):
            several = min(_SUMMED, (head + 1) * headdim - start)
            for k in range(several):
                i = start + k
                line, codes, products = scales[groups[i]], state[document, i], terms[k]
                u = x[document, i]
                for n in range(states):
                    drive = np.float32(stepped[n] * u)
                    old = np.float32(line[n] * np.float32(codes[n]))
                    new = np.float32(np.float32(old * kept) + drive)
                    divisor = np.float32(line[n] * _SSD_FACTOR)
                    codes[n] = half_even(np.float32(np.float32(new * _SSD_FACTOR) / divisor))
                    products[n] = np.float32(new * read[n])
            total[:] = _ZERO
            for n in range(states):
                for k in range(_SUMMED):
                    total[k] = np.float32(total[k] + terms[k, n])
            for k in range(several):
                u = x[document, start + k]
                y[document, start + k] = np.float32(total[k] + np.float32(u * d[head]))
