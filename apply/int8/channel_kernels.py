"""Compiled CPU kernels of the INT8 Mamba-2 block: like `host_kernels`, with a scale per channel or group.

Rounding: half to even in the GEMM epilogue and the states, half away from zero in the convolution and where one row
alone is projected. float32 in upstream's order of operations, products never contracted with sums.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from quambase.apply.int8.host_kernels import half_away, half_even
from quambase.model.operators.host_kernels import BLOCK, silu32

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
Int64 = npt.NDArray[np.int64]

_ZERO = np.float32(0)
# Upstream multiplies state and scale by it before dividing (quant_ssm_states.py).
_STATE_FACTOR = np.float32(1e6)


@numba.njit(parallel=True, cache=True)
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


@numba.njit(parallel=True, cache=True)
def conv_channels_int8(
    x: Int8,
    first: int,
    weight: Float32,
    scale_wx: Float32,
    bias: Float32,
    scale_out: Float32,
    offsets: Int64,
    out: Int8,
) -> None:
    """`kernels.conv_silu_int8` with each channel's own scales: half away from zero, saturating.

    x (t, >= first + c): columns from ``first`` are read; weight (k, c) codes in float32; scale_wx, bias (dequantized),
    scale_out (c,); out (t, c).
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
                out[row, low + i] = half_away(np.float32(silu32(value) / scale_out[low + i]))


@numba.njit(cache=True)
def conv_update_channels_int8(
    x: Int8,
    first: int,
    window: Int8,
    weight: Float32,
    scale_wx: Float32,
    bias: Float32,
    scale_out: Float32,
    out: Int8,
) -> None:
    """One decoded token through the convolution: shifts ``window``, then sums from the bias in float32.

    x (b, >= first + c); window (b, k, c), oldest first, updated in place; the rest as in conv_channels_int8.
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
            out[document, i] = half_away(np.float32(silu32(value) / scale_out[i]))


@numba.njit(parallel=True, cache=True)
def state_groups_to_int8(state: Float32, scales: Float32, groups: Int64, out: Int8) -> None:
    """Codes (half to even) of a prefill's last state: ``(state * 1e6) / (scale * 1e6)``.

    state, out (documents, e, n); scales (g, n) of the scale groups; groups (e,): each channel's.
    """
    for document in numba.prange(state.shape[0]):
        for i in range(state.shape[1]):
            line = scales[groups[i]]
            for n in range(state.shape[2]):
                divisor = np.float32(line[n] * _STATE_FACTOR)
                out[document, i, n] = half_even(np.float32(np.float32(state[document, i, n] * _STATE_FACTOR) / divisor))


@numba.njit(parallel=True, cache=True)
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
        for i in range(head * headdim, (head + 1) * headdim):
            line = scales[groups[i]]
            u = x[document, i]
            total = _ZERO
            for n in range(states):
                drive = np.float32(np.float32(b[document, first + n] * delta[document, head]) * u)
                old = np.float32(line[n] * np.float32(state[document, i, n]))
                new = np.float32(np.float32(old * kept) + drive)
                divisor = np.float32(line[n] * _STATE_FACTOR)
                state[document, i, n] = half_even(np.float32(np.float32(new * _STATE_FACTOR) / divisor))
                total = np.float32(total + np.float32(new * c[document, first + n]))
            y[document, i] = np.float32(total + np.float32(u * d[head]))
