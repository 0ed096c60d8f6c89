"""What a manifest and a scale table say about the model and the text of a run, as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quambase.schema.errors import DatabaseInvalid
from quambase.schema.groups import LayerGroups
from quambase.schema.json_files import Count, Size

SIZES = ("n_layer", "d_model", "d_inner", "d_state", "dt_rank", "headdim", "ngroups", "vocab_size")
"""Names of a model's sizes; a family has some of them."""

MOST_LAYERS = 10_000
"""Largest accepted number of layers: tables and files have rows for each."""


@dataclass(frozen=True)
class SortedGroups:
    """How a Mamba-2's heads and channels are sorted.

    settings  how the groups were found: variant, and where its statistics are from
    layers    the order and the groups of each layer
    """

    settings: Mapping[str, Any]
    layers: tuple[LayerGroups, ...]

    @property
    def variant(self) -> str | None:
        """fixed or quamba2; None if the order is upstream's own, from a file of its scales."""
        found = self.settings.get("variant")
        return None if found is None else str(found)


@dataclass(frozen=True)
class ModelInfo:
    """The model of a run.

    name    what it is called
    family  "mamba1", "mamba2", or "tensor" for an imported file
    path    where its checkpoint was read from
    sizes   by name, of SIZES
    groups  of a sorted Mamba-2
    shape   of an imported tensor
    """

    name: str
    family: str
    path: str | None = None
    sizes: Mapping[str, Size] = field(default_factory=dict)
    groups: SortedGroups | None = None
    shape: tuple[Size, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.sizes.get("n_layer", 1) <= MOST_LAYERS:
            raise ValueError(f"a model of {self.sizes['n_layer']} layers; expected 1 to {MOST_LAYERS:,}")

    @property
    def n_layer(self) -> int:
        """Layers of the model; DatabaseInvalid if they are not known."""
        return self.size("n_layer")

    def size(self, name: str) -> int:
        """The size called ``name``; DatabaseInvalid if it is not known."""
        if name not in self.sizes:
            raise DatabaseInvalid(f"the {name} of model {self.name} is not stored with its run; collect again")
        return self.sizes[name]

    @property
    def layer_groups(self) -> list[LayerGroups] | None:
        """The groups of each layer; None if the model was not sorted."""
        return None if self.groups is None else list(self.groups.layers)

    def to_json(self) -> dict[str, Any]:
        """As manifests and provenances store it."""
        found: dict[str, Any] = {"name": self.name, "path": self.path, "family": self.family, **self.sizes}
        if self.shape is not None:
            found["shape"] = list(self.shape)
        if self.groups is not None:
            layers = [layer.to_json() for layer in self.groups.layers]
            found["groups"] = {**self.groups.settings, "layers": layers}
        return found

    @staticmethod
    def nested(raw: dict[str, Any]) -> dict[str, Any]:
        """What `to_json` gave, under the names of the fields, for `quambase.schema.json_files.as_type`."""
        found: dict[str, Any] = {name: raw[name] for name in ("name", "family", "path", "shape") if name in raw}
        found["sizes"] = {name: raw[name] for name in SIZES if raw.get(name) is not None}
        if isinstance(stored := raw.get("groups"), dict):
            settings = {name: value for name, value in stored.items() if name != "layers"}
            found["groups"] = {"settings": settings, "layers": stored.get("layers")}
        return found


@dataclass(frozen=True)
class TextInfo:
    """The text of a run.

    name       what it is called
    path       of the file; None for a known name
    read       documents read
    documents  documents with a token
    empty      documents without one
    truncated  documents cut at the sequence length
    tokens     tokens counted
    """

    name: str
    documents: Count
    tokens: Count
    path: str | None = None
    read: Count | None = None
    empty: Count = 0
    truncated: Count = 0

    def to_json(self) -> dict[str, Any]:
        """As manifests and provenances store it."""
        names = ("name", "path", "read", "documents", "empty", "truncated", "tokens")
        return {name: getattr(self, name) for name in names}
