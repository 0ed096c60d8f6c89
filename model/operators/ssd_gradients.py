"""The gradients of Mamba-2's scan by matrix products over chunks of tokens (Dao & Gu 2024, section 6), on any device.

Within a chunk the scan is a product with a matrix that has an entry for each pair of tokens; the chunks are joined by
the states before them and, backwards, by the gradients of the states after them, the adjoints. Written out because
PyTorch's own gradient of the same products runs twice as many operations, each a launch on a device.
"""

from __future__ import annotations

import torch

CHUNK = 64
"""Tokens that are multiplied as one matrix."""


def ssd_gradients(
    x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, step: torch.Tensor, grad: torch.Tensor, a: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, b, c and step, of the SSD scan without skip connection.

    x and ``grad``, the output's gradient, (b, l, h, p); b, c (b, l, g, n); step (b, l, h); a (h,). l is a multiple of
    CHUNK. Below, k counts chunks, q their tokens, and r the heads of a group, h = g r.
    """
    documents, length, heads, _ = x.shape
    groups = b.shape[2]

    def chunks(part: torch.Tensor) -> torch.Tensor:
        """(b, k, q, ...) of (b, l, ...)."""
        return part.view(documents, length // CHUNK, CHUNK, *part.shape[2:])

    def by_group(part: torch.Tensor) -> torch.Tensor:
        """(b, k, g, q, r p) of (b, k, q, h, p)."""
        return torch.unflatten(part, 3, (groups, -1)).flatten(4).transpose(2, 3)

    def by_head(part: torch.Tensor) -> torch.Tensor:
        """(b, k, q, h, p) of (b, k, g, q, r p)."""
        return torch.unflatten(part.transpose(2, 3), 4, (heads // groups, -1)).flatten(3, 4)

    x, step, grad = chunks(x), chunks(step), chunks(grad)
    b, c = (chunks(part).transpose(2, 3) for part in (b, c))  # (b, k, g, q, n)
    driven = step[..., None] * x
    logs = (step * a).cumsum(2)  # logarithm of the decay since the chunk's first token, (b, k, q, h)
    since, until = logs.exp(), (logs[:, :, -1:] - logs).exp()
    entering, leaving = by_group(grad * since[..., None]), by_group(driven * until[..., None])
    # The state before each chunk and the adjoint after it, (b, k, g, r p, n).
    states, adjoints = _joined(logs[:, :, -1], leaving.transpose(3, 4) @ b, entering.transpose(3, 4) @ c)
    of_driven = by_head(b @ adjoints.transpose(3, 4)) * until[..., None]
    of_leaving = (driven * of_driven).sum(4)  # of logs[last] - logs, (b, k, q, h)
    of_logs = (by_head(c @ states.transpose(3, 4)) * grad).sum(4) * since
    of_whole = torch.unflatten(states * adjoints, 3, (heads // groups, -1)).sum((4, 5)).flatten(2) * since[:, :, -1]
    of_c, of_b = entering @ states, leaving @ adjoints
    # Pairs of tokens of a chunk, the later one first, (b, k, h, q, q).
    logs, slope = logs.transpose(2, 3), grad.transpose(2, 3)
    past = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
    between = (logs[..., :, None] - logs[..., None, :]).masked_fill_(~past, -torch.inf).exp_()
    of_weights = between * (slope @ driven.transpose(2, 3).transpose(3, 4))
    scores = c @ b.transpose(3, 4)  # (b, k, g, q, q)
    of_scores = torch.unflatten(of_weights, 2, (groups, -1)).sum(3)
    of_c, of_b = of_c + of_scores @ b, of_b + of_scores.transpose(3, 4) @ c
    wide_scores = scores.repeat_interleave(heads // groups, 2)
    of_driven = of_driven + ((between * wide_scores).transpose(3, 4) @ slope).transpose(2, 3)
    of_pairs = of_weights * wide_scores
    of_logs = of_logs + (of_pairs.sum(4) - of_pairs.sum(3)).transpose(2, 3)
    # Every later token's logarithm contains this token's, and every earlier token's decay until the end.
    of_log = of_logs.flip(2).cumsum(2).flip(2) + of_leaving.cumsum(2) - of_leaving + of_whole[:, :, None]
    of_step = (of_driven * x).sum(4) + a * of_log
    of_b, of_c = (part.transpose(2, 3).flatten(1, 2) for part in (of_b, of_c))
    return (step[..., None] * of_driven).flatten(1, 2), of_b, of_c, of_step.flatten(1, 2)


def _joined(logs: torch.Tensor, added: torch.Tensor, asked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state before each chunk and the adjoint after it, (b, k, g, r p, n), from what each chunk adds to the state
    after it and to the adjoint before it, of the same shape, and the logarithm of its decay, logs (b, k, h).

    States are a lower triangular matrix of decays (k, k) times ``added``, adjoints its transpose times ``asked``.
    """
    documents, count, heads = logs.shape
    total = logs.double().cumsum(1)  # differences of a long document's float32 sums would be inexact
    powers = (total - logs)[:, :, None] - total[:, None]  # (b, k, k, h)
    earlier = torch.ones(count, count, dtype=torch.bool, device=logs.device).tril(-1)
    decays = powers.masked_fill(~earlier[..., None], -torch.inf).exp().float().permute(0, 3, 1, 2)

    def times(matrix: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        by_head = part.reshape(documents, count, heads, -1).transpose(1, 2)  # (b, h, k, p n)
        return (matrix @ by_head).transpose(1, 2).reshape(part.shape)

    return times(decays, added), times(decays.transpose(2, 3), asked)
