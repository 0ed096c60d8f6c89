# mypy: disable-error-code="attr-defined"
"""A tiny Mamba-2 of two SSD groups for the INT8 tests; scales per tensor, SSD group and channel group."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from quambase.model.language_model import floating_model
from quambase.model.mamba2 import Mamba2Config
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare
from quambase.model.weights import ModelWeights, random_weights
from quambase.schema.sites import MAMBA2, layer_sites

CONFIG = Mamba2Config(d_model=32, n_layer=2, vocab_size=40, d_inner=64, d_state=16, d_conv=4, headdim=8, ngroups=2)


def tiny_weights(seed: int = 0, config: Mamba2Config = CONFIG) -> ModelWeights:
    """Random weights whose logits are not all alike (the embedding is larger than at initialisation)."""
    weights = random_weights(config, seed)
    embedding = weights.embedding * 30
    return dataclasses.replace(weights, embedding=embedding, lm_head=embedding)


def channel_groups(config: Mamba2Config = CONFIG) -> list[torch.Tensor]:
    """Uneven groups within each SSD group, other ones in each layer: 3 per SSD group."""
    generator = np.random.default_rng(5)
    share = config.d_inner // config.ngroups
    maps = []
    for _ in range(config.n_layer):
        parts = [np.r_[0, 1, 2, generator.integers(0, 3, share - 3)] + 3 * g for g in range(config.ngroups)]
        maps.append(torch.from_numpy(np.concatenate(parts)).long())
    return maps


def absmax_scales(prepared: ModelWeights, texts: list[list[int]], granularity: str = "tensor", groups=()):
    """Absmax / 127 of every site; per ``tensor``, ``ssd`` group, or ``channel`` group (B, C by SSD group)."""
    config = prepared.config
    amax: dict[tuple[int, str], np.ndarray] = {}
    for layer, site in layer_sites(config.n_layer, MAMBA2):
        amax[layer, site.name] = np.full(1, 1e-3)

    def tap(layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        channels = values.abs().amax(0).numpy()
        if site == "ssm_state_act:input":
            channels = channels.max(1)
        found = np.array([channels.max()])
        divided = ("x_conv_out:input", "B_conv_out:input", "C_conv_out:input", "ssm_state_act:input")
        if granularity != "tensor" and site in divided:
            by_channel = granularity == "channel" and len(channels) == config.d_inner
            index = groups[layer].numpy() if by_channel else np.arange(len(channels)) * config.ngroups // len(channels)
            found = np.array([channels[index == g].max() for g in range(index.max() + 1)])
        amax[layer, site] = np.maximum(amax[layer, site], found)

    floating_model(prepared, rotated=True).hidden(Batch.pack(texts), tap)
    scales = {key: tuple(float(np.float32(v / 127)) for v in values) for key, values in amax.items()}
    return {key: values if len(values) > 1 else values[0] for key, values in scales.items()}


def tiny_prepared(seed: int = 0, config: Mamba2Config = CONFIG) -> ModelWeights:
    """Folded and rotated."""
    return prepare(tiny_weights(seed, config))


def documents(seed: int = 0, lengths: tuple[int, ...] = (17, 1, 40, 3)) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, CONFIG.vocab_size, length).tolist() for length in lengths]
