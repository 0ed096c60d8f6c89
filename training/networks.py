"""Mamba-1 and Mamba-2 for training: mamba-ssm's parameter names and initialisation, plain torch but for the scans.

Each block is a dense function before the scan, the scan, and a dense function after it; the dense ones take tensors
only, so that `torch.compile` compiles them once for all layers. Activations are of ``dtype``, parameters, residual
stream and loss float32. Mamba-1 runs channel-major (e, b, l), the layout its scan kernel wants, so nothing is copied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.scans import ssd_scan, ssm_scan
from training.shape import Shape

EPS = 1e-5


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last axis, computed in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def before_ssm(
    h: Tensor, norm: Tensor, in_proj: Tensor, conv: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Mamba-1 up to the scan. h (b, l, d) -> x, dt, z, each (b, e, l) and channel-major in memory; B, C (b, n, l)."""
    batch, length, d = h.shape
    u = rms_norm(h, norm).to(dtype).view(batch * length, d)
    x, z = (in_proj.to(dtype) @ u.t()).view(2, -1, batch, length)
    k = conv.shape[-1]
    padded = F.pad(x, (k - 1, 0))
    taps = [padded[..., i : i + length].float() * conv[:, 0, i, None, None] for i in range(k)]
    x = F.silu(functools.reduce(torch.add, taps) + conv_bias[:, None, None]).to(dtype)
    projected = x_proj.to(dtype) @ x.view(-1, batch * length)
    rank = dt_proj.shape[1]
    dt = (dt_proj.to(dtype) @ projected[:rank]).view(-1, batch, length)
    B, C = (part.contiguous() for part in projected[rank:].view(2, -1, batch, length).transpose(1, 2))
    return x.transpose(0, 1), dt.transpose(0, 1), z.transpose(0, 1), B, C


def after_ssm(h: Tensor, y: Tensor, out_proj: Tensor) -> Tensor:
    """The residual (b, l, d) after y (b, e, l), the gated output of the scan."""
    return h + F.linear(y.transpose(1, 2), out_proj.to(y.dtype)).float()


