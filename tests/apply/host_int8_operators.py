"""The device's INT8 operators by the CPU's kernels: the slow twin of the CUDA ones, which runs anywhere."""

from __future__ import annotations

import numpy as np
import torch

from quambase.apply.int8 import channel_kernels as kernels2
from quambase.apply.int8 import host_kernels as kernels
from quambase.apply.int8.arithmetic import Int8Weight, dequantize, matmul, softplus_delta, to_half
from quambase.apply.int8.cuda_operators import ScanScales
from quambase.model.hadamard import hadamard
from quambase.model.operators.host_kernels import selective_scan, ssd_scan
from quambase.model.operators.torch import gated_rms_norm
from quambase.model.packed_batch import PlacedBatch


class HostInt8Operators:
    """`quambase.apply.int8.cuda_operators.CudaInt8Operators` on the CPU. ``ngroups``, ``d_inner``: of a Mamba-2."""

    def __init__(self, ngroups: int = 1, d_inner: int = 0) -> None:
        self.ngroups, self.d_inner = ngroups, d_inner

    def add_norm_to_int8(self, x, residual, eps, scale):
        out = torch.empty(residual.shape, dtype=torch.int8)
        kernels.add_rms_norm_int8(x.float().numpy(), residual.numpy(), np.float32(eps), np.float32(scale), out.numpy())
        return out

    def add_norm_to_half(self, x, residual, eps):
        out = torch.empty_like(residual)
        kernels.add_rms_norm(x.float().numpy(), residual.numpy(), np.float32(eps), out.numpy())
        return out.half()

    def _sums(self, x, weight):
        return matmul(x, Int8Weight(weight[:, : x.shape[1]].contiguous(), 1.0))

    def linear_to_int8(self, x, weight, first, second):
        acc = self._sums(x, weight)
        out = torch.empty(acc.shape, dtype=torch.int8)
        if isinstance(first, torch.Tensor):
            kernels2.scale_columns_to_int8(acc.numpy(), first.numpy(), np.float32(second), False, out.numpy())
        else:
            kernels.scale_to_int8(acc.numpy(), np.float32(first), np.float32(second), out.numpy())
        return out

    def linear_to_half(self, x, weight, first, second):
        return self._sums(x, weight).mul_(first).mul_(second).half()

    def conv_silu(self, x, taps, scale_wx, bias, scale_out, batch: PlacedBatch):
        out = torch.empty(x.shape, dtype=torch.int8)
        vectors = (taps.numpy(), scale_wx.numpy(), bias.numpy(), scale_out.numpy())
        kernels2.conv_channels_int8(x.contiguous().numpy(), 0, *vectors, batch.host.offsets.numpy(), out.numpy())
        return out

    def selective_scan(self, u, delta, bc, z, scales: ScanScales, a, d, bias, batch: PlacedBatch):
        states = len(a)
        b_c = dequantize(bc, scales.bc)
        y = torch.empty(u.shape)
        selective_scan(
            dequantize(u, scales.u).numpy(),
            softplus_delta(delta, scales.delta, bias).numpy(),
            a.numpy(),
            b_c[:, :states].contiguous().numpy(),
            b_c[:, states:].contiguous().numpy(),
            d.numpy(),
            dequantize(z, scales.z).numpy(),
            batch.host.offsets.numpy(),
            y.numpy(),
            np.zeros((batch.host.documents, *a.shape), np.float32),
        )
        return y.half()

    def rotate(self, y, factor, wrap):
        rotated = hadamard(y, factor)
        out = torch.empty(y.shape, dtype=torch.int8)
        kernels.round_to_int8(rotated.numpy(), wrap, out.numpy())
        return out

    def ssd_scan(self, conv_out, scales, dt, dt_scale, a, d, bias, batch: PlacedBatch):
        e = self.d_inner
        width = (conv_out.shape[1] - e) // 2
        values = conv_out.float() * scales
        x, b, c = (part.contiguous().numpy() for part in torch.split(to_half(values), [e, width, width], dim=1))
        delta = softplus_delta(dt, dt_scale, bias)
        y = torch.empty(len(conv_out), e)
        state = np.zeros((batch.host.documents, e, width // self.ngroups), np.float32)
        decay, no_skip = torch.exp(delta * a), np.zeros(len(a), np.float32)
        ssd_scan(x, delta.numpy(), decay.numpy(), b, c, no_skip, batch.host.offsets.numpy(), y.numpy(), state)
        y += values[:, :e] * torch.repeat_interleave(d, e // len(a))
        return y.half()

    def gated_rotate(self, y, z, z_scale, weight, eps, factor, wrap):
        normed = gated_rms_norm(y.float(), dequantize(z, z_scale), weight, self.ngroups, eps)
        return self.rotate(to_half(normed), factor, wrap)
