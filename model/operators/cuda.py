"""The operators of the Mamba blocks as compiled CUDA kernels."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from quambase.model.cuda.compiler import Argument, Kernels
from quambase.model.hadamard import odd_factor, odd_order
from quambase.model.operators.interface import BlockState, OperatorSizes, ScanInputs, SsdInputs
from quambase.model.operators.torch import TorchOperators
from quambase.model.packed_batch import PlacedBatch

SOURCE = Path(__file__).with_name("forward.cu")
NAMES = (
    "add_norm",
    "conv_silu",
    "conv_step",
    "selective_scan",
    "scan_step",
    "ssd_scan",
    "ssd_step",
    "gated_norm",
    "gated_norm_hadamard",
    "hadamard",
)
CONV_ROWS = 16
"""Rows per thread of the convolution, as in forward.cu."""

ROW_THREADS = 256
"""Threads per block of the kernels over whole rows, as in norm_hadamard.cuh."""

SCAN_THREADS = 128
"""Threads per block of the selective scan, one per channel, as in scans.cuh."""

STEP_THREADS = 128
"""Threads per block of the SSD scan of one token, as in scans.cuh."""


def ssd_division(states: int, headdim: int) -> tuple[int, int]:
    """SPLIT and JOINED of scans.cuh: threads that share a channel of an SSD scan, and channels per thread."""
    split = math.gcd(states, 16)
    # Four channels per thread where that gives whole warps.
    return split, 4 if headdim % 4 == 0 and headdim // 4 * split % 32 == 0 else 1


def step_blocks(channels: int, headdim: int) -> int:
    """Blocks per sequence of the SSD scan of one token: a warp per STEP_CHANNELS channels, as in scans.cuh."""
    return -(-channels * 32 // (STEP_THREADS * (1 if headdim % 4 else 4)))


def rows_of_block(dim: int) -> int:
    """ROWS of norm_hadamard.cuh: rows of ``dim`` channels per block."""
    return 2 if dim <= 4096 else 1


def rows_shared(dim: int) -> int:
    """Bytes of dynamic shared memory of those rows."""
    return rows_of_block(dim) * 4 * (dim + dim // 32 + 1)


def kernel_sizes(sizes: OperatorSizes) -> dict[str, int]:
    """The constants (-D) of norm_hadamard.cuh, scans.cuh and the sources that include them.

    CheckpointInvalid if there is no Hadamard matrix of d_inner.
    """
    order = odd_order(sizes.d_inner)
    headdim = sizes.headdim or 1
    split, joined = ssd_division(sizes.d_state, headdim)
    return {
        "DIM": sizes.d_inner,
        "ORDER": order,
        "BITS": (sizes.d_inner // order).bit_length() - 1,
        "STATES": sizes.d_state,
        "HEADDIM": headdim,
        "SPLIT": split,
        "JOINED": joined,
        "WIDTH": sizes.d_conv,
    }


class CudaOperators(TorchOperators):
    """`quambase.model.operators.interface.Operators` for one model's sizes on one device. With a ``state``, a
    kernel updates it in place; convolution inputs must be contiguous.

    CompilationFailed: the kernels do not compile; CheckpointInvalid as `kernel_sizes`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: OperatorSizes) -> None:
        super().__init__(dtype, sizes.ngroups, device)
        defines = kernel_sizes(sizes)
        self._headdim = defines["HEADDIM"]
        self._ssd_threads = defines["HEADDIM"] // defines["JOINED"] * defines["SPLIT"]
        self._rows, self._shared = rows_of_block(sizes.d_inner), rows_shared(sizes.d_inner)
        self._odd = torch.tensor(odd_factor(defines["ORDER"]), device=device)
        self._transposed_odd = self._odd.T.contiguous()
        self._factor = sizes.d_inner**-0.5
        half, lanes = int(dtype == torch.float16), 4 if sizes.d_model % 4 == 0 else 1
        self._kernels = Kernels(SOURCE, NAMES, {"HALF": half, "LANES": lanes, **defines}, device)
        shared = {"add_norm": 4 * sizes.d_model}
        shared |= dict.fromkeys(("gated_norm", "gated_norm_hadamard", "hadamard"), self._shared)
        for name, size in shared.items():
            self._kernels.allow_shared(name, size)

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As `Operators.add_norm`."""
        rows, width = residual.shape
        out = torch.empty(rows, width, dtype=self.dtype, device=x.device)
        arguments = (x.contiguous(), residual, weight, width, eps, out)
        self._kernels.launch("add_norm", (rows, 1), ROW_THREADS, arguments, 4 * width)
        return out

    def conv_silu(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        batch: PlacedBatch,
        state: BlockState | None = None,
    ) -> torch.Tensor:
        """As `Operators.conv_silu`."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows, channels = x.shape
        if state is not None:
            assert state.conv.is_contiguous() and state.conv.dtype == x.dtype
            step = (x, x.stride(0), weight, bias, channels, state.conv, out)
            self._kernels.launch("conv_step", (-(-channels // 128), rows), 128, step)
            return out
        grid = (-(-channels // 128), -(-rows // CONV_ROWS))
        arguments = (x, x.stride(0), weight, bias, batch.starts, rows, channels, out)
        self._kernels.launch("conv_silu", grid, 128, arguments)
        return out

    def selective_scan(
        self, inputs: ScanInputs, batch: PlacedBatch, state: BlockState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Operators.selective_scan`."""
        u, delta, bc, z, a, d, bias = inputs
        documents, channels = batch.host.documents, u.shape[1]
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        arguments = (u.contiguous(), delta.contiguous(), bc, bc.stride(0), z, z.stride(0), a, d, bias)
        grid = (-(-channels // SCAN_THREADS), documents)
        if state is not None:
            kept: list[Argument] = [channels, y, state.ssm, *state.ssm.stride()]
            self._kernels.launch("scan_step", grid, SCAN_THREADS, [*arguments, *kept])
            return y, state.ssm
        last = torch.empty(documents, channels, len(a), device=u.device)
        rest = (batch.offsets, channels, y, last)
        self._kernels.launch("selective_scan", grid, SCAN_THREADS, (*arguments, *rest))
        return y, last

    def ssd_scan(
        self, inputs: SsdInputs, batch: PlacedBatch, state: BlockState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Operators.ssd_scan`."""
        x, b, c, dt, a, d, bias = inputs
        documents, heads = batch.host.documents, len(a)
        if not x.stride() == b.stride() == c.stride():  # the kernel reads columns of one matrix
            x, b, c = torch.split(torch.cat([x, b, c], 1), [x.shape[1], b.shape[1], c.shape[1]], 1)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        arguments = (x, b, c, x.stride(0), dt, dt.stride(0), a, d, bias)
        if state is not None:
            kept: list[Argument] = [heads, self.ngroups, y, state.ssm, *state.ssm.stride()]
            grid = (step_blocks(x.shape[1], self._headdim), documents)
            self._kernels.launch("ssd_step", grid, STEP_THREADS, [*arguments, *kept])
            return y, state.ssm
        last = torch.empty(documents, x.shape[1], b.shape[1] // self.ngroups, device=x.device)
        rest = (batch.offsets, heads, self.ngroups, y, last)
        self._kernels.launch("ssd_scan", (heads, documents), self._ssd_threads, (*arguments, *rest))
        return y, last

    def gated_norm(
        self, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, *, rotated: bool
    ) -> torch.Tensor:
        """As `Operators.gated_norm`."""
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        norm = (y.contiguous(), len(y), z, z.stride(0), weight, self.ngroups, eps)
        name = "gated_norm_hadamard" if rotated else "gated_norm"
        arguments = (*norm, self._odd, self._factor, out) if rotated else (*norm, out)
        self._kernels.launch(name, self._row_blocks(len(y)), ROW_THREADS, arguments, self._shared)
        return out

    def hadamard(self, x: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
        """As `Operators.hadamard`; ``transposed``: by the transposed matrix, whose power-of-two factor is the same."""
        x = x.contiguous()
        out = torch.empty_like(x)
        arguments = (x, len(x), self._transposed_odd if transposed else self._odd, self._factor, out)
        self._kernels.launch("hadamard", self._row_blocks(len(x)), ROW_THREADS, arguments, self._shared)
        return out

    def _row_blocks(self, rows: int) -> tuple[int, int]:
        return -(-rows // self._rows), 1
