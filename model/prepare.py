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

ROWS = 256
"""Rows that are rounded and rotated at a time: what lies between is small, and in the same memory again and again. New
memory takes longer to get than all of the arithmetic.
"""


@overload
def prepare(weights: MambaWeights, *, half: bool = True) -> MambaWeights: ...
@overload
def prepare(weights: Mamba2Weights, *, half: bool = True) -> Mamba2Weights: ...
def prepare(weights: MambaWeights | Mamba2Weights, *, half: bool = True) -> MambaWeights | Mamba2Weights:
    """Folded and rotated weights, to be run by ``Mamba(prepared, rotated=True)`` or ``Mamba2`` likewise.

    ``half``: round to float16 where upstream does (on loading, after folding, after each rotation); the tensors stay
    float32 and hold float16 values. Without it everything is float32.
    """

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float16).to(torch.float32) if half else x.to(torch.float32)

    def rotate(x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        """Every row of x, times ``norm``, in the rotated basis."""
        out = torch.empty(x.shape)
        for start in range(0, len(x), ROWS):
            part = rounded(x[start : start + ROWS])
            if norm is not None:
                # Upstream does in float64. A float32 product is that one rounded once; of float16 values it is exact.
                part = rounded(part * rounded(norm))
            out[start : start + ROWS] = rounded(hadamard(part))
        return out

    def block(layer: LayerWeights | Mamba2LayerWeights) -> LayerWeights | Mamba2LayerWeights:
        changed: dict[str, Any] = {
            "norm": torch.ones_like(layer.norm),
            "in_proj": rotate(layer.in_proj, layer.norm),
            "out_proj": rotate(rotate(layer.out_proj).T).T.contiguous(),
        }
        done = (*changed, *_FLOAT32[type(layer)])
        changed |= {name: rounded(value) for name, value in vars(layer).items() if name not in done}
        return replace(layer, **changed)

    whole: dict[str, Any] = {
        "embedding": rotate(weights.embedding),
        "layers": tuple(block(layer) for layer in weights.layers),
        "norm_f": torch.ones_like(weights.norm_f),
        "lm_head": rotate(weights.lm_head, weights.norm_f),
    }
    return replace(weights, **whole)
