"""The Mamba-2 forward pass in float32 on the CPU, with a tap at every site of `quambase.schema.sites`.

Taps see what upstream's `Mamba2Simple` (quamba/qMamba2.py:155-270) shows its hooks: dt_act before dt_bias and
softplus, ssd_out_act after the skip connection and before the gated norm, out_proj:input after norm and Hadamard.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from quambase.model.backbone import Backbone, State, Tap
from quambase.model.exponential import exp
from quambase.model.hadamard import hadamard
from quambase.model.mamba2_weights import Mamba2Config, Mamba2Weights
from quambase.model.operators.host_kernels import causal_conv1d_silu, ssd_scan
from quambase.model.packed_batch import Batch


def gated_rms_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, ngroups: int, eps: float) -> torch.Tensor:
    """Gate, then norm: y SiLU(z) over its root mean square within each of ``ngroups`` runs of channels, times weight.

    y, z (t, e); weight (e,). mamba_ssm's RMSNormGated with norm_before_gate False and group_size e / ngroups.
    """
    gated = (y * F.silu(z)).view(len(y), ngroups, -1)
    return F.rms_norm(gated, gated.shape[-1:], None, eps).view_as(y) * weight


class Mamba2(Backbone):
    """A Mamba-2 language model."""

    weights: Mamba2Weights

    def __init__(self, weights: Mamba2Weights, *, rotated: bool = False) -> None:
        self.weights = weights
        self.config: Mamba2Config = weights.config
        self.rotated = rotated
        # What the kernels read, laid out once: conv (k, channels), A (h,) negative.
        self._conv = [layer.conv_weight.T.contiguous().numpy() for layer in weights.layers]
        self._a = [-exp(layer.A_log) for layer in weights.layers]

    def _block(self, index: int, normalised: torch.Tensor, batch: Batch, tap: Tap | None) -> torch.Tensor:
        c = self.config
        layer = self.weights.layers[index]
        documents = slice(0, batch.documents)
        offsets = batch.offsets.numpy()
        widths = [c.d_inner, c.bc_width, c.bc_width]

        projected = F.linear(normalised, layer.in_proj)  # (t, 2e + 2gn + h)
        z, conv_in, dt = torch.split(projected, [c.d_inner, c.conv_width, c.heads], dim=1)
        conv_in = conv_in.contiguous()
        conv_out = torch.empty_like(conv_in)
        causal_conv1d_silu(conv_in.numpy(), self._conv[index], layer.conv_bias.numpy(), offsets, conv_out.numpy())
        x, b, read = (part.contiguous() for part in torch.split(conv_out, widths, dim=1))
        state = torch.zeros(batch.documents, c.d_inner, c.d_state)
        y = self._scan(index, x, dt, b, read, offsets, state)
        normed = gated_rms_norm(y, z, layer.gated_norm, c.ngroups, c.norm_eps)
        gated = hadamard(normed) if self.rotated else normed
        out = F.linear(gated, layer.out_proj)  # (t, d)
        if tap:
            x_in, b_in, c_in = torch.split(conv_in, widths, dim=1)
            identities = {"z_act": z, "x_conv_in": x_in, "B_conv_in": b_in, "C_conv_in": c_in, "x_conv_out": x}
            identities |= {"B_conv_out": b, "C_conv_out": read, "dt_act": dt, "ssm_state_act": state, "ssd_out_act": y}
            tap(index, "in_proj:input", normalised, documents)
            tap(index, "in_proj:output", projected, documents)
            for name, values in identities.items():
                tap(index, f"{name}:input", values, documents)
                tap(index, f"{name}:output", values, documents)
            tap(index, "out_proj:input", gated, documents)
            tap(index, "out_proj:output", out, documents)
        return out

    def _scan(
        self,
        index: int,
        x: torch.Tensor,
        dt: torch.Tensor,
        b: torch.Tensor,
        read: torch.Tensor,
        offsets: np.ndarray[tuple[int], np.dtype[np.int64]],
        state: torch.Tensor,
    ) -> torch.Tensor:
        """y (t, e) of x (t, e), dt (t, h) without its bias, B and C (t, gn); ``state`` is updated."""
        layer = self.weights.layers[index]
        delta = F.softplus(dt + layer.dt_bias)  # the identity above 20, as in mamba_ssm
        y = torch.empty_like(x)
        ssd_scan(
            x.numpy(),
            delta.numpy(),
            exp(delta * self._a[index]).numpy(),
            b.numpy(),
            read.numpy(),
            layer.D.numpy(),
            offsets,
            y.numpy(),
            state.numpy(),
        )
        return y

    def new_state(self, sequences: int) -> State:
        """The state of ``sequences`` sequences before their first token."""
        c = self.config
        return State(
            [torch.zeros(sequences, c.d_conv - 1, c.conv_width) for _ in range(c.n_layer)],
            [torch.zeros(sequences, c.d_inner, c.d_state) for _ in range(c.n_layer)],
        )

    def _block_step(self, index: int, normalised: torch.Tensor, state: State) -> torch.Tensor:
        c = self.config
        layer = self.weights.layers[index]
        projected = F.linear(normalised, layer.in_proj)
        z, conv_in, dt = torch.split(projected, [c.d_inner, c.conv_width, c.heads], dim=1)
        window = torch.cat([state.conv[index], conv_in.unsqueeze(1)], dim=1)  # (b, k, channels)
        state.conv[index] = window[:, 1:].contiguous()
        conv_out = F.silu(torch.einsum("bke,ek->be", window, layer.conv_weight) + layer.conv_bias)
        parts = torch.split(conv_out, [c.d_inner, c.bc_width, c.bc_width], dim=1)
        x, b, read = (part.contiguous() for part in parts)
        # Every sequence is a document of one token.
        y = self._scan(index, x, dt, b, read, np.arange(len(x) + 1), state.ssm[index])
        normed = gated_rms_norm(y, z, layer.gated_norm, c.ngroups, c.norm_eps)
        return F.linear(hadamard(normed) if self.rotated else normed, layer.out_proj)
