"""The operators of the Mamba blocks on a device: the interface, and plain PyTorch that runs anywhere.

Tensors are packed as in `quambase.model.packed_batch` and of the activation dtype, float16 or float32. Every operator
computes in float32 inside and rounds its result once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from quambase.model.hadamard import odd_factor, odd_order
from quambase.model.packed_batch import Batch


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on a device.

    tokens   (t,) int64
    offsets  (documents + 1,) int32, and on the host as in ``host``
    starts   (t,) int32: the first row of each row's document
    """

    host: Batch
    tokens: torch.Tensor
    offsets: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> DeviceBatch:
        """Copy a batch there, without waiting for what the device is doing."""
        offsets = batch.offsets.numpy()
        starts = torch.from_numpy(np.repeat(offsets[:-1].astype(np.int32), np.diff(offsets)))
        parts = (batch.tokens, batch.offsets.to(torch.int32), starts)
        return cls(batch, *(part.to(device, non_blocking=True) for part in parts))


class Operators(Protocol):
    """What lies between the matrix products."""

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """``residual`` += x, then its RMS norm times ``weight``, of the activation dtype.

        x (t, d); residual (t, d) float32, contiguous, updated; weight (d,).
        """

    def conv_silu(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, batch: DeviceBatch) -> torch.Tensor:
        """Depthwise causal convolution, then SiLU: (t, e) of x (t, e), whose rows may be apart; weight (k, e)."""

    def selective_scan(
        self,
        u: torch.Tensor,
        delta: torch.Tensor,
        bc: torch.Tensor,
        z: torch.Tensor,
        a: torch.Tensor,
        d: torch.Tensor,
        bias: torch.Tensor,
        batch: DeviceBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y (t, e) and the float32 state (documents, e, n) after each document's last token.

        u, delta (before bias and softplus), z (t, e); bc (t, 2n), B then C; a (n, e) negative; d, bias (e,).
        """

    def ssd_scan(
        self,
        x: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        d: torch.Tensor,
        bias: torch.Tensor,
        batch: DeviceBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y (t, h p) and the float32 state (documents, h p, n) after each document's last token.

        x (t, h p); b, c (t, g n); dt (t, h) before bias and softplus; a (h,) negative; d, bias (h,).
        """

    def gated_norm(
        self, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, *, rotated: bool
    ) -> torch.Tensor:
        """RMS norm of y SiLU(z), each SSD group's channels apart, times ``weight``; if ``rotated``, then `hadamard`.

        y (t, e); z (t, e), whose rows may be apart; weight (e,).
        """

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """`quambase.model.hadamard.hadamard` of x (t, e), in x's dtype."""


class TorchOperators:
    """Operators in plain PyTorch, a Python loop over time: exact, and slow.

    ``dtype``: of activations; ``ngroups``: SSD groups of a Mamba-2.
    """

    def __init__(self, dtype: torch.dtype, ngroups: int = 1) -> None:
        self.dtype, self.ngroups = dtype, ngroups

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As `Operators.add_norm`."""
        residual += x
        return F.rms_norm(residual, weight.shape, weight, eps).to(self.dtype)

    def conv_silu(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, batch: DeviceBatch) -> torch.Tensor:
        """As `Operators.conv_silu`."""
        rows = torch.arange(len(x), device=x.device)
        total = bias.expand(x.shape).clone()
        for tap in range(len(weight)):
            source = rows - (len(weight) - 1 - tap)
            inside = (source >= batch.starts)[:, None]
            total += torch.where(inside, weight[tap] * x[source.clamp(min=0)].float(), 0.0)
        return F.silu(total).to(x.dtype)

    def selective_scan(
        self,
        u: torch.Tensor,
        delta: torch.Tensor,
        bc: torch.Tensor,
        z: torch.Tensor,
        a: torch.Tensor,
        d: torch.Tensor,
        bias: torch.Tensor,
        batch: DeviceBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Operators.selective_scan`."""
        states = len(a)
        state = torch.zeros(batch.host.documents, u.shape[1], states, device=u.device)
        step = F.softplus(delta.float() + bias)
        y = d * u.float()
        for documents, rows in _by_position(batch, u.device):
            b, c = bc[rows, None, :states].float(), bc[rows, None, states:].float()
            kept = torch.exp(step[rows, :, None] * a.T) * state[documents]
            now = kept + (step[rows] * u[rows].float())[:, :, None] * b
            state[documents] = now
            y[rows] += (now * c).sum(-1)
        return (y * F.silu(z.float())).to(u.dtype), state

    def ssd_scan(
        self,
        x: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        d: torch.Tensor,
        bias: torch.Tensor,
        batch: DeviceBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Operators.ssd_scan`."""
        heads = len(a)
        wide = x.float().view(len(x), heads, -1)
        share = heads // self.ngroups
        shared = [part.float().view(len(x), self.ngroups, -1).repeat_interleave(share, 1) for part in (b, c)]
        states = shared[0].shape[-1]
        state = torch.zeros(batch.host.documents, heads, wide.shape[2], states, device=x.device)
        step = F.softplus(dt.float() + bias)
        y = d[:, None] * wide
        for documents, rows in _by_position(batch, x.device):
            gain, read = (part[rows][:, :, None, :] for part in shared)  # (documents, h, 1, n)
            kept = torch.exp(step[rows] * a)[:, :, None, None] * state[documents]
            now = kept + (step[rows][:, :, None] * wide[rows])[..., None] * gain
            state[documents] = now
            y[rows] += (now * read).sum(-1)
        return y.view(x.shape).to(x.dtype), state.flatten(1, 2)

    def gated_norm(
        self, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, *, rotated: bool
    ) -> torch.Tensor:
        """As `Operators.gated_norm`."""
        gated = (y.float() * F.silu(z.float())).view(len(y), self.ngroups, -1)
        normed = (F.rms_norm(gated, gated.shape[-1:], None, eps).view(y.shape) * weight).to(self.dtype)
        return self.hadamard(normed) if rotated else normed

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """As `Operators.hadamard`."""
        dim = x.shape[-1]
        order = odd_order(dim)
        work = x.float().view(-1, dim)
        half = 1
        while half < dim // order:
            low, high = work.view(-1, dim // (2 * half), 2, half).unbind(2)
            work = torch.stack([low + high, low - high], dim=2).view(-1, dim)
            half *= 2
        if order > 1:
            odd = torch.tensor(odd_factor(order), device=x.device)
            work = (odd @ work.view(-1, order, dim // order)).view(-1, dim)
        rotated: torch.Tensor = work * dim**-0.5
        return rotated.view(x.shape).to(x.dtype)


def _by_position(batch: DeviceBatch, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each position, the documents that reach it and their rows there."""
    lengths = batch.host.offsets.diff()
    found = []
    for position in range(int(lengths.max()) if len(lengths) else 0):
        documents = torch.nonzero(lengths > position)[:, 0]
        rows = batch.host.offsets[documents] + position
        found.append((documents.to(device), rows.to(device)))
    return found
