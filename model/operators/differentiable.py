"""Operators that PyTorch can differentiate with respect to activations; weights are constants.

Three forms compute the same: compiled loops on the CPU, compiled kernels on CUDA (cuda_differentiable.py), and
PyTorch's own operations on any device. All recompute intermediate results in the backward pass, so memory grows with
the inputs and not with the states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from quambase.model.exponential import exp
from quambase.model.hadamard import hadamard
from quambase.model.operators import host_kernels as kernels
from quambase.model.operators.interface import BlockState, ScanInputs, SsdInputs
from quambase.model.operators.ssd_gradients import CHUNK
from quambase.model.operators.torch import CPU, TorchOperators
from quambase.model.packed_batch import PlacedBatch

RUN = 24
"""Tokens of a Mamba-1's scan that follow one another in a loop; runs of them are computed side by side."""


def on_gradient(values: torch.Tensor, receive: Callable[[torch.Tensor], None]) -> None:
    """Call ``receive`` with the gradient of ``values``, of the same shape, during the backward pass.

    If ``values`` is a slice that only the caller uses, no gradient reaches it; so the hook is on the tensor it is a
    slice of.
    """
    whole = values if values._base is None else values._base
    shape, strides, first = values.shape, values.stride(), values.storage_offset() - whole.storage_offset()

    def hook(gradient: torch.Tensor) -> None:
        of_whole = gradient.contiguous()
        receive(of_whole.as_strided(shape, strides, of_whole.storage_offset() + first))

    whole.register_hook(hook)  # type: ignore[no-untyped-call]


def applied(function: type[torch.autograd.Function], *arguments: Any) -> torch.Tensor:
    """What ``function`` returns, as a tensor of the autograd graph."""
    found: torch.Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


