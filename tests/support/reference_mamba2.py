"""Slow twin of the floating-point Mamba-2, in float64 NumPy, written from the definition (Dao & Gu 2024).

It shares nothing with the package but the weight containers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from reference import conv_silu, rms_norm, silu, softplus


def ssd(
    x: np.ndarray, delta: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """x (l, h, p); delta (l, h); a, d (h,); b, c (l, g, n); state (h, p, n): y (l, h, p) and the last state."""
    state = state.copy()
    y = np.zeros_like(x)
    heads = x.shape[1]
    share = heads // b.shape[1]
    for t in range(x.shape[0]):
        for h in range(heads):
            state[h] = np.exp(delta[t, h] * a[h]) * state[h] + delta[t, h] * np.outer(x[t, h], b[t, h // share])
            y[t, h] = state[h] @ c[t, h // share] + d[h] * x[t, h]
    return y, state


def gated_norm(y: np.ndarray, z: np.ndarray, weight: np.ndarray, ngroups: int, eps: float) -> np.ndarray:
    """y SiLU(z) divided by its root mean square within each group of channels, times weight; all (l, e)."""
    gated = y * silu(z)
    parts = np.split(gated, ngroups, axis=1)
    return np.concatenate([rms_norm(part, np.ones(part.shape[1]), eps) for part in parts], axis=1) * weight


def forward(weights: Any, tokens: list[int], hadamard: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Logits and every site of one document. ``hadamard`` (e, e) is applied before out_proj."""
    cfg = weights.config
    e, n, g, p = cfg.d_inner, cfg.d_state, cfg.ngroups, cfg.headdim
    heads = e // p
    f = lambda t: t.numpy().astype(np.float64)  # noqa: E731
    sites: dict[str, np.ndarray] = {}
    residual = f(weights.embedding)[tokens]
    for i, layer in enumerate(weights.layers):
        norm = rms_norm(residual, f(layer.norm), cfg.norm_eps)
        projected = norm @ f(layer.in_proj).T
        z, x, b, c, dt = np.split(projected, np.cumsum([e, e, g * n, g * n]), axis=1)
        kernel, bias = f(layer.conv_weight), f(layer.conv_bias)
        x_out = conv_silu(x, kernel[:e], bias[:e])
        b_out = conv_silu(b, kernel[e : e + g * n], bias[e : e + g * n])
        c_out = conv_silu(c, kernel[e + g * n :], bias[e + g * n :])
        y, state = ssd(
            x_out.reshape(-1, heads, p),
            softplus(dt + f(layer.dt_bias)),
            -np.exp(f(layer.A_log)),
            b_out.reshape(-1, g, n),
            c_out.reshape(-1, g, n),
            f(layer.D),
            np.zeros((heads, p, n)),
        )
        y = y.reshape(-1, e)
        out_in = gated_norm(y, z, f(layer.gated_norm), g, cfg.norm_eps)
        if hadamard is not None:
            out_in = out_in @ hadamard.T
        out = out_in @ f(layer.out_proj).T
        residual = residual + out
        identities = {"z_act": z, "x_conv_in": x, "B_conv_in": b, "C_conv_in": c, "x_conv_out": x_out}
        identities |= {"B_conv_out": b_out, "C_conv_out": c_out, "dt_act": dt, "ssd_out_act": y}
        identities["ssm_state_act"] = state.reshape(e, n)
        sites |= {f"{i}/{name}:{end}": v for name, v in identities.items() for end in ("input", "output")}
        sites |= {f"{i}/in_proj:input": norm, f"{i}/in_proj:output": projected}
        sites |= {f"{i}/out_proj:input": out_in, f"{i}/out_proj:output": out}
    final = rms_norm(residual, f(weights.norm_f), cfg.norm_eps)
    sites["-1/lm_head:input"] = final
    sites["-1/lm_head:output"] = final @ f(weights.lm_head).T
    return sites
