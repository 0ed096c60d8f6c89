"""The operators that an INT8 model leaves in 16 bit: the floating-point model's own, rounded to float16."""

from __future__ import annotations

import torch

from quambase.apply.int8.arithmetic import to_half
from quambase.model.operators.interface import BlockState, Operators, ScanInputs, SsdInputs, by_state_index
from quambase.model.packed_batch import PlacedBatch, last_rows


class HalfOperators:
    """Convolution, scans, gated norm and Hadamard transform of float16 values, which are float32 tensors on the CPU.

    They compute in float32 and round a result once. Convolution and scans take a ``state`` or None, as
    `quambase.apply.int8.operators.interface.Int8Operators` have it: convolution inputs as float16 values (``dtype``),
    the scan's state in float32. ``decodes``: every document is the next token of a sequence.
    """

    def __init__(self, floating: Operators, *, decodes: bool) -> None:
        """``floating``: of float32 on the CPU, of float16 on CUDA."""
        self.floating, self.decodes, self.dtype = floating, decodes, floating.dtype

    def conv_silu(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, batch: PlacedBatch, state: BlockState | None
    ) -> torch.Tensor:
        """As `Operators.conv_silu`."""
        found = self.floating.conv_silu(x, weight, bias, batch, state if self.decodes else None)
        if state is not None and not self.decodes:
            state.conv = last_rows(x, batch, len(weight) - 1)
        return self._rounded(found)

    def selective_scan(self, inputs: ScanInputs, batch: PlacedBatch, state: BlockState | None) -> torch.Tensor:
        """y of `Operators.selective_scan`."""
        y, last = self.floating.selective_scan(inputs, batch, state if self.decodes else None)
        if state is not None:
            state.ssm = last if self.decodes else by_state_index(last)
        return self._rounded(y)

    def ssd_scan(self, inputs: SsdInputs, batch: PlacedBatch, state: BlockState | None) -> torch.Tensor:
        """y of `Operators.ssd_scan`."""
        y, last = self.floating.ssd_scan(inputs, batch, state if self.decodes else None)
        if state is not None:
            state.ssm = last
        return self._rounded(y)

    def gated_norm(self, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As `Operators.gated_norm`, Hadamard-transformed."""
        return self._rounded(self.floating.gated_norm(y, z, weight, eps, rotated=True))

    def hadamard(self, y: torch.Tensor) -> torch.Tensor:
        """As `Operators.hadamard`."""
        return self._rounded(self.floating.hadamard(y))

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        return values if values.dtype == torch.float16 else to_half(values)
