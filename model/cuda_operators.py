"""The operators of the Mamba blocks as compiled CUDA kernels."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from quambase.model.cuda import Kernels
from quambase.model.hadamard import odd_factor, odd_order
from quambase.model.operators import DeviceBatch

SOURCE = Path(__file__).with_name("forward.cu")
CONV_ROWS = 16
"""Rows of one thread of the convolution, as in the source."""

ROW_SHARED = 48 * 1024
"""Shared memory that a kernel has without asking: the longest row of the Hadamard transform, in bytes."""


SCAN_THREADS = 128
"""Of a block of the selective scan, one a channel, as in scans.cuh."""


def ssd_division(states: int, headdim: int) -> tuple[int, int]:
    """Threads that share a channel of an SSD scan, and channels of a thread: SPLIT and JOINED of the sources."""
    split = math.gcd(states, 16)
    # Four channels a thread where that leaves whole warps.
    return split, 4 if headdim % 4 == 0 and headdim // 4 * split % 32 == 0 else 1


class CudaOperators:
    """`quambase.model.operators.Operators` for one model's sizes on one device.

    states: d_state; headdim, ngroups: of a Mamba-2. CompilationFailed where it cannot be compiled.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, states: int, taps: int, headdim: int = 1, ngroups: int = 1
    ) -> None:
        self.ngroups = ngroups
        split, joined = ssd_division(states, headdim)
        self._ssd_threads = headdim // joined * split
        sizes = {
            "STATES": states,
            "HEADDIM": headdim,
            "SPLIT": split,
            "JOINED": joined,
            "WIDTH": taps,
        }
        self._kernels = Kernels(
            SOURCE,
            ("conv_silu", "selective_scan", "ssd_scan", "hadamard"),
            {"HALF": int(dtype == torch.float16), **sizes},
            device,
        )
        self._odd: dict[int, torch.Tensor] = {}

    def conv_silu(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, batch: DeviceBatch) -> torch.Tensor:
        """As `Operators.conv_silu`."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows, channels = x.shape
        grid = (-(-channels // 128), -(-rows // CONV_ROWS))
        arguments = (x, x.stride(0), weight, bias, batch.starts, rows, channels, out)
        self._kernels.launch("conv_silu", grid, 128, arguments)
        return out

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
        documents, channels = batch.host.documents, u.shape[1]
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        state = torch.empty(documents, channels, len(a), device=u.device)
        arguments = (u.contiguous(), delta.contiguous(), bc, bc.stride(0), z, z.stride(0), a, d, bias)
        grid = (-(-channels // SCAN_THREADS), documents)
        rest = (batch.offsets, channels, y, state)
        self._kernels.launch("selective_scan", grid, SCAN_THREADS, (*arguments, *rest))
        return y, state

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
        """As `Operators.ssd_scan`; x, b and c are slices of one tensor."""
        documents, heads = batch.host.documents, len(a)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        state = torch.empty(documents, x.shape[1], b.shape[1] // self.ngroups, device=x.device)
        arguments = (x, b, c, x.stride(0), dt, dt.stride(0), a, d, bias, batch.offsets, heads, self.ngroups, y, state)
        self._kernels.launch("ssd_scan", (heads, documents), self._ssd_threads, arguments)
        return y, state

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """As `Operators.hadamard`."""
        x = x.contiguous()
        dim = x.shape[-1]
        order = odd_order(dim)
        if order not in self._odd:
            self._odd[order] = torch.tensor(odd_factor(order), device=x.device)
        out = torch.empty_like(x)
        shared = 4 * dim
        if shared > ROW_SHARED:
            self._kernels.allow_shared("hadamard", shared)
        arguments = (x, self._odd[order], order, dim, float(dim**-0.5), out)
        self._kernels.launch("hadamard", (x.numel() // dim, 1), min(256, dim), arguments, shared)
        return out
