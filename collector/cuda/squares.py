"""Counts float16 patterns and sums the squares of their gradients on CUDA, by a compiled kernel."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from quambase.collector.host.kernels import PATTERNS
from quambase.model.cuda.compiler import CompilationFailed, Kernels

SOURCE = Path(__file__).with_name("squares.cu")
NAMES = ("largest", "add_squares", "finish")
THREADS = 256
"""Threads per block, as in squares.cu."""

EACH = 16
"""Values per thread, about, and in a large tensor more."""

MOST_BLOCKS = 4096
"""Some thirty for each multiprocessor of a large device."""


class CudaSquares:
    """`quambase.collector.sensitivity.fixed_point_sums` of float32 values, added in place, in one pass over values and
    gradients. CompilationFailed: the kernels do not compile.
    """

    def __init__(self, device: torch.device) -> None:
        self._kernels = Kernels(SOURCE, NAMES, {"PATTERNS": PATTERNS}, device)

    def add(
        self,
        counts: torch.Tensor,
        gradient_sq: torch.Tensor,
        values: torch.Tensor,
        gradient: torch.Tensor,
        group_of: torch.Tensor,
    ) -> None:
        """Add to counts int64 and gradient_sq float64, (groups, PATTERNS) contiguous each. values, gradient (t, c)
        float32; group_of (c,) int64.
        """
        rows, width = values.shape
        if not values.numel():
            return
        values, gradient = (part if part.stride(1) == 1 else part.contiguous() for part in (values, gradient))
        # Torch fills it before the first launch here: on a thread of autograd, that makes its context the current one.
        whole = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=values.device)
        largest = whole[-1:]
        blocks = min(-(-rows * width // (THREADS * EACH)), MOST_BLOCKS)
        slopes = (gradient, gradient.stride(0))
        self._kernels.launch("largest", (blocks, 1), THREADS, (*slopes, rows, width, largest))
        arguments = (values, values.stride(0), *slopes, group_of, rows, width, largest, counts, whole)
        self._kernels.launch("add_squares", (blocks, 1), THREADS, arguments)
        places = counts.numel()
        finish = (whole, largest, rows * width, gradient_sq, places)
        self._kernels.launch("finish", (-(-places // THREADS), 1), THREADS, finish)


@cache
def choose_squares(device: torch.device) -> CudaSquares | None:
    """The compiled kernels on CUDA; None on the CPU, and if they do not compile."""
    if device.type != "cuda":
        return None
    try:
        return CudaSquares(device)
    except CompilationFailed:  # the counter, compiled before, has warned of it
        return None