def before_ssd(
    h: Tensor, norm: Tensor, in_proj: Tensor, conv: Tensor, conv_bias: Tensor, inner: int, states: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Mamba-2 up to the scan. h (b, l, d) -> z, x (b, l, e); B, C (b, l, g n); dt (b, l, heads)."""
    length = h.shape[1]
    projected = F.linear(rms_norm(h, norm).to(dtype), in_proj.to(dtype))
    z, mixed, dt = torch.split(projected, [inner, inner + 2 * states, projected.shape[-1] - 2 * inner - 2 * states], -1)
    k = conv.shape[-1]
    padded = F.pad(mixed, (0, 0, k - 1, 0))
    taps = [padded[:, i : i + length].float() * conv[:, 0, i] for i in range(k)]
    mixed = F.silu(functools.reduce(torch.add, taps) + conv_bias).to(dtype)
    x, B, C = torch.split(mixed, [inner, states, states], -1)
    return z, x, B, C, dt


def after_ssd(h: Tensor, y: Tensor, z: Tensor, norm: Tensor, out_proj: Tensor, groups: int) -> Tensor:
    """The residual (b, l, d) after y (b, l, e): gate, RMSNorm in each SSD group, out_proj."""
    gated = y.float() * F.silu(z.float())
    shape = gated.shape
    normed = rms_norm(gated.view(*shape[:-1], groups, -1), norm.view(groups, -1)).view(shape)
    return h + F.linear(normed.to(y.dtype), out_proj.to(y.dtype)).float()


def head_loss(h: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean cross entropy in nats of the tied head. h (b, l, d), targets (b, l)."""
    return F.cross_entropy(head(h, norm, embedding, dtype).float().flatten(0, 1), targets.flatten())


def head(h: Tensor, norm: Tensor, embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits (b, l, v) of ``dtype``."""
    return F.linear(rms_norm(h, norm).to(dtype), embedding.to(dtype))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


class _Mixer(nn.Module):
    """What both mixers share: projections, the depthwise convolution's parameters, A, D."""

    def __init__(self, shape: Shape, projected: int, convolved: int) -> None:
        super().__init__()
        self.shape = shape
        self.in_proj = nn.Linear(shape.d_model, projected, bias=False)
        self.conv1d = nn.Conv1d(convolved, convolved, shape.d_conv, groups=convolved)
        self.out_proj = nn.Linear(shape.d_inner, shape.d_model, bias=False)
        with torch.no_grad():  # one residual branch a layer (GPT-2's rule, as mamba-ssm applies it)
            self.out_proj.weight /= math.sqrt(shape.n_layer)

    @property
    def conv_bias(self) -> Tensor:
        """The convolution's bias (channels,)."""
        return cast(Tensor, self.conv1d.bias)


def _dt_bias(size: int) -> Tensor:
    """Inverse softplus of time steps log-uniform in [0.001, 0.1]."""
    dt = torch.exp(torch.rand(size) * math.log(100) + math.log(0.001))
    return dt + torch.log(-torch.expm1(-dt))


class Mamba1Mixer(_Mixer):
    """Selective SSM with a state of its own a channel."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, 2 * shape.d_inner, shape.d_inner)
        self.x_proj = nn.Linear(shape.d_inner, shape.dt_rank + 2 * shape.d_state, bias=False)
        self.dt_proj = nn.Linear(shape.dt_rank, shape.d_inner)
        nn.init.uniform_(self.dt_proj.weight, -(shape.dt_rank**-0.5), shape.dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(_dt_bias(shape.d_inner))
        steps = torch.arange(1, shape.d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(steps.log().repeat(shape.d_inner, 1))
        self.D = nn.Parameter(torch.ones(shape.d_inner))

    def residual(self, h: Tensor, norm: Tensor, dtype: torch.dtype, compiled: bool) -> Tensor:
        """h (b, l, d) -> h plus this layer's branch."""
        before = _compiled(before_ssm) if compiled else before_ssm
        after = _compiled(after_ssm) if compiled else after_ssm
        x, dt, z, B, C = before(
            h, norm, self.in_proj.weight, self.conv1d.weight, self.conv_bias, self.x_proj.weight,
            self.dt_proj.weight, dtype,
        )  # fmt: skip
        y = ssm_scan(x, dt, -torch.exp(self.A_log), B, C, self.D, z, self.dt_proj.bias)
        return cast(Tensor, after(h, y, self.out_proj.weight))


class Mamba2Mixer(_Mixer):
    """State-space duality: a decay a head, B and C shared by the heads of an SSD group."""

    def __init__(self, shape: Shape) -> None:
        states = shape.ngroups * shape.d_state
        super().__init__(shape, 2 * shape.d_inner + 2 * states + shape.heads, shape.d_inner + 2 * states)
        self.dt_bias = nn.Parameter(_dt_bias(shape.heads))
        self.A_log = nn.Parameter(torch.empty(shape.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(shape.heads))
        self.norm = nn.RMSNorm(shape.d_inner, eps=EPS)

    def residual(self, h: Tensor, norm: Tensor, dtype: torch.dtype, compiled: bool) -> Tensor:
        """h (b, l, d) -> h plus this layer's branch."""
        s = self.shape
        before = _compiled(before_ssd) if compiled else before_ssd
        after = _compiled(after_ssd) if compiled else after_ssd
        z, x, B, C, dt = before(
            h, norm, self.in_proj.weight, self.conv1d.weight, self.conv_bias, s.d_inner, s.ngroups * s.d_state, dtype
        )
        y = ssd_scan(
            x.unflatten(-1, (s.heads, s.headdim)),
            dt,
            -torch.exp(self.A_log),
            B.unflatten(-1, (s.ngroups, s.d_state)),
            C.unflatten(-1, (s.ngroups, s.d_state)),
            self.D,
            self.dt_bias,
        )
        return cast(Tensor, after(h, y.flatten(2), z, self.norm.weight, self.out_proj.weight, s.ngroups))


class _Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.d_model, eps=EPS)
        self.mixer = Mamba1Mixer(shape) if shape.architecture == "mamba1" else Mamba2Mixer(shape)


class _Backbone(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(_Block(shape) for _ in range(shape.n_layer))
        self.norm_f = nn.RMSNorm(shape.d_model, eps=EPS)


class LanguageModel(nn.Module):
    """The whole model; its state dict has mamba-ssm's names (the tied head left out)."""

    def __init__(self, shape: Shape, *, dtype: torch.dtype = torch.float32, compiled: bool = False) -> None:
        super().__init__()
        self.shape, self.dtype, self.compiled = shape, dtype, compiled
        self.backbone = _Backbone(shape)

    def hidden(self, ids: Tensor) -> Tensor:
        """Residual stream (b, l, d) after the last layer, float32. ids (b, l)."""
        h: Tensor = self.backbone.embedding(ids)
        for block in self.backbone.layers:
            mixer = cast("Mamba1Mixer | Mamba2Mixer", block.mixer)
            h = mixer.residual(h, cast(nn.RMSNorm, block.norm).weight, self.dtype, self.compiled)
        return h

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (b, l, v). ids (b, l)."""
        return head(self.hidden(ids), self.backbone.norm_f.weight, self.backbone.embedding.weight, self.dtype)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean cross entropy in nats of the next tokens. ids (b, l + 1)."""
        function = _compiled(head_loss) if self.compiled else head_loss
        h = self.hidden(ids[:, :-1])
        norm, embedding = self.backbone.norm_f.weight, self.backbone.embedding.weight
        return cast(Tensor, function(h, norm, embedding, ids[:, 1:].contiguous(), self.dtype))
