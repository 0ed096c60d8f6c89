"""Scans that keep their state in a simulated format, in plain PyTorch on any device: one operation after the other.

They take codes as `quambase.apply.int8.operators.interface.Int8Operators` have them, and compute in float32.
"""

from __future__ import annotations

import torch

from quambase.apply.int8.arithmetic import decoded, to_half
from quambase.apply.int8.operators.interface import ScanScales, SsdCodes, SsdScales
from quambase.apply.int8.state_formats import SimulatedState
from quambase.model.operators.interface import BlockState, ScanInputs, SsdInputs
from quambase.model.operators.torch import TorchOperators
from quambase.model.packed_batch import PlacedBatch


def selective_scan(inputs: ScanInputs, scales: ScanScales, batch: PlacedBatch, state: SimulatedState) -> torch.Tensor:
    """y (t, e) float32 of a Mamba-1's scan; ``state`` keeps what the documents, or next tokens, make of it."""
    values = inputs._replace(
        u=decoded(inputs.u, scales.u, scales.u_zero),
        delta=decoded(inputs.delta, scales.delta),
        bc=decoded(inputs.bc, scales.bc),
        z=decoded(inputs.z, scales.z),
    )
    before = _before(state, batch, state.ssm.transpose(1, 2))
    exact = TorchOperators(torch.float32, device=inputs.u.device)
    y, last = exact.selective_scan(values, batch, before)
    state.keep(last.transpose(1, 2).contiguous())
    return y


def ssd_scan(
    inputs: SsdCodes, scales: SsdScales, batch: PlacedBatch, state: SimulatedState, ngroups: int
) -> torch.Tensor:
    """y (t, e) float32 of a Mamba-2's scan. Of whole documents x, B, C and the last state are rounded to float16, as
    the INT8 model's prefill does; y is then not that of the model, whose skip connection reads x before.
    """
    conv_out, dt, a, d, bias = inputs
    values = decoded(conv_out, scales.conv_out, scales.zero)
    if not batch.decodes:
        values = to_half(values)
    channels = state.ssm.shape[1]
    width = (values.shape[1] - channels) // 2
    x, b, c = torch.split(values, [channels, width, width], dim=1)
    exact = TorchOperators(torch.float32, ngroups, conv_out.device)
    read = SsdInputs(x, b, c, decoded(dt, scales.dt), a, d, bias)
    y, last = exact.ssd_scan(read, batch, _before(state, batch, state.ssm))
    state.keep(last if batch.decodes else to_half(last))
    return y


def _before(state: SimulatedState, batch: PlacedBatch, ssm: torch.Tensor) -> BlockState | None:
    """A copy of the state that next tokens read; None before whole documents."""
    return BlockState(state.conv, ssm.clone()) if batch.decodes else None
