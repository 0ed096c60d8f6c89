"""The operators of the INT8 models as compiled CUDA kernels.

Codes are int8. Every row of codes is padded to 16 bytes, of float16 likewise, so that kernels work on whole words:
results are slices of wider tensors. Weights are padded with zeros, so what a row holds beyond its width counts for
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from quambase.model.block import ModelConfig
from quambase.model.cuda.compiler import Argument, Kernels
from quambase.model.hadamard import odd_factor
from quambase.model.operators.cuda import (
    FREE_SHARED,
    ROW_THREADS,
    SCAN_THREADS,
    kernel_sizes,
    rows_of_block,
    rows_shared,
)
from quambase.model.packed_batch import PlacedBatch

ALIGNMENT = 16
"""Bytes."""

PRODUCTS, BLOCKS = (Path(__file__).with_name(name) for name in ("gemm.cu", "blocks.cu"))

TILE = 128
"""Outputs of a product's block along either side, as in gemm.cu."""


@dataclass(frozen=True)
class ProductBlock:
    """A product's block, as in gemm.cu: its threads, and its shared memory in bytes."""

    threads: int
    shared: int


HOPPER, OTHERS = ProductBlock(256, 3 * 2 * TILE * 128), ProductBlock(128, 4 * 2 * TILE * 64)

CONV_ROWS, CONV_CHANNELS = 8, 4 * 128
"""Rows and channels of a block of the convolution, as in blocks.cu."""


@dataclass(frozen=True)
class ScanScales:
    """The scales of a Mamba-1 scan's inputs."""

    u: float
    delta: float
    bc: float
    z: float


