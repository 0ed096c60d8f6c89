"""Configuration and weights of a Mamba-2 language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from quambase.model.settings import Settings
from quambase.model.weights import (
    NORM_EPS,
    check_hugging_face,
    check_mamba_ssm,
    name_tensors,
    padded_vocabulary,
    take_ends,
    taker,
)
from quambase.schema.errors import CheckpointInvalid

# What mamba-ssm's Mamba2 can also be, with the one value that upstream's INT8 model handles.
_ONLY = {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False}


@dataclass(frozen=True)
class Mamba2Config:
    """Sizes of a Mamba-2 model. ``vocab_size`` counts the embedding's rows, padding rows included.

    d_inner is heads times headdim; each of ``ngroups`` SSD groups has its own B and C, shared by heads / ngroups
    consecutive heads.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_inner: int
    d_state: int = 128
    d_conv: int = 4
    headdim: int = 64
    ngroups: int = 1
    norm_eps: float = NORM_EPS

    def __post_init__(self) -> None:
        if self.d_inner % self.headdim or self.heads % self.ngroups:
            raise CheckpointInvalid(
                f"config.json implies {self.d_inner} channels in heads of {self.headdim} and {self.ngroups} groups of "
                "heads; expected whole heads, as many in each group"
            )

    @property
    def heads(self) -> int:
        """How many heads."""
        return self.d_inner // self.headdim

    @property
    def bc_width(self) -> int:
        """The width of B, and of C: ngroups times d_state."""
        return self.ngroups * self.d_state

    @property
    def conv_width(self) -> int:
        """The channels of the convolution: x, B, C."""
        return self.d_inner + 2 * self.bc_width

    @property
    def in_proj_edges(self) -> tuple[int, ...]:
        """Placement z, x, B, C, dt begin in in_proj's output, and where dt ends."""
        e, w = self.d_inner, self.bc_width
        return (0, e, 2 * e, 2 * e + w, 2 * e + 2 * w, 2 * e + 2 * w + self.heads)

    @classmethod
    def from_mamba_ssm(cls, values: Mapping[str, Any]) -> Mamba2Config:
        """From mamba-ssm's config.json; what it leaves out has the defaults of mamba_ssm/modules/mamba2.py."""
        raw = Settings(values)
        ssm = check_mamba_ssm(raw)
        for name, value in _ONLY.items():
            ssm.only(name, value)
        _check_dt_limit(ssm, "dt_limit")
        d_model = raw.size("d_model")
        d_inner = ssm.expanded(d_model)
        if "d_ssm" in ssm and ssm.size("d_ssm") != d_inner:
            raise CheckpointInvalid(
                f"config.json says ssm_cfg.d_ssm = {ssm.size('d_ssm')} of {d_inner} channels (a gated MLP beside the "
                "SSM); expected Mamba layers only"
            )
        return cls(
            d_model=d_model,
            n_layer=raw.size("n_layer"),
            vocab_size=padded_vocabulary(raw),
            d_inner=d_inner,
            d_state=ssm.size("d_state", 128),
            d_conv=ssm.size("d_conv", 4),
            headdim=ssm.size("headdim", 64),
            ngroups=ssm.size("ngroups", 1),
        )

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> Mamba2Config:
        """From transformers' Mamba2Config JSON; what it leaves out has that class's defaults, but for the sizes that
        every model has of its own.
        """
        raw = Settings(values)
        check_hugging_face(raw)
        _check_dt_limit(raw, "time_step_limit")
        d_model = raw.size("hidden_size")
        config = cls(
            d_model=d_model,
            n_layer=raw.size("num_hidden_layers"),
            vocab_size=raw.size("vocab_size"),
            d_inner=raw.expanded(d_model),
            d_state=raw.size("state_size", 128),
            d_conv=raw.size("conv_kernel", 4),
            headdim=raw.size("head_dim", 64),
            ngroups=raw.size("n_groups", 8),
            norm_eps=float(raw.positive("layer_norm_epsilon", NORM_EPS)),
        )
        if raw.size("num_heads", 128) != config.heads:
            raise raw.invalid("num_heads", f"expand x hidden_size / head_dim, which is {config.heads}")
        return config


def _check_dt_limit(settings: Settings, key: str) -> None:
    """Only an unlimited time step: upstream's INT8 model silently loses any other limit (qChunkScan.py:100)."""
    limit = settings.values.get(key)
    # transformers writes infinity as {"__float__": "Infinity"}, json as Infinity.
    unlimited = ([0, math.inf], [0, {"__float__": "Infinity"}])
    if limit is not None and limit not in unlimited:
        raise settings.invalid(key, "[0, infinity], no limit")


