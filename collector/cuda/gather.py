"""Rows of activations, copied on their device to float32: those of the tokens and states whose raw values are kept."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import torch

from quambase.collector.taps import Gather, TorchGather
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


class CudaGather:
    """A `Gather` of one launch for PIECES tensors. CompilationFailed where it cannot be compiled."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kernels = Kernels(SOURCE, ("gather",), {"PIECES": PIECES, "CHUNK": CHUNK}, device)
        self._pieces = Pieces()
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._tensors: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, rows: torch.Tensor | None) -> None:
        """As `Gather.add`, but for all rows of a tensor."""
        assert rows is not None, "where every row is kept, they go to the host"
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
        self._tensors.append(out)

    def gathered(self) -> list[torch.Tensor]:
        """As `Gather.gathered`."""
        if self._waiting:
            self._copy()
        found, self._tensors = self._tensors, []
        return found


def choose_gather(device: torch.device, everything: bool) -> Gather:
    """The compiled kernel on CUDA, plain PyTorch where it does not compile and on the CPU. Where every row is kept, to
    the host: those of a block fit in no device.
    """
    if device.type == "cuda" and not everything:
        try:
            return CudaGather(device)
        except CompilationFailed:  # of which the counter, compiled before, has warned
            return TorchGather(device)
    return TorchGather(torch.device("cpu"))
