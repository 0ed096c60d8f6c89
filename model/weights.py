"""The weights of a language model of any kind of block, and how they are read from a state dict."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from quambase.model.block import BlockWeights, Draw, ModelConfig
from quambase.model.block_kinds import kind_of
from quambase.model.inputs.settings import shown
from quambase.model.inputs.tensor_files import QUANTIZED, plain_tensor
from quambase.schema.errors import CheckpointInvalid


@dataclass(frozen=True)
class ModelWeights:
    """A whole model, float32 on the CPU: embedding (v, d), layers, norm_f (d,), lm_head (v, d) (the same tensor where
    tied).
    """

    config: ModelConfig
    embedding: torch.Tensor
    layers: tuple[BlockWeights, ...]
    norm_f: torch.Tensor
    lm_head: torch.Tensor


_QUANTIZERS_NAME = re.compile(r"(_scale|_scale_inv|\.scales|zero_point|qzeros|qweight|_packed|absmax|quant_map|\.SCB)$")
"""Endings of tensor names that quantizers (compressed-tensors, GPTQ, AWQ, bitsandbytes) add to a checkpoint."""


def _take(tensors: dict[str, torch.Tensor], expected: str, shape: tuple[int, ...], *names: str) -> torch.Tensor:
    """A tensor of ``shape``, the first of ``names`` that a state dict has, as float32.

    CheckpointInvalid names a tensor that is missing (``expected`` describes a complete checkpoint), of another shape,
    not finite, or quantized.
    """
    name = next((name for name in names if name in tensors), None)
    if name is None:
        raise CheckpointInvalid(f"the checkpoint has no tensor {names[0]}; expected {expected}")
    if tensors[name].element_size() == 1:
        raise CheckpointInvalid(f"tensor {name} is {tensors[name].dtype}: {QUANTIZED}")
    tensor = plain_tensor(tensors[name], f"tensor {name}", CheckpointInvalid)
    if name.endswith("conv1d.weight") and tensor.ndim == 3:
        tensor = tensor.squeeze(1)
    if tuple(tensor.shape) != shape:
        raise CheckpointInvalid(f"tensor {name} has shape {tuple(tensor.shape)}; config.json implies {shape}")
    tensor = tensor.to(torch.float32).contiguous()
    if not torch.isfinite(tensor).all():
        raise CheckpointInvalid(f"tensor {name} holds NaN or infinity; the checkpoint is damaged")
    return tensor


def _ends(
    take: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor], config: ModelConfig, tied: bool
) -> dict[str, torch.Tensor]:
    """embedding, norm_f and lm_head, in mamba-ssm's (``backbone.embedding``) or transformers' names.

    A head in the checkpoint is the head, whatever config.json says: transformers does not tie what differs. A head that
    equals the embedding, or is absent from a model with ``tied`` head, is the embedding. CheckpointInvalid: it is
    absent and not tied.
    """
    whole = config.vocab_size, config.d_model
    embedding = take(whole, "backbone.embedding.weight", "backbone.embeddings.weight")
    head = embedding
    if "lm_head.weight" in tensors:
        head = take(whole, "lm_head.weight")
    elif not tied:
        raise CheckpointInvalid(
            "the checkpoint has no tensor lm_head.weight, and config.json does not tie the head to the embedding; "
            "save the model with its head"
        )
    if head is not embedding and torch.equal(head, embedding):
        head = embedding
    return {"embedding": embedding, "norm_f": take(whole[1:], "backbone.norm_f.weight"), "lm_head": head}


def weights_from_tensors(config: ModelConfig, tensors: dict[str, torch.Tensor], tied: bool = True) -> ModelWeights:
    """Build weights from a state dict of mamba-ssm or transformers.

    CheckpointInvalid: a tensor is missing, of another shape or not finite, or the checkpoint is quantized.
    """
    for name in tensors:
        if _QUANTIZERS_NAME.search(name):
            raise CheckpointInvalid(f"the checkpoint has a tensor {shown(name)}: {QUANTIZED}")
    kind, shapes = kind_of(config), config.block_shapes()
    take = partial(_take, tensors, f"a {kind.title} of {config.n_layer} layers")
    layers = tuple(
        kind.weights(**{key: take(shapes[key], f"backbone.layers.{i}.{name}") for key, name in kind.names.items()})
        for i in range(config.n_layer)
    )
    return ModelWeights(config, layers=layers, **_ends(take, tensors, config, tied))


def tensors_of(weights: ModelWeights) -> dict[str, torch.Tensor]:
    """The state dict in mamba-ssm's layout and names (a tied head is left out)."""
    found = {"backbone.embedding.weight": weights.embedding, "backbone.norm_f.weight": weights.norm_f}
    for i, layer in enumerate(weights.layers):
        for key, name in kind_of(layer).names.items():
            tensor = getattr(layer, key)
            found[f"backbone.layers.{i}.{name}"] = tensor.unsqueeze(1) if key == "conv_weight" else tensor
    if weights.lm_head is not weights.embedding:
        found["lm_head.weight"] = weights.lm_head
    return found


def weights_digest(weights: ModelWeights) -> str:
    """SHA-256 over configuration and every tensor's float32 bytes: the same for the same model in any layout."""
    digest = hashlib.sha256(repr(weights.config).encode())
    for tensor in (weights.embedding, weights.norm_f, weights.lm_head):
        digest.update(tensor.contiguous().numpy().tobytes())
    for layer in weights.layers:
        for tensor in vars(layer).values():
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def random_weights(config: ModelConfig, seed: int = 0) -> ModelWeights:
    """Random weights distributed as mamba-ssm initialises them, head tied."""
    draw = Draw(seed)
    embedding = draw.normal(config.vocab_size, config.d_model, std=0.02)
    layers = tuple(config.random_block(draw) for _ in range(config.n_layer))
    return ModelWeights(config, embedding, layers, 1 + draw.normal(config.d_model, std=0.1), embedding)
