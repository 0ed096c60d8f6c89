"""The INT8 operators as compiled CUDA kernels.

Rows of codes and of float16 values are padded to 16 bytes, so that kernels process whole words; results are slices of
wider tensors. Weights are padded with zeros, so a row's padding does not change a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from quambase.apply.int8.arithmetic import Int8Weight, decoded, encoded
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
from quambase.model.cuda.compiler import Argument, Kernels
from quambase.model.hadamard import odd_factor
from quambase.model.operators.cuda import (
    ROW_THREADS,
    SCAN_THREADS,
    STEP_THREADS,
    CudaOperators,
    kernel_sizes,
    rows_of_block,
    rows_shared,
    step_blocks,
)
from quambase.model.operators.interface import OperatorSizes, ScanInputs
from quambase.model.packed_batch import PlacedBatch, last_rows

ALIGNMENT = 16
"""Of rows, in bytes."""

PRODUCTS, BLOCKS = (Path(__file__).with_name(name) for name in ("gemm.cu", "blocks.cu"))

TILE = 128
"""Rows and columns of outputs per block of a product, as in gemm.cu."""


@dataclass(frozen=True)
class ProductBlock:
    """A block of a product, as in gemm.cu: its threads, and its shared memory in bytes."""

    threads: int
    shared: int


HOPPER, OTHERS = ProductBlock(256, 3 * 2 * TILE * 128), ProductBlock(128, 4 * 2 * TILE * 64)

CONV_ROWS, CONV_CHANNELS = 8, 4 * 128
"""Rows and channels per block of the convolution, as in blocks.cu."""

STEP_CHANNELS = 128
"""Channels per block of the convolution of one token."""

ROW_WARPS = 4
"""Warps per block of a single row's product, each with one output, as in blocks.cu."""


