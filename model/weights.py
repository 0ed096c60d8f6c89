"""Configuration and weights of a Mamba-1 language model, and what reading Mamba-2's shares with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch

from quambase.schema.errors import CheckpointInvalid

_BIASES = "config.json asks for projection biases or no conv bias; no INT8 Quamba model has that"


def check_mamba_ssm(raw: dict[str, Any]) -> dict[str, Any]:
    """``ssm_cfg`` of mamba-ssm's config.json; CheckpointInvalid for what no INT8 Quamba model of any family has."""
    ssm: dict[str, Any] = raw.get("ssm_cfg") or {}
    if not raw.get("rms_norm", True):
        raise CheckpointInvalid("config.json says rms_norm = false; only models with RMSNorm can be folded and rotated")
    if raw.get("attn_layer_idx") or raw.get("d_intermediate"):
        raise CheckpointInvalid(
            "config.json describes a hybrid model (attention or MLP layers); expected Mamba layers only"
        )
    if ssm.get("bias") or ssm.get("conv_bias") is False:
        raise CheckpointInvalid(_BIASES)
    return ssm


def check_hugging_face(raw: dict[str, Any]) -> None:
    """CheckpointInvalid for what no INT8 Quamba model of any family has, in transformers' words."""
    if raw.get("use_bias") or raw.get("use_conv_bias") is False:
        raise CheckpointInvalid(_BIASES)


def padded_vocabulary(raw: dict[str, Any]) -> int:
    """The embedding's rows: ``vocab_size`` rounded up to ``pad_vocab_size_multiple`` (8)."""
    multiple = int(raw.get("pad_vocab_size_multiple", 8))
    return -(-int(raw["vocab_size"]) // multiple) * multiple


@dataclass(frozen=True)
class MambaConfig:
    """Sizes of a Mamba-1 model. ``vocab_size`` counts the embedding's rows, padding rows included."""

    d_model: int
    n_layer: int
    vocab_size: int
    d_inner: int
    d_state: int = 16
    d_conv: int = 4
    dt_rank: int = 0
    norm_eps: float = 1e-5

    @classmethod
    def from_mamba_ssm(cls, raw: dict[str, Any]) -> MambaConfig:
        """From mamba-ssm's config.json (``d_model``, ``n_layer``, ``vocab_size``, ``ssm_cfg``)."""
        ssm = check_mamba_ssm(raw)
        d_model = int(raw["d_model"])
        dt_rank = ssm.get("dt_rank", "auto")
        return cls(
            d_model=d_model,
            n_layer=int(raw["n_layer"]),
            vocab_size=padded_vocabulary(raw),
            d_inner=int(ssm.get("expand", 2) * d_model),
            d_state=int(ssm.get("d_state", 16)),
            d_conv=int(ssm.get("d_conv", 4)),
            dt_rank=math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank),
        )

    @classmethod
    def from_hugging_face(cls, raw: dict[str, Any]) -> MambaConfig:
        """From transformers' MambaConfig JSON (``hidden_size``, ``num_hidden_layers``, ...)."""
        check_hugging_face(raw)
        d_model = int(raw["hidden_size"])
        dt_rank = raw.get("time_step_rank", "auto")
        return cls(
            d_model=d_model,
            n_layer=int(raw["num_hidden_layers"]),
            vocab_size=int(raw["vocab_size"]),
            d_inner=int(raw.get("intermediate_size") or raw.get("expand", 2) * d_model),
            d_state=int(raw.get("state_size", 16)),
            d_conv=int(raw.get("conv_kernel", 4)),
            dt_rank=math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank),
            norm_eps=float(raw.get("layer_norm_epsilon", 1e-5)),
        )


