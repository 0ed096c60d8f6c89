"""The error of a scale group against its scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from quambase.analyzer.least_squares import optimal_scale
from quambase.analyzer.quantization_error import predicted_kl
from quambase.analyzer.scale_groups import ScaleGroup
from quambase.analyzer.strategies import stored_scale
from quambase.schema.values.arrays import Float64
from quambase.schema.values.number_format import INT8

POINTS = 160

BEYOND = 1.5
"""The factor by which the curve extends beyond the scales it must show."""


@dataclass(frozen=True)
class ErrorCurve:
    """What symmetric scales lose at one scale group.

    scales        (points,) float64, ascending, each a float32 as it would be stored; ``least_mse_scale`` is one of them
    mse           (points,): mean squared error
    predicted_kl  (points,): predicted KL, nats a token; None without sensitivities
    least_mse_scale, least_kl_scale   the scales of least error of all (`quambase.analyzer.least_squares`), not only of
                  those here; the latter None without sensitivities
    """

    scales: Float64
    mse: Float64
    predicted_kl: Float64 | None
    least_mse_scale: float
    least_kl_scale: float | None


def error_curve(group: ScaleGroup, scales: Iterable[float] = (), points: int = POINTS) -> ErrorCurve:
    """MSE and predicted KL of ``group`` at ``points`` scales spaced evenly in their logarithm, and at the best ones.

    They cover ``scales`` (such as the strategies'), the best scales and that of absmax. Without values the MSE is NaN.
    """
    sensitivity = group.sensitivity
    least_mse = stored_scale(group.least_squares)
    least_kl = None if sensitivity is None else stored_scale(optimal_scale(sensitivity.weighted))
    bests = [least_mse, *([] if least_kl is None else [least_kl])]
    shown = [*map(stored_scale, scales), *bests, stored_scale(group.distribution.amax / INT8.qmax)]
    grid = np.geomspace(min(shown) / BEYOND, max(shown) * BEYOND, points)
    chosen = np.unique(np.array([*grid, *bests], np.float32).astype(np.float64))
    mse = np.array([group.figures(float(scale)).mse for scale in chosen])
    kl = None if sensitivity is None else np.array([predicted_kl(sensitivity, float(scale)) for scale in chosen])
    return ErrorCurve(chosen, mse, kl, least_mse, least_kl)
