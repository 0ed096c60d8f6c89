"""exp on the CPU, the same in every process."""

from __future__ import annotations

import numpy as np
import torch


def exp(x: torch.Tensor) -> torch.Tensor:
    """exp of a float32 tensor of any shape on the CPU, computed in float64 and rounded once.

    `torch.exp` is not used there: it calls MKL's vector library, whose first call in a process was seen to return a
    relative error of 1.5e-4 in the half that the second thread computes (torch 2.13.0, MKL 2024.2, about one process of
    ten). The same command then gave different results.
    """
    return torch.from_numpy(np.exp(x.numpy().astype(np.float64)).astype(np.float32))
