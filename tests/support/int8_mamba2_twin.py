# mypy: disable-error-code="return-value"
"""Slow twin of what the INT8 Mamba-2 adds to `int8_twin`, in NumPy float64: scan by heads, gated norm, states."""

from __future__ import annotations

import itertools

import int8_twin as twin
import numpy as np
from int8_twin import EXP, Real, U, Valued


def by_row(scales, widths) -> Real:
    """One number per row of parts of these widths."""
    return np.concatenate([np.full(width, scale, np.float64) for scale, width in zip(scales, widths, strict=True)])


def dequantized(codes, scales) -> Real:
    """Codes times their channel's scale, the float32 product as it is stored."""
    return np.asarray(codes, np.float32) * np.asarray(scales, np.float32)


def half(values) -> Real:
    """Rounded to float16, as the tensor cores' operands are."""
    return np.asarray(values).astype(np.float16).astype(np.float64)


def decay_of(delta: Valued, a: Valued) -> Valued:
    """exp(delta A) (t, h), A negative."""
    exponent = delta[0] * a[0]
    error = delta[1] * np.abs(a[0]) + delta[0] * a[1] + U * np.abs(exponent)
    value = np.exp(exponent)
    return value, value * (np.expm1(error) + EXP)


def scan(x, b, c, skip_x, delta: Valued, decay: Valued, d, offsets, ngroups: int, initial=None):
    """State space dual scan, one head, channel and token at a time: y (t, e), last states [(e, n)], error bounds.

    x, b, c are what the products read, ``skip_x`` what D (h,) multiplies; delta and decay (t, h); ``initial``: float32
    state (e, n) of each document before its first token, else zeros.
    """
    x, b, c = (np.asarray(v, np.float64) for v in (x, b, c))
    heads, n = d.size, b.shape[1] // ngroups
    headdim = x.shape[1] // heads
    y, y_error, states = np.zeros(x.shape), np.zeros(x.shape), []
    for document, (start, end) in enumerate(itertools.pairwise(offsets)):
        h = np.zeros((x.shape[1], n)) if initial is None else initial[document].astype(np.float64)
        e_h = np.zeros(h.shape)
        for t in range(start, end):
            for head in range(heads):
                group = head // (heads // ngroups)
                gain, read = b[t, group * n : (group + 1) * n], c[t, group * n : (group + 1) * n]
                for i in range(head * headdim, (head + 1) * headdim):
                    drive = delta[0][t, head] * x[t, i] * gain
                    # Two products, and delta's own error.
                    e_drive = (delta[1][t, head] * np.abs(x[t, i]) * np.abs(gain)) + 3 * U * np.abs(drive)
                    kept = decay[0][t, head] * h[i]
                    e_h[i] = decay[0][t, head] * e_h[i] + decay[1][t, head] * (np.abs(h[i]) + e_h[i]) + e_drive
                    h[i] = kept + drive
                    e_h[i] += 3 * U * (np.abs(kept) + np.abs(drive))
                    skip = d[head] * float(skip_x[t, i])
                    magnitude = (np.abs(read * h[i])).sum() + np.abs(skip)
                    y[t, i] = (read * h[i]).sum() + skip
                    # n products and n additions in any order, then D (u), its product and the last sum.
                    y_error[t, i] = (np.abs(read) * e_h[i]).sum() + (n + 5) * U * magnitude
        states.append((h, e_h))
    return (y, y_error), states


def gated_norm(y, z: Real, weight, ngroups: int, eps: float) -> Valued:
    """y silu(z) over its root mean square by group, times weight; ``z`` exact, its float32 product off by u."""
    gate, e_gate = twin.silu((z, U * np.abs(z)))
    value = np.asarray(y, np.float64) * gate
    error = np.abs(y) * e_gate + U * np.abs(value)
    shape = (len(value), ngroups, -1)
    squares = (value**2).reshape(shape).mean(-1, keepdims=True)
    size = value.shape[1] // ngroups
    # Each square is off by twice its root's error and u, their sum in any order by size u.
    e_squares = (2 * np.abs(value) * error).reshape(shape).mean(-1, keepdims=True) + (size + 2) * U * squares
    root = np.sqrt(squares + eps)
    relative = e_squares / (2 * (squares + eps)) + 4 * U  # root, reciprocal, eps, product
    result = (value.reshape(shape) / root).reshape(value.shape) * weight
    e_relative = np.broadcast_to(relative, (len(value), ngroups, size)).reshape(value.shape)
    own = (error.reshape(shape) / root).reshape(value.shape) * np.abs(weight)
    return result, own + (e_relative + 3 * U) * np.abs(result)


def state_codes(state: Valued, scale) -> Valued:
    """The state rounded to float16, over its scale: three float32 operations (two factors of 1e6, the division)."""
    low, high = (half(state[0] + sign * state[1]) for sign in (-1, 1))
    middle = (low + high) / 2 / scale
    return middle, (high - low) / 2 / scale + 4 * U * np.abs(middle)
