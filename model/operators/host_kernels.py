"""Compiled CPU kernels of the Mamba blocks: causal convolution, selective and SSD scans, Hadamard butterflies.

Batches are packed: documents are concatenated in ``t`` tokens without padding, document ``i`` being rows
``offsets[i]:offsets[i + 1]``, and are computed independently. Work is divided into independent (document, block of
channels) pieces, so results do not depend on the thread count.
"""

from __future__ import annotations

import numba
import numpy as np

from quambase.schema.compiled import kept_njit
from quambase.schema.values.arrays import Float32, Int64

BLOCK = 128
"""Channels per piece of work: a (d_state=16, BLOCK) float32 state stays in the first-level cache."""

# exp(x) = 2^k exp(r), |r| <= ln(2)/2; r by Cody-Waite subtraction of k ln(2) in two
# parts; exp(r) by the degree-6 minimax polynomial of Cephes' expf (about 1 ulp).
_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_P0 = np.float32(1.9875691500e-4)
_P1 = np.float32(1.3981999507e-3)
_P2 = np.float32(8.3334519073e-3)
_P3 = np.float32(4.1665795894e-2)
_P4 = np.float32(1.6666665459e-1)
_P5 = np.float32(5.0000001201e-1)
_LOWEST = np.float32(-87.3)
_HIGHEST = np.float32(88.3)
_ONE = np.float32(1)


@numba.njit(inline="always", fastmath={"contract"})
def exp32(x: np.float32) -> np.float32:
    """exp(x) in float32 to about 1 ulp, saturating outside [-87.3, 88.3]; branch-free so that loops vectorise."""
    x = min(max(x, _LOWEST), _HIGHEST)
    k = np.floor(x * _LOG2E + np.float32(0.5))
    r = x - k * _LN2_HIGH - k * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    power = np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32((p * r * r + r + _ONE) * power)


@numba.njit(inline="always", fastmath={"contract"})
def silu32(x: np.float32) -> np.float32:
    """x / (1 + exp(-x)) in float32."""
    return np.float32(x / (_ONE + exp32(-x)))


@kept_njit(parallel=True, fastmath={"contract"})
def causal_conv1d_silu(x: Float32, first: int, weight: Float32, bias: Float32, offsets: Int64, out: Float32) -> None:
    """Depthwise causal convolution with bias, then SiLU, with zeros before each document.

    x (t, >= first + e): columns from ``first`` are read; out (t, e); weight (k, e), the last row multiplying the
    current token; bias (e,). All C-contiguous, or the loops would not vectorise.
    """
    documents = offsets.size - 1
    width, channels = weight.shape
    blocks = (channels + BLOCK - 1) // BLOCK
    for piece in numba.prange(documents * blocks):
        document = piece // blocks
        low = (piece % blocks) * BLOCK
        high = min(low + BLOCK, channels)
        size = high - low
        start = offsets[document]
        total = np.empty(BLOCK, np.float32)
        for row in range(start, offsets[document + 1]):
            for i in range(size):
                total[i] = bias[low + i]
            for tap in range(max(0, width - 1 - (row - start)), width):
                source = row - (width - 1 - tap)
                for i in range(size):
                    total[i] += weight[tap, low + i] * x[source, first + low + i]
            for i in range(size):
                out[row, low + i] = silu32(total[i])


