"""Sort a Mamba-2's heads and channels into groups: upstream's `reorder_mamba` (quamba/reorder_utils.py:172-195).

The function that the model computes stays the same: heads are independent of each other, channels of a head too, and
heads stay in their SSD group, whose B, C and norm they share. Only the order of sums in out_proj and in the norm
changes. Reordering comes before `quambase.model.prepare.prepare`, which mixes the columns of out_proj.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from quambase.model.mamba2_weights import Mamba2Config, Mamba2LayerWeights, Mamba2Weights
from quambase.schema.errors import CheckpointInvalid
from quambase.schema.groups import LayerGroups


def reorder(weights: Mamba2Weights, layers: Sequence[LayerGroups]) -> Mamba2Weights:
    """The same model with each layer's heads and channels in the order of its groups.

    Acts on the weights as they are loaded, not on prepared ones. CheckpointInvalid: groups of another model.
    """
    c = weights.config
    sizes = {(len(groups.head_index), len(groups.channel_index), len(groups.head_groups)) for groups in layers}
    if len(layers) != c.n_layer or sizes != {(c.heads, c.d_inner, c.ngroups)}:
        raise CheckpointInvalid(
            f"the groups are of {len(layers)} layers of (heads, channels, SSD groups) {sorted(sizes)}; the model has "
            f"{c.n_layer} of {(c.heads, c.d_inner, c.ngroups)}: take the groups of a run of this model"
        )
    blocks = zip(weights.layers, layers, strict=True)
    return replace(weights, layers=tuple(_reorder_layer(c, layer, groups) for layer, groups in blocks))


def _reorder_layer(c: Mamba2Config, layer: Mamba2LayerWeights, groups: LayerGroups) -> Mamba2LayerWeights:
    heads = torch.tensor(groups.head_index)
    channels = torch.tensor(groups.channel_index)
    _, x, b, _, dt, _ = c.in_proj_edges
    rows = torch.cat([channels, x + channels, torch.arange(b, dt), dt + heads])
    conv = torch.cat([channels, torch.arange(c.d_inner, c.conv_width)])
    return replace(
        layer,
        in_proj=layer.in_proj[rows],
        conv_weight=layer.conv_weight[conv],
        conv_bias=layer.conv_bias[conv],
        dt_bias=layer.dt_bias[heads],
        A_log=layer.A_log[heads],
        D=layer.D[heads],
        gated_norm=layer.gated_norm[channels],
        out_proj=layer.out_proj[:, channels].contiguous(),
    )
