"""The registry of block kinds. A new kind is a file of its own and an entry here."""

from __future__ import annotations

from pathlib import Path

from quambase.model import mamba1, mamba2
from quambase.model.block import BlockKind, BlockWeights, ModelConfig
from quambase.model.inputs.settings import Settings, shown
from quambase.schema.errors import CheckpointInvalid

KINDS: dict[str, BlockKind] = {kind.name: kind for kind in (mamba1.KIND, mamba2.KIND)}
"""By name, in the order in which messages list them."""


def kind_of(part: ModelConfig | BlockWeights) -> BlockKind:
    """The kind of a config or of a block's weights."""
    return KINDS[part.kind]


def read_config(raw: Settings, path: Path) -> tuple[ModelConfig, bool]:
    """The sizes in a config.json of any kind and layout, and whether it ties the head to the embedding; ``path`` is for
    errors.

    ``model_type`` decides which layout's keys are read, as in transformers: a converted model may contain both, and
    transformers updates only its own. CheckpointInvalid for any other model.
    """
    kinds = list(KINDS.values())
    by_type = {kind.model_type: kind for kind in kinds}
    model_type = raw.word("model_type", "")
    if model_type in by_type and ("d_model" not in raw or "hidden_size" in raw):
        kind = by_type[model_type]
        return kind.config.from_hugging_face(raw.values), raw.flag("tie_word_embeddings", kind.tied)
    if model_type in ("", *by_type) and ("d_model" in raw or "n_layer" in raw):
        by_layer = {kind.layer: kind for kind in kinds}
        ssm = raw.section("ssm_cfg")
        ssm.only("layer", *by_layer)
        layer = ssm.word("layer", kinds[0].layer)  # mamba-ssm's default
        return by_layer[layer].config.from_mamba_ssm(raw.values), raw.flag("tie_embeddings", True)
    raise CheckpointInvalid(
        f"{path} describes a {shown(model_type) if model_type else 'model of unknown type'}; expected "
        f"{' or '.join(kind.title for kind in kinds)} in mamba-ssm layout (d_model, n_layer) or Hugging Face layout "
        f"(model_type {' or '.join(by_type)})"
    )
