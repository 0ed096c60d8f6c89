"""INT8 operators of the CPU that keep what they were called with and what they returned, and ones that lay rows out as
CUDA's do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.apply.int8.operators.host import HostInt8Decoding, HostInt8Operators
from quambase.apply.int8.weights import PlacedWeights
from quambase.model.operators.torch import CPU

TO_CODES = ("add_norm_to_int8", "linear_to_int8", "conv_silu", "rotate", "gated_rotate")
TO_HALVES = ("add_norm_to_half", "linear_to_half", "half_product", "selective_scan", "ssd_scan")
OPERATORS = (*TO_CODES, *TO_HALVES)
"""By what they return."""


@dataclass
class Call:
    """Name, arguments (tensors copied before the call), and result of an operator."""

    name: str
    arguments: tuple[Any, ...]
    result: torch.Tensor


@dataclass
class Calls:
    """In the order they ended; one that another operator makes comes before it."""

    all: list[Call] = field(default_factory=list)

    def of(self, *names: str) -> list[Call]:
        """Those of these operators."""
        return [call for call in self.all if call.name in names]

    def results(self, name: str) -> list[Any]:
        """What one operator returned, as arrays."""
        return [call.result.numpy() for call in self.of(name)]


def changed(kind: type[HostInt8Operators], change: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> type:
    """A subclass whose every operator is ``change`` of its name and the original."""
    return type(f"Changed{kind.__name__}", (kind,), {name: change(name, getattr(kind, name)) for name in OPERATORS})


def recorded(model: Int8LanguageModel) -> tuple[Int8LanguageModel, Calls]:
    """The same model over operators that record, prefill and decoding alike."""
    calls = Calls()

    def record(name: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(self: HostInt8Operators, *arguments: Any) -> torch.Tensor:
            copies = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
            found = original(self, *arguments)
            calls.all.append(Call(name, copies, found.clone()))
            return found

        return call

    operators = changed(HostInt8Operators, record)(model.config.operator_sizes)
    operators.decoding = lambda: changed(HostInt8Decoding, record)(model.config.operator_sizes)
    return model.on(PlacedWeights(model.weights, operators)), calls


def padded(x: torch.Tensor, device: torch.device = CPU) -> torch.Tensor:
    """Codes or float16 values as CUDA's operators leave them: a slice of rows of 16 bytes whose rest is anything."""
    whole = 16 // x.element_size()
    wide = torch.full((len(x), -(-x.shape[1] // whole) * whole), 77, dtype=x.dtype, device=device)
    return wide[:, : x.shape[1]].copy_(x)


def laid_out_as_on_cuda(model: Int8LanguageModel) -> Int8LanguageModel:
    """The same model over the CPU's operators, which hold float16 values in float16 here, and rows apart."""

    def lay_out(name: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(self: HostInt8Operators, *arguments: Any) -> torch.Tensor:
            taken = [a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.float16 else a for a in arguments]
            found = original(self, *taken)
            return padded(found if name in TO_CODES else found.half())

        return call

    class HalvesInFloat16(changed(HostInt8Operators, lay_out)):  # type: ignore[misc]
        def halves(self, rows: torch.Tensor) -> torch.Tensor:
            return padded(rows)

        def new_residual(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(x.shape)

    return model.on(PlacedWeights(model.weights, HalvesInFloat16(model.config.operator_sizes)))
