"""The INT8 operators on the CPU: integer products by float32 BLAS, compiled loops between them."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from quambase.apply.int8.arithmetic import Int8Weight, decoded, encoded, matmul, softplus_delta, to_half
from quambase.apply.int8.operators import host_kernels as kernels
from quambase.apply.int8.operators import simulated_scans
from quambase.apply.int8.operators.half import HalfOperators
from quambase.apply.int8.operators.interface import (
    Convolution,
    Int8BlockState,
    Multipliers,
    ScanScales,
    SsdCodes,
    SsdScales,
)
from quambase.apply.int8.state_formats import SimulatedState
from quambase.model.exponential import exp
from quambase.model.hadamard import hadamard
from quambase.model.operators import host_kernels as float_kernels
from quambase.model.operators.host import HostOperators, whole_rows
from quambase.model.operators.interface import OperatorSizes, ScanInputs
from quambase.model.operators.torch import CPU, gated_rms_norm
from quambase.model.packed_batch import PlacedBatch, last_rows

Array = npt.NDArray[np.float32]


class HostInt8Operators:
    """`quambase.apply.int8.operators.interface.Int8Operators` on the CPU."""

    device = CPU
    decodes = False

    def __init__(self, sizes: OperatorSizes) -> None:
        self.sizes = sizes

    def decoding(self) -> HostInt8Decoding:
        """As `Int8Operators.decoding`."""
        return HostInt8Decoding(self.sizes)

    def matrix(self, weight: Int8Weight) -> Int8Weight:
        """As `Int8Operators.matrix`."""
        return weight

    def half_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """As `Int8Operators.half_matrix`, in float32 for BLAS."""
        return weight.to(torch.float32)

    def vector(self, values: torch.Tensor) -> torch.Tensor:
        """As `Int8Operators.vector`."""
        return values.contiguous()

    def halves(self, rows: torch.Tensor) -> torch.Tensor:
        """As `Int8Operators.halves`, in float32."""
        return rows.to(torch.float32)

    def new_residual(self, x: torch.Tensor) -> torch.Tensor:
        """As `Int8Operators.new_residual`."""
        return torch.zeros_like(x)

    def add_norm_to_int8(self, x: torch.Tensor, residual: torch.Tensor, eps: float, scale: float) -> torch.Tensor:
        """As `Int8Operators.add_norm_to_int8`."""
        out = torch.empty(x.shape, dtype=torch.int8)
        kernels.add_rms_norm_int8(x.numpy(), residual.numpy(), np.float32(eps), np.float32(scale), out.numpy())
        return out

    def add_norm_to_half(self, x: torch.Tensor, residual: torch.Tensor, eps: float) -> torch.Tensor:
        """As `Int8Operators.add_norm_to_half`."""
        out = torch.empty_like(x)
        kernels.add_rms_norm(x.numpy(), residual.numpy(), np.float32(eps), out.numpy())
        return to_half(out)

    def linear_to_int8(
        self, x: torch.Tensor, weight: Int8Weight, by: Multipliers, offset: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.linear_to_int8`."""
        acc = matmul(x, weight, offset)
        columns = by.first if isinstance(by.first, torch.Tensor) else torch.full((acc.shape[1],), by.first)
        out = torch.empty(acc.shape, dtype=torch.int8)
        kernels.scale_columns_to_int8(acc.numpy(), columns.numpy(), np.float32(by.second), by.away, out.numpy())
        return out

    def linear_to_half(self, x: torch.Tensor, weight: Int8Weight, by: Multipliers) -> torch.Tensor:
        """As `Int8Operators.linear_to_half`."""
        return to_half(matmul(x, weight).mul_(by.first).mul_(by.second))

    def half_product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As `Int8Operators.half_product`."""
        return to_half(F.linear(x, weight))

    @cached_property
    def half(self) -> HalfOperators:
        """As `Int8Operators.half`."""
        return HalfOperators(HostOperators(self.sizes.ngroups), decodes=self.decodes)

    def encode(
        self, x: torch.Tensor, scale: float | torch.Tensor, zero: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.encode`."""
        return encoded(x, scale, zero).to(torch.int8)

    def decode(
        self, codes: torch.Tensor, scale: float | torch.Tensor, zero: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.decode`."""
        return to_half(decoded(codes, scale, zero))

    def conv_silu(
        self, x: torch.Tensor, conv: Convolution, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.conv_silu`."""
        out = torch.empty(x.shape, dtype=torch.int8)
        rows, first = whole_rows(x)
        kernels.conv_silu_int8(rows, first, *_arrays(conv), batch.host.offsets.numpy(), out.numpy())
        if state is not None:
            state.conv = last_rows(x, batch, len(conv.taps))
        return out

    def selective_scan(
        self, inputs: ScanInputs, scales: ScanScales, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.selective_scan`."""
        y, last = torch.empty(inputs.u.shape), torch.zeros(batch.host.documents, *inputs.a.shape)
        float_kernels.selective_scan(*_scan_values(inputs, scales), batch.host.offsets.numpy(), y.numpy(), last.numpy())
        if isinstance(state, SimulatedState):
            state.keep(last)
        elif state is not None:
            state.ssm = torch.empty(last.shape, dtype=torch.int8)
            kernels.state_to_int8(last.numpy(), np.float32(scales.state), state.ssm.numpy())
        return to_half(y)

    def ssd_scan(
        self, inputs: SsdCodes, scales: SsdScales, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.ssd_scan`."""
        conv_out, dt, a, d, bias = inputs
        values = decoded(conv_out, scales.conv_out, scales.zero)
        x, b, c = self._split(to_half(values))
        delta = softplus_delta(dt, scales.dt, bias)
        y, last = torch.empty(x.shape), torch.zeros(batch.host.documents, x.shape[1], self.sizes.d_state)
        float_kernels.ssd_scan(
            x.numpy(),
            delta.numpy(),
            exp(delta * a).numpy(),
            b.numpy(),
            c.numpy(),
            np.zeros(len(a), np.float32),  # the skip connection reads x before it is rounded
            batch.host.offsets.numpy(),
            y.numpy(),
            last.numpy(),
        )
        y += values[:, : x.shape[1]] * torch.repeat_interleave(d, x.shape[1] // len(d))
        if isinstance(state, SimulatedState):
            state.keep(to_half(last))
        elif state is not None:
            state.ssm = torch.empty(last.shape, dtype=torch.int8)
            arguments = (to_half(last).numpy(), scales.state.numpy(), scales.groups.numpy())
            kernels.state_groups_to_int8(*arguments, state.ssm.numpy())
        return to_half(y)

    def _split(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (rows, e), B and C (rows, gn) of the convolution's output."""
        width = self.sizes.ngroups * self.sizes.d_state
        x, b, c = torch.split(values, [self.sizes.d_inner, width, width], dim=1)
        return x.contiguous(), b.contiguous(), c.contiguous()

    def rotate(self, y: torch.Tensor, factor: float, wrap: bool) -> torch.Tensor:
        """As `Int8Operators.rotate`."""
        out = torch.empty(y.shape, dtype=torch.int8)
        kernels.round_to_int8(hadamard(y, factor).numpy(), wrap, out.numpy())
        return out

    def gated_rotate(
        self,
        y: torch.Tensor,
        z: torch.Tensor,
        z_scale: float,
        weight: torch.Tensor,
        eps: float,
        factor: float,
        wrap: bool,
    ) -> torch.Tensor:
        """As `Int8Operators.gated_rotate`."""
        normed = gated_rms_norm(y, decoded(z, z_scale), weight, self.sizes.ngroups, eps)
        return self.rotate(to_half(normed), factor, wrap)


class HostInt8Decoding(HostInt8Operators):
    """The operators for decoding: every document is the next token of a sequence, whose state is given."""

    decodes = True

    def conv_silu(
        self, x: torch.Tensor, conv: Convolution, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.conv_silu`; the sum is rounded term by term."""
        assert state is not None
        out = torch.empty(x.shape, dtype=torch.int8)
        rows, first = whole_rows(x)
        kernels.conv_update_int8(rows, first, state.conv.numpy(), *_arrays(conv), out.numpy())
        return out

    def selective_scan(
        self, inputs: ScanInputs, scales: ScanScales, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.selective_scan`."""
        assert state is not None
        if isinstance(state, SimulatedState):
            return to_half(simulated_scans.selective_scan(inputs, scales, batch, state))
        y = torch.empty(inputs.u.shape)
        kernels.scan_update_int8(*_scan_values(inputs, scales), np.float32(scales.state), state.ssm.numpy(), y.numpy())
        return to_half(y)

    def ssd_scan(
        self, inputs: SsdCodes, scales: SsdScales, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.ssd_scan`; nothing but y is rounded to float16."""
        assert state is not None
        if isinstance(state, SimulatedState):
            return to_half(simulated_scans.ssd_scan(inputs, scales, batch, state, self.sizes.ngroups))
        conv_out, dt, a, d, bias = inputs
        x, b, c = self._split(decoded(conv_out, scales.conv_out, scales.zero))
        delta = softplus_delta(dt, scales.dt, bias)
        y = torch.empty(x.shape)
        kernels.ssd_update_int8(
            x.numpy(),
            delta.numpy(),
            exp(delta * a).numpy(),
            b.numpy(),
            c.numpy(),
            d.numpy(),
            scales.state.numpy(),
            scales.groups.numpy(),
            state.ssm.numpy(),
            y.numpy(),
        )
        return to_half(y)


def _arrays(conv: Convolution) -> tuple[Array, Array, Array, Array, Array]:
    """The arguments of both convolution kernels: zero points of 0 where there are none."""
    taps, scale_wx, bias, scale_out, zero_out = conv
    zeros = torch.zeros_like(bias) if zero_out is None else zero_out
    return taps.numpy(), scale_wx.numpy(), bias.numpy(), scale_out.numpy(), zeros.numpy()


def _scan_values(inputs: ScanInputs, scales: ScanScales) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """u, delta, A, B, C, D, z of Mamba-1's scan kernels, dequantized to float32."""
    u, delta, bc, z, a, d, bias = inputs
    b, c = torch.split(decoded(bc, scales.bc), len(a), dim=1)
    return (
        decoded(u, scales.u, scales.u_zero).numpy(),
        softplus_delta(delta, scales.delta, bias).numpy(),
        a.numpy(),
        b.contiguous().numpy(),
        c.contiguous().numpy(),
        d.numpy(),
        decoded(z, scales.z).numpy(),
    )
