"""A tiny Mamba-1 for the INT8 tests: random weights, sizes that exercise padding and several blocks."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from quambase.apply.int8.needed_scales import needed_sites
from quambase.model.language_model import floating_model
from quambase.model.mamba1 import MambaConfig
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare
from quambase.model.weights import ModelWeights, random_weights
from quambase.schema.sites import layer_sites

CONFIG = MambaConfig(d_model=32, n_layer=2, vocab_size=40, d_inner=64, d_state=8, d_conv=4, dt_rank=3)


def tiny_weights(seed: int = 0) -> ModelWeights:
    """Random weights whose logits are not all alike (the embedding is larger than at initialisation)."""
    weights = random_weights(CONFIG, seed)
    embedding = weights.embedding * 30
    return dataclasses.replace(weights, embedding=embedding, lm_head=embedding)


def tiny_prepared(seed: int = 0) -> ModelWeights:
    """The same, folded and rotated."""
    return prepare(tiny_weights(seed))


def documents(seed: int = 0, lengths: tuple[int, ...] = (17, 1, 40, 3)) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, CONFIG.vocab_size, length).tolist() for length in lengths]


def absmax_scales(prepared: ModelWeights, texts: list[list[int]]) -> dict[tuple[int, str], float]:
    """Float16-rounded absmax / 127 of every site over ``texts``."""
    amax = dict.fromkeys(((layer, site.name) for layer, site in layer_sites(CONFIG.n_layer)), 1e-3)

    def tap(layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        amax[layer, site] = max(amax[layer, site], float(values.abs().max()))

    floating_model(prepared, rotated=True).hidden(Batch.pack(texts), tap)
    return {key: float(np.float16(value / 127)) for key, value in amax.items()}


def needed(quantize_lm_head: bool = True) -> list[tuple[int, str]]:
    return needed_sites(CONFIG, quantize_lm_head)
