"""Log-probabilities and divergences of rows of logits, where the logits are: on the CPU by compiled loops, on a device
by PyTorch. Softmax is float32, a row's divergence is summed in float64, ties of the largest logit go to the first.
"""

from __future__ import annotations

import torch

from quambase.apply.evaluation import host_kernels as kernels


def log_probabilities(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p (rows, v) float32 of logits (rows, v), which it may overwrite, and the most likely token (rows,) int64."""
    if logits.device.type != "cpu":
        return torch_log_probabilities(logits)
    top = torch.empty(len(logits), dtype=torch.int64)
    kernels.log_softmax_rows(logits.numpy(), top.numpy())
    return logits, top


def compare(
    reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per row -log q(target) and KL(p || q) in nats, float64 (rows,), and q's most likely token (rows,) int64.

    reference (rows, v): log p; logits (rows, v): q before normalisation; targets (rows,) int64.
    """
    if logits.device.type != "cpu":
        return torch_compare(reference, logits, targets)
    nll, kl = (torch.empty(len(logits), dtype=torch.float64) for _ in range(2))
    top = torch.empty(len(logits), dtype=torch.int64)
    kernels.compare_rows(reference.numpy(), logits.numpy(), targets.numpy(), nll.numpy(), kl.numpy(), top.numpy())
    return nll, kl, top


def torch_log_probabilities(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`log_probabilities` in PyTorch, of float16 or float32 logits on any device."""
    return torch.log_softmax(logits.float(), dim=-1), _first_largest(logits)


def torch_compare(
    reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`compare` in PyTorch, of float16 or float32 logits on any device."""
    logq = torch.log_softmax(logits.float(), dim=-1)
    nll = -logq.gather(1, targets[:, None])[:, 0].double()
    kl = (reference.exp() * (reference - logq)).sum(-1, dtype=torch.float64)
    return nll, kl, _first_largest(logits)


def _first_largest(logits: torch.Tensor) -> torch.Tensor:
    """As NumPy's argmax; torch's may take any of several, and logits of float16 often tie."""
    columns = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    largest = logits == logits.amax(-1, keepdim=True)
    return torch.where(largest, columns, logits.shape[1]).amin(-1).long()
