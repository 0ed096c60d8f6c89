"""Prepares weights for quantization: sorts heads, folds norms, applies Hadamard rotations.

`prepare` is upstream's `configure_model` and `fuse_had_matrices`. Afterwards the residual stream is in the rotated
basis: embedding and every out_proj write it rotated, in_proj and lm_head expect it rotated, and RMSNorm commutes with
the rotation once its weight is 1. The inside of the block changes only before out_proj, whose input is rotated at run
time (``rotated=True``). Mamba-2's gated norm keeps its weight: it is between gate and rotation, where no adjacent
projection can absorb it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from quambase.model.block import BlockWeights
from quambase.model.block_kinds import kind_of
from quambase.model.hadamard import hadamard
from quambase.model.weights import ModelWeights
from quambase.schema.errors import CheckpointInvalid
from quambase.schema.groups import LayerGroups

ROWS = 256
"""Rows that are rounded and rotated at a time. The intermediate tensors are then small enough for their memory to be
reused; allocating new memory takes longer than the arithmetic.
"""


def reorder(weights: ModelWeights, layers: Sequence[LayerGroups]) -> ModelWeights:
    """The same model with each layer's heads and channels in the order of its groups.

    For weights as loaded, not prepared ones: preparing mixes the columns of out_proj. CheckpointInvalid: groups of
    another model.
    """
    config = weights.config
    sizes = {(len(groups.head_index), len(groups.channel_index), len(groups.head_groups)) for groups in layers}
    if len(layers) != config.n_layer or sizes != {config.head_layout}:
        layout = "no heads" if config.head_layout is None else tuple(config.head_layout)
        raise CheckpointInvalid(
            f"the groups describe {len(layers)} layers of (heads, channels, SSD groups) {sorted(sizes)}; the model has "
            f"{config.n_layer} of {layout}: use the groups of a run of this model"
        )
    blocks = zip(weights.layers, layers, strict=True)
    return replace(weights, layers=tuple(layer.reordered(groups) for layer, groups in blocks))


def prepare(weights: ModelWeights, *, half: bool = True) -> ModelWeights:
    """Folded and rotated weights, to be run by ``floating_model(prepared, rotated=True)``.

    ``half``: round to float16 where upstream does (on loading, after folding, after each rotation); the tensors stay
    float32 and hold float16 values. Without it everything is float32.
    """

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float16).to(torch.float32) if half else x.to(torch.float32)

    def rotate(x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        """Every row of x times ``norm``, in the rotated basis."""
        out = torch.empty(x.shape)
        for start in range(0, len(x), ROWS):
            part = rounded(x[start : start + ROWS])
            if norm is not None:
                # Upstream multiplies in float64. The float32 product is its result rounded once, and exact for float16
                # values.
                part = rounded(part * rounded(norm))
            out[start : start + ROWS] = rounded(hadamard(part))
        return out

    def block(layer: BlockWeights) -> BlockWeights:
        tensors: dict[str, Any] = vars(layer)
        changed: dict[str, Any] = {
            "norm": torch.ones_like(layer.norm),
            "in_proj": rotate(tensors["in_proj"], layer.norm),
            "out_proj": rotate(rotate(tensors["out_proj"]).T).T.contiguous(),
        }
        done = (*changed, *kind_of(layer).float32)
        changed |= {name: rounded(value) for name, value in tensors.items() if name not in done}
        return replace(layer, **changed)

    return replace(
        weights,
        embedding=rotate(weights.embedding),
        layers=tuple(block(layer) for layer in weights.layers),
        norm_f=torch.ones_like(weights.norm_f),
        lm_head=rotate(weights.lm_head, weights.norm_f),
    )
