"""What a kind of block is: sizes, weights, and one forward pass over operators.

A kind is one file (`quambase.model.mamba1`, `quambase.model.mamba2`) with a subclass of each class here and a
`BlockKind`; `quambase.model.block_kinds` lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from quambase.model.operators.interface import BlockState, Operators, OperatorSizes
from quambase.model.packed_batch import PlacedBatch
from quambase.schema.errors import CheckpointInvalid
from quambase.schema.groups import LayerGroups


class Tap(Protocol):
    """Receives every site's activation during a forward pass.

    ``values`` is (rows, channels) of the model's dtype and on its device, the rows of the batch's documents
    ``documents`` one after another; at the ssm_state sites (documents, e, n) float32. A site may arrive in several
    calls of ascending documents. The tensor must not be changed; it stays as it is until the tap has seen the last one.
    """

    def __call__(self, layer: int, site: str, values: torch.Tensor, documents: slice) -> None: ...


Show = Callable[[str, torch.Tensor], None]
"""A `Tap` of one layer and all documents: takes a site and its values."""


Change = Callable[[str, torch.Tensor], torch.Tensor]
"""Takes a site of one layer and its values (t, channels); what the block goes on with in their place."""


def unchanged(site: str, values: torch.Tensor) -> torch.Tensor:
    """The `Change` that changes nothing."""
    return values


class HeadLayout(NamedTuple):
    """How the channels of x lie in heads, and the heads in SSD groups: how many of each."""

    heads: int
    channels: int
    ssd_groups: int

    @property
    def headdim(self) -> int:
        """Channels of a head."""
        return self.channels // self.heads


class Draw(Protocol):
    """Draws random weights: normal values of a standard deviation, uniform ones from 0 to 1."""

    def normal(self, *shape: int, std: float) -> torch.Tensor: ...

    def uniform(self, *shape: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class ModelConfig(ABC):
    """Sizes of a model whose blocks are all of one kind.

    ``vocab_size`` counts the embedding's rows, padding rows included. ``kind``: the name of its `BlockKind`.
    """

    kind: ClassVar[str]
    d_model: int
    n_layer: int
    vocab_size: int
    d_inner: int
    d_state: int
    d_conv: int

    @property
    @abstractmethod
    def norm_eps(self) -> float:
        """Added to the mean square by the norms. A field of every kind, its last: the order of the fields determines
        `quambase.model.weights.weights_digest`.
        """

    @classmethod
    @abstractmethod
    def from_mamba_ssm(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From mamba-ssm's config.json (``d_model``, ``n_layer``, ``vocab_size``, ``ssm_cfg``). CheckpointInvalid."""

    @classmethod
    @abstractmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From transformers' config.json (``hidden_size``, ``num_hidden_layers``, ...). CheckpointInvalid."""

    @abstractmethod
    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of a block, by field of its weights."""

    @abstractmethod
    def block_edges(self) -> dict[str, tuple[int, ...]]:
        """Where the channel slices of every site of a block begin, and where the last one ends."""

    @abstractmethod
    def random_block(self, draw: Draw) -> BlockWeights:
        """Random weights, distributed as mamba-ssm initialises them."""

    @property
    @abstractmethod
    def operator_sizes(self) -> OperatorSizes:
        """What the operators of a block are made for."""

    @property
    def head_layout(self) -> HeadLayout | None:
        """The heads that can be sorted into groups (`quambase.schema.groups`); None without heads."""
        return None

    def site_edges(self) -> dict[str, tuple[int, ...]]:
        """As `block_edges`, of the model: the head's sites too."""
        head = {"lm_head:input": (0, self.d_model), "lm_head:output": (0, self.vocab_size)}
        return self.block_edges() | head


@dataclass(frozen=True)
class BlockWeights(ABC):
    """One block's weights, float32 on the CPU. Every kind has in_proj, which reads the normalised residual stream, and
    out_proj, which writes to it.

    norm  (d,): of the norm before the block
    """

    kind: ClassVar[str]
    norm: torch.Tensor

    def reordered(self, groups: LayerGroups) -> BlockWeights:
        """The same function with heads and channels in the order of ``groups``. CheckpointInvalid: there are none."""
        raise CheckpointInvalid(f"a block of kind {self.kind} has no heads to sort; leave the groups out")


class Block(ABC):
    """A block's forward pass, its weights laid out for ``operators``.

    ``rotated``: the weights were prepared (`quambase.model.prepare`), so the block's output is Hadamard-transformed
    before out_proj.
    """

    @abstractmethod
    def __init__(self, config: Any, weights: Any, operators: Operators, *, rotated: bool) -> None:
        """Of weights and sizes of the same kind."""

    @abstractmethod
    def forward(
        self,
        normalised: torch.Tensor,
        batch: PlacedBatch,
        state: BlockState | None = None,
        show: Show | None = None,
        change: Change = unchanged,
    ) -> torch.Tensor:
        """What is added to the residual stream (t, d) for the normalised one (t, d); ``show`` sees every site.

        ``state``: each document is the next token of a sequence that has it; it is updated.
        ``change``: sees every site whose scale an INT8 model's forward pass reads, before anything reads its values.
        """

    @abstractmethod
    def new_state(self, sequences: int) -> BlockState:
        """The state of ``sequences`` sequences before their first token."""


@dataclass(frozen=True)
class BlockKind:
    """One kind of block, and what others call it.

    name        in manifests and tables, as the model's family: a key of `quambase.schema.sites.FAMILIES`
    title       in messages
    model_type  transformers' and upstream's word, ``model_type`` of config.json
    layer       mamba-ssm's word, ``ssm_cfg.layer`` of config.json
    tied        whether transformers ties the head where config.json does not say
    names       each field of the weights to the tensor's name within a layer of mamba-ssm's state dict
    float32     fields that mamba_ssm creates in float32 whatever dtype the model is asked for in, and whose values its
                loader copies; every other parameter is rounded on loading
    """

    name: str
    title: str
    model_type: str
    layer: str
    tied: bool
    names: Mapping[str, str]
    float32: tuple[str, ...]
    config: type[ModelConfig]
    weights: type[BlockWeights]
    block: type[Block]
