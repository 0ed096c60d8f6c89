"""Compiled CPU kernels of scoring: softmax and divergences, row by row."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from quambase.model.operators.host_kernels import exp32
from quambase.schema.compiled import kept_njit
from quambase.schema.values.arrays import Float32, Int64


# Inlined by force: otherwise these sums are vectorised in one way in the process that compiles a kernel, and in another
# in those that load it from the cache, and the last digits of KL differ.
@numba.njit(fastmath={"reassoc", "nsz", "contract"}, forceinline=True)
def _log_sum_exp(line: Float32) -> tuple[np.float32, int]:
    """log(sum(exp(line))) and the first index of its largest value."""
    top = line[0]
    for i in range(1, line.size):
        top = max(top, line[i])
    total = 0.0
    for i in range(line.size):
        total += float(exp32(line[i] - top))
    best = 0
    while line[best] < top:
        best += 1
    return np.float32(top + np.log(total)), best


@kept_njit(parallel=True)
def log_softmax_rows(logits: Float32, top: Int64) -> None:
    """In place: logits (rows, v) to log-probabilities; ``top`` (rows,) gets each row's first argmax."""
    for row in numba.prange(logits.shape[0]):
        line = logits[row]
        lse, best = _log_sum_exp(line)
        top[row] = best
        for i in range(line.size):
            line[i] -= lse


@numba.njit(fastmath={"reassoc", "nsz", "contract"}, forceinline=True)
def _divergence(reference: Float32, line: Float32, lse: np.float32) -> float:
    total = 0.0
    for i in range(line.size):
        total += float(exp32(reference[i]) * (reference[i] - (line[i] - lse)))
    return total


@kept_njit(parallel=True)
def compare_rows(
    reference: Float32,
    logits: Float32,
    targets: Int64,
    nll: npt.NDArray[np.float64],
    kl: npt.NDArray[np.float64],
    top: Int64,
) -> None:
    """Per row: -log q(target), KL(p || q) in nats and the first argmax of q.

    reference (rows, v): log p; logits (rows, v): q before normalisation; the rest (rows,).
    """
    for row in numba.prange(logits.shape[0]):
        lse, best = _log_sum_exp(logits[row])
        top[row] = best
        nll[row] = lse - logits[row, targets[row]]
        kl[row] = _divergence(reference[row], logits[row], lse)
