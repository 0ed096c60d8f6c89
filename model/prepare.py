"""Upstream's `configure_model` and `fuse_had_matrices`: fold the norms, rotate by Hadamard matrices.

Afterwards the residual stream lives in the rotated basis: embedding and every out_proj write it rotated, in_proj and
lm_head expect it so, and RMSNorm commutes with the rotation once its weight is 1. The inside of the block changes
only before out_proj, whose input is rotated at run time (``rotated=True``). Mamba-2's gated norm keeps its weight: it
lies between gate and rotation, where nothing could take it up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, overload

import torch

from quambase.model.hadamard import hadamard
from quambase.model.mamba2_weights import Mamba2LayerWeights, Mamba2Weights
from quambase.model.weights import LayerWeights, MambaWeights

# mamba_ssm creates these in float32 whatever dtype the model is asked for in, and its
# loader copies into them; every other parameter is rounded on loading.
_FLOAT32 = {LayerWeights: ("A_log", "D"), Mamba2LayerWeights: ("D",)}


@overload
def prepare(weights: MambaWeights, *, half: bool = True) -> MambaWeights: ...
@overload
def prepare(weights: Mamba2Weights, *, half: bool = True) -> Mamba2Weights: ...
def prepare(weights: MambaWeights | Mamba2Weights, *, half: bool = True) -> MambaWeights | Mamba2Weights:
    """Folded and rotated weights, to be run by ``Mamba(prepared, rotated=True)`` or ``Mamba2`` likewise.

    ``half``: round to float16 where upstream does (on loading, after folding, after each rotation); the tensors stay
    float32 and hold float16 values. Without it everything is float32, folding float64.
    """

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float16).to(torch.float32) if half else x.to(torch.float32)

    def fold(linear: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return rounded(rounded(linear).double() * rounded(norm).double())

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return rounded(hadamard(x))

    def block(layer: LayerWeights | Mamba2LayerWeights) -> LayerWeights | Mamba2LayerWeights:
        out_proj = rotate(rounded(layer.out_proj))
        kept = {name: getattr(layer, name) for name in _FLOAT32[type(layer)]}
        return replace(
            layer.map(rounded),
            norm=torch.ones_like(layer.norm),
            in_proj=rotate(fold(layer.in_proj, layer.norm)),
            out_proj=rotate(out_proj.T).T.contiguous(),
            **kept,
        )

    changed: dict[str, Any] = {
        "embedding": rotate(rounded(weights.embedding)),
        "layers": tuple(block(layer) for layer in weights.layers),
        "norm_f": torch.ones_like(weights.norm_f),
        "lm_head": rotate(fold(weights.lm_head, weights.norm_f)),
    }
    return replace(weights, **changed)
