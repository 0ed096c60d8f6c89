"""Slow twins of the floating-point model, in float64 NumPy, written from the definitions (Gu & Dao 2023).

They share nothing with the package but the weight containers.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def sylvester(order: int) -> np.ndarray:
    h = np.ones((1, 1))
    while h.shape[0] < order:
        h = np.kron(np.array([[1, 1], [1, -1]]), h)
    return h


def conv_silu(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """x (l, e), weight (e, k): y[t] = SiLU(bias + sum_j weight[:, j] x[t - (k - 1) + j])."""
    length, width = x.shape[0], weight.shape[1]
    out = np.zeros_like(x)
    for t in range(length):
        for j in range(width):
            source = t - (width - 1) + j
            if source >= 0:
                out[t] += weight[:, j] * x[source]
        out[t] += bias
    return silu(out)


def scan(
    u: np.ndarray,
    delta: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    d: np.ndarray,
    z: np.ndarray,
    state: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """u, delta, z (l, e); a (e, n); b, c (l, n); state (e, n): gated output (l, e) and last state."""
    y = np.zeros_like(u)
    for t in range(u.shape[0]):
        state = np.exp(delta[t][:, None] * a) * state + (delta[t] * u[t])[:, None] * b[t][None, :]
        y[t] = (state @ c[t] + d * u[t]) * silu(z[t])
    return y, state


def forward(weights: Any, tokens: list[int], hadamard: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Logits and every site of one document. ``hadamard`` (e, e) is applied before out_proj."""
    cfg = weights.config
    f = lambda t: t.numpy().astype(np.float64)  # noqa: E731
    sites: dict[str, np.ndarray] = {}
    residual = f(weights.embedding)[tokens]
    for i, layer in enumerate(weights.layers):
        norm = rms_norm(residual, f(layer.norm), cfg.norm_eps)
        xz = norm @ f(layer.in_proj).T
        x, z = xz[:, : cfg.d_inner], xz[:, cfg.d_inner :]
        u = conv_silu(x, f(layer.conv_weight), f(layer.conv_bias))
        dbc = u @ f(layer.x_proj).T
        r, n = cfg.dt_rank, cfg.d_state
        dt = dbc[:, :r] @ f(layer.dt_proj).T
        y, state = scan(
            u,
            softplus(dt + f(layer.dt_bias)),
            -np.exp(f(layer.A_log)),
            dbc[:, r : r + n],
            dbc[:, r + n :],
            f(layer.D),
            z,
            np.zeros((cfg.d_inner, n)),
        )
        if hadamard is not None:
            y = y @ hadamard.T
        out = y @ f(layer.out_proj).T
        residual = residual + out
        sites |= {
            f"{i}/in_proj:input": norm,
            f"{i}/in_proj:output": xz,
            f"{i}/x_proj:input": u,
            f"{i}/x_proj:output": dbc,
            f"{i}/dt_proj:input": dbc[:, :r],
            f"{i}/dt_proj:output": dt,
            f"{i}/ssm_state_act:input": state,
            f"{i}/ssm_state_act:output": state,
            f"{i}/out_proj:input": y,
            f"{i}/out_proj:output": out,
        }
    final = rms_norm(residual, f(weights.norm_f), cfg.norm_eps)
    sites["-1/lm_head:input"] = final
    sites["-1/lm_head:output"] = final @ f(weights.lm_head).T
    return sites
