"""Copies the rows of activations whose raw values are stored, as float32, on their device."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import torch

from quambase.collector.taps import Gather, TorchGather
from quambase.model.cuda.compiler import CompilationFailed, Kernels

SOURCE = Path(__file__).with_name("gather.cu")

PIECES = 16
"""Largest number of tensors per launch."""

CHUNK = 2048
"""Values per block of threads."""

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
"""The layout of `Piece`, which is faster to write than the structure."""


class Pieces(ctypes.Structure):
    """The source's struct of the same name."""

    _fields_ = [("at", Piece * PIECES), ("first", ctypes.c_int32 * (PIECES + 1))]


class CudaGather:
    """A `Gather` with one launch for PIECES tensors. CompilationFailed: the kernel does not compile."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kernels = Kernels(SOURCE, ("gather",), {"PIECES": PIECES, "CHUNK": CHUNK}, device)
        self._pieces = Pieces()
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._tensors: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, rows: torch.Tensor | None) -> None:
        """As `Gather.add`; ``rows`` must not be None."""
        assert rows is not None, "a gather of every row is on the host"
        self._pending.append((x if x.stride(1) == 1 else x.contiguous(), rows))
        if len(self._pending) == PIECES:
            self._copy()

    def _copy(self) -> None:
        pending, self._pending = self._pending, []
        shapes = [(rows.shape[0], x.shape[1]) for x, rows in pending]
        out = torch.empty(sum(count * width for count, width in shapes), device=pending[0][0].device)
        address, blocks, firsts = out.data_ptr(), 0, [0]
        for number, ((x, rows), (count, width)) in enumerate(zip(pending, shapes, strict=True)):
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
        if self._pending:
            self._copy()
        found, self._tensors = self._tensors, []
        return found


def choose_gather(device: torch.device, everything: bool) -> Gather:
    """The compiled kernel on CUDA; plain PyTorch on the CPU, and if the kernel does not compile. ``everything``: to the
    host, since all rows of a block do not fit in a device's memory.
    """
    if device.type == "cuda" and not everything:
        try:
            return CudaGather(device)
        except CompilationFailed:  # the counter, compiled before, has warned of it
            return TorchGather(device)
    return TorchGather(torch.device("cpu"))
