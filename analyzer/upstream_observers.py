"""Upstream Quamba's calibration observers, replayed from the `documents` table to the bit.

Source: enyac-group/Quamba@c474646 quamba/observer.py (lines 16-101) and run_quamba_calibration in
quamba/modelutils_mamba.py. Upstream runs on CUDA only. There PyTorch computes ``tensor / 127`` for a Python number 127
as ``tensor * (1 / 127)`` with the reciprocal rounded to float32 (ATen/native/cuda/BinaryDivTrueKernel.cu); on float32
this differs from a division in the last bit for 4.5 % of values, on float16 for none. Checked on an H100 with torch
2.11, as were torch.quantile and the moving average, which equal the CPU's.

The activations are ours, of a float32 forward pass: "to the bit" means for the same activations.
"""

from __future__ import annotations

import numpy as np

from quambase.schema.errors import UnknownName
from quambase.schema.tables import DOCUMENT_QUANTILES
from quambase.schema.values.arrays import Float32
from quambase.schema.values.number_format import INT8

AMAX_FLOOR = 1e-5
"""Upstream's least observed maximum (observer.py: ``clamp(min=1e-5)``)."""

SCALE_FLOOR = 1e-6
"""Upstream's least scale (observer.py: ``clamp(min=1e-6)``), so that a dead site does not divide by zero."""

EMA_SITES = frozenset({"x_proj:input", "ssm_state_act:input"})
"""Sites whose Mamba-1 observer is the moving percentile; every other one is a float16 absolute maximum."""

FLOAT32_SITES = frozenset({"x_conv_out:input", "ssm_state_act:input"})
"""Sites whose Mamba-2 observers cast to float32 (observer.py:173-405); every other one is a float16 absolute maximum.
No Mamba-2 observer takes a percentile: the alpha that run_quamba2_calibration sets is passed to none of them."""

EMA_SIGMA = 0.01
EMA_ALPHA = 0.9995

_FLOAT16_MAX = np.float32(65504)
_PER_LEVEL = np.float32(1) / np.float32(INT8.qmax)


def floored(scale: float | np.floating) -> np.float32:
    """A scale as float32, at least `SCALE_FLOOR`."""
    return max(np.float32(scale), np.float32(SCALE_FLOOR))


def minmax_scale(amax: Float32) -> np.float32:
    """Upstream's `PerTensorMinmaxObserver`: the running maximum and its quotient by 127 in float16.

    amax  (D,) float32 largest absolute value of each document. Rounding to float16 is monotone, so the
          maximum of the rounded values is the rounded maximum.

    A maximum beyond float16 counts as 65504, where upstream would get an infinite scale.
    """
    finite = amax[np.isfinite(amax)]
    largest = np.float16(min(finite.max(initial=np.float32(0)), _FLOAT16_MAX))
    largest = max(largest, np.float16(AMAX_FLOOR))
    # On CUDA a float16 product is computed in float32 and rounded once.
    return floored(np.float16(np.float32(largest) * _PER_LEVEL))


def minmax_scale_float32(amax: Float32) -> np.float32:
    """Upstream's Mamba-2 `CrossHeadMinmaxObserver` for one of its groups: as `minmax_scale`, of values cast to float32.

    amax  (D,) float32 largest absolute value of each document.
    """
    largest = max(amax[np.isfinite(amax)].max(initial=np.float32(0)), np.float32(AMAX_FLOOR))
    return floored(largest * _PER_LEVEL)


def ema_scale(observed: Float32, sigma: float = EMA_SIGMA) -> np.float32:
    """Upstream's `PerTensorPercentileObserver`: ``w += sigma (current - w)`` over documents in order,
    float32.

    observed  (D,) float32, the quantile (or maximum) of each document; the first one starts the average.

    Documents without a finite value are skipped, where upstream's average would stay NaN from there on.
    """
    rate = np.float32(sigma)
    finite = observed[np.isfinite(observed)]
    average = finite[0] if finite.size else np.float32(0)
    for current in finite[1:]:
        average = np.float32(average + np.float32(rate * np.float32(current - average)))
    return floored(average * _PER_LEVEL)


def quantile_column(alpha: float) -> str:
    """The column of `documents` that holds the quantile ``alpha`` (1.0: the maximum); UnknownName otherwise."""
    columns = {p: name for name, p in DOCUMENT_QUANTILES.items()} | {1.0: "amax"}
    if alpha not in columns:
        raise UnknownName.of("stored document quantile", f"{alpha:g}", [f"{p:g}" for p in columns])
    return columns[alpha]