@dataclass(frozen=True)
class LayerWeights:
    """One block, float32 on the CPU.

    norm (d,); in_proj (2e, d), rows x then z; conv_weight (e, k), last column the current token; conv_bias (e,);
    x_proj (r + 2n, e), rows dt, B, C; dt_proj (e, r); dt_bias (e,); A_log (e, n); D (e,); out_proj (d, e).
    """

    norm: torch.Tensor
    in_proj: torch.Tensor
    conv_weight: torch.Tensor
    conv_bias: torch.Tensor
    x_proj: torch.Tensor
    dt_proj: torch.Tensor
    dt_bias: torch.Tensor
    A_log: torch.Tensor
    D: torch.Tensor
    out_proj: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LayerWeights:
        """Every tensor replaced by ``function`` of it."""
        return replace(self, **{f.name: function(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class MambaWeights:
    """A whole model: embedding (v, d), layers, norm_f (d,), lm_head (v, d) (the same tensor where tied)."""

    config: MambaConfig
    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm_f: torch.Tensor
    lm_head: torch.Tensor


_LAYER_NAMES = {
    "norm": "norm.weight",
    "in_proj": "mixer.in_proj.weight",
    "conv_weight": "mixer.conv1d.weight",
    "conv_bias": "mixer.conv1d.bias",
    "x_proj": "mixer.x_proj.weight",
    "dt_proj": "mixer.dt_proj.weight",
    "dt_bias": "mixer.dt_proj.bias",
    "A_log": "mixer.A_log",
    "D": "mixer.D",
    "out_proj": "mixer.out_proj.weight",
}


class Take(Protocol):
    """Picks a tensor out of a checkpoint: the first of ``names`` it holds, float32."""

    def __call__(self, shape: tuple[int, ...], *names: str) -> torch.Tensor: ...


def taker(tensors: dict[str, torch.Tensor], expected: str) -> Take:
    """How a state dict is read. CheckpointInvalid names a tensor that is missing, of another shape or not finite;
    ``expected`` says what would have been complete.
    """

    def take(shape: tuple[int, ...], *names: str) -> torch.Tensor:
        for name in names:
            if name in tensors:
                tensor = tensors[name].to(torch.float32)
                if name.endswith("conv1d.weight") and tensor.ndim == 3:
                    tensor = tensor.squeeze(1)
                if tuple(tensor.shape) != shape:
                    raise CheckpointInvalid(
                        f"tensor {name} has shape {tuple(tensor.shape)}; config.json implies {shape}"
                    )
                if not torch.isfinite(tensor).all():
                    raise CheckpointInvalid(f"tensor {name} holds NaN or infinity; the checkpoint is damaged")
                return tensor.contiguous()
        raise CheckpointInvalid(f"the checkpoint has no tensor {names[0]}; expected {expected}")

    return take


def take_ends(take: Take, tensors: dict[str, torch.Tensor], vocab_size: int, d_model: int) -> dict[str, torch.Tensor]:
    """embedding, norm_f and lm_head, in mamba-ssm's (``backbone.embedding``) or transformers' names; a head that is
    absent or equal to the embedding is the embedding.
    """
    embedding = take((vocab_size, d_model), "backbone.embedding.weight", "backbone.embeddings.weight")
    head = take((vocab_size, d_model), "lm_head.weight") if "lm_head.weight" in tensors else embedding
    if head is not embedding and torch.equal(head, embedding):
        head = embedding
    return {"embedding": embedding, "norm_f": take((d_model,), "backbone.norm_f.weight"), "lm_head": head}


def weights_from_tensors(config: MambaConfig, tensors: dict[str, torch.Tensor]) -> MambaWeights:
    """Build MambaWeights from a state dict of mamba-ssm or transformers; errors as `taker`'s."""
    c = config
    take = taker(tensors, f"a Mamba-1 of {c.n_layer} layers")
    shapes = {
        "norm": (c.d_model,),
        "in_proj": (2 * c.d_inner, c.d_model),
        "conv_weight": (c.d_inner, c.d_conv),
        "conv_bias": (c.d_inner,),
        "x_proj": (c.dt_rank + 2 * c.d_state, c.d_inner),
        "dt_proj": (c.d_inner, c.dt_rank),
        "dt_bias": (c.d_inner,),
        "A_log": (c.d_inner, c.d_state),
        "D": (c.d_inner,),
        "out_proj": (c.d_model, c.d_inner),
    }
    layers = tuple(
        LayerWeights(**{key: take(shapes[key], f"backbone.layers.{i}.{name}") for key, name in _LAYER_NAMES.items()})
        for i in range(c.n_layer)
    )
    return MambaWeights(c, layers=layers, **take_ends(take, tensors, c.vocab_size, c.d_model))


def tensors_of(weights: MambaWeights) -> dict[str, torch.Tensor]:
    """The state dict in mamba-ssm's layout and names (a tied head is left out)."""
    return name_tensors(weights.embedding, weights.norm_f, weights.lm_head, weights.layers, _LAYER_NAMES)


def name_tensors(
    embedding: torch.Tensor,
    norm_f: torch.Tensor,
    lm_head: torch.Tensor,
    layers: Iterable[object],
    names: dict[str, str],
) -> dict[str, torch.Tensor]:
    """A state dict from the parts of a model; ``names`` maps a layer's fields to mamba-ssm's names."""
    found = {"backbone.embedding.weight": embedding, "backbone.norm_f.weight": norm_f}
    for i, layer in enumerate(layers):
        for key, name in names.items():
            tensor = getattr(layer, key)
            found[f"backbone.layers.{i}.{name}"] = tensor.unsqueeze(1) if key == "conv_weight" else tensor
    if lm_head is not embedding:
        found["lm_head.weight"] = lm_head
    return found


def random_weights(config: MambaConfig, seed: int = 0) -> MambaWeights:
    """Random weights distributed as mamba-ssm initialises them (S4D-real A, inverse-softplus dt bias), head tied."""
    c = config
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    def layer() -> LayerWeights:
        dt = torch.exp(torch.rand(c.d_inner, generator=generator) * math.log(100) + math.log(0.001))
        return LayerWeights(
            norm=1 + normal(c.d_model, std=0.1),
            in_proj=normal(2 * c.d_inner, c.d_model, std=c.d_model**-0.5),
            conv_weight=normal(c.d_inner, c.d_conv, std=c.d_conv**-0.5),
            conv_bias=normal(c.d_inner, std=0.1),
            x_proj=normal(c.dt_rank + 2 * c.d_state, c.d_inner, std=c.d_inner**-0.5),
            dt_proj=normal(c.d_inner, c.dt_rank, std=c.dt_rank**-0.5),
            dt_bias=dt + torch.log(-torch.expm1(-dt)),
            A_log=torch.log(torch.arange(1, c.d_state + 1, dtype=torch.float32)).repeat(c.d_inner, 1),
            D=1 + normal(c.d_inner, std=0.1),
            out_proj=normal(c.d_model, c.d_inner, std=(c.d_inner * 2 * c.n_layer) ** -0.5),
        )

    embedding = normal(c.vocab_size, c.d_model, std=0.02)
    layers = tuple(layer() for _ in range(c.n_layer))
    return MambaWeights(c, embedding, layers, 1 + normal(c.d_model, std=0.1), embedding)
