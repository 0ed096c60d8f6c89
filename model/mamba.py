"""The Mamba-1 forward pass in float32 on the CPU, with a tap at every site of `quambase.schema.sites`."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from quambase.model.backbone import Backbone, State, Tap
from quambase.model.exponential import exp
from quambase.model.hadamard import hadamard
from quambase.model.operators.host_kernels import causal_conv1d_silu, selective_scan
from quambase.model.packed_batch import Batch
from quambase.model.weights import MambaConfig, MambaWeights


class Mamba(Backbone):
    """A Mamba-1 language model."""

    weights: MambaWeights

    def __init__(self, weights: MambaWeights, *, rotated: bool = False) -> None:
        self.weights = weights
        self.config: MambaConfig = weights.config
        self.rotated = rotated
        # What the kernels read, laid out once: conv (k, e), A (n, e) negative.
        self._conv = [layer.conv_weight.T.contiguous().numpy() for layer in weights.layers]
        self._a = [-exp(layer.A_log).T.contiguous() for layer in weights.layers]

    def _block(self, index: int, normalised: torch.Tensor, batch: Batch, tap: Tap | None) -> torch.Tensor:
        layer = self.weights.layers[index]
        c = self.config
        documents = slice(0, batch.documents)
        offsets = batch.offsets.numpy()

        xz = F.linear(normalised, layer.in_proj)  # (t, 2e)
        u = torch.empty((xz.shape[0], c.d_inner))
        causal_conv1d_silu(xz.numpy(), self._conv[index], layer.conv_bias.numpy(), offsets, u.numpy())
        dt_b_c = F.linear(u, layer.x_proj)  # (t, r + 2n)
        low_rank = dt_b_c[:, : c.dt_rank]
        delta = F.linear(low_rank, layer.dt_proj)  # (t, e), without its bias
        if tap:
            tap(index, "in_proj:input", normalised, documents)
            tap(index, "in_proj:output", xz, documents)
            tap(index, "x_proj:input", u, documents)
            tap(index, "x_proj:output", dt_b_c, documents)
            tap(index, "dt_proj:input", low_rank, documents)
            tap(index, "dt_proj:output", delta, documents)

        delta = F.softplus(delta.add_(layer.dt_bias))  # the identity above 20, as in mamba_ssm
        state = np.zeros((batch.documents, c.d_state, c.d_inner), np.float32)
        y = torch.empty_like(u)
        selective_scan(
            u.numpy(),
            delta.numpy(),
            self._a[index].numpy(),
            dt_b_c[:, c.dt_rank : c.dt_rank + c.d_state].contiguous().numpy(),
            dt_b_c[:, c.dt_rank + c.d_state :].contiguous().numpy(),
            layer.D.numpy(),
            xz[:, c.d_inner :].contiguous().numpy(),
            offsets,
            y.numpy(),
            state,
        )
        gated = hadamard(y) if self.rotated else y
        out = F.linear(gated, layer.out_proj)  # (t, d)
        if tap:
            last = torch.from_numpy(np.ascontiguousarray(state.transpose(0, 2, 1)))  # (documents, e, n)
            tap(index, "ssm_state_act:input", last, documents)
            tap(index, "ssm_state_act:output", last, documents)
            tap(index, "out_proj:input", gated, documents)
            tap(index, "out_proj:output", out, documents)
        return out

    def new_state(self, sequences: int) -> State:
        """The state of ``sequences`` sequences before their first token."""
        c = self.config
        return State(
            [torch.zeros(sequences, c.d_conv - 1, c.d_inner) for _ in range(c.n_layer)],
            [torch.zeros(sequences, c.d_state, c.d_inner) for _ in range(c.n_layer)],
        )

    def _block_step(self, index: int, normalised: torch.Tensor, state: State) -> torch.Tensor:
        c = self.config
        layer = self.weights.layers[index]
        xz = F.linear(normalised, layer.in_proj)
        x, z = xz[:, : c.d_inner], xz[:, c.d_inner :]
        window = torch.cat([state.conv[index], x.unsqueeze(1)], dim=1)  # (b, k, e)
        state.conv[index] = window[:, 1:].contiguous()
        u = F.silu(torch.einsum("bke,ek->be", window, layer.conv_weight) + layer.conv_bias)
        dt_b_c = F.linear(u, layer.x_proj)
        dt, b, read = torch.split(dt_b_c, [c.dt_rank, c.d_state, c.d_state], dim=1)
        delta = F.softplus(F.linear(dt, layer.dt_proj, layer.dt_bias))
        y = torch.empty_like(u)
        selective_scan(
            u.numpy(),
            delta.numpy(),
            self._a[index].numpy(),
            b.contiguous().numpy(),
            read.contiguous().numpy(),
            layer.D.numpy(),
            z.contiguous().numpy(),
            np.arange(len(u) + 1),  # every sequence is a document of one token
            y.numpy(),
            state.ssm[index].numpy(),
        )
        return F.linear(hadamard(y) if self.rotated else y, layer.out_proj)
