"""The number format of quantized activations: which codes there are, and how a value becomes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class NumberFormat:
    """A uniform integer format with one scale: ``code = clamp(round(x / scale), qmin, qmax)``.

    x, scale and their quotient are float32; ties round to even.
    """

    name: str
    qmin: int
    qmax: int

    @property
    def codes(self) -> int:
        """How many codes there are."""
        return self.qmax - self.qmin + 1

    @property
    def rounds_beyond(self) -> float:
        """The least quotient x / scale whose rounding exceeds qmax (a tie, which rounds to the even qmax + 1)."""
        return self.qmax + 0.5

    def quantize(self, values: npt.ArrayLike, scale: float) -> npt.NDArray[Any]:
        """The codes of ``values``, in the smallest signed integer type that holds them.

        >>> INT8.quantize([-9, 0.05, 0.15, 9], scale=0.1)
        array([-90,   0,   2,  90], dtype=int8)
        >>> INT8.quantize([12.7, 12.9], scale=0.1)
        array([127, 127], dtype=int8)
        """
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            quotient = np.rint(np.asarray(values, np.float32) / np.float32(scale))
        codes: npt.NDArray[Any] = np.clip(quotient, self.qmin, self.qmax).astype(np.min_scalar_type(self.qmin))
        return codes


@dataclass(frozen=True)
class Affine:
    """A scale with a zero point: ``code = clamp(round(x / scale) + zero_point, qmin, qmax)``, so that a value of 0 has
    the code ``zero_point``. Where nearly all values have one sign, a symmetric scale leaves half of the codes unused.
    """

    scale: float
    zero_point: int


def multipliers(scale: float | Affine | tuple[float, float]) -> tuple[float, ...]:
    """What codes are multiplied by: one number, or of two segments the inner one's and the outer one's."""
    return scale if isinstance(scale, tuple) else (scale.scale,) if isinstance(scale, Affine) else (scale,)


def zero_point_of(scale: float | Affine | tuple[float, float]) -> int:
    """The code of 0."""
    return scale.zero_point if isinstance(scale, Affine) else 0


INT8 = NumberFormat("int8", -128, 127)
"""The format of every scale in this package."""

OUTLIER_CODE = 120
"""Codes beyond this magnitude are the seed's "outlier range" (121..127 and -121..-128)."""