def _padded(width: int, item: int) -> int:
    """``width`` items of ``item`` bytes each, rounded up to a multiple of ALIGNMENT; in items."""
    return -(-width * item // ALIGNMENT) * ALIGNMENT // item


def padded_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor (rows, width) whose rows are ALIGNMENT apart and aligned."""
    whole = _padded(width, dtype.itemsize)
    found = torch.empty(rows, whole, dtype=dtype, device=device)
    return found if whole == width else found[:, :width]


class CudaInt8Operators:
    """`quambase.apply.int8.operators.interface.Int8Operators` for one model's sizes on one device, of whole documents.

    CompilationFailed: the kernels do not compile. The integer products need compute capability 8.0.
    """

    decodes = False

    def __init__(self, device: torch.device, sizes: OperatorSizes, *, hopper: bool | None = None) -> None:
        """``hopper``: use Hopper's own products (compute capability 9.0); default: on such a device."""
        self.device, self.sizes = device, sizes
        defines = kernel_sizes(sizes)
        self._rotated_rows, self._rotated_shared = rows_of_block(sizes.d_inner), rows_shared(sizes.d_inner)
        self._odd = torch.tensor(odd_factor(defines["ORDER"]), device=device)
        heads = sizes.headdim is not None
        self._ssd_threads = defines["HEADDIM"] // defines["JOINED"] * defines["SPLIT"]
        own = (
            ("ssd_scan", "ssd_scan_shifted", "ssd_step", "ssd_step_shifted", "gated_rotate")
            if heads
            else ("selective_scan", "selective_scan_shifted", "scan_step", "scan_step_shifted", "rotate")
        )
        convolutions = ("conv_silu", "conv_silu_shifted", "conv_step", "conv_step_shifted")
        names = ("norm_to_int8", "norm_to_half", "row_to_int8", "row_to_half", *convolutions, *own)
        # No contraction, so that codes are rounded from the same float32 values as on the CPU.
        self._blocks = Kernels(BLOCKS, names, {"HEADS": int(heads), **defines}, device, ("-fmad=false",))
        if hopper is None:
            hopper = torch.cuda.get_device_capability(device) == (9, 0)
        self._product_block = HOPPER if hopper else OTHERS
        products = ("product_to_int8", "product_to_int8_less", "product_to_half")
        self._products = Kernels(PRODUCTS, products, {"HOPPER": int(hopper)}, device)
        for name in products:
            self._products.allow_shared(name, self._product_block.shared)
        shared = dict.fromkeys(("norm_to_int8", "norm_to_half"), 4 * _padded(sizes.d_model, 4))
        shared["gated_rotate" if heads else "rotate"] = self._rotated_shared
        for name, size in shared.items():
            self._blocks.allow_shared(name, size)

    def decoding(self) -> CudaInt8Decoding:
        """As `Int8Operators.decoding`."""
        return self._decoding

    @cached_property
    def _decoding(self) -> CudaInt8Decoding:
        return CudaInt8Decoding(self.device, self.sizes, hopper=self._product_block is HOPPER)

    def matrix(self, weight: Int8Weight) -> Int8Weight:
        """As `Int8Operators.matrix`; rows are padded with zeros to a multiple of 16."""
        width = weight.codes.shape[1]
        padded = F.pad(weight.codes, (0, _padded(width, 1) - width)).contiguous()
        return Int8Weight(padded.to(self.device), weight.scale)

    def half_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """As `Int8Operators.half_matrix`."""
        return weight.to(self.device)

    def vector(self, values: torch.Tensor) -> torch.Tensor:
        """As `Int8Operators.vector`."""
        return values.contiguous().to(self.device)

    def halves(self, rows: torch.Tensor) -> torch.Tensor:
        """As `Int8Operators.halves`."""
        return self._halves(*rows.shape).copy_(rows)

    def new_residual(self, x: torch.Tensor) -> torch.Tensor:
        """As `Int8Operators.new_residual`."""
        return padded_rows(len(x), x.shape[1], torch.float32, self.device).zero_()

    def _codes(self, rows: int, width: int) -> torch.Tensor:
        return padded_rows(rows, width, torch.int8, self.device)

    def _halves(self, rows: int, width: int) -> torch.Tensor:
        return padded_rows(rows, width, torch.float16, self.device)

    def add_norm_to_int8(self, x: torch.Tensor, residual: torch.Tensor, eps: float, scale: float) -> torch.Tensor:
        """As `Int8Operators.add_norm_to_int8`; rows of x and residual are padded as by `padded_rows`."""
        rows, width = residual.shape
        out = self._codes(rows, width)
        arguments = (x, x.stride(0), residual, residual.stride(0), width, eps, scale, out, out.stride(0))
        self._blocks.launch("norm_to_int8", (rows, 1), ROW_THREADS, arguments, 4 * _padded(width, 4))
        return out

    def add_norm_to_half(self, x: torch.Tensor, residual: torch.Tensor, eps: float) -> torch.Tensor:
        """As `Int8Operators.add_norm_to_half`."""
        rows, width = residual.shape
        out = self._halves(rows, width)
        arguments = (x, x.stride(0), residual, residual.stride(0), width, eps, out, out.stride(0))
        self._blocks.launch("norm_to_half", (rows, 1), ROW_THREADS, arguments, 4 * _padded(width, 4))
        return out

    def linear_to_int8(
        self, x: torch.Tensor, weight: Int8Weight, by: Multipliers, offset: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.linear_to_int8`."""
        assert not by.away  # only if one sequence decodes
        out = self._codes(len(x), len(weight.codes))
        name = "product_to_int8" if offset is None else "product_to_int8_less"
        return self._product(name, x, weight.codes, by, out, offset)

    def linear_to_half(self, x: torch.Tensor, weight: Int8Weight, by: Multipliers) -> torch.Tensor:
        """As `Int8Operators.linear_to_half`."""
        out = self._halves(len(x), len(weight.codes))
        return self._product("product_to_half", x, weight.codes, by, out)

    def half_product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As `Int8Operators.half_product`."""
        return F.linear(x, weight)

    @cached_property
    def half(self) -> HalfOperators:
        """As `Int8Operators.half`. CompilationFailed."""
        return HalfOperators(CudaOperators(self.device, torch.float16, self.sizes), decodes=self.decodes)

    def encode(
        self, x: torch.Tensor, scale: float | torch.Tensor, zero: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.encode`."""
        return self._codes(*x.shape).copy_(encoded(x, scale, zero))

    def decode(
        self, codes: torch.Tensor, scale: float | torch.Tensor, zero: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.decode`."""
        return decoded(codes, scale, zero).to(torch.float16)

    def _product(
        self,
        name: str,
        x: torch.Tensor,
        weight: torch.Tensor,
        by: Multipliers,
        out: torch.Tensor,
        offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = self._aligned(x)
        columns, depth = weight.shape
        arguments = (x, x.stride(0), weight, len(x), columns, depth, *_scaling(by, offset), out, out.stride(0))
        grid = (-(-columns // TILE), -(-len(x) // TILE))
        self._products.launch(name, grid, self._product_block.threads, arguments, self._product_block.shared)
        return out

    def _aligned(self, x: torch.Tensor) -> torch.Tensor:
        """Codes x (rows, in) in rows as `padded_rows` makes them: rows selected from a padded tensor are packed."""
        if x.stride(0) % ALIGNMENT or x.stride(1) != 1 or x.data_ptr() % ALIGNMENT:
            return self._codes(*x.shape).copy_(x)
        return x

    def conv_silu(
        self, x: torch.Tensor, conv: Convolution, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.conv_silu`."""
        rows, channels = x.shape
        out = self._codes(rows, channels)
        grid = (-(-channels // CONV_CHANNELS), -(-rows // CONV_ROWS))
        arguments = (x, x.stride(0), *_vectors(conv), batch.starts, rows, channels, out, out.stride(0))
        self._blocks.launch("conv_silu" if conv.zero_out is None else "conv_silu_shifted", grid, 128, arguments)
        if state is not None:
            state.conv = last_rows(x, batch, len(conv.taps))
        return out

    def selective_scan(
        self, inputs: ScanInputs, scales: ScanScales, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.selective_scan`."""
        if isinstance(state, SimulatedState):
            simulated_scans.selective_scan(inputs, scales, batch, state)
            state = None
        documents, states, channels = batch.host.documents, *inputs.a.shape
        y = torch.empty(inputs.u.shape, dtype=torch.float16, device=self.device)
        if state is not None:
            state.ssm = torch.empty(documents, states, channels, dtype=torch.int8, device=self.device)
        kept = (0 if state is None else state.ssm, scales.state)
        arguments = (*_scan_arguments(inputs, scales), batch.offsets, channels, y, *kept)
        name = "selective_scan_shifted" if scales.u_zero else "selective_scan"
        self._blocks.launch(name, (-(-channels // SCAN_THREADS), documents), SCAN_THREADS, arguments)
        return y

    def rotate(self, y: torch.Tensor, factor: float, wrap: bool) -> torch.Tensor:
        """As `Int8Operators.rotate`."""
        out = self._codes(*y.shape)
        arguments = (y, len(y), self._odd, factor, int(wrap), out, out.stride(0))
        self._blocks.launch("rotate", self._row_blocks(len(y)), ROW_THREADS, arguments, self._rotated_shared)
        return out

    def ssd_scan(
        self, inputs: SsdCodes, scales: SsdScales, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.ssd_scan`."""
        if isinstance(state, SimulatedState):
            simulated_scans.ssd_scan(inputs, scales, batch, state, self.sizes.ngroups)
            state = None
        documents, channels, heads = batch.host.documents, self.sizes.d_inner, len(inputs.a)
        y = torch.empty(len(inputs.dt), channels, dtype=torch.float16, device=self.device)
        if state is not None:
            state.ssm = torch.empty(documents, channels, self.sizes.d_state, dtype=torch.int8, device=self.device)
        kept = (0 if state is None else state.ssm, scales.state, scales.groups)
        arguments = (*self._ssd_arguments(inputs, scales), batch.offsets, heads, self.sizes.ngroups, y, *kept)
        name = "ssd_scan" if scales.zero is None else "ssd_scan_shifted"
        self._blocks.launch(name, (heads, documents), self._ssd_threads, arguments)
        return y

    def _ssd_arguments(self, inputs: SsdCodes, scales: SsdScales) -> list[Argument]:
        """The arguments of both SSD kernels up to the block's constants."""
        conv_out, dt, *constants = inputs
        width = self.sizes.ngroups * self.sizes.d_state
        widths = [self.sizes.d_inner, width, width]
        parts: list[Argument] = [*torch.split(conv_out, widths, dim=1), conv_out.stride(0)]
        parts += torch.split(scales.conv_out, widths)
        parts += [0, 0, 0] if scales.zero is None else torch.split(scales.zero, widths)
        return [*parts, dt, dt.stride(0), scales.dt, *constants]

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
        out = self._codes(*y.shape)
        norm = (z, z.stride(0), z_scale, weight, self.sizes.ngroups, eps)
        arguments = (y, len(y), *norm, self._odd, factor, int(wrap), out, out.stride(0))
        self._blocks.launch("gated_rotate", self._row_blocks(len(y)), ROW_THREADS, arguments, self._rotated_shared)
        return out

    def _row_blocks(self, rows: int) -> tuple[int, int]:
        return -(-rows // self._rotated_rows), 1


class CudaInt8Decoding(CudaInt8Operators):
    """The operators for decoding: every document is the next token of a sequence, whose state is updated in place; its
    tensors must be contiguous. The product of a single row has a kernel of its own, as upstream's.
    """

    decodes = True

    def linear_to_int8(
        self, x: torch.Tensor, weight: Int8Weight, by: Multipliers, offset: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.linear_to_int8`; away from zero of a single row only."""
        if len(x) != 1:
            return super().linear_to_int8(x, weight, by, offset)
        out = self._codes(1, len(weight.codes))
        return self._row("row_to_int8", x, weight.codes, by, out, offset)

    def linear_to_half(self, x: torch.Tensor, weight: Int8Weight, by: Multipliers) -> torch.Tensor:
        """As `Int8Operators.linear_to_half`."""
        if len(x) != 1:
            return super().linear_to_half(x, weight, by)
        out = self._halves(1, len(weight.codes))
        return self._row("row_to_half", x, weight.codes, by, out)

    def _row(
        self,
        name: str,
        x: torch.Tensor,
        weight: torch.Tensor,
        by: Multipliers,
        out: torch.Tensor,
        offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        columns, depth = weight.shape
        arguments = (self._aligned(x), weight, columns, depth, *_scaling(by, offset), int(by.away), out)
        self._blocks.launch(name, (-(-columns // ROW_WARPS), 1), ROW_WARPS * 32, arguments)
        return out

    def conv_silu(
        self, x: torch.Tensor, conv: Convolution, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.conv_silu`; the sum is rounded term by term."""
        assert state is not None and state.conv.is_contiguous()
        rows, channels = x.shape
        out = self._codes(rows, channels)
        arguments = (x, x.stride(0), *_vectors(conv), channels, state.conv, out, out.stride(0))
        name = "conv_step" if conv.zero_out is None else "conv_step_shifted"
        self._blocks.launch(name, (-(-channels // STEP_CHANNELS), rows), STEP_CHANNELS, arguments)
        return out

    def selective_scan(
        self, inputs: ScanInputs, scales: ScanScales, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.selective_scan`."""
        if isinstance(state, SimulatedState):
            y = simulated_scans.selective_scan(inputs, scales, batch, state)
            return y.to(torch.float16)
        assert state is not None and state.ssm.is_contiguous()
        rows, channels = inputs.u.shape
        y = torch.empty(rows, channels, dtype=torch.float16, device=self.device)
        arguments = (*_scan_arguments(inputs, scales), channels, y, state.ssm, scales.state)
        name = "scan_step_shifted" if scales.u_zero else "scan_step"
        self._blocks.launch(name, (-(-channels // SCAN_THREADS), rows), SCAN_THREADS, arguments)
        return y

    def ssd_scan(
        self, inputs: SsdCodes, scales: SsdScales, batch: PlacedBatch, state: Int8BlockState | None = None
    ) -> torch.Tensor:
        """As `Int8Operators.ssd_scan`; nothing but y is rounded to float16."""
        if isinstance(state, SimulatedState):
            y = simulated_scans.ssd_scan(inputs, scales, batch, state, self.sizes.ngroups)
            return y.to(torch.float16)
        assert state is not None and state.ssm.is_contiguous()
        rows, channels = len(inputs.dt), self.sizes.d_inner
        y = torch.empty(rows, channels, dtype=torch.float16, device=self.device)
        kept = (state.ssm, scales.state, scales.groups)
        arguments = (*self._ssd_arguments(inputs, scales), len(inputs.a), self.sizes.ngroups, y, *kept)
        grid = (step_blocks(channels, self.sizes.headdim or 1), rows)
        self._blocks.launch("ssd_step" if scales.zero is None else "ssd_step_shifted", grid, STEP_THREADS, arguments)
        return y


def _scaling(by: Multipliers, offset: torch.Tensor | None) -> tuple[Argument, ...]:
    """The arguments of a product's scaling: factors by column or one, the second factor, offsets by column."""
    factors: tuple[Argument, Argument] = (by.first, 1.0) if isinstance(by.first, torch.Tensor) else (0, by.first)
    return (*factors, by.second, 0 if offset is None else offset)


def _vectors(conv: Convolution) -> tuple[Argument, ...]:
    """The arguments of both convolutions by channel."""
    return (*conv[:4], 0 if conv.zero_out is None else conv.zero_out)


def _scan_arguments(inputs: ScanInputs, scales: ScanScales) -> tuple[Argument, ...]:
    """The arguments of both selective scans up to the block's constants."""
    u, delta, bc, z, *constants = inputs
    codes = (u, u.stride(0), delta, delta.stride(0), bc, bc.stride(0), z, z.stride(0))
    return (*codes, scales.u, float(scales.u_zero), scales.delta, scales.bc, scales.z, *constants)