@kept_njit(parallel=True, fastmath={"contract"})
def selective_scan(
    u: Float32,
    delta: Float32,
    a: Float32,
    b: Float32,
    c: Float32,
    d: Float32,
    z: Float32,
    offsets: Int64,
    y: Float32,
    state: Float32,
) -> None:
    """Selective scan with skip connection and gate (Mamba, algorithm 2; mamba_ssm selective_scan_ref).

    state[n] = exp(delta A[n]) state[n] + delta B[n] u;  y = (sum_n C[n] state[n] + D u) * SiLU(z)

    u, delta (after softplus), z, y (t, e); a (n, e), negative; b, c (t, n); d (e,); state (documents, n, e): the
    state before the first token on entry, after the last one on return. All C-contiguous.
    """
    documents = offsets.size - 1
    states, channels = a.shape
    blocks = (channels + BLOCK - 1) // BLOCK
    for piece in numba.prange(documents * blocks):
        document = piece // blocks
        low = (piece % blocks) * BLOCK
        high = min(low + BLOCK, channels)
        size = high - low
        step = np.empty(BLOCK, np.float32)
        drive = np.empty(BLOCK, np.float32)
        total = np.empty(BLOCK, np.float32)
        h = np.empty((states, BLOCK), np.float32)
        rate = np.empty((states, BLOCK), np.float32)
        for n in range(states):
            for i in range(size):
                h[n, i] = state[document, n, low + i]
                rate[n, i] = a[n, low + i]
        for row in range(offsets[document], offsets[document + 1]):
            for i in range(size):
                step[i] = delta[row, low + i]
                drive[i] = step[i] * u[row, low + i]
                total[i] = d[low + i] * u[row, low + i]
            for n in range(states):
                b_n = b[row, n]
                c_n = c[row, n]
                for i in range(size):
                    h_n = exp32(step[i] * rate[n, i]) * h[n, i] + b_n * drive[i]
                    h[n, i] = h_n
                    total[i] += c_n * h_n
            for i in range(size):
                y[row, low + i] = total[i] * silu32(z[row, low + i])
        for n in range(states):
            for i in range(size):
                state[document, n, low + i] = h[n, i]


GRADIENT_BLOCK = 32
"""Channels per piece of work of a backward scan, which holds the states of every token of a document."""


# Sums over channels may be reordered, or they would not vectorise.
@kept_njit(parallel=True, fastmath={"contract", "reassoc"})
def selective_scan_gradients(
    u: Float32,
    delta: Float32,
    a: Float32,
    b: Float32,
    c: Float32,
    d: Float32,
    z: Float32,
    offsets: Int64,
    grad: Float32,
    grad_u: Float32,
    grad_delta: Float32,
    grad_z: Float32,
    grad_bc: Float32,
) -> None:
    """The gradients of `selective_scan` from zero states, for ``grad`` (t, e), that of y.

    With h = state[n] and g[n] the gradient of h, which runs backwards over the tokens:
    g[n] = C[n] s + exp(delta A[n]) g[n] of the next token, s = grad SiLU(z) being the gradient of the ungated y.

    Written: grad_u, grad_delta, grad_z (t, e); grad_bc (blocks, t, 2n), B then C, a sum over the channels of each
    GRADIENT_BLOCK, so that their total does not depend on the thread count. The rest as in `selective_scan`.
    """
    documents = offsets.size - 1
    states, channels = a.shape
    blocks = grad_bc.shape[0]
    for piece in numba.prange(documents * blocks):
        document = piece // blocks
        block = piece % blocks
        low = block * GRADIENT_BLOCK
        size = min(GRADIENT_BLOCK, channels - low)
        start = offsets[document]
        length = offsets[document + 1] - start
        h = np.zeros((length + 1, states, GRADIENT_BLOCK), np.float32)  # h[t + 1] after token t
        decay = np.empty((length, states, GRADIENT_BLOCK), np.float32)
        total = np.empty((length, GRADIENT_BLOCK), np.float32)  # y before the gate
        for t in range(length):
            row = start + t
            for i in range(size):
                total[t, i] = d[low + i] * u[row, low + i]
            for n in range(states):
                b_n = b[row, n]
                c_n = c[row, n]
                for i in range(size):
                    step = delta[row, low + i]
                    decay[t, n, i] = exp32(step * a[n, low + i])
                    h[t + 1, n, i] = decay[t, n, i] * h[t, n, i] + b_n * (step * u[row, low + i])
                    total[t, i] += c_n * h[t + 1, n, i]
        g = np.zeros((states, GRADIENT_BLOCK), np.float32)
        ungated = np.empty(GRADIENT_BLOCK, np.float32)
        of_drive = np.empty(GRADIENT_BLOCK, np.float32)  # of delta u
        of_step = np.empty(GRADIENT_BLOCK, np.float32)
        for t in range(length - 1, -1, -1):
            row = start + t
            for i in range(size):
                gate = z[row, low + i]
                share = _ONE / (_ONE + exp32(-gate))
                grad_z[row, low + i] = grad[row, low + i] * total[t, i] * share * (_ONE + gate * (_ONE - share))
                ungated[i] = grad[row, low + i] * gate * share
                of_drive[i] = np.float32(0)
                of_step[i] = np.float32(0)
            for n in range(states):
                b_n = b[row, n]
                c_n = c[row, n]
                of_b = np.float32(0)
                of_c = np.float32(0)
                for i in range(size):
                    step = delta[row, low + i]
                    of_c += ungated[i] * h[t + 1, n, i]
                    here = g[n, i] + c_n * ungated[i]
                    of_b += here * (step * u[row, low + i])
                    of_drive[i] += here * b_n
                    back = here * decay[t, n, i]
                    of_step[i] += back * h[t, n, i] * a[n, low + i]
                    g[n, i] = back
                grad_bc[block, row, n] = of_b
                grad_bc[block, row, states + n] = of_c
            for i in range(size):
                step = delta[row, low + i]
                grad_u[row, low + i] = step * of_drive[i] + d[low + i] * ungated[i]
                grad_delta[row, low + i] = of_step[i] + of_drive[i] * u[row, low + i]


