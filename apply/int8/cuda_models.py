"""The INT8 models on a device: the forward pass of a host model with its weights, scales and arithmetic.

Everything is taken from a built `mamba1.Int8Mamba` or `mamba2.Int8Mamba2`. Codes equal
the host's except where sums of float32 are ordered differently or exp is the device's; then they differ by one. The
tests count those.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F

from quambase.apply.int8.arithmetic import Int8Weight, float32
from quambase.apply.int8.cuda_operators import CudaInt8Operators, ScanScales, pad_weight, padded_rows
from quambase.apply.int8.families import Int8Model
from quambase.apply.int8.mamba1 import Int8Mamba
from quambase.apply.int8.mamba2 import Int8Mamba2
from quambase.apply.int8.mamba2_weights import Int8Mamba2Layer, Int8Mamba2Weights
from quambase.apply.int8.weights import UPSTREAM, Int8Layer, Int8Weights
from quambase.model.packed_batch import Batch, PlacedBatch
from quambase.schema.sites import HEAD_LAYER

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class DeviceWeights:
    """Weights of an INT8 model on a device, shared by every strategy; matrices of codes as `pad_weight` makes them.

    embedding  (v, d) float16, or int8 codes with ``embedding_scales`` (v,) float16
    lm_head    (v, d) float16, or codes
    layers     by name, what is not a matrix of codes dequantized to float32
    """

    embedding: torch.Tensor
    embedding_scales: torch.Tensor | None
    lm_head: torch.Tensor
    layers: tuple[Tensors, ...]

    @classmethod
    def of(cls, weights: Int8Weights | Int8Mamba2Weights, device: torch.device) -> DeviceWeights:
        """Copy a host model's weights there."""
        head, scales = weights.lm_head, weights.embedding_scales
        layers: tuple[Int8Layer | Int8Mamba2Layer, ...] = weights.layers
        return cls(
            weights.embedding.to(device),
            None if scales is None else scales.to(device),
            (pad_weight(head.codes) if isinstance(head, Int8Weight) else head).to(device),
            tuple({name: t.to(device) for name, t in _layer_tensors(layer).items()} for layer in layers),
        )


def _layer_tensors(layer: Int8Layer | Int8Mamba2Layer) -> Tensors:
    common = {"conv_taps": layer.conv_taps, "a": layer.a, "D": layer.D.dequantized()}
    if isinstance(layer, Int8Layer):
        matrices = ("in_proj", "x_proj", "dt_proj", "out_proj")
        return {
            **{name: pad_weight(getattr(layer, name).codes) for name in matrices},
            **common,
            "conv_bias": layer.conv_bias.dequantized(),
            "dt_bias": layer.dt_bias.dequantized(),
        }
    return {
        **{name: pad_weight(getattr(layer, name).codes) for name in ("in_proj", "out_proj")},
        **common,
        "conv_bias": layer.conv_bias_floats,
        "dt_bias": layer.dt_bias.to(torch.float32),
        "gated_norm": layer.gated_norm.to(torch.float32),
    }


Host = TypeVar("Host", Int8Mamba, Int8Mamba2)


