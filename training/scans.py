"""The two recurrences: mamba-ssm's kernels on CUDA, a plain loop over time elsewhere."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128
"""Tokens a chunk of the SSD kernels; a matter of speed alone."""


def ssm_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """Mamba-1's selective scan, gated: (b, e, l) of x's dtype.

    x, dt, z (b, e, l); A (e, n); B, C (b, n, l); D, dt_bias (e,). With s = softplus(dt + dt_bias):
    h' = exp(s A) h + s B x; y = (C h' + D x) silu(z). (Gu and Dao 2023, equation 2 with the simplified B.)
    """
    if x.is_cuda:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        return cast(Tensor, selective_scan_fn(x, dt, A, B, C, D, z, dt_bias, True))
    step = F.softplus(dt.float() + dt_bias[:, None])
    state = torch.zeros(*x.shape[:2], A.shape[1], device=x.device)
    outputs = []
    for t in range(x.shape[-1]):
        s, now = step[..., t, None], x[..., t, None].float()
        state = torch.exp(s * A) * state + s * now * B[:, None, :, t].float()
        outputs.append((state * C[:, None, :, t].float()).sum(-1))
    y = torch.stack(outputs, -1) + D[:, None] * x.float()
    return (y * F.silu(z.float())).to(x.dtype)


def ssd_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """Mamba-2's scan, not gated: (b, l, h, p) of x's dtype.

    x (b, l, h, p); dt (b, l, h); A, D, dt_bias (h,); B, C (b, l, g, n), head i in group i // (h / g). With
    s = softplus(dt + dt_bias): S' = exp(s A) S + s x B^T; y = S' C + D x. (Dao and Gu 2024, section 7.)
    """
    if x.is_cuda:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        return cast(Tensor, mamba_chunk_scan_combined(x, dt, A, B, C, CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True))
    step = F.softplus(dt.float() + dt_bias)
    share = x.shape[2] // B.shape[2]
    wide_B, wide_C = (m.float().repeat_interleave(share, 2) for m in (B, C))
    state = torch.zeros(x.shape[0], *x.shape[2:], B.shape[-1], device=x.device)
    outputs = []
    for t in range(x.shape[1]):
        s = step[:, t, :, None, None]
        state = torch.exp(s * A[:, None, None]) * state + s * x[:, t, ..., None].float() * wide_B[:, t, :, None]
        outputs.append((state * wide_C[:, t, :, None]).sum(-1))
    return (torch.stack(outputs, 1) + D[:, None] * x.float()).to(x.dtype)
