"""`DifferentiableOperators` on CUDA: the forward kernels of `CudaOperators`, and kernels for their gradients or, of
Mamba-2's scan, matrix products.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from quambase.model.cuda.compiler import Kernels, parameter_value
from quambase.model.operators.cuda import CONV_ROWS, CudaOperators, kernel_sizes
from quambase.model.operators.differentiable import DifferentiableOperators, Padding, applied
from quambase.model.operators.interface import BlockState, OperatorSizes, ScanInputs, SsdInputs
from quambase.model.operators.ssd_gradients import CHUNK, ssd_gradients
from quambase.model.packed_batch import PlacedBatch

SOURCE = Path(__file__).with_name("gradients.cu")
SCANS = ("scan_chunks", "join_chunks", "scan_gradients")
THREADS = 128
"""Threads per block, as in gradients.cu."""


def scan_chunk(states: int) -> int:
    """CHUNK of gradients.cu: tokens of a Mamba-1's scan that one thread computes, whose states fit in its registers."""
    return max(1, min(8, 128 // states))


class CudaDifferentiableOperators(DifferentiableOperators):
    """`DifferentiableOperators` for one model's sizes on one CUDA device, in compiled kernels.

    CompilationFailed: the kernels do not compile; CheckpointInvalid as `kernel_sizes`.
    """

    def __init__(self, sizes: OperatorSizes, device: torch.device) -> None:
        super().__init__(sizes.ngroups, device)
        self.forward = CudaOperators(device, torch.float32, sizes)
        mamba1 = sizes.headdim is None  # with the many states of a Mamba-2 the scan would compile for minutes
        defines = {"MAMBA1": int(mamba1), "CHUNK": scan_chunk(sizes.d_state), **kernel_sizes(sizes)}
        self.gradients = Kernels(SOURCE, ("conv_silu_gradients", *(SCANS if mamba1 else ())), defines, device)
        self._padded: tuple[PlacedBatch, Padding] | None = None

    def padding(self, batch: PlacedBatch) -> Padding:
        """The padding of ``batch`` to whole chunks, kept for the other layers."""
        if self._padded is None or self._padded[0] is not batch:
            self._padded = batch, Padding(batch, CHUNK)
        return self._padded[1]

    def conv_silu(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        batch: PlacedBatch,
        state: BlockState | None = None,
    ) -> torch.Tensor:
        """As `Operators.conv_silu`."""
        return applied(_ConvSilu, x, weight, bias, batch, self)

    def selective_scan(
        self, inputs: ScanInputs, batch: PlacedBatch, state: BlockState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Operators.selective_scan`."""
        y = applied(_SelectiveScan, self, batch, *inputs)
        return y, self.no_states(batch, inputs.a.T.shape)

    def ssd_scan(
        self, inputs: SsdInputs, batch: PlacedBatch, state: BlockState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Operators.ssd_scan`."""
        y = applied(_SsdScan, self, batch, *inputs)
        return y, self.no_states(batch, (inputs.x.shape[1], inputs.b.shape[1] // self.ngroups))

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """As `Operators.hadamard`."""
        return applied(_Hadamard, x, self)


class _ConvSilu(torch.autograd.Function):
    """`Operators.conv_silu`; the gradient of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        batch: PlacedBatch,
        operators: CudaDifferentiableOperators,
    ) -> torch.Tensor:
        """The convolution after SiLU."""
        ctx.save_for_backward(x)
        ctx.constants = weight, bias, batch.starts
        ctx.kernels = operators.gradients
        return operators.forward.conv_silu(x, weight, bias, batch)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """As the arguments of `forward`."""
        (x,) = ctx.saved_tensors
        rows, channels = x.shape
        of_x = torch.empty(rows, channels, device=x.device)
        arguments = (x, x.stride(0), *ctx.constants, gradients[0].contiguous(), rows, channels, of_x)
        grid = (-(-channels // THREADS), -(-rows // CONV_ROWS))
        ctx.kernels.launch("conv_silu_gradients", grid, THREADS, arguments)
        return of_x, None, None, None, None


class _Scan(ctypes.Structure):
    """The source's struct `Scan`: addresses of tensors, and numbers."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("u", "delta", "bc", "bc_stride", "z", "z_stride", "a", "d", "bias"),
            *("grad", "channels", "offsets", "most", "states", "adjoints", "steps"),
        )
    ]


class _SelectiveScan(torch.autograd.Function):
    """`Operators.selective_scan`; the gradients of u, delta, bc and z."""

    @staticmethod
    def forward(
        ctx: Any, operators: CudaDifferentiableOperators, batch: PlacedBatch, *inputs: torch.Tensor
    ) -> torch.Tensor:
        """y; ``inputs`` as `ScanInputs` has them."""
        ctx.save_for_backward(*inputs[:4])
        ctx.constants = inputs[4:]
        ctx.batch, ctx.kernels = batch, operators.gradients
        return operators.forward.selective_scan(ScanInputs(*inputs), batch)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """As the arguments of `forward`."""
        u, delta, bc, z = ctx.saved_tensors
        (rows, channels), states, documents = u.shape, len(ctx.constants[0]), ctx.batch.host.documents
        most = -(-int(ctx.batch.host.offsets.diff().max()) // scan_chunk(states))  # chunks of the longest document
        chunks = documents * most
        between = torch.empty(2, chunks, states, channels, device=u.device)
        steps = torch.empty(chunks, channels, device=u.device)
        inputs = (u.contiguous(), delta.contiguous(), bc, bc.stride(0), z, z.stride(0), *ctx.constants)
        rest = (gradients[0].contiguous(), channels, ctx.batch.offsets, most, *between, steps)
        scan = _Scan(*map(parameter_value, (*inputs, *rest)))
        of_u, of_delta, of_z = torch.empty(3, rows, channels, device=u.device)
        of_bc = torch.empty(-(-channels // 32), rows, 2 * states, device=u.device)  # of each warp
        grid = (-(-channels // THREADS), chunks)
        ctx.kernels.launch("scan_chunks", grid, THREADS, (scan,))
        ctx.kernels.launch("join_chunks", (-(-channels * states // THREADS), documents), THREADS, (scan,))
        ctx.kernels.launch("scan_gradients", grid, THREADS, (scan, rows, of_u, of_delta, of_z, of_bc))
        return None, None, of_u, of_delta, of_bc.sum(0), of_z, None, None, None


class _SsdScan(torch.autograd.Function):
    """`Operators.ssd_scan`; the gradients of x, b, c and dt."""

    @staticmethod
    def forward(
        ctx: Any, operators: CudaDifferentiableOperators, batch: PlacedBatch, *inputs: torch.Tensor
    ) -> torch.Tensor:
        """y; ``inputs`` as `SsdInputs` has them."""
        ctx.save_for_backward(*inputs[:4])
        ctx.constants = inputs[4:]
        ctx.batch, ctx.operators = batch, operators
        return operators.forward.ssd_scan(SsdInputs(*inputs), batch)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """As the arguments of `forward`."""
        x, b, c, dt = ctx.saved_tensors
        a, d, bias = ctx.constants
        padding, before = ctx.operators.padding(ctx.batch), dt + bias
        wide_x, grad = (torch.unflatten(part, 1, (len(a), -1)) for part in (x, gradients[0]))
        parts = (torch.unflatten(part, 1, (ctx.operators.ngroups, -1)) for part in (b, c))
        x, b, c, step, slope = (padding.pad(part) for part in (wide_x, *parts, F.softplus(before), grad))
        found = ssd_gradients(x, b, c, step, slope, a)
        of_x, of_b, of_c, of_step = (padding.packed(part) for part in found)
        of_x = torch.addcmul(of_x, grad, d[:, None])
        return None, None, of_x.flatten(1), of_b.flatten(1), of_c.flatten(1), of_step * before.sigmoid(), *[None] * 3


class _Hadamard(torch.autograd.Function):
    """`Operators.hadamard`; the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, operators: CudaDifferentiableOperators) -> torch.Tensor:
        """The transform of x."""
        ctx.operators = operators.forward
        return operators.forward.hadamard(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The transposed transform of the gradient."""
        return ctx.operators.hadamard(gradients[0], transposed=True), None