@dataclass(frozen=True)
class Mamba2LayerWeights:
    """One block, float32 on the CPU.

    norm (d,); in_proj (2e + 2gn + h, d), rows z, x, B, C, dt; conv_weight (e + 2gn, k), channels x, B, C, last column
    the current token; conv_bias (e + 2gn,); dt_bias, A_log, D (h,); gated_norm (e,); out_proj (d, e).
    """

    norm: torch.Tensor
    in_proj: torch.Tensor
    conv_weight: torch.Tensor
    conv_bias: torch.Tensor
    dt_bias: torch.Tensor
    A_log: torch.Tensor
    D: torch.Tensor
    gated_norm: torch.Tensor
    out_proj: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Mamba2LayerWeights:
        """Every tensor replaced by ``function`` of it."""
        return replace(self, **{f.name: function(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class Mamba2Weights:
    """A whole model: embedding (v, d), layers, norm_f (d,), lm_head (v, d) (the same tensor where tied)."""

    config: Mamba2Config
    embedding: torch.Tensor
    layers: tuple[Mamba2LayerWeights, ...]
    norm_f: torch.Tensor
    lm_head: torch.Tensor


_LAYER_NAMES = {
    "norm": "norm.weight",
    "in_proj": "mixer.in_proj.weight",
    "conv_weight": "mixer.conv1d.weight",
    "conv_bias": "mixer.conv1d.bias",
    "dt_bias": "mixer.dt_bias",
    "A_log": "mixer.A_log",
    "D": "mixer.D",
    "gated_norm": "mixer.norm.weight",
    "out_proj": "mixer.out_proj.weight",
}


def mamba2_weights_from_tensors(
    config: Mamba2Config, tensors: dict[str, torch.Tensor], tied: bool = True
) -> Mamba2Weights:
    """Build Mamba2Weights from a state dict of mamba-ssm or transformers; errors as `taker`'s and `take_ends`'s."""
    c = config
    take = taker(tensors, f"a Mamba-2 of {c.n_layer} layers")
    shapes = {
        "norm": (c.d_model,),
        "in_proj": (c.in_proj_edges[-1], c.d_model),
        "conv_weight": (c.conv_width, c.d_conv),
        "conv_bias": (c.conv_width,),
        "dt_bias": (c.heads,),
        "A_log": (c.heads,),
        "D": (c.heads,),
        "gated_norm": (c.d_inner,),
        "out_proj": (c.d_model, c.d_inner),
    }
    layers = tuple(
        Mamba2LayerWeights(
            **{key: take(shapes[key], f"backbone.layers.{i}.{name}") for key, name in _LAYER_NAMES.items()}
        )
        for i in range(c.n_layer)
    )
    return Mamba2Weights(c, layers=layers, **take_ends(take, tensors, c.vocab_size, c.d_model, tied))


def mamba2_tensors_of(weights: Mamba2Weights) -> dict[str, torch.Tensor]:
    """The state dict in mamba-ssm's layout and names (a tied head is left out)."""
    return name_tensors(weights.embedding, weights.norm_f, weights.lm_head, weights.layers, _LAYER_NAMES)


def random_mamba2_weights(config: Mamba2Config, seed: int = 0) -> Mamba2Weights:
    """Random weights distributed as mamba-ssm initialises them (A in [1, 16], inverse-softplus dt bias), head tied.

    Norm weights, D and the conv bias vary too, so that a test sees them misplaced.
    """
    c = config
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    def layer() -> Mamba2LayerWeights:
        dt = torch.exp(torch.rand(c.heads, generator=generator) * math.log(100) + math.log(0.001))
        return Mamba2LayerWeights(
            norm=1 + normal(c.d_model, std=0.1),
            in_proj=normal(c.in_proj_edges[-1], c.d_model, std=c.d_model**-0.5),
            conv_weight=normal(c.conv_width, c.d_conv, std=c.d_conv**-0.5),
            conv_bias=normal(c.conv_width, std=0.1),
            dt_bias=dt + torch.log(-torch.expm1(-dt)),
            A_log=torch.log(1 + 15 * torch.rand(c.heads, generator=generator)),
            D=1 + normal(c.heads, std=0.1),
            gated_norm=1 + normal(c.d_inner, std=0.1),
            out_proj=normal(c.d_model, c.d_inner, std=(c.d_inner * 2 * c.n_layer) ** -0.5),
        )

    embedding = normal(c.vocab_size, c.d_model, std=0.02)
    layers = tuple(layer() for _ in range(c.n_layer))
    return Mamba2Weights(c, embedding, layers, 1 + normal(c.d_model, std=0.1), embedding)
