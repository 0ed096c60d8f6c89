"""Upstream's `configure_model` and `fuse_had_matrices`: fold the norms, rotate by Hadamard matrices.

Afterwards the residual stream lives in the rotated basis: embedding and every out_proj write it rotated, in_proj and
lm_head expect it so, and RMSNorm commutes with the rotation once its weight is 1. The inside of the block changes
only before out_proj, whose input is rotated at run time (`Mamba(rotated=True)`).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from quambase.model.hadamard import hadamard
from quambase.model.weights import LayerWeights, MambaWeights

# mamba_ssm creates these in float32 whatever dtype the model is asked for in, and its
# loader copies into them; every other parameter is rounded on loading.
_FLOAT32 = ("A_log", "D")


def prepare(weights: MambaWeights, *, half: bool = True) -> MambaWeights:
    """Folded and rotated weights, to be run by ``Mamba(prepared, rotated=True)``.

    ``half``: round to float16 where upstream does (on loading, after folding, after each rotation); the tensors stay
    float32 and hold float16 values. Without it everything is float32, folding float64.
    """

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float16).to(torch.float32) if half else x.to(torch.float32)

    def fold(linear: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return rounded(rounded(linear).double() * rounded(norm).double())

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return rounded(hadamard(x))

    def block(layer: LayerWeights) -> LayerWeights:
        out_proj = rotate(rounded(layer.out_proj))
        kept = {name: getattr(layer, name) for name in _FLOAT32}
        return replace(
            layer.map(rounded),
            norm=torch.ones_like(layer.norm),
            in_proj=rotate(fold(layer.in_proj, layer.norm)),
            out_proj=rotate(out_proj.T).T.contiguous(),
            **kept,
        )

    return MambaWeights(
        weights.config,
        embedding=rotate(rounded(weights.embedding)),
        layers=tuple(block(layer) for layer in weights.layers),
        norm_f=torch.ones_like(weights.norm_f),
        lm_head=rotate(fold(weights.lm_head, weights.norm_f)),
    )
