"""Perplexity and next-token accuracy on held-out documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from training.data import TokenIds

Forward = Callable[[torch.Tensor], torch.Tensor]


def held_out(
    forward: Forward, documents: Sequence[TokenIds], *, length: int = 512, batch: int = 64, device: str = "cpu"
) -> dict[str, float]:
    """Figures of ``forward`` (ids (b, l) -> logits (b, l, v)) over adjoining windows of ``length`` tokens.

    The first token of each window has no context and is no target. Returns {heldout_loss (nats a token),
    heldout_perplexity, heldout_accuracy, heldout_targets}. Windows of one batch are padded at their ends, which no
    causal model sees.
    """
    windows = [ids[i : i + length] for ids in documents for i in range(0, len(ids) - 1, length)]
    windows = sorted((w for w in windows if len(w) > 1), key=len)
    total, right, targets = 0.0, 0, 0
    for first in range(0, len(windows), batch):
        group = windows[first : first + batch]
        sizes = torch.tensor([len(w) for w in group], device=device)
        padded = np.zeros((len(group), len(group[-1])), np.int64)
        for row, window in zip(padded, group, strict=True):
            row[: len(window)] = window
        ids = torch.from_numpy(padded).to(device)
        with torch.no_grad():
            logits = forward(ids)[:, :-1].float()
        real = torch.arange(1, ids.shape[1], device=device) < sizes[:, None]
        predicted, wanted = logits[real], ids[:, 1:][real]
        total += float(F.cross_entropy(predicted, wanted, reduction="sum"))
        right += int((predicted.argmax(-1) == wanted).sum())
        targets += len(wanted)
    loss = total / targets
    return {
        "heldout_loss": round(loss, 5),
        "heldout_perplexity": round(math.exp(loss), 3),
        "heldout_accuracy": round(right / targets, 5),
        "heldout_targets": targets,
    }