def _padded(width: int, item: int) -> int:
    """``width`` items of ``item`` bytes, up to whole ALIGNMENTs."""
    return -(-width * item // ALIGNMENT) * ALIGNMENT // item


def padded_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor (rows, width) whose rows are ALIGNMENT apart and aligned."""
    whole = _padded(width, dtype.itemsize)
    found = torch.empty(rows, whole, dtype=dtype, device=device)
    return found if whole == width else found[:, :width]


def pad_weight(codes: torch.Tensor) -> torch.Tensor:
    """Codes (out, in), each row filled up with zeros to a multiple of 16."""
    return F.pad(codes, (0, _padded(codes.shape[1], 1) - codes.shape[1])).contiguous()


class CudaInt8Operators:
    """The INT8 blocks' steps for one model's sizes on one device; each rounds once, as the CPU's sibling named says.

    Tensors are on the device; rows may be apart. CompilationFailed where it cannot be compiled: the integer products
    need compute capability 8.0.
    """

    def __init__(self, device: torch.device, config: ModelConfig, *, hopper: bool | None = None) -> None:
        """``hopper``: whether products are Hopper's own (compute capability 9.0); default: if the device is one."""
        self.device = device
        sizes, heads = kernel_sizes(config.operator_sizes), config.head_layout
        self._rotated_rows, self._rotated_shared = rows_of_block(config.d_inner), rows_shared(config.d_inner)
        self._odd = torch.tensor(odd_factor(sizes["ORDER"]), device=device)
        mamba2 = heads is not None
        self._ssd_threads = sizes["HEADDIM"] // sizes["JOINED"] * sizes["SPLIT"]
        if heads is not None:
            self._ngroups, width = heads.ssd_groups, heads.ssd_groups * config.d_state
            self._widths = [config.d_inner, width, width]
        own = ("ssd_scan", "gated_rotate") if mamba2 else ("selective_scan", "rotate")
        names = ("norm_to_int8", "norm_to_half", "conv_silu", *own)
        # No contraction, so that codes are rounded from the same float32 values as on the CPU.
        self._blocks = Kernels(BLOCKS, names, {"MAMBA2": int(mamba2), **sizes}, device, ("-fmad=false",))
        if hopper is None:
            hopper = torch.cuda.get_device_capability(device) == (9, 0)
        self._product_block = HOPPER if hopper else OTHERS
        products = ("product_to_int8", "product_to_half")
        self._products = Kernels(PRODUCTS, products, {"HOPPER": int(hopper)}, device)
        for name in products:
            self._products.allow_shared(name, self._product_block.shared)
        shared = dict.fromkeys(("norm_to_int8", "norm_to_half"), 4 * _padded(config.d_model, 4))
        shared["gated_rotate" if mamba2 else "rotate"] = self._rotated_shared
        for name, size in shared.items():
            if size > FREE_SHARED:
                self._blocks.allow_shared(name, size)

    def _codes(self, rows: int, width: int) -> torch.Tensor:
        return padded_rows(rows, width, torch.int8, self.device)

    def _halves(self, rows: int, width: int) -> torch.Tensor:
        return padded_rows(rows, width, torch.float16, self.device)

    def add_norm_to_int8(self, x: torch.Tensor, residual: torch.Tensor, eps: float, scale: float) -> torch.Tensor:
        """`kernels.add_rms_norm_int8`: x (t, d) float16; residual (t, d) float32, updated, its rows as `padded_rows`
        lays them, and so x's; codes (t, d).
        """
        rows, width = residual.shape
        out = self._codes(rows, width)
        arguments = (x, x.stride(0), residual, residual.stride(0), width, eps, scale, out, out.stride(0))
        self._blocks.launch("norm_to_int8", (rows, 1), ROW_THREADS, arguments, 4 * _padded(width, 4))
        return out

    def add_norm_to_half(self, x: torch.Tensor, residual: torch.Tensor, eps: float) -> torch.Tensor:
        """`kernels.add_rms_norm`, rounded to float16."""
        rows, width = residual.shape
        out = self._halves(rows, width)
        arguments = (x, x.stride(0), residual, residual.stride(0), width, eps, out, out.stride(0))
        self._blocks.launch("norm_to_half", (rows, 1), ROW_THREADS, arguments, 4 * _padded(width, 4))
        return out

    def linear_to_int8(
        self, x: torch.Tensor, weight: torch.Tensor, first: float | torch.Tensor, second: float
    ) -> torch.Tensor:
        """`int8.linear_to_int8`: x (rows, in) codes, weight (out, in) as `pad_weight` makes it; ``first`` may be one
        factor per column (out,).
        """
        return self._product("product_to_int8", x, weight, first, second, self._codes(len(x), len(weight)))

    def linear_to_half(self, x: torch.Tensor, weight: torch.Tensor, first: float, second: float) -> torch.Tensor:
        """`int8.linear_to_half`, the result float16."""
        return self._product("product_to_half", x, weight, first, second, self._halves(len(x), len(weight)))

    def _product(
        self,
        name: str,
        x: torch.Tensor,
        weight: torch.Tensor,
        first: float | torch.Tensor,
        second: float,
        out: torch.Tensor,
    ) -> torch.Tensor:
        if x.stride(0) % ALIGNMENT or x.stride(1) != 1:  # rows taken out of a tensor of ours are packed
            x = self._codes(*x.shape).copy_(x)
        columns, depth = weight.shape
        per_column = isinstance(first, torch.Tensor)
        factors = (first, 1.0) if per_column else (0, first)
        arguments = (x, x.stride(0), weight, len(x), columns, depth, *factors, second, out, out.stride(0))
        grid = (-(-columns // TILE), -(-len(x) // TILE))
        self._products.launch(name, grid, self._product_block.threads, arguments, self._product_block.shared)
        return out

    def conv_silu(
        self,
        x: torch.Tensor,
        taps: torch.Tensor,
        scale_wx: torch.Tensor,
        bias: torch.Tensor,
        scale_out: torch.Tensor,
        batch: PlacedBatch,
    ) -> torch.Tensor:
        """`kernels2.conv_channels_int8`: x codes (t, e); taps (k, e); scale_wx, bias, scale_out (e,); codes (t, e)."""
        rows, channels = x.shape
        out = self._codes(rows, channels)
        grid = (-(-channels // CONV_CHANNELS), -(-rows // CONV_ROWS))
        arguments = (x, x.stride(0), taps, scale_wx, bias, scale_out, batch.starts, rows, channels, out, out.stride(0))
        self._blocks.launch("conv_silu", grid, 128, arguments)
        return out

    def selective_scan(
        self,
        u: torch.Tensor,
        delta: torch.Tensor,
        bc: torch.Tensor,
        z: torch.Tensor,
        scales: ScanScales,
        a: torch.Tensor,
        d: torch.Tensor,
        bias: torch.Tensor,
        batch: PlacedBatch,
    ) -> torch.Tensor:
        """`quambase.model.operators.host_kernels.selective_scan` of codes, rounded to float16 (t, e).

        u, delta (before bias and softplus), z (t, e); bc (t, 2n), B then C; a (n, e) negative; d, bias (e,).
        """
        rows, channels = u.shape
        y = torch.empty(rows, channels, dtype=torch.float16, device=self.device)
        codes = (u, u.stride(0), delta, delta.stride(0), bc, bc.stride(0), z, z.stride(0))
        factors = (scales.u, scales.delta, scales.bc, scales.z)
        arguments = (*codes, *factors, a, d, bias, batch.offsets, channels, y)
        grid = (-(-channels // SCAN_THREADS), batch.host.documents)
        self._blocks.launch("selective_scan", grid, SCAN_THREADS, arguments)
        return y

    def rotate(self, y: torch.Tensor, factor: float, wrap: bool) -> torch.Tensor:
        """The Hadamard quantizer: codes of ``factor`` times the transform of y (t, e) float16; `round_to_int8`."""
        out = self._codes(*y.shape)
        arguments = (y, len(y), self._odd, factor, int(wrap), out, out.stride(0))
        self._blocks.launch("rotate", self._row_blocks(len(y)), ROW_THREADS, arguments, self._rotated_shared)
        return out

    def ssd_scan(
        self,
        conv_out: torch.Tensor,
        scales: torch.Tensor,
        dt: torch.Tensor,
        dt_scale: float,
        a: torch.Tensor,
        d: torch.Tensor,
        bias: torch.Tensor,
        batch: PlacedBatch,
    ) -> torch.Tensor:
        """`quambase.model.operators.host_kernels.ssd_scan` of values rounded to float16, the skip connection of
        unrounded ones; rounded to float16 (t, e).

        conv_out (t, e + 2gn) codes of x, B, C with ``scales`` (e + 2gn,); dt (t, h) codes before bias and softplus;
        a (h,) negative; d, bias (h,).
        """
        heads, rows = len(a), len(conv_out)
        widths = self._widths
        y = torch.empty(rows, widths[0], dtype=torch.float16, device=self.device)
        parts: list[Argument] = [*torch.split(conv_out, widths, dim=1), conv_out.stride(0)]
        parts += torch.split(scales, widths)
        arguments = (*parts, dt, dt.stride(0), dt_scale, a, d, bias, batch.offsets, heads, self._ngroups, y)
        self._blocks.launch("ssd_scan", (heads, batch.host.documents), self._ssd_threads, arguments)
        return y

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
        """`quambase.model.operators.torch.gated_rms_norm`, rounded to float16, then `rotate`.

        y (t, e) float16, z (t, e) codes, weight (e,).
        """
        out = self._codes(*y.shape)
        norm = (z, z.stride(0), z_scale, weight, self._ngroups, eps)
        arguments = (y, len(y), *norm, self._odd, factor, int(wrap), out, out.stride(0))
        self._blocks.launch("gated_rotate", self._row_blocks(len(y)), ROW_THREADS, arguments, self._rotated_shared)
        return out

    def _row_blocks(self, rows: int) -> tuple[int, int]:
        return -(-rows // self._rotated_rows), 1
