"""Configuration and weights of a Mamba-1 language model, and what reading Mamba-2's shares with it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch

from quambase.model.settings import Settings, shown
from quambase.model.tensor_files import QUANTIZED, plain_tensor
from quambase.schema.errors import CheckpointInvalid

NORM_EPS = 1e-5
"""Added to the mean square by the norms, where config.json says nothing else: the default of both layouts."""

_BIASES = "config.json asks for projection biases or no conv bias; no INT8 Quamba model has that"
_HYBRID = "config.json describes a hybrid model (attention or MLP layers); expected Mamba layers only"


def check_mamba_ssm(raw: Settings) -> Settings:
    """``ssm_cfg`` of mamba-ssm's config.json; CheckpointInvalid for what no INT8 Quamba model of any family has."""
    ssm = raw.section("ssm_cfg")
    if not raw.flag("rms_norm", True):
        raise CheckpointInvalid("config.json says rms_norm = false; only models with RMSNorm can be folded and rotated")
    if raw.values.get("attn_layer_idx") or raw.values.get("d_intermediate"):
        raise CheckpointInvalid(_HYBRID)
    if ssm.flag("bias", False) or not ssm.flag("conv_bias", True):
        raise CheckpointInvalid(_BIASES)
    raw.only("norm_epsilon", NORM_EPS)  # mamba-ssm itself cannot be given another in config.json
    _check_quantized(raw)
    return ssm


def check_hugging_face(raw: Settings) -> None:
    """CheckpointInvalid for what no INT8 Quamba model of any family has, in transformers' words."""
    if raw.flag("use_bias", False) or not raw.flag("use_conv_bias", True):
        raise CheckpointInvalid(_BIASES)
    raw.only("hidden_act", "silu", "swish")
    _check_quantized(raw)


def _check_quantized(raw: Settings) -> None:
    for key in ("quantization_config", "quantization", "compression_config"):
        if key in raw:
            raise CheckpointInvalid(f"config.json has a {key}: {QUANTIZED}")


def padded_vocabulary(raw: Settings) -> int:
    """The embedding's rows: ``vocab_size`` rounded up to ``pad_vocab_size_multiple`` (8)."""
    multiple = raw.size("pad_vocab_size_multiple", 8)
    return -(-raw.size("vocab_size") // multiple) * multiple


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
    norm_eps: float = NORM_EPS

    @classmethod
    def from_mamba_ssm(cls, values: Mapping[str, Any]) -> MambaConfig:
        """From mamba-ssm's config.json (``d_model``, ``n_layer``, ``vocab_size``, ``ssm_cfg``)."""
        raw = Settings(values)
        ssm = check_mamba_ssm(raw)
        d_model = raw.size("d_model")
        return cls(
            d_model=d_model,
            n_layer=raw.size("n_layer"),
            vocab_size=padded_vocabulary(raw),
            d_inner=ssm.expanded(d_model),
            d_state=ssm.size("d_state", 16),
            d_conv=ssm.size("d_conv", 4),
            dt_rank=ssm.rank("dt_rank", d_model),
        )

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> MambaConfig:
        """From transformers' MambaConfig JSON (``hidden_size``, ``num_hidden_layers``, ...)."""
        raw = Settings(values)
        check_hugging_face(raw)
        d_model = raw.size("hidden_size")
        return cls(
            d_model=d_model,
            n_layer=raw.size("num_hidden_layers"),
            vocab_size=raw.size("vocab_size"),
            d_inner=raw.size("intermediate_size") if "intermediate_size" in raw else raw.expanded(d_model),
            d_state=raw.size("state_size", 16),
            d_conv=raw.size("conv_kernel", 4),
            dt_rank=raw.rank("time_step_rank", d_model),
            norm_eps=float(raw.positive("layer_norm_epsilon", NORM_EPS)),
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

_QUANTIZERS_NAME = re.compile(r"(_scale|_scale_inv|\.scales|zero_point|qzeros|qweight|_packed|absmax|quant_map|\.SCB)$")
"""How the names end of what a quantizer keeps beside the weights (compressed-tensors, GPTQ, AWQ, bitsandbytes)."""


class Take(Protocol):
    """Picks a tensor out of a checkpoint: the first of ``names`` it holds, float32."""

    def __call__(self, shape: tuple[int, ...], *names: str) -> torch.Tensor: ...


def taker(tensors: dict[str, torch.Tensor], expected: str) -> Take:
    """How a state dict is read. CheckpointInvalid names a tensor that is missing, of another shape or not finite;
    ``expected`` says what would have been complete. A checkpoint that holds what quantizers write is refused whole:
    its weights are codes, or another model's.
    """
    for name in tensors:
        if _QUANTIZERS_NAME.search(name):
            raise CheckpointInvalid(f"the checkpoint has a tensor {shown(name)}: {QUANTIZED}")

    def take(shape: tuple[int, ...], *names: str) -> torch.Tensor:
        for name in names:
            if name in tensors:
                if tensors[name].element_size() == 1:
                    raise CheckpointInvalid(f"tensor {name} is {tensors[name].dtype}: {QUANTIZED}")
                tensor = plain_tensor(tensors[name], f"tensor {name}", CheckpointInvalid)
                if name.endswith("conv1d.weight") and tensor.ndim == 3:
                    tensor = tensor.squeeze(1)
                if tuple(tensor.shape) != shape:
                    raise CheckpointInvalid(
                        f"tensor {name} has shape {tuple(tensor.shape)}; config.json implies {shape}"
                    )
                tensor = tensor.to(torch.float32).contiguous()
                if not torch.isfinite(tensor).all():
                    raise CheckpointInvalid(f"tensor {name} holds NaN or infinity; the checkpoint is damaged")
                return tensor
        raise CheckpointInvalid(f"the checkpoint has no tensor {names[0]}; expected {expected}")

    return take


def take_ends(
    take: Take, tensors: dict[str, torch.Tensor], vocab_size: int, d_model: int, tied: bool
) -> dict[str, torch.Tensor]:
    """embedding, norm_f and lm_head, in mamba-ssm's (``backbone.embedding``) or transformers' names.

    A head in the checkpoint is the head, whatever config.json says: transformers does not tie what differs. One that
    is equal to the embedding, or absent where heads are ``tied``, is the embedding. CheckpointInvalid: absent and not
    tied.
    """
    embedding = take((vocab_size, d_model), "backbone.embedding.weight", "backbone.embeddings.weight")
    head = embedding
    if "lm_head.weight" in tensors:
        head = take((vocab_size, d_model), "lm_head.weight")
    elif not tied:
        raise CheckpointInvalid(
            "the checkpoint has no tensor lm_head.weight, and config.json does not tie the head to the embedding; "
            "save the model with its head"
        )
    if head is not embedding and torch.equal(head, embedding):
        head = embedding
    return {"embedding": embedding, "norm_f": take((d_model,), "backbone.norm_f.weight"), "lm_head": head}


def weights_from_tensors(config: MambaConfig, tensors: dict[str, torch.Tensor], tied: bool = True) -> MambaWeights:
    """Build MambaWeights from a state dict of mamba-ssm or transformers; errors as `taker`'s and `take_ends`'s."""
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
    return MambaWeights(c, layers=layers, **take_ends(take, tensors, c.vocab_size, c.d_model, tied))


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
