"""The operators of the Mamba blocks on the CPU in float32: compiled loops for what PyTorch lacks."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F

from quambase.model.exponential import exp
from quambase.model.hadamard import hadamard
from quambase.model.operators import host_kernels as kernels
from quambase.model.operators.interface import BlockState, ScanInputs, SsdInputs
from quambase.model.operators.torch import TorchOperators
from quambase.model.packed_batch import PlacedBatch


class HostOperators(TorchOperators):
    """`quambase.model.operators.interface.Operators`; ``ngroups``: SSD groups of a Mamba-2."""

    head_rows = 512

    def __init__(self, ngroups: int = 1) -> None:
        super().__init__(torch.float32, ngroups)

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
            return super().conv_silu(x, weight, bias, batch, state)
        out = torch.empty(x.shape)
        rows, first = whole_rows(x)
        offsets = batch.host.offsets.numpy()
        kernels.causal_conv1d_silu(rows, first, weight.numpy(), bias.numpy(), offsets, out.numpy())
        return out

    def selective_scan(
        self, inputs: ScanInputs, batch: PlacedBatch, state: BlockState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Operators.selective_scan`. In memory, states are (documents, n, e)."""
        u, delta, bc, z, a, d, bias = inputs
        states, channels = a.shape
        if state is None:
            ssm = torch.zeros(batch.host.documents, states, channels)
        else:
            ssm = state.ssm.transpose(1, 2).contiguous()
        y = torch.empty_like(u)
        kernels.selective_scan(
            u.numpy(),
            F.softplus(delta + bias).numpy(),  # the identity above 20, as in mamba_ssm
            a.numpy(),
            bc[:, :states].contiguous().numpy(),
            bc[:, states:].contiguous().numpy(),
            d.numpy(),
            z.contiguous().numpy(),
            batch.host.offsets.numpy(),
            y.numpy(),
            ssm.numpy(),
        )
        last = ssm.transpose(1, 2)
        if state is not None:
            state.ssm = last
        return y, last

    def ssd_scan(
        self, inputs: SsdInputs, batch: PlacedBatch, state: BlockState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Operators.ssd_scan`."""
        x, b, c, dt, a, d, bias = inputs
        delta = F.softplus(dt + bias)
        ssm = torch.zeros(batch.host.documents, x.shape[1], b.shape[1] // self.ngroups) if state is None else state.ssm
        y = torch.empty(x.shape)
        kernels.ssd_scan(
            x.contiguous().numpy(),
            delta.numpy(),
            exp(delta * a).numpy(),
            b.contiguous().numpy(),
            c.contiguous().numpy(),
            d.numpy(),
            batch.host.offsets.numpy(),
            y.numpy(),
            ssm.numpy(),
        )
        return y, ssm

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """As `Operators.hadamard`."""
        return hadamard(x)


def whole_rows(x: torch.Tensor) -> tuple[npt.NDArray[Any], int]:
    """A C-contiguous array (t, columns) that contains x (t, c), and x's first column in it: compiled loops vectorise
    only over contiguous arrays. If x is a slice of a tensor's columns the array is that tensor, else a copy of x.
    """
    stride = x.stride(0)
    offset = int(x.storage_offset())
    first = offset % stride if stride else 0
    inside = (offset - first + len(x) * stride) * x.element_size() <= x.untyped_storage().nbytes()
    if inside and x.stride(1) == 1 and first + x.shape[1] <= stride:
        return x.as_strided((len(x), stride), (stride, 1), offset - first).numpy(), first
    return x.contiguous().numpy(), 0
