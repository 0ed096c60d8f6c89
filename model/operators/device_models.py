"""The Mamba forward passes on a device, with the same taps as the float32 ones on the CPU.

In float16 they compute what upstream runs: matrix products in float16 (accumulated in float32), the residual stream
and its norms in float32, convolution, scans and Hadamard transforms in float32 inside and rounded once at their end.
Weights are prepared, so rounding them to float16 loses nothing. In float32 everything is float32, without TF32. A state
is float32 either way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from quambase.model.backbone import Tap
from quambase.model.cuda.compiler import CompilationFailed
from quambase.model.exponential import exp
from quambase.model.mamba2_weights import Mamba2Weights
from quambase.model.operators.cuda import CudaOperators
from quambase.model.operators.torch import DeviceBatch, Operators, TorchOperators
from quambase.model.packed_batch import Batch
from quambase.model.weights import MambaWeights
from quambase.schema.errors import DataInvalid, UnknownName
from quambase.schema.progress import remark
from quambase.schema.sites import HEAD_LAYER

DEVICES = ("auto", "cpu", "cuda")

HEAD_ROWS = 4096
"""Tokens per chunk of logits: 0.4 GB of float16 at a vocabulary of 50,280."""


def choose_device(name: str = "auto") -> torch.device:
    """What ``--device`` means here: ``auto`` is CUDA if there is any.

    UnknownName: another device; DataInvalid: CUDA where there is none.
    """
    if name not in DEVICES:
        raise UnknownName.of("device", name, DEVICES)
    available = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise DataInvalid(f"torch {torch.__version__} finds no CUDA device here; leave out --device, or say cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def without_tf32() -> Iterator[None]:
    """Matrix products of float32 in float32, whatever the process has chosen."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


def choose_operators(
    weights: MambaWeights | Mamba2Weights, device: torch.device, dtype: torch.dtype, *, compiled: bool = True
) -> Operators:
    """Compiled kernels on CUDA; plain PyTorch elsewhere, and, after a warning on stderr, where they do not compile."""
    if device.type == "cuda" and compiled:
        try:
            return CudaOperators(device, dtype, weights.config)
        except CompilationFailed as error:
            remark(f"warning: scans run in plain PyTorch, some hundred times slower: {error}")
    return TorchOperators(dtype, weights.config.ngroups if isinstance(weights, Mamba2Weights) else 1)


