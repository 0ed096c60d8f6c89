"""Formats of the recurrent state that is cached between decoded tokens, simulated in float32.

A format is written ``NUMBER[:SCALES][:ROUNDING][:every=K]``, such as ``int8:channel:stochastic``. After every token the
state's values are divided by their scale, rounded to the format's numbers and multiplied again: that is what a cache in
the format gives the next token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from quambase.apply.int8.operators.interface import Int8BlockState
from quambase.schema.errors import DataInvalid


@dataclass(frozen=True)
class Grid:
    """The numbers of a format: all multiples of a spacing from ``smallest`` to ``largest``.

    bytes     of a number
    mantissa  bits; the spacing is 2^(exponent - mantissa). None: integers, of spacing 1
    lowest    the exponent below which the spacing stays
    scaled    whether values are divided by a scale first
    """

    bytes: int
    smallest: float
    largest: float
    mantissa: int | None = None
    lowest: int = 0
    scaled: bool = True

    def spacing(self, x: torch.Tensor) -> torch.Tensor:
        """The distance of the format's numbers around each of x."""
        if self.mantissa is None:
            return torch.ones_like(x)
        exponents = torch.frexp(x)[1] - 1  # of 2^e <= |x| < 2^(e + 1)
        return torch.ldexp(torch.ones_like(x), exponents.clamp(min=self.lowest) - self.mantissa)


GRIDS = {
    "int8": Grid(1, -128, 127),
    "int16": Grid(2, -32768, 32767),
    "fp8": Grid(1, -448, 448, mantissa=3, lowest=-6),  # E4M3 without infinities
    "float16": Grid(2, -65504, 65504, mantissa=10, lowest=-14, scaled=False),
    "bfloat16": Grid(2, -3.3895313892515355e38, 3.3895313892515355e38, mantissa=7, lowest=-126, scaled=False),
    "float32": Grid(4, -math.inf, math.inf, scaled=False),
}
"""By name, in the order of help texts."""

TABLE, SITE, CHANNEL, INDEX, HEAD = "table", "site", "channel", "index", "head"
SCALES = (TABLE, SITE, HEAD, CHANNEL, INDEX)
"""What shares a scale: as the scale table has it, fixed; or computed from the state itself, of each sequence, for the
whole, a head, a channel (of a head, in Mamba-2) or a state index.
"""

NEAREST, STOCHASTIC, FEEDBACK = "nearest", "stochastic", "feedback"
ROUNDINGS = (NEAREST, STOCHASTIC, FEEDBACK)
"""nearest: half to even; stochastic: up with the probability of the remainder; feedback: to nearest, after the rounding
error of the token before, itself kept in 8 bits, was added.
"""

RESIDUAL_LEVELS = 127
"""The residual of half a spacing has this code."""


@dataclass(frozen=True)
class StateFormat:
    """A format of the cached state; ``every``: tokens after which scales from the state are computed anew."""

    number: str
    scales: str = TABLE
    rounding: str = NEAREST
    every: int = 1

    @classmethod
    def parse(cls, text: str) -> StateFormat:
        """As it is written; DataInvalid, which says what is known."""
        number, *rest = text.split(":")
        found = {"number": number}
        every = 1
        for part in rest:
            if part in SCALES and "scales" not in found:
                found["scales"] = part
            elif part in ROUNDINGS and "rounding" not in found:
                found["rounding"] = part
            elif part.removeprefix("every=").isdecimal() and part.startswith("every=") and every == 1:
                every = int(part.removeprefix("every="))
            else:
                number = ""
        known = f"{', '.join(GRIDS)}; then :{' or :'.join(SCALES)}, :{' or :'.join(ROUNDINGS)}, and :every=K"
        if number not in GRIDS or every < 1:
            raise DataInvalid(f"{text!r} is no format of the state; expected one of {known}")
        if not GRIDS[number].scaled and ("scales" in found or every != 1):
            raise DataInvalid(f"{text!r}: {number} has no scales; expected {number}, or a rounding after it")
        if every != 1 and found.get("scales", TABLE) == TABLE:
            raise DataInvalid(f"{text!r}: scales of the table are fixed; every=K goes with :{', :'.join(SCALES[1:])}")
        if number == "float32" and "rounding" in found:
            raise DataInvalid(f"{text!r}: a float32 state is not rounded")
        return cls(every=every, **found)

    def __str__(self) -> str:
        parts = [self.number] + ([self.scales] if self.grid.scaled else [])
        parts += [self.rounding] if self.rounding != NEAREST else []
        return ":".join(parts + ([f"every={self.every}"] if self.every != 1 else []))

    @property
    def grid(self) -> Grid:
        """Its numbers."""
        return GRIDS[self.number]


