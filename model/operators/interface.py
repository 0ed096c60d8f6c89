"""The operations between the blocks' matrix products: the interface that host, plain PyTorch and CUDA implement.

Tensors are packed as in `quambase.model.packed_batch`, in the activation dtype, float32 or float16. Every operator
computes in float32 inside and rounds its result once. A state is float32.

Convolution and scans take a ``state`` or None. Without one, documents start from zeros. With one, every document is the
next token of a sequence, whose state is read and updated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, Self

import torch

from quambase.model.packed_batch import PlacedBatch


@dataclass(frozen=True)
class OperatorSizes:
    """The sizes that operators are built for. ``headdim``: channels of a head, None without heads; ``ngroups``: SSD
    groups.
    """

    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    headdim: int | None = None
    ngroups: int = 1


@dataclass
class BlockState:
    """A block's decoding state of b sequences.

    conv  (b, k - 1, channels): the convolution's last inputs, oldest first
    ssm   (b, e, n) float32; of a Mamba-1 in memory (b, n, e), since a kernel's neighbouring threads have channels
    ``in_place``: a step writes to these tensors; otherwise it replaces them.
    """

    in_place: ClassVar[bool] = True

    conv: torch.Tensor
    ssm: torch.Tensor

    def first(self, sequences: int) -> Self:
        """The state of the first ``sequences`` of them."""
        return type(self)(self.conv[:sequences], self.ssm[:sequences])


def by_state_index(ssm: torch.Tensor) -> torch.Tensor:
    """A Mamba-1's state (b, e, n), laid out in memory as `BlockState` says."""
    return ssm.transpose(1, 2).contiguous().transpose(1, 2)


class ScanInputs(NamedTuple):
    """What Mamba-1's scan reads: activations, and the constants of a block.

    u, delta (before bias and softplus), z (t, e); bc (t, 2n), B then C; a (n, e) negative; d, bias (e,).
    """

    u: torch.Tensor
    delta: torch.Tensor
    bc: torch.Tensor
    z: torch.Tensor
    a: torch.Tensor
    d: torch.Tensor
    bias: torch.Tensor

    def at(self, rows: slice) -> ScanInputs:
        """The same of these rows alone."""
        return self._replace(u=self.u[rows], delta=self.delta[rows], bc=self.bc[rows], z=self.z[rows])


class SsdInputs(NamedTuple):
    """What Mamba-2's scan reads: activations, and the constants of a block.

    x (t, h p), b, c (t, g n): slices of one tensor; dt (t, h) before bias and softplus; a (h,) negative; d, bias (h,).
    """

    x: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    dt: torch.Tensor
    a: torch.Tensor
    d: torch.Tensor
    bias: torch.Tensor

    def at(self, rows: slice) -> SsdInputs:
        """The same of these rows alone."""
        return self._replace(x=self.x[rows], b=self.b[rows], c=self.c[rows], dt=self.dt[rows])


class Operators(Protocol):
    """The operators of one model on one device.

    ``head_rows``: tokens per chunk of logits where logits are observed.
    """

    device: torch.device
    dtype: torch.dtype
    head_rows: int

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight of matrix products, in the activation dtype on the device."""

    def vector(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight of the operators, float32 and contiguous on the device."""

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """``residual`` += x, then its RMS norm times ``weight``, in the activation dtype.

        x (t, d); residual (t, d) float32, contiguous, updated; weight (d,).
        """

    def conv_silu(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        batch: PlacedBatch,
        state: BlockState | None = None,
    ) -> torch.Tensor:
        """Depthwise causal convolution, then SiLU: (t, c) from x (t, c), whose rows may be strided.

        weight (k, c), the last row for the current token; bias (c,).
        """

    def selective_scan(
        self, inputs: ScanInputs, batch: PlacedBatch, state: BlockState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y (t, e) and the state (documents, e, n) after each document's last token."""

    def ssd_scan(
        self, inputs: SsdInputs, batch: PlacedBatch, state: BlockState | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y (t, h p) and the state (documents, h p, n) after each document's last token."""

    def gated_norm(
        self, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, *, rotated: bool
    ) -> torch.Tensor:
        """RMS norm of y SiLU(z) over each SSD group's channels, times ``weight``; if ``rotated``, then `hadamard`.

        y (t, e); z (t, e), whose rows may be strided; weight (e,).
        """

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """`quambase.model.hadamard.hadamard` of x (t, e), in x's dtype."""