HEAD_BLOCK = 8
"""Channels of a head per piece of an SSD scan: an (HEAD_BLOCK, d_state=128) float32 state is 4 KB."""


# Sums over the state may be reordered, or they would not vectorise; nothing else here is sensitive to that.
@kept_njit(parallel=True, fastmath={"contract", "reassoc"})
def ssd_scan(
    x: Float32,
    delta: Float32,
    decay: Float32,
    b: Float32,
    c: Float32,
    d: Float32,
    offsets: Int64,
    y: Float32,
    state: Float32,
) -> None:
    """State space dual scan with skip connection, without gate (Mamba-2, Dao & Gu 2024, section 3 in recurrent form).

    state[p, n] = decay state[p, n] + delta x[p] B[n];  y[p] = sum_n C[n] state[p, n] + D x[p]; decay = exp(delta A)

    x, y (t, h p); delta (after softplus), decay (t, h); b, c (t, g n): head i reads SSD group i g // h; d (h,);
    state (documents, h p, n): the state before the first token on entry, after the last one on return. All
    C-contiguous. Recurrent, since a CPU keeps the state in its first-level cache: at 4 x 512 tokens, 24 heads of 64
    and d_state 128 this takes 43 ms on two cores; the chunked form by matrix products 500 ms (chunks of 128), and
    the block's in_proj 157 ms.
    """
    documents = offsets.size - 1
    heads = d.size
    headdim = x.shape[1] // heads
    states = state.shape[2]
    groups = b.shape[1] // states
    blocks = (headdim + HEAD_BLOCK - 1) // HEAD_BLOCK
    for piece in numba.prange(documents * heads * blocks):
        document = piece // (heads * blocks)
        head = piece // blocks % heads
        low = head * headdim + piece % blocks * HEAD_BLOCK
        size = min(HEAD_BLOCK, (head + 1) * headdim - low)
        first = head * groups // heads * states
        h = np.empty((HEAD_BLOCK, states), np.float32)
        for i in range(size):
            for n in range(states):
                h[i, n] = state[document, low + i, n]
        for row in range(offsets[document], offsets[document + 1]):
            decay_t = decay[row, head]
            b_t = b[row, first : first + states]
            c_t = c[row, first : first + states]
            for i in range(size):
                u = x[row, low + i]
                drive = delta[row, head] * u
                line = h[i]
                total = np.float32(0)
                for n in range(states):
                    line[n] = decay_t * line[n] + drive * b_t[n]
                    total += c_t[n] * line[n]
                y[row, low + i] = total + d[head] * u
        for i in range(size):
            for n in range(states):
                state[document, low + i, n] = h[i, n]