@dataclass(frozen=True)
class StateLayout:
    """How a block's state is laid out.

    table     INT8 scales of the scale table, float32, broadcast over (b, ...) as the state is
    channels  the dimension of the channels, 1 or 2; the other one is that of the state index
    heads     into which the channels are divided; 1 without heads
    """

    table: torch.Tensor
    channels: int
    heads: int = 1

    def largest(self, magnitudes: torch.Tensor, scales: str) -> torch.Tensor:
        """The largest of ``magnitudes`` (b, ., .) within what shares a scale, broadcast to the same shape."""
        index = 3 - self.channels
        if scales == SITE:
            return magnitudes.amax((1, 2), keepdim=True).expand_as(magnitudes)
        if scales == CHANNEL:
            return magnitudes.amax(index, keepdim=True).expand_as(magnitudes)
        if scales == INDEX:
            return magnitudes.amax(self.channels, keepdim=True).expand_as(magnitudes)
        of_channels = magnitudes.amax(index)
        of_heads = of_channels.view(len(of_channels), self.heads, -1).amax(2)
        headdim = of_channels.shape[1] // self.heads
        return of_heads.repeat_interleave(headdim, 1).unsqueeze(index).expand_as(magnitudes)

    def scale_count(self, shape: torch.Size, scales: str) -> int:
        """How many scales computed from the state a sequence keeps; ``shape`` of the state (b, ., .)."""
        counts = {TABLE: 0, SITE: 1, HEAD: self.heads, CHANNEL: shape[self.channels], INDEX: shape[3 - self.channels]}
        return counts[scales]


@dataclass
class SimulatedState(Int8BlockState):
    """A block's decoding state whose ``ssm`` (float32) has passed through a format.

    scales    of each value, float32; None before the first rounding, and where the format has none
    residual  the last rounding error as it is kept, float32; None without error feedback
    age       tokens since the scales were computed
    """

    in_place: ClassVar[bool] = False

    layout: StateLayout
    format: StateFormat
    generator: torch.Generator
    scales: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    age: int = 0

    def first(self, sequences: int) -> SimulatedState:
        """The state of the first ``sequences`` of them."""
        scales, residual = (None if kept is None else kept[:sequences] for kept in (self.scales, self.residual))
        return replace(self, conv=self.conv[:sequences], ssm=self.ssm[:sequences], scales=scales, residual=residual)

    def keep(self, values: torch.Tensor) -> None:
        """Round ``values`` (b, ., .) float32, the state after a token or a prompt, and keep the result."""
        grid, rounding = self.format.grid, self.format.rounding
        if grid.scaled:
            self._rescale(values)
        if math.isinf(grid.largest):
            self.ssm = values
            return
        if self.residual is not None:
            values = values + self.residual
        quotients = values if self.scales is None else values / self.scales
        spacing = grid.spacing(quotients)
        steps = quotients / spacing
        if rounding == STOCHASTIC:
            drawn = torch.rand(steps.shape, generator=self.generator, device=steps.device)
            steps = (steps + drawn).floor_()
        else:
            steps = steps.round()
        rounded = (steps * spacing).clamp_(grid.smallest, grid.largest)
        self.ssm = rounded if self.scales is None else rounded * self.scales
        if rounding == FEEDBACK:
            unit = (spacing if self.scales is None else spacing * self.scales) / (2 * RESIDUAL_LEVELS)
            codes = ((values - self.ssm) / unit).round_().clamp_(-RESIDUAL_LEVELS, RESIDUAL_LEVELS)
            self.residual = codes * unit

    def _rescale(self, values: torch.Tensor) -> None:
        """Set the scales for ``values``."""
        largest = self.format.grid.largest
        if self.format.scales == TABLE:
            # A table's scale maps code 127 to its largest value.
            self.scales = (self.layout.table * GRIDS["int8"].largest / largest).expand_as(values)
        elif self.scales is None or self.age >= self.format.every:
            found = self.layout.largest(values.abs(), self.format.scales) / largest
            self.scales, self.age = torch.where(found > 0, found, 1.0), 0
        self.age += 1

    @property
    def bytes_per_sequence(self) -> int:
        """What a cache in this format keeps of a sequence: convolution codes, state, its scales (float32), residual."""
        grid, numbers = self.format.grid, self.ssm[0].numel()
        scales = self.layout.scale_count(self.ssm.shape, self.format.scales) if grid.scaled else 0
        residual = numbers if self.format.rounding == FEEDBACK else 0
        return self.conv[0].numel() * self.conv.element_size() + numbers * grid.bytes + 4 * scales + residual