class DifferentiableOperators(TorchOperators):
    """`quambase.model.operators.interface.Operators` of float32. ``state`` must be None; the returned final states are
    zeros, since nothing reads them.

    Scans run over zero-padded documents: zeros at the end change nothing, since a scan is causal.
    """

    head_rows = 512

    def __init__(self, ngroups: int = 1, device: torch.device = CPU) -> None:
        super().__init__(torch.float32, ngroups, device)

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As `Operators.add_norm`. Gradients of a forward pass end at its first norm's input."""
        residual += x
        current = residual.clone()  # the residual stream changes before the backward pass
        if not current.requires_grad:
            current.requires_grad_()
        return F.rms_norm(current, weight.shape, weight, eps)

    def conv_silu(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        batch: PlacedBatch,
        state: BlockState | None = None,
    ) -> torch.Tensor:
        """As `Operators.conv_silu`."""
        place = torch.arange(len(x), device=self.device) - batch.starts  # of each token in its document
        total = torch.addcmul(bias, weight[-1], x)
        for back in range(1, len(weight)):
            earlier = F.pad(x, (0, 0, back, 0))[: len(x)]
            total = total + earlier * (weight[-1 - back] * (place >= back)[:, None])
        return F.silu(total)

    def selective_scan(
        self, inputs: ScanInputs, batch: PlacedBatch, state: BlockState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Operators.selective_scan`."""
        u, delta, bc, z, a, d, bias = inputs
        padded = Padding(batch, RUN)
        parts = map(padded.pad, (F.softplus(delta + bias), u, bc))
        scanned = padded.packed(checkpoint(_recurrent_scan, *parts, a, use_reentrant=False))
        return (scanned + d * u) * F.silu(z), self.no_states(batch, a.T.shape)

    def ssd_scan(
        self, inputs: SsdInputs, batch: PlacedBatch, state: BlockState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Operators.ssd_scan`."""
        x, b, c, dt, a, d, bias = inputs
        states = b.shape[1] // self.ngroups
        wide = x.view(len(x), len(a), -1)
        padded = Padding(batch, CHUNK)
        grouped = [part.view(len(x), self.ngroups, states) for part in (b, c)]
        parts = map(padded.pad, (wide, *grouped, F.softplus(dt + bias)))
        scanned = padded.packed(checkpoint(_chunked_scan, *parts, a, use_reentrant=False))
        return (scanned + d[:, None] * wide).view(x.shape), self.no_states(batch, (x.shape[1], states))

    def no_states(self, batch: PlacedBatch, shape: tuple[int, ...]) -> torch.Tensor:
        """Zeros in place of the final states, of ``shape`` for each document."""
        return torch.zeros(batch.host.documents, *shape, device=self.device)


class HostDifferentiableOperators(DifferentiableOperators):
    """The same on the CPU, with the compiled loops of `quambase.model.operators.host_kernels`."""

    def selective_scan(
        self, inputs: ScanInputs, batch: PlacedBatch, state: BlockState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Operators.selective_scan`."""
        stepped = inputs._replace(delta=F.softplus(inputs.delta + inputs.bias))
        y = applied(_HostSelectiveScan, batch.host.offsets, *stepped)
        return y, self.no_states(batch, inputs.a.T.shape)

    def ssd_scan(
        self, inputs: SsdInputs, batch: PlacedBatch, state: BlockState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Operators.ssd_scan`."""
        stepped = inputs._replace(dt=F.softplus(inputs.dt + inputs.bias))
        y = applied(_HostSsdScan, batch.host.offsets, self.ngroups, *stepped)
        return y, self.no_states(batch, (inputs.x.shape[1], inputs.b.shape[1] // self.ngroups))

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """As `Operators.hadamard`."""
        return applied(_HostHadamard, x)


class Padding:
    """Converts packed rows (t, ...) to zero-padded documents (b, l, ...), l a multiple of ``multiple``, and back."""

    def __init__(self, batch: PlacedBatch, multiple: int = 1) -> None:
        lengths = batch.host.offsets.diff()
        self.documents = batch.host.documents
        self.length = -(-int(lengths.max()) // multiple) * multiple
        numbers = torch.repeat_interleave(torch.arange(self.documents), lengths)
        within = torch.arange(len(numbers)) - batch.host.offsets[numbers]
        self.rows = (numbers * self.length + within).to(batch.tokens.device)

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """(b, l, ...) of (t, ...)."""
        flat = packed.new_zeros((self.documents * self.length, *packed.shape[1:]))
        return flat.index_copy(0, self.rows, packed).view(self.documents, self.length, *packed.shape[1:])

    def packed(self, padded: torch.Tensor) -> torch.Tensor:
        """(t, ...) of (b, l, ...)."""
        return padded.flatten(0, 1)[self.rows]


def _linear_recurrence(decay: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """h[t] = decay[t] h[t - 1] + added[t] from h[-1] = 0, along the first axis, a multiple of RUN; all (l, ...).

    Runs of RUN places are computed side by side as if each began at zero, then each run's last value goes on through
    the next: RUN + l / RUN steps in turn, instead of l.
    """
    shape = -1, RUN, *added.shape[1:]
    decays, h = decay.view(shape), added.clone().view(shape)
    since = decays.clone()  # the product of the decays since the run began
    for t in range(1, RUN):
        h[:, t].addcmul_(decays[:, t], h[:, t - 1])
        since[:, t].mul_(since[:, t - 1])
    carried = torch.zeros_like(h[:, 0])
    for run in range(1, len(h)):
        torch.addcmul(h[run - 1, -1], since[run - 1, -1], carried[run - 1], out=carried[run])
    return h.addcmul_(since, carried[:, None]).view_as(added)


class _LinearRecurrence(torch.autograd.Function):
    """`_linear_recurrence`. Its adjoint is the same recurrence backwards: g[t] = grad[t] + decay[t + 1] g[t + 1], the
    gradient of added[t]; that of decay[t] is g[t] h[t - 1].
    """

    @staticmethod
    def forward(ctx: Any, decay: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """h."""
        h = _linear_recurrence(decay, added)
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of decay and added."""
        decay, h = ctx.saved_tensors
        later = torch.zeros_like(decay)  # decay[t + 1], last place first
        later[1:] = decay[1:].flip(0)
        g = _linear_recurrence(later, gradients[0].flip(0)).flip(0)
        of_decay = torch.empty_like(g)
        of_decay[0] = 0
        torch.mul(g[1:], h[:-1], out=of_decay[1:])
        return of_decay, g


def _recurrent_scan(step: torch.Tensor, u: torch.Tensor, bc: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """sum_n C[n] h[n] (b, l, e) of h[n] = exp(step A[n]) h[n] + step B[n] u.

    step, u (b, l, e); bc (b, l, 2n); a (n, e). l is a multiple of RUN.
    """
    step, u, bc = (part.transpose(0, 1)[..., None, :] for part in (step, u, bc))  # (l, b, 1, ...)
    b, c = bc.transpose(2, 3).chunk(2, dim=2)  # (l, b, n, 1)
    h = applied(_LinearRecurrence, torch.exp(step * a), b * (step * u))  # (l, b, n, e)
    return (c * h).sum(2).transpose(0, 1)


def _chunked_scan(
    x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, step: torch.Tensor, a: torch.Tensor
) -> torch.Tensor:
    """The SSD scan without skip connection (b, l, h, p) by matrix products over chunks (Dao & Gu 2024, listing 1).

    x (b, l, h, p); b, c (b, l, g, n); step (b, l, h); a (h,). l is a multiple of CHUNK.
    """
    documents, length, heads, _ = x.shape
    share = heads // b.shape[2]

    def chunks(part: torch.Tensor) -> torch.Tensor:
        """(b, chunks, heads or groups, CHUNK, ...)."""
        return part.view(documents, length // CHUNK, CHUNK, *part.shape[2:]).transpose(2, 3)

    logs = chunks(step * a).cumsum(-1)  # logarithm of the decay since the chunk's first token
    driven = chunks(step)[..., None] * chunks(x)  # (b, k, h, q, p)
    wide_b, wide_c = (chunks(part).repeat_interleave(share, 2) for part in (b, c))  # (b, k, h, q, n)
    past = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
    between = (logs[..., :, None] - logs[..., None, :]).masked_fill(~past, -torch.inf).exp()
    scores = chunks(c) @ chunks(b).transpose(-1, -2)  # (b, k, g, q, q)
    y = (scores.repeat_interleave(share, 2) * between) @ driven
    # What each chunk adds to the state, and the state before it.
    added = (driven * torch.exp(logs[..., -1:] - logs)[..., None]).transpose(-1, -2) @ wide_b  # (b, k, h, p, n)
    whole = torch.exp(logs[..., -1])[..., None, None]
    states = [torch.zeros_like(added[:, 0])]
    for chunk in range(added.shape[1] - 1):
        states.append(whole[:, chunk] * states[-1] + added[:, chunk])
    y = y + torch.exp(logs)[..., None] * (wide_c @ torch.stack(states, 1).transpose(-1, -2))
    return y.transpose(2, 3).reshape(x.shape)


class _HostSelectiveScan(torch.autograd.Function):
    """`Operators.selective_scan` of float32 tensors on the CPU; the gradients of u, step, bc and z."""

    @staticmethod
    def forward(ctx: Any, offsets: torch.Tensor, *stepped: torch.Tensor) -> torch.Tensor:
        """y; ``stepped``: as `ScanInputs` has them, delta after its bias and softplus."""
        u, step, bc, z, a, d, _ = stepped
        b, c = (part.contiguous() for part in bc.chunk(2, dim=1))
        inputs = [u, step, a, b, c, d, z.contiguous(), offsets]
        y, states = torch.empty_like(u), torch.zeros(len(offsets) - 1, *a.shape)
        kernels.selective_scan(*(part.numpy() for part in [*inputs, y, states]))
        ctx.save_for_backward(*inputs)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """As the arguments of `forward`."""
        inputs = ctx.saved_tensors
        u, a = inputs[0], inputs[2]
        of_u, of_step, of_z = torch.empty(3, *u.shape)
        blocks = -(-u.shape[1] // kernels.GRADIENT_BLOCK)
        of_bc = torch.empty(blocks, len(u), 2 * len(a))  # of each block of channels
        written = [gradients[0].contiguous(), of_u, of_step, of_z, of_bc]
        kernels.selective_scan_gradients(*(part.numpy() for part in [*inputs, *written]))
        return None, of_u, of_step, of_bc.sum(0), of_z, None, None, None


class _HostSsdScan(torch.autograd.Function):
    """`Operators.ssd_scan` of float32 tensors on the CPU; the gradients of x, b, c and step."""

    @staticmethod
    def forward(ctx: Any, offsets: torch.Tensor, ngroups: int, *stepped: torch.Tensor) -> torch.Tensor:
        """y; ``stepped``: as `SsdInputs` has them, dt after its bias and softplus."""
        x, b, c = (part.contiguous() for part in stepped[:3])
        step, a, d, _ = stepped[3:]
        decay = exp(step * a)
        y, states = torch.empty_like(x), torch.zeros(len(offsets) - 1, x.shape[1], b.shape[1] // ngroups)
        kernels.ssd_scan(*(part.numpy() for part in (x, step, decay, b, c, d, offsets, y, states)))
        ctx.ngroups = ngroups
        ctx.save_for_backward(x, step, decay, a, b, c, d, offsets)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """As the arguments of `forward`."""
        inputs = ctx.saved_tensors
        x, step, b = inputs[0], inputs[1], inputs[4]
        width = 2 * b.shape[1] // ctx.ngroups
        of_x, of_step = torch.empty_like(x), torch.empty_like(step)
        of_bc = torch.empty(step.shape[1], len(x), width)  # of each head
        written = [gradients[0].contiguous(), of_x, of_step, of_bc]
        kernels.ssd_scan_gradients(*(part.numpy() for part in [*inputs, *written]))
        shared = of_bc.view(ctx.ngroups, -1, len(x), width).sum(1).transpose(0, 1)  # (t, g, 2n)
        of_b, of_c = (part.reshape(b.shape) for part in shared.chunk(2, dim=2))
        return None, None, of_x, of_b, of_c, of_step, None, None, None


class _HostHadamard(torch.autograd.Function):
    """`Operators.hadamard` of float32 tensors on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """The transform of x."""
        return hadamard(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """The transposed transform of the gradient."""
        return hadamard(gradients[0], transposed=True)
