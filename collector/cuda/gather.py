"""Rows of activations, copied on their device to float32: those of the tokens and states whose raw values are kept."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import Protocol

import torch

from quambase.model.cuda.compiler import CompilationFailed, Kernels

SOURCE = Path(__file__).with_name("gather.cu")

PIECES = 16
"""Tensors whose rows one launch copies."""

CHUNK = 2048
"""Values that a block of threads copies."""

_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Piece(ctypes.Structure):
    """The source's struct of the same name."""

    _fields_ = [
        ("x", _POINTER),
        ("rows", _POINTER),
        *((name, _I64) for name in ("stride", "width", "half")),
        ("out", _POINTER),
    ]


_PIECE = struct.Struct(f"@{len(Piece._fields_)}q")
"""As `Piece`, many of which are written."""


class Pieces(ctypes.Structure):
    """The source's struct of the same name."""

    _fields_ = [("at", Piece * PIECES), ("first", ctypes.c_int32 * (PIECES + 1))]


class Gather(Protocol):
    """Copies rows of one tensor after the other."""

    def add(self, x: torch.Tensor, rows: torch.Tensor) -> None:
        """Rows ``rows`` (count,) int64 of x (t, width), float16 or float32, both on the device.

        Perhaps only noted: x must stay as it is until the next `taken`.
        """

    def taken(self) -> list[torch.Tensor]:
        """What was added since the last call, one after the other: float32, flat, in as many tensors as it pleases."""


class TorchGather:
    """A `Gather` in plain PyTorch."""

    def __init__(self) -> None:
        self._taken: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, rows: torch.Tensor) -> None:
        """As `Gather.add`."""
        self._taken.append(x.index_select(0, rows).float().reshape(-1))

    def taken(self) -> list[torch.Tensor]:
        """As `Gather.taken`."""
        found, self._taken = self._taken, []
        return found


class CudaGather:
    """A `Gather` of one launch for PIECES tensors. CompilationFailed where it cannot be compiled."""

    def __init__(self, device: torch.device) -> None:
        self._kernels = Kernels(SOURCE, ("gather",), {"PIECES": PIECES, "CHUNK": CHUNK}, device)
        self._pieces = Pieces()
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._taken: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, rows: torch.Tensor) -> None:
        """As `Gather.add`."""
        self._waiting.append((x if x.stride(1) == 1 else x.contiguous(), rows))
        if len(self._waiting) == PIECES:
            self._copy()

    def _copy(self) -> None:
        waiting, self._waiting = self._waiting, []
        shapes = [(rows.shape[0], x.shape[1]) for x, rows in waiting]
        out = torch.empty(sum(count * width for count, width in shapes), device=waiting[0][0].device)
        address, blocks, firsts = out.data_ptr(), 0, [0]
        for number, ((x, rows), (count, width)) in enumerate(zip(waiting, shapes, strict=True)):
            half = x.dtype == torch.float16
            place = number * _PIECE.size
            _PIECE.pack_into(self._pieces, place, x.data_ptr(), rows.data_ptr(), x.stride(0), width, half, address)
            address += 4 * count * width
            blocks += count * -(-width // CHUNK)
            firsts.append(blocks)
        self._pieces.first[:] = firsts + [blocks] * (PIECES + 1 - len(firsts))
        if blocks:
            self._kernels.launch("gather", (blocks, 1), 256, [self._pieces])
        self._taken.append(out)

    def taken(self) -> list[torch.Tensor]:
        """As `Gather.taken`."""
        if self._waiting:
            self._copy()
        found, self._taken = self._taken, []
        return found


def choose_gather(device: torch.device) -> Gather:
    """The compiled kernel on CUDA; plain PyTorch elsewhere, and where it does not compile."""
    if device.type == "cuda":
        try:
            return CudaGather(device)
        except CompilationFailed:  # of which the counter, compiled before, has warned
            pass
    return TorchGather()
