"""The Mamba-1 forward pass in float32 on the CPU, with a tap at every site of `quambase.schema.sites`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from quambase.model.batch import Batch
from quambase.model.hadamard import hadamard
from quambase.model.kernels import causal_conv1d_silu, selective_scan
from quambase.model.weights import LayerWeights, MambaConfig, MambaWeights
from quambase.schema.sites import HEAD_LAYER

HEAD_ROWS = 512
"""Tokens per chunk of logits when they are observed."""


class Tap(Protocol):
    """Receives every site's activation during a forward pass.

    ``values`` is (rows, channels) float32, the rows of the documents ``documents`` of the batch one after another;
    at the ssm_state sites (documents, e, n). A site may arrive in several calls of ascending documents. The tensor
    must not be changed or kept.
    """

    def __call__(self, layer: int, site: str, values: torch.Tensor, documents: slice) -> None: ...


@dataclass
class State:
    """What a decoding step carries on, for b sequences: per layer conv (b, k - 1, e) inputs and ssm (b, n, e)."""

    conv: list[torch.Tensor]
    ssm: list[torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, float32."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


class Mamba:
    """A Mamba-1 language model.

    ``rotated``: the weights were prepared (`quambase.model.prepare`), so the gated output is Hadamard-transformed
    before out_proj.
    """

    def __init__(self, weights: MambaWeights, *, rotated: bool = False) -> None:
        self.weights = weights
        self.config: MambaConfig = weights.config
        self.rotated = rotated
        # What the kernels read, laid out once: conv (k, e), A (n, e) negative.
        self._conv = [layer.conv_weight.T.contiguous().numpy() for layer in weights.layers]
        self._a = [-torch.exp(layer.A_log).T.contiguous() for layer in weights.layers]

    @torch.inference_mode()
    def hidden(self, batch: Batch, tap: Tap | None = None) -> torch.Tensor:
        """The normalised final hidden state (t, d), which is lm_head:input; ``tap`` sees every site on the way.

        With a tap the logits are computed too, in chunks, since lm_head:output is a site.
        """
        everything = slice(0, batch.documents)
        residual = F.embedding(batch.tokens, self.weights.embedding)
        for index, layer in enumerate(self.weights.layers):
            normalised = rms_norm(residual, layer.norm, self.config.norm_eps)
            residual += self._block(index, layer, normalised, batch, tap)
        out = rms_norm(residual, self.weights.norm_f, self.config.norm_eps)
        if tap:
            tap(HEAD_LAYER, "lm_head:input", out, everything)
            for documents in batch.chunks(HEAD_ROWS):
                rows = slice(int(batch.offsets[documents.start]), int(batch.offsets[documents.stop]))
                tap(HEAD_LAYER, "lm_head:output", self.logits(out[rows]), documents)
        return out

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (rows, v) of normalised hidden states (rows, d)."""
        return F.linear(hidden, self.weights.lm_head)

    def _block(
        self, index: int, layer: LayerWeights, normalised: torch.Tensor, batch: Batch, tap: Tap | None
    ) -> torch.Tensor:
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

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor, state: State) -> torch.Tensor:
        """Feed one token to each sequence: tokens (b,) int64, ``state`` is updated in place; logits (b, v)."""
        c = self.config
        offsets = np.arange(tokens.numel() + 1)  # every sequence is a document of one token
        residual = F.embedding(tokens, self.weights.embedding)
        for index, layer in enumerate(self.weights.layers):
            normalised = rms_norm(residual, layer.norm, c.norm_eps)
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
                offsets,
                y.numpy(),
                state.ssm[index].numpy(),
            )
            residual = residual + F.linear(hadamard(y) if self.rotated else y, layer.out_proj)
        return self.logits(rms_norm(residual, self.weights.norm_f, c.norm_eps))