class DeviceModel(ABC):
    """A language model of one of the Mamba families on a device, of prepared weights."""

    def __init__(
        self,
        weights: MambaWeights | Mamba2Weights,
        device: torch.device,
        dtype: torch.dtype,
        operators: Operators,
        *,
        rotated: bool,
    ) -> None:
        self.device, self.dtype, self.operators, self.rotated = device, dtype, operators, rotated
        self.eps = weights.config.norm_eps
        self.embedding = self._matrix(weights.embedding)
        self.norms = [self._vector(layer.norm) for layer in weights.layers]
        self.norm_f = self._vector(weights.norm_f)
        self.lm_head = self._matrix(weights.lm_head)

    def _matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.device, self.dtype)

    def _vector(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.device, torch.float32).contiguous()

    @torch.inference_mode()
    def hidden(self, batch: Batch, tap: Tap | None = None) -> torch.Tensor:
        """As `quambase.model.backbone.Backbone.hidden`, on the device and of its dtype; so are the tensors of the tap,
        but for the float32 states, and they stay as they are until the tap has seen the last one.
        """
        here = DeviceBatch.of(batch, self.device)
        everything = slice(0, batch.documents)
        with without_tf32():
            x = F.embedding(here.tokens, self.embedding)
            residual = torch.zeros(x.shape, device=self.device)
            for index, norm in enumerate(self.norms):
                x = self._block(index, self.operators.add_norm(x, residual, norm, self.eps), here, tap)
            out = self.operators.add_norm(x, residual, self.norm_f, self.eps)
            if tap:
                tap(HEAD_LAYER, "lm_head:input", out, everything)
                for documents in batch.chunks(HEAD_ROWS):
                    rows = slice(int(batch.offsets[documents.start]), int(batch.offsets[documents.stop]))
                    tap(HEAD_LAYER, "lm_head:output", self.logits(out[rows]), documents)
        return out

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (rows, v) of normalised hidden states (rows, d)."""
        with without_tf32():
            return F.linear(hidden, self.lm_head)

    @abstractmethod
    def _block(self, index: int, normalised: torch.Tensor, batch: DeviceBatch, tap: Tap | None) -> torch.Tensor:
        """Block ``index`` of the normalised residual stream (t, d); what is added to the residual stream."""


class DeviceMamba(DeviceModel):
    """`quambase.model.mamba.Mamba` on a device."""

    def __init__(
        self,
        weights: MambaWeights,
        device: torch.device,
        dtype: torch.dtype,
        operators: Operators,
        *,
        rotated: bool = False,
    ) -> None:
        super().__init__(weights, device, dtype, operators, rotated=rotated)
        self.config = weights.config
        matrices, vectors = ("in_proj", "x_proj", "dt_proj", "out_proj"), ("conv_bias", "dt_bias", "D")
        self._layers = [
            {
                **{name: self._matrix(getattr(layer, name)) for name in matrices},
                **{name: self._vector(getattr(layer, name)) for name in vectors},
                "conv_weight": self._vector(layer.conv_weight.T),
                "A": self._vector(-exp(layer.A_log).T),
            }
            for layer in weights.layers
        ]

    def _block(self, index: int, normalised: torch.Tensor, batch: DeviceBatch, tap: Tap | None) -> torch.Tensor:
        w = self._layers[index]
        c = self.config
        documents = slice(0, batch.host.documents)
        xz = F.linear(normalised, w["in_proj"])  # (t, 2e)
        u = self.operators.conv_silu(xz[:, : c.d_inner], w["conv_weight"], w["conv_bias"], batch)
        dt_b_c = F.linear(u, w["x_proj"])  # (t, r + 2n)
        low_rank = dt_b_c[:, : c.dt_rank]
        delta = F.linear(low_rank, w["dt_proj"])  # (t, e), without its bias
        y, state = self.operators.selective_scan(
            u, delta, dt_b_c[:, c.dt_rank :], xz[:, c.d_inner :], w["A"], w["D"], w["dt_bias"], batch
        )
        gated = self.operators.hadamard(y) if self.rotated else y
        out = F.linear(gated, w["out_proj"])  # (t, d)
        if tap:
            tap(index, "in_proj:input", normalised, documents)
            tap(index, "in_proj:output", xz, documents)
            tap(index, "x_proj:input", u, documents)
            tap(index, "x_proj:output", dt_b_c, documents)
            tap(index, "dt_proj:input", low_rank, documents)
            tap(index, "dt_proj:output", delta, documents)
            tap(index, "ssm_state_act:input", state, documents)
            tap(index, "ssm_state_act:output", state, documents)
            tap(index, "out_proj:input", gated, documents)
            tap(index, "out_proj:output", out, documents)
        return out


class DeviceMamba2(DeviceModel):
    """`quambase.model.mamba2.Mamba2` on a device."""

    def __init__(
        self,
        weights: Mamba2Weights,
        device: torch.device,
        dtype: torch.dtype,
        operators: Operators,
        *,
        rotated: bool = False,
    ) -> None:
        super().__init__(weights, device, dtype, operators, rotated=rotated)
        self.config = weights.config
        vectors = ("conv_bias", "dt_bias", "D", "gated_norm")
        self._layers = [
            {
                **{name: self._matrix(getattr(layer, name)) for name in ("in_proj", "out_proj")},
                **{name: self._vector(getattr(layer, name)) for name in vectors},
                "conv_weight": self._vector(layer.conv_weight.T),
                "A": self._vector(-exp(layer.A_log)),
            }
            for layer in weights.layers
        ]

    def _block(self, index: int, normalised: torch.Tensor, batch: DeviceBatch, tap: Tap | None) -> torch.Tensor:
        w = self._layers[index]
        c = self.config
        documents = slice(0, batch.host.documents)
        widths = [c.d_inner, c.bc_width, c.bc_width]
        projected = F.linear(normalised, w["in_proj"])  # (t, 2e + 2gn + h)
        z, conv_in, dt = torch.split(projected, [c.d_inner, c.conv_width, c.heads], dim=1)
        conv_out = self.operators.conv_silu(conv_in, w["conv_weight"], w["conv_bias"], batch)
        x, b, read = torch.split(conv_out, widths, dim=1)
        y, state = self.operators.ssd_scan(x, b, read, dt, w["A"], w["D"], w["dt_bias"], batch)
        gated = self.operators.gated_norm(y, z, w["gated_norm"], self.eps, rotated=self.rotated)
        out = F.linear(gated, w["out_proj"])  # (t, d)
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


def device_model(
    weights: MambaWeights | Mamba2Weights, device: torch.device, dtype: torch.dtype, *, rotated: bool = False
) -> DeviceModel:
    """The forward pass of weights of any family on ``device``; ``rotated``: they were prepared."""
    operators = choose_operators(weights, device, dtype)
    if isinstance(weights, Mamba2Weights):
        return DeviceMamba2(weights, device, dtype, operators, rotated=rotated)
    return DeviceMamba(weights, device, dtype, operators, rotated=rotated)
