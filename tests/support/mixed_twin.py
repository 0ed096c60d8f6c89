"""INT8 models with operators in 16 bit, from the definition: floating-point operators between values that are rounded
to codes or to float16. Plain PyTorch in float32, a loop over time; for whole documents.

A site is in codes unless every operator that reads it is in 16 bit. An operator of codes makes values that are rounded
once, by the reader's format; one in 16 bit makes float16 values, and reads a site's codes decoded to float16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from quambase.apply.int8.arithmetic import weight_values
from quambase.apply.int8.group_scales import scale_of_channels, zero_point_of_channels
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.model.hadamard import hadamard
from quambase.model.operators.interface import ScanInputs, SsdInputs
from quambase.model.operators.torch import TorchOperators
from quambase.model.packed_batch import Batch, PlacedBatch
from quambase.schema.sites import CONV_SCAN, IN_PROJ, OUT_PROJ, X_PROJ, find_site

Values = torch.Tensor


def half(values: Values) -> Values:
    return values.to(torch.float16).to(torch.float32)


def half_away(values: Values) -> Values:
    return torch.sign(values) * torch.floor(values.abs() + 0.5)


class Twin:
    """``model``: its weights, scales and operators in 16 bit, nothing else of it."""

    def __init__(self, model: Int8LanguageModel) -> None:
        self.model, self.config = model, model.config
        self.operators = TorchOperators(torch.float32, getattr(model.config, "ngroups", 1))

    def hidden(self, batch: Batch) -> Values:
        placed = PlacedBatch.of(batch, torch.device("cpu"))
        x = self.model.weights.embedding[batch.tokens].to(torch.float32)
        residual = torch.zeros_like(x)
        block = self.mamba1 if self.config.kind == "mamba1" else self.mamba2
        for layer in range(self.config.n_layer):
            residual = (residual + x).to(torch.float32)
            x = block(layer, F.rms_norm(residual, x.shape[1:], None, self.config.norm_eps), placed)
        residual = (residual + x).to(torch.float32)
        return half(F.rms_norm(residual, x.shape[1:], None, self.config.norm_eps))

    def kept(self, layer: int) -> set[str]:
        return {name for at, name in self.model.in_16_bit if at == layer}

    def weight(self, layer: int, name: str) -> Values:
        return weight_values(getattr(self.model.weights.layers[layer], name)).to(torch.float32)

    def site(
        self, layer: int, made_by: str, site: str, values: Values, rounding: Callable[[Values], Values] = torch.round
    ) -> Callable[[str], Values]:
        """What an operator reads at a site; ``made_by``: the operator that made the values."""
        kept = self.kept(layer)
        found = half(values) if made_by in kept else values
        if set(find_site(site, self.config.kind).read_by) <= kept:
            return lambda operator: half(found)
        divisions = self.model.channel_groups[layer] if self.model.channel_groups else []
        where = self.config, divisions, site, self.model.scales[layer, site]
        step, zero = (f(*where).to(torch.float32) for f in (scale_of_channels, zero_point_of_channels))
        decoded = (torch.clamp(rounding(found / step) + zero, -128, 127) - zero) * step
        return lambda operator: half(decoded) if operator in kept else decoded

    def mamba1(self, layer: int, normed: Values, batch: PlacedBatch) -> Values:
        e, r, w = self.config.d_inner, self.config.dt_rank, lambda name: self.weight(layer, name)  # type: ignore[attr-defined]
        kept = self.kept(layer)
        read = self.site(layer, IN_PROJ, "in_proj:input", normed)(IN_PROJ)
        xz = self.site(layer, IN_PROJ, "in_proj:output", read @ w("in_proj").T)(CONV_SCAN)
        convolved = self.operators.conv_silu(xz[:, :e], w("conv_weight").T, w("conv_bias"), batch)
        away = torch.round if CONV_SCAN in kept else half_away
        u = self.site(layer, CONV_SCAN, "x_proj:input", convolved, away)
        dt_b_c = self.site(layer, X_PROJ, "x_proj:output", u(X_PROJ) @ w("x_proj").T)
        dt = self.site(layer, X_PROJ, "dt_proj:output", dt_b_c(X_PROJ)[:, :r] @ w("dt_proj").T)(CONV_SCAN)
        a, bc = -torch.exp(w("A_log")).T, dt_b_c(CONV_SCAN)[:, r:]
        inputs = ScanInputs(u(CONV_SCAN), dt, bc, xz[:, e:], a, w("D"), w("dt_bias"))
        y, _ = self.operators.selective_scan(inputs, batch)
        return self.out(layer, hadamard(half(y)))

    def mamba2(self, layer: int, normed: Values, batch: PlacedBatch) -> Values:
        c, w = self.config, lambda name: self.weight(layer, name)
        widths = [c.d_inner, c.bc_width, c.bc_width]  # type: ignore[attr-defined]
        kept = self.kept(layer)
        read = self.site(layer, IN_PROJ, "in_proj:input", normed)(IN_PROJ)
        z, *xbc, dt = torch.split(read @ w("in_proj").T, [c.d_inner, *widths, c.heads], dim=1)  # type: ignore[attr-defined]
        z = self.site(layer, IN_PROJ, "z_act:input", z)(CONV_SCAN)
        dt = self.site(layer, IN_PROJ, "dt_act:input", dt)(CONV_SCAN)
        names = ("x", "B", "C")
        inputs = zip(names, xbc, strict=True)
        conv_in = torch.cat([self.site(layer, IN_PROJ, f"{n}_conv_in:input", v)(CONV_SCAN) for n, v in inputs], 1)
        conv = self.operators.conv_silu(conv_in, w("conv_weight").T, w("conv_bias"), batch)
        away = torch.round if CONV_SCAN in kept else half_away
        parts = [
            self.site(layer, CONV_SCAN, f"{n}_conv_out:input", v, away)(CONV_SCAN)
            for n, v in zip(names, torch.split(conv, widths, dim=1), strict=True)
        ]
        skip = parts[0]
        if CONV_SCAN not in kept:
            parts = [half(part) for part in parts]  # as tensor cores read them
        nothing = torch.zeros(c.heads)  # type: ignore[attr-defined]
        a = -torch.exp(w("A_log"))
        inputs = SsdInputs(parts[0], parts[1], parts[2], dt, a, nothing, w("dt_bias"))
        y, _ = self.operators.ssd_scan(inputs, batch)
        y = half(y + skip * w("D").repeat_interleave(c.d_inner // c.heads))  # type: ignore[attr-defined]
        if CONV_SCAN not in kept and OUT_PROJ in kept:
            z = half(z)
        gated = (y * F.silu(z)).view(len(y), c.ngroups, -1)  # type: ignore[attr-defined]
        normed = F.rms_norm(gated, gated.shape[-1:], None, c.norm_eps).view_as(y) * w("gated_norm")
        if not kept & {CONV_SCAN, OUT_PROJ}:
            normed = half(normed)  # as upstream's norm hands it to its Hadamard quantizer
        return self.out(layer, hadamard(normed))

    def out(self, layer: int, gated: Values) -> Values:
        """The Hadamard transform of an INT8 out_proj is rounded to codes at once; else, or beside a scan in 16 bit, to
        float16 first in a Mamba-2.
        """
        kept = self.kept(layer)
        first = self.config.kind == "mamba2" and CONV_SCAN in kept
        made_by = CONV_SCAN if first else ""
        away = torch.round if first else half_away
        read = self.site(layer, made_by, "out_proj:input", gated, away)(OUT_PROJ)
        return half(read @ self.weight(layer, "out_proj").T)
