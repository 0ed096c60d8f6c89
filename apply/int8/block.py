"""The interface of INT8 blocks: weights as codes, activation scales as the operators read them, one forward pass.

A kind is one file (`mamba1`, `mamba2`) with a subclass of each class here; `block_kinds` lists them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from quambase.apply.int8.arithmetic import SplitInt8Weight, Weight, float32, scale_of_rows
from quambase.apply.int8.operators.interface import Factors, Int8Operators, Multipliers
from quambase.apply.int8.state_formats import StateLayout
from quambase.model.block_kinds import KINDS
from quambase.model.operators.interface import BlockState
from quambase.model.packed_batch import PlacedBatch
from quambase.schema.errors import ScalesInvalid
from quambase.schema.scale_table import Scale
from quambase.schema.values.number_format import Affine


class Int8BlockWeights(ABC):
    """One block's weights: each an `Int8Weight`, a `SplitInt8Weight`, or a tensor in 16 bit.

    ``fields_of``: of each operator that can stay in 16 bit, the fields with its weights; the first is quantized unless
    the operator is in 16 bit.
    """

    kind: ClassVar[str]
    fields_of: ClassVar[Mapping[str, tuple[str, ...]]]

    @classmethod
    @abstractmethod
    def quantized(
        cls, config: Any, layer: Any, weight_bits: int = 8, moments: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> Int8BlockWeights:
        """Quantize prepared (folded and rotated, `quambase.model.prepare`) weights, rounding as upstream does.

        weight_bits  of in_proj, x_proj and out_proj: 8, or 4 (`quantize_weight_4bit`)
        moments      of 4 bits, the second moments of these operators' inputs by site; none: round to nearest
        """

    def with_16_bit(self, layer: Any, operators: Collection[str]) -> Int8BlockWeights:
        """The same with the weights of the ``operators`` in float16, or in float32 where the floating-point model has
        that whatever its dtype; ``layer``: the prepared weights.

        ScalesInvalid: the block has no such operator.
        """
        wide = KINDS[self.kind].float32
        halves: dict[str, torch.Tensor] = {}
        for operator in operators:
            if operator not in self.fields_of:
                known = ", ".join(self.fields_of)
                raise ScalesInvalid(f"a {KINDS[self.kind].title} block has no operator {operator}; it has {known}")
            for name in self.fields_of[operator]:
                halves[name] = getattr(layer, name).to(torch.float32 if name in wide else torch.float16)
        return replace(self, **halves)  # type: ignore[type-var]

    @property
    def in_16_bit(self) -> frozenset[str]:
        """The operators in 16 bit."""
        return frozenset(
            operator for operator, names in self.fields_of.items() if isinstance(getattr(self, names[0]), torch.Tensor)
        )

    @classmethod
    def widths(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """For each field that is a `SplitInt8Weight` if it is quantized, the rows of its parts."""
        return {}


@dataclass(frozen=True)
class BlockScales:
    """One block's activation scales as its operators read them.

    input  of the codes that the block reads; None: it reads float16 values, its in_proj is in 16 bit
    """

    input: float | None
    out_proj: Factors
    rotation: float
    wrap: bool


class Int8Block(ABC):
    """A block's forward pass, with its weights laid out for operators; the scales of any strategy are an argument."""

    operators: Int8Operators

    @abstractmethod
    def __init__(self, config: Any, weights: Any, operators: Int8Operators) -> None:
        """``config`` and ``weights`` are of the block's kind."""

    def scale_of(self, weight: Weight) -> float | torch.Tensor:
        """`scale_of_rows`, on the operators' device."""
        found = scale_of_rows(weight)
        return self.operators.vector(found) if isinstance(found, torch.Tensor) else found

    def matrix(self, weight: Weight) -> Any:
        """A matrix laid out for the products of codes, or if it is in 16 bit, of float16 values."""
        if isinstance(weight, torch.Tensor):
            return self.operators.half_matrix(weight)
        return self.operators.matrix(weight.joined if isinstance(weight, SplitInt8Weight) else weight)

    @abstractmethod
    def lay_out(self, scales: Mapping[str, Scale], divisions: Sequence[torch.Tensor], wrap: bool) -> BlockScales:
        """The checked scales of the block's sites, laid out for `forward`.

        divisions  the ways x is divided into scale groups, each the group of every channel (e,), int64
        wrap       whether the Hadamard quantizer wraps modulo 256, as upstream's
        """

    @abstractmethod
    def forward(
        self,
        ops: Int8Operators,
        x: torch.Tensor,
        scales: Any,
        batch: PlacedBatch,
        state: BlockState | None = None,
    ) -> torch.Tensor:
        """The block's contribution to the residual stream, float16 values (t, d), from codes (t, d) of the normalised
        stream, or from its float16 values if in_proj is in 16 bit.

        scales  as `lay_out` returns them
        state   updated if ``ops`` decode, otherwise set to the state after each document
        """

    @abstractmethod
    def state_layout(self, scales: Any) -> StateLayout:
        """How the state is laid out; ``scales`` as `lay_out` returns them."""

    @abstractmethod
    def new_state(self, sequences: int) -> BlockState:
        """The state of ``sequences`` sequences before their first token."""


def whole(scale: Scale) -> float:
    """The one scale of an undivided site."""
    found = scale.scale if isinstance(scale, Affine) else scale
    assert isinstance(found, float)
    return found


def zero_point(scale: Scale) -> int:
    """The zero point of an undivided site."""
    return scale.zero_point if isinstance(scale, Affine) else 0


def half_factors(weight: float | torch.Tensor, source: float) -> Factors:
    """The factors of a product with float16 result: the weight's scale first, then that of the input codes.

    weight  one scale, or (out,) float32 on the operators' device
    """
    both = Multipliers(weight, source)
    combined = weight * source if isinstance(weight, torch.Tensor) else float32(weight * source)
    return Factors(both, both, Multipliers(combined, 1.0))


def rotation_factor(d_inner: int, scale: float) -> float:
    """The Hadamard quantizer's factor: 1/sqrt(e) and the scale combined, as upstream (qHadamard.py)."""
    return 1.0 / math.sqrt(d_inner) / scale


@dataclass(frozen=True)
class Int8BlockKind:
    """One kind of INT8 block.

    name    of the `quambase.model.block.BlockKind`
    format  the name of such a model's format in its folder
    """

    name: str
    format: str
    weights: type[Int8BlockWeights]
    block: type[Int8Block]
