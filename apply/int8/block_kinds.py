"""The registry of INT8 block kinds. A new kind is a file of its own and an entry here."""

from __future__ import annotations

from quambase.apply.int8 import mamba1, mamba2
from quambase.apply.int8.block import Int8BlockKind, Int8BlockWeights
from quambase.model.block import BlockWeights, ModelConfig

KINDS: dict[str, Int8BlockKind] = {kind.name: kind for kind in (mamba1.KIND, mamba2.KIND)}
"""By name, in the order in which messages list them."""

BY_FORMAT = {kind.format: kind for kind in KINDS.values()}


def int8_kind_of(part: ModelConfig | BlockWeights | Int8BlockWeights) -> Int8BlockKind:
    """The INT8 kind of a config or of a block's weights."""
    return KINDS[part.kind]