# As `ssd_scan`, sums may be reordered.
@kept_njit(parallel=True, fastmath={"contract", "reassoc"})
def ssd_scan_gradients(
    x: Float32,
    delta: Float32,
    decay: Float32,
    a: Float32,
    b: Float32,
    c: Float32,
    d: Float32,
    offsets: Int64,
    grad: Float32,
    grad_x: Float32,
    grad_delta: Float32,
    grad_bc: Float32,
) -> None:
    """The gradients of `ssd_scan` from zero states, for ``grad`` (t, h p), that of y.

    With g the gradient of the state, which runs backwards over the tokens: g[p, n] = C[n] grad[p] + decay g[p, n] of
    the next token. a (h,): decay is exp(delta A).

    Written: grad_x (t, h p); grad_delta (t, h), including delta's effect on decay; grad_bc (h, t, 2n), B then C,
    separately for each head, so that their sum does not depend on the thread count. The rest as in `ssd_scan`.
    """
    documents = offsets.size - 1
    heads = d.size
    headdim = x.shape[1] // heads
    states = grad_bc.shape[2] // 2
    groups = b.shape[1] // states
    for piece in numba.prange(documents * heads):
        document = piece // heads
        head = piece % heads
        first = head * groups // heads * states
        start = offsets[document]
        length = offsets[document + 1] - start
        h = np.zeros((length + 1, HEAD_BLOCK, states), np.float32)  # h[t + 1] after token t
        g = np.empty((HEAD_BLOCK, states), np.float32)
        for row in range(start, start + length):
            grad_delta[row, head] = np.float32(0)
            for n in range(2 * states):
                grad_bc[head, row, n] = np.float32(0)
        for low in range(head * headdim, (head + 1) * headdim, HEAD_BLOCK):
            size = min(HEAD_BLOCK, (head + 1) * headdim - low)
            for t in range(length):
                row = start + t
                b_t = b[row, first : first + states]
                for i in range(size):
                    drive = delta[row, head] * x[row, low + i]
                    for n in range(states):
                        h[t + 1, i, n] = decay[row, head] * h[t, i, n] + drive * b_t[n]
            g[:] = 0
            for t in range(length - 1, -1, -1):
                row = start + t
                b_t = b[row, first : first + states]
                c_t = c[row, first : first + states]
                of_b = grad_bc[head, row, :states]
                of_c = grad_bc[head, row, states:]
                step = delta[row, head]
                decay_t = decay[row, head]
                for i in range(size):
                    of_y = grad[row, low + i]
                    drive = step * x[row, low + i]
                    of_drive = np.float32(0)
                    of_decay = np.float32(0)
                    for n in range(states):
                        here = g[i, n] + c_t[n] * of_y
                        of_c[n] += of_y * h[t + 1, i, n]
                        of_b[n] += here * drive
                        of_drive += here * b_t[n]
                        of_decay += here * h[t, i, n]
                        g[i, n] = here * decay_t
                    grad_x[row, low + i] = step * of_drive + d[head] * of_y
                    grad_delta[row, head] += x[row, low + i] * of_drive + of_decay * decay_t * a[head]


@kept_njit(parallel=True, fastmath={"contract"})
def butterflies(x: Float32, odd: Float32, factor: np.float32) -> None:
    """In place: every row times (odd kron H_2^k), times ``factor``.

    x (rows, m 2^k); odd (m, m), a Hadamard matrix of an order that is not a power of two, or the 1 x 1 identity.
    The power-of-two stages come first, neighbours first; then the outermost ``odd``.
    """
    rows, dim = x.shape
    order = odd.shape[0]
    inner = dim // order
    for row in numba.prange(rows):
        line = x[row]
        half = 1
        while half < inner:
            for start in range(0, dim, 2 * half):
                for i in range(start, start + half):
                    low = line[i]
                    high = line[i + half]
                    line[i] = low + high
                    line[i + half] = low - high
            half *= 2
        if order > 1:
            mixed = np.zeros(dim, np.float32)
            for i in range(order):
                for j in range(order):
                    sign = odd[i, j]
                    for p in range(inner):
                        mixed[i * inner + p] += sign * line[j * inner + p]
            for i in range(dim):
                line[i] = mixed[i]
        for i in range(dim):
            line[i] *= factor
