"""Orthonormal Hadamard transforms of the sizes Mamba models have, with upstream Quamba's matrices.

A size is ``m 2^k`` with m in 12, 40, 20, 28 or 1, tried in that order, and the matrix is ``H_m kron H_2^k``
(upstream ``hadamard_utils.py``: 12 N and 40 N kernels, else a power of two). The matrices of orders 12, 20, 28
and 40 are those of fast-hadamard-transform (three of them from N. Sloane's library). Scales depend on the matrix, so
others of the same order cannot replace them.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch

from quambase.model.operators.host_kernels import butterflies
from quambase.schema.errors import CheckpointInvalid

Matrix = npt.NDArray[np.float32]


def _circulant(signs: str) -> Matrix:
    first = np.array([1.0 if sign == "+" else -1.0 for sign in signs], np.float32)
    return np.stack([np.roll(first, shift) for shift in range(len(signs))])


def _williamson(a: str, b: str, c: str, d: str) -> Matrix:
    """Williamson's array of four symmetric circulants with A² + B² + C² + D² = 4 n I."""
    A, B, C, D = (_circulant(signs) for signs in (a, b, c, d))
    return np.block([[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]])


def _legendre(q: int) -> npt.NDArray[np.int64]:
    """chi(0..q-1): 0 at 0, 1 at the squares modulo the prime q, else -1."""
    squares = {i * i % q for i in range(1, q)}
    return np.array([0, *(1 if i in squares else -1 for i in range(1, q))])


def _paley_two(q: int) -> Matrix:
    """Paley's second construction, order 2 (q + 1), q = 1 mod 4; symmetric."""
    chi = _legendre(q)
    conference = np.ones((q + 1, q + 1))
    conference[0, 0] = 0
    conference[1:, 1:] = [[chi[(j - i) % q] for j in range(q)] for i in range(q)]
    off, diagonal = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return (np.kron(conference, off) + np.kron(np.eye(q + 1), diagonal)).astype(np.float32)


def _paley_one(q: int) -> Matrix:
    """Paley's first construction, order q + 1, q = 3 mod 4, as Sloane writes it: first column +, first row + - - ..."""
    chi = _legendre(q)
    matrix = np.ones((q + 1, q + 1), np.float32)
    matrix[0, 1:] = -1
    for i in range(q):
        matrix[i + 1, 1:] = [1 if i == j else -chi[(j - i) % q] for j in range(q)]
    return matrix


@functools.cache
def odd_factor(order: int) -> Matrix:
    """The +-1 matrix (order, order) for order 12, 20, 28, 40 or 1; read-only."""
    if order == 12:
        matrix = _paley_two(5)
    elif order == 20:
        matrix = _williamson("+----", "+----", "++--+", "+-++-")
    elif order == 28:
        matrix = _williamson("+------", "++----+", "+-+--+-", "+--++--")
    elif order == 40:
        matrix = np.kron(np.array([[1, 1], [1, -1]], np.float32), _paley_one(19))
    else:
        matrix = np.ones((1, 1), np.float32)
    matrix.setflags(write=False)
    return matrix


def odd_order(dim: int) -> int:
    """The m of ``dim = m 2^k`` that upstream chooses; CheckpointInvalid if there is none."""
    for order in (12, 40, 20, 28, 1):
        power, rest = divmod(dim, order)
        if rest == 0 and power > 0 and power & (power - 1) == 0:
            return order
    raise CheckpointInvalid(
        f"no Hadamard matrix for dimension {dim}; expected 12, 20, 28, 40 or 1 times a power of two, "
        "as every published Mamba has"
    )


def hadamard(x: torch.Tensor, factor: float | None = None, *, transposed: bool = False) -> torch.Tensor:
    """Every row times the Hadamard matrix: ``y[i] = factor * sum_j H[i, j] x[j]`` in float32; ``transposed``: H[j, i].

    x (..., dim), any float dtype; returns float32 of the same shape. ``factor`` defaults to 1/sqrt(dim), which makes
    the transform orthonormal; it is applied last, in one multiplication.
    """
    dim = x.shape[-1]
    work = x.detach().to(torch.float32, copy=True).contiguous()
    scale = np.float32(dim**-0.5 if factor is None else factor)
    odd = odd_factor(odd_order(dim))
    butterflies(work.view(-1, dim).numpy(), np.ascontiguousarray(odd.T) if transposed else odd, scale)
    return work
