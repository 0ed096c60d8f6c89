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

    ``values``: (rows, channels) in the model's dtype on its device, the concatenated rows of the batch's documents
    ``documents``; at the ssm_state_act sites (documents, e, n) float32, at the ssm_state_seq sites (states, e, n),
    those after the documents' `quambase.model.packed_batch.sampled_ends`. A site may be delivered in several calls with
    ascending documents. The tap must not change the tensor, which stays valid until the forward pass ends.
    """

    def __call__(self, layer: int, site: str, values: torch.Tensor, documents: slice) -> None: ...


class Show(Protocol):
    """A `Tap` of one layer; ``documents`` None: all of them."""

    def __call__(self, site: str, values: torch.Tensor, documents: slice | None = None) -> None: ...


Change = Callable[[str, torch.Tensor], torch.Tensor]
"""Takes a site of one layer and its values (t, channels); returns the values that the block continues with."""


def unchanged(site: str, values: torch.Tensor) -> torch.Tensor:
    """The `Change` that changes nothing."""
    return values


class HeadLayout(NamedTuple):
    """Sizes of the head structure: equally large heads divide the channels of x, and SSD groups divide the heads."""

    heads: int
    channels: int
    ssd_groups: int

    @property
    def headdim(self) -> int:
        """Channels per head."""
        return self.channels // self.heads


class Draw:
    """Draws random weights by a seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float) -> torch.Tensor:
        """Normal with standard deviation ``std``."""
        return torch.randn(shape, generator=self._generator) * std

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform from 0 to 1."""
        return torch.rand(shape, generator=self._generator)


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

    def __post_init__(self) -> None:
        sizes = {
            name: getattr(self, name) for name in ("d_model", "n_layer", "vocab_size", "d_inner", "d_state", "d_conv")
        }
        if wrong := [f"{name} = {size}" for name, size in sizes.items() if size < 1]:
            raise CheckpointInvalid(f"config.json implies {wrong[0]}; expected at least 1")

    @property
    @abstractmethod
    def norm_eps(self) -> float:
        """Epsilon of the RMS norms, added to the mean square. Every kind declares it as its last field, since the order
        of the fields determines `quambase.model.weights.weights_digest`.
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
        """For every site of a block, the channels at which its slices begin, and the end of the last slice."""

    @abstractmethod
    def random_block(self, draw: Draw) -> BlockWeights:
        """Random weights, distributed as mamba-ssm initialises them."""

    @property
    @abstractmethod
    def operator_sizes(self) -> OperatorSizes:
        """The sizes that a block's operators are built for."""

    @property
    def head_layout(self) -> HeadLayout | None:
        """The heads that can be sorted into groups (`quambase.schema.groups`); None without heads."""
        return None

    def site_edges(self) -> dict[str, tuple[int, ...]]:
        """As `block_edges`, and the head's sites."""
        head = {"lm_head:input": (0, self.d_model), "lm_head:output": (0, self.vocab_size)}
        return self.block_edges() | head


@dataclass(frozen=True)
class BlockWeights(ABC):
    """One block's weights, float32 on the CPU. Every kind has in_proj, which reads the normalised residual stream, and
    out_proj, which writes to it.

    norm  (d,): weight of the norm before the block
    """

    kind: ClassVar[str]
    norm: torch.Tensor

    def reordered(self, groups: LayerGroups) -> BlockWeights:
        """The same function with heads and channels in the order of ``groups``. CheckpointInvalid: the kind has no
        heads.
        """
        raise CheckpointInvalid(f"a block of kind {self.kind} has no heads to sort; leave the groups out")


class Block(ABC):
    """A block's forward pass, its weights laid out for ``operators``.

    ``rotated``: the weights were prepared (`quambase.model.prepare`), so the block's output is Hadamard-transformed
    before out_proj.
    """

    @abstractmethod
    def __init__(self, config: Any, weights: Any, operators: Operators, *, rotated: bool) -> None:
        """``config`` and ``weights`` are of the block's kind."""

    @abstractmethod
    def forward(
        self,
        normalised: torch.Tensor,
        batch: PlacedBatch,
        state: BlockState | None = None,
        show: Show | None = None,
        change: Change = unchanged,
    ) -> torch.Tensor:
        """The block's contribution (t, d) to the residual stream, from the normalised stream (t, d); ``show`` receives
        every site.

        ``state``: if ``batch`` decodes, of the sequences whose next tokens are its documents; updated in place.
        Otherwise set to the state after each document.
        ``change``: receives every site that an INT8 model quantizes, before anything reads its values.
        """

    @abstractmethod
    def new_state(self, sequences: int) -> BlockState:
        """The state of ``sequences`` sequences before their first token."""


@dataclass(frozen=True)
class BlockKind:
    """One kind of block: its classes, and its names here and in other projects.

    name        in manifests and tables, as the model's family: a key of `quambase.schema.sites.FAMILIES`
    title       in messages
    model_type  transformers' and upstream's word, ``model_type`` of config.json
    layer       mamba-ssm's word, ``ssm_cfg.layer`` of config.json
    tied        whether transformers ties the head where config.json does not say
    names       maps each field of the weights to the tensor's name within a layer of mamba-ssm's state dict
    float32     fields that mamba_ssm holds in float32 whatever the model's dtype; its loader rounds every other
                parameter
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
