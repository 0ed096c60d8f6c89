"""What an INT8 scale does to a distribution: squared error, clipping and codes, all exact.

Codes are those of `quambase.schema.values.number_format.INT8`, as the INT8 model computes them, so that code counts
equal quantizing every value one by one. The reconstruction is ``code * scale``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quambase.analyzer import kernels
from quambase.schema.values.arrays import Float64, Int64
from quambase.schema.values.distribution import Distribution, Sensitivity
from quambase.schema.values.number_format import INT8, OUTLIER_CODE, Affine


@dataclass(frozen=True)
class Figures:
    """The error of one scale on one distribution.

    histogram      (codes,) int64: how many values get each code from qmin on
    clipped        how many values lie beyond the codes (round(x / scale) is less than qmin or more than qmax)
    squared_error  sum of (x - code * s)^2, float64
    signal         sum of x^2, float64
    """

    histogram: Int64
    clipped: int
    squared_error: float
    signal: float

    @property
    def total(self) -> int:
        """How many values."""
        return int(self.histogram.sum())

    @property
    def mse(self) -> float:
        """Mean squared error; NaN without values."""
        return self.squared_error / self.total if self.total else math.nan

    @property
    def sqnr_db(self) -> float:
        """`sqnr_db` of these values."""
        return sqnr_db(self.signal, self.squared_error)

    @property
    def clipped_share(self) -> float:
        """Share of values that clip; NaN without values."""
        return self.clipped / self.total if self.total else math.nan

    @property
    def codes_used(self) -> int:
        """How many of the codes occur."""
        return int(np.count_nonzero(self.histogram))

    @property
    def codes_above_120(self) -> int:
        """How many of the codes with |code| > 120 occur."""
        return int(np.count_nonzero(self.histogram[_outlier_codes()]))

    @property
    def values_above_120(self) -> int:
        """How many values get a code with |code| > 120."""
        return int(self.histogram[_outlier_codes()].sum())

    @property
    def entropy_bits(self) -> float:
        """Shannon entropy of the codes, at most 8; NaN without values."""
        if not self.total:
            return math.nan
        share = self.histogram[self.histogram > 0] / self.total
        return float(-(share * np.log2(share)).sum()) + 0.0  # no -0.0 for a single code


def sqnr_db(signal: float, squared_error: float) -> float:
    """Signal to quantization noise: 10 log10(signal / error); infinite without error, NaN without signal."""
    if math.isnan(squared_error) or not signal > 0:
        return math.nan
    return 10 * math.log10(signal / squared_error) if squared_error > 0 else math.inf


def _outlier_codes() -> npt.NDArray[np.bool_]:
    return np.abs(np.arange(INT8.qmin, INT8.qmax + 1)) > OUTLIER_CODE


def signal_energy(distribution: Distribution) -> float:
    """Sum of x^2, float64."""
    return float((distribution.values.astype(np.float64) ** 2 * distribution.counts).sum())


def figures(distribution: Distribution, scale: float | Affine, signal: float | None = None) -> Figures:
    """The error of ``scale`` (used as float32). ``signal`` spares computing `signal_energy` again."""
    histogram = np.zeros(INT8.codes, np.int64)
    step, lowest = _step(scale)
    error, clipped = kernels.tally(distribution.values, distribution.counts, step, lowest, histogram)
    return Figures(histogram, int(clipped), float(error), signal_energy(distribution) if signal is None else signal)


def _step(scale: float | Affine) -> tuple[np.float32, int]:
    """The scale, and the lowest code before the zero point is added."""
    if isinstance(scale, Affine):
        return np.float32(scale.scale), INT8.qmin - scale.zero_point
    return np.float32(scale), INT8.qmin


def predicted_kl(sensitivity: Sensitivity, scale: float | Affine | tuple[float, float]) -> float:
    """The KL from the undisturbed model to the one whose values of this group have the error of ``scale``, in nats a
    token.

    To second order, errors unrelated to one another: half of the sum of squared gradient times squared error
    (`quambase.collector.sensitivity`). Groups and sites add up. ``scale``: used as float32; two for `piecewise_codes`.
    """
    if isinstance(scale, tuple):
        rest = sensitivity.values.astype(np.float64) - piecewise_codes(sensitivity.values, *scale)[1]
        error = float((rest**2 * sensitivity.gradient_sq).sum())
    else:
        error = kernels.weighted_error(sensitivity.values, sensitivity.gradient_sq, *_step(scale))
    return 0.5 * error / sensitivity.tokens


def piecewise_codes(values: npt.NDArray[np.floating], inner: float, outer: float) -> tuple[Int64, Float64]:
    """Codes and reconstructions of the two-segment code of strategy `outlier_piecewise`, of ``values`` (any shape).

    Magnitudes up to ``120 * inner`` use ``code = round(a / inner)`` (0..120); larger ones
    ``code = 120 + round((a - 120 inner) / outer)`` (121..127, the sign kept, so -127..127). Computed in float64.
    """
    edge = OUTLIER_CODE * inner
    magnitude = np.abs(values.astype(np.float64))
    code = np.minimum(np.rint(magnitude / inner), OUTLIER_CODE)
    rebuilt = code * inner
    if outer > 0:
        beyond = magnitude > edge
        above = np.minimum(np.rint((magnitude[beyond] - edge) / outer), INT8.qmax - OUTLIER_CODE)
        code[beyond] = OUTLIER_CODE + above
        rebuilt[beyond] = edge + above * outer
    negative = values < 0
    return np.where(negative, -code, code).astype(np.int64), np.where(negative, -rebuilt, rebuilt)


def piecewise_figures(distribution: Distribution, inner: float, outer: float, signal: float | None = None) -> Figures:
    """The error of `piecewise_codes`; a magnitude half an outer step beyond qmax counts as clipped."""
    values = distribution.values.astype(np.float64)
    codes, rebuilt = piecewise_codes(values, inner, outer)
    histogram = np.zeros(INT8.codes, np.int64)
    np.add.at(histogram, codes - INT8.qmin, distribution.counts)
    error = float(((values - rebuilt) ** 2 * distribution.counts).sum())
    reach = OUTLIER_CODE * inner + (INT8.qmax - OUTLIER_CODE + 0.5) * outer
    clipped = int(distribution.counts[np.abs(values) > reach].sum())
    return Figures(histogram, clipped, error, signal_energy(distribution) if signal is None else signal)