class DeviceInt8Model(ABC, Generic[Host]):
    """An INT8 language model on a device: `hidden` and `logits` as `language_model.Int8Backbone` has them."""

    def __init__(self, host: Host, weights: DeviceWeights, operators: CudaInt8Operators) -> None:
        self.host: Host = host
        self.weights, self.operators = weights, operators
        self.device = weights.embedding.device
        self.eps: float = host.config.norm_eps
        self.wrap = host.compat == UPSTREAM
        # float32 (channels,) of each layer, which the convolution multiplies and divides by.
        self._conv_scales = [self._move_conv_scales(index) for index in range(host.config.n_layer)]

    @abstractmethod
    def _move_conv_scales(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """scale_wx and scale_out of layer ``index``, (channels,) on the device."""

    @abstractmethod
    def _block(self, index: int, codes: torch.Tensor, batch: PlacedBatch) -> torch.Tensor:
        """Block ``index`` of codes (t, d): float16 (t, d)."""

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> torch.Tensor:
        """What lm_head reads (t, d): float16, or int8 codes if the head is quantized."""
        here = PlacedBatch.of(batch, self.device)
        x = self._embed(here.tokens)
        residual = padded_rows(len(x), x.shape[1], torch.float32, self.device).zero_()
        for index in range(self.host.config.n_layer):
            scale = self.host.whole_scale(index, "in_proj:input")
            x = self._block(index, self.operators.add_norm_to_int8(x, residual, self.eps, scale), here)
        if self.host.quantized_lm_head:
            return self.operators.add_norm_to_int8(x, residual, self.eps, self._head_scale())
        return self.operators.add_norm_to_half(x, residual, self.eps)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (rows, v) float16 of rows of `hidden`."""
        head = self.host.weights.lm_head
        if isinstance(head, Int8Weight):
            return self.operators.linear_to_half(hidden, self.weights.lm_head, head.scale, self._head_scale())
        found: torch.Tensor = F.linear(hidden, self.weights.lm_head)
        return found

    def _head_scale(self) -> float:
        return self.host.whole_scale(HEAD_LAYER, "lm_head:input")

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = self.weights.embedding[tokens].to(torch.float16)
        if self.weights.embedding_scales is not None:
            rows = rows * self.weights.embedding_scales[tokens].unsqueeze(-1)  # float16 product
        return padded_rows(len(rows), rows.shape[1], torch.float16, self.device).copy_(rows)

    def _convolve(self, index: int, x: torch.Tensor, batch: PlacedBatch) -> torch.Tensor:
        w = self.weights.layers[index]
        scale_wx, scale_out = self._conv_scales[index]
        return self.operators.conv_silu(x, w["conv_taps"], scale_wx, w["conv_bias"], scale_out, batch)


class DeviceInt8Mamba(DeviceInt8Model[Int8Mamba]):
    """`quambase.apply.int8.mamba1.Int8Mamba` on a device."""

    def _move_conv_scales(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        _, scale_wx, _, scale_out = self.host.conv_arguments(index)
        full = (self.host.config.d_inner,)
        return (
            torch.full(full, float(scale_wx), dtype=torch.float32, device=self.device),
            torch.full(full, float(scale_out), dtype=torch.float32, device=self.device),
        )

    def _block(self, index: int, codes: torch.Tensor, batch: PlacedBatch) -> torch.Tensor:
        host, w, ops = self.host, self.weights.layers[index], self.operators
        c, layer, s = host.config, host.weights.layers[index], host.scales
        in_ratio = host.ratio(index, "in_proj:input", "in_proj:output")
        xz = ops.linear_to_int8(codes, w["in_proj"], in_ratio, layer.in_proj.scale)  # (t, 2e)
        u = self._convolve(index, xz[:, : c.d_inner], batch)
        x_ratio = host.ratio(index, "x_proj:input", "x_proj:output")
        dt_b_c = ops.linear_to_int8(u, w["x_proj"], layer.x_proj.scale, x_ratio)  # (t, r + 2n)
        dt_ratio = host.ratio(index, "x_proj:output", "dt_proj:output")
        dt = ops.linear_to_int8(dt_b_c[:, : c.dt_rank], w["dt_proj"], dt_ratio, layer.dt_proj.scale)
        sites = ("x_proj:input", "dt_proj:output", "x_proj:output", "in_proj:output")
        scales = ScanScales(*(s[index, site] for site in sites))
        b_c, z = dt_b_c[:, c.dt_rank :], xz[:, c.d_inner :]
        y = ops.selective_scan(u, dt, b_c, z, scales, w["a"], w["D"], w["dt_bias"], batch)
        gated = ops.rotate(y, host.rotation_factor(index), self.wrap)
        return ops.linear_to_half(gated, w["out_proj"], layer.out_proj.scale, s[index, "out_proj:input"])


class DeviceInt8Mamba2(DeviceInt8Model[Int8Mamba2]):
    """`quambase.apply.int8.mamba2.Int8Mamba2` on a device."""

    def __init__(self, host: Int8Mamba2, weights: DeviceWeights, operators: CudaInt8Operators) -> None:
        super().__init__(host, weights, operators)
        self._columns = [laid_out.columns.to(self.device) for laid_out in host.laid_out]

    def _move_conv_scales(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        laid_out = self.host.laid_out[index]
        return laid_out.conv_in.to(self.device), laid_out.conv_out.to(self.device)

    def _block(self, index: int, codes: torch.Tensor, batch: PlacedBatch) -> torch.Tensor:
        host, w, ops = self.host, self.weights.layers[index], self.operators
        c, layer = host.config, host.weights.layers[index]
        in_scale = float32(host.whole_scale(index, "in_proj:input"))
        projected = ops.linear_to_int8(codes, w["in_proj"], self._columns[index], in_scale)  # (t, 2e + 2gn + h)
        z, conv_in, dt = torch.split(projected, [c.d_inner, c.conv_width, c.heads], dim=1)
        conv_out = self._convolve(index, conv_in, batch)
        dt_scale = host.whole_scale(index, "dt_act:input")
        scales = self._conv_scales[index][1]
        y = ops.ssd_scan(conv_out, scales, dt, dt_scale, w["a"], w["D"], w["dt_bias"], batch)
        z_scale, factor = host.whole_scale(index, "z_act:input"), host.rotation_factor(index)
        gated = ops.gated_rotate(y, z, z_scale, w["gated_norm"], self.eps, factor, self.wrap)
        out_scale = host.whole_scale(index, "out_proj:input")
        return ops.linear_to_half(gated, w["out_proj"], layer.out_proj.scale, out_scale)


AnyDeviceInt8Model = DeviceInt8Mamba | DeviceInt8Mamba2


def on_device(host: Int8Model, weights: DeviceWeights, operators: CudaInt8Operators) -> AnyDeviceInt8Model:
    """The model of any family over weights that are there already."""
    if isinstance(host, Int8Mamba2):
        return DeviceInt8Mamba2(host, weights, operators)
    return DeviceInt8Mamba(host, weights, operators)


def int8_on_cuda(models: Mapping[str, Int8Model], device: torch.device) -> dict[str, AnyDeviceInt8Model]:
    """Strategies of one model on a CUDA device, by label, on one copy of the weights they share.

    CompilationFailed where the kernels cannot be compiled.
    """
    found: dict[str, AnyDeviceInt8Model] = {}
    shared: dict[int, DeviceWeights] = {}
    operators: CudaInt8Operators | None = None
    for label, host in models.items():
        operators = operators or CudaInt8Operators(device, host.config)
        if id(host.weights) not in shared:
            shared[id(host.weights)] = DeviceWeights.of(host.weights, device)
        found[label] = on_device(host, shared[id(host.weights)], operators)
    return found
