"""From a float model and a scale table to the INT8 model of its family."""

from __future__ import annotations

from quambase.apply.int8 import mamba1 as quamba1
from quambase.apply.int8 import mamba2 as quamba2
from quambase.apply.int8.group_scales import channel_maps, check_group_scales
from quambase.apply.int8.mamba1 import Int8Mamba
from quambase.apply.int8.mamba2 import Int8Mamba2
from quambase.apply.int8.needed_scales import Scales, check_scales, needed_sites
from quambase.model.prepare import prepare, reorder
from quambase.model.weights import ModelWeights
from quambase.schema.scale_table import ScaleTable
from quambase.schema.sites import MAMBA1

Int8Model = Int8Mamba | Int8Mamba2


def build_model(
    weights: ModelWeights,
    table: ScaleTable,
    scales: Scales,
    *,
    quantize_lm_head: bool = False,
    quantize_embedding: bool = False,
    compat: str | None = None,
) -> Int8Model:
    """Fold, rotate and quantize ``weights``, a Mamba-2's in the order that the table's run sorted heads and channels.

    Errors: ScalesInvalid as for the model's class; CheckpointInvalid where the table's groups are another model's.
    """
    if weights.config.kind == MAMBA1:
        return quamba1.build(
            prepare(weights),
            scales,
            quantize_lm_head=quantize_lm_head,
            quantize_embedding=quantize_embedding,
            compat=compat,
        )
    groups = table.model.layer_groups
    return quamba2.build(
        prepare(weights if groups is None else reorder(weights, groups)),
        scales,
        channel_groups=channel_maps(groups or ()),
        quantize_lm_head=quantize_lm_head,
        quantize_embedding=quantize_embedding,
        compat=compat,
    )


def check_any_scales(weights: ModelWeights, table: ScaleTable, scales: Scales, quantize_lm_head: bool) -> Scales:
    """The scales that `build_model` would read, rounded to float32; ScalesInvalid, before the slow part."""
    if weights.config.kind == MAMBA1:
        return check_scales(scales, needed_sites(weights.config, quantize_lm_head))
    maps = channel_maps(table.model.layer_groups or ())
    return check_group_scales(scales, weights.config, maps, quantize_lm_head)
