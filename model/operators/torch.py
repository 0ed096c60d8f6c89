"""The operators of the Mamba blocks in plain PyTorch, which runs anywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quambase.model.hadamard import odd_factor, odd_order
from quambase.model.operators.interface import BlockState, ScanInputs, SsdInputs
from quambase.model.packed_batch import PlacedBatch

CPU = torch.device("cpu")


def gated_rms_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, ngroups: int, eps: float) -> torch.Tensor:
    """Gate, then norm: y SiLU(z) over its root mean square within each of ``ngroups`` runs of channels, times weight.

    y, z (t, e) float32; weight (e,). mamba_ssm's RMSNormGated with norm_before_gate False and group_size e / ngroups.
    """
    gated = (y * F.silu(z)).view(len(y), ngroups, -1)
    return F.rms_norm(gated, gated.shape[-1:], None, eps).view_as(y) * weight


class TorchOperators:
    """`quambase.model.operators.interface.Operators` as a Python loop over time: exact, and slow.

    ``dtype``: of activations; ``ngroups``: SSD groups of a Mamba-2.
    """

    head_rows = 4096
    """0.4 GB of float16 at a vocabulary of 50,280."""

    def __init__(self, dtype: torch.dtype, ngroups: int = 1, device: torch.device = CPU) -> None:
        self.dtype, self.ngroups, self.device = dtype, ngroups, device

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """As `Operators.matrix`."""
        return weight.to(self.device, self.dtype)

    def vector(self, weight: torch.Tensor) -> torch.Tensor:
        """As `Operators.vector`."""
        return weight.to(self.device, torch.float32).contiguous()

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As `Operators.add_norm`."""
        residual += x
        return F.rms_norm(residual, weight.shape, weight, eps).to(self.dtype)

    def conv_silu(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        batch: PlacedBatch,
        state: BlockState | None = None,
    ) -> torch.Tensor:
        """As `Operators.conv_silu`."""
        if state is not None:
            window = torch.cat([state.conv, x.unsqueeze(1)], dim=1)  # (b, k, c)
            state.conv.copy_(window[:, 1:])
            return F.silu(torch.einsum("bkc,kc->bc", window.float(), weight) + bias).to(x.dtype)
        rows = torch.arange(len(x), device=x.device)
        total = bias.expand(x.shape).clone()
        for tap in range(len(weight)):
            source = rows - (len(weight) - 1 - tap)
            inside = (source >= batch.starts)[:, None]
            total += torch.where(inside, weight[tap] * x[source.clamp(min=0)].float(), 0.0)
        return F.silu(total).to(x.dtype)

    def selective_scan(
        self, inputs: ScanInputs, batch: PlacedBatch, state: BlockState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Operators.selective_scan`."""
        u, delta, bc, z, a, d, bias = inputs
        states = len(a)
        ssm = torch.zeros(batch.host.documents, u.shape[1], states, device=u.device) if state is None else state.ssm
        step = F.softplus(delta.float() + bias)
        y = d * u.float()
        for documents, rows in _by_position(batch, u.device):
            b, c = bc[rows, None, :states].float(), bc[rows, None, states:].float()
            decayed = torch.exp(step[rows, :, None] * a.T) * ssm[documents]
            now = decayed + (step[rows] * u[rows].float())[:, :, None] * b
            ssm[documents] = now
            y[rows] += (now * c).sum(-1)
        return (y * F.silu(z.float())).to(u.dtype), ssm

    def ssd_scan(
        self, inputs: SsdInputs, batch: PlacedBatch, state: BlockState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Operators.ssd_scan`."""
        x, b, c, dt, a, d, bias = inputs
        heads = len(a)
        wide = x.float().view(len(x), heads, -1)
        share = heads // self.ngroups
        shared = [part.float().view(len(x), self.ngroups, -1).repeat_interleave(share, 1) for part in (b, c)]
        shape = (batch.host.documents, heads, wide.shape[2], shared[0].shape[-1])
        ssm = torch.zeros(shape, device=x.device) if state is None else state.ssm.view(shape)
        step = F.softplus(dt.float() + bias)
        y = d[:, None] * wide
        for documents, rows in _by_position(batch, x.device):
            b_t, c_t = (part[rows][:, :, None, :] for part in shared)  # (documents, h, 1, n)
            decayed = torch.exp(step[rows] * a)[:, :, None, None] * ssm[documents]
            now = decayed + (step[rows][:, :, None] * wide[rows])[..., None] * b_t
            ssm[documents] = now
            y[rows] += (now * c_t).sum(-1)
        return y.view(x.shape).to(x.dtype), ssm.flatten(1, 2)

    def gated_norm(
        self, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, *, rotated: bool
    ) -> torch.Tensor:
        """As `Operators.gated_norm`."""
        normed = gated_rms_norm(y.float(), z.float(), weight, self.ngroups, eps).to(self.dtype)
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


Indices = torch.Tensor | slice


def _by_position(batch: PlacedBatch, device: torch.device) -> list[tuple[Indices, Indices]]:
    """For each position, the documents that reach it and their rows there."""
    if batch.decodes:
        return [(slice(None), slice(None))]
    lengths = batch.host.offsets.diff()
    found: list[tuple[Indices, Indices]] = []
    for position in range(int(lengths.max()) if len(lengths) else 0):
        documents = torch.nonzero(lengths > position)[:, 0]
        rows = batch.host.offsets[documents] + position
        found.append((documents.to(device), rows.to(device)))
    return found
