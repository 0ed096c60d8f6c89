"""Tiny models of both families on a device, and what their taps show."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quambase.model.block import Tap
from quambase.model.language_model import LanguageModel
from quambase.model.mamba1 import MambaConfig
from quambase.model.mamba2 import Mamba2Config
from quambase.model.operators.torch import TorchOperators
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare
from quambase.model.weights import ModelWeights, random_weights

DOCUMENTS = [[5, 3, 8], [1], list(range(40)), [7, 7], list(range(20, 58))]


def tiny_weights(family: str) -> ModelWeights:
    """Prepared weights: d_inner 24, whose Hadamard matrix has an odd factor, or, of Mamba-2, heads of 8 channels."""
    if family == "mamba1":
        config = MambaConfig(d_model=16, n_layer=2, vocab_size=64, d_inner=24, d_state=4, d_conv=4, dt_rank=1)
        return prepare(random_weights(config))
    ngroups = 2 if family == "mamba2" else 1
    config2 = Mamba2Config(16, 2, vocab_size=64, d_inner=32, d_state=4, headdim=8, ngroups=ngroups)
    return prepare(random_weights(config2))


def plain_model(weights: ModelWeights, dtype: torch.dtype, *, rotated: bool = False) -> LanguageModel:
    """In plain PyTorch on the CPU, which is what a device without compiled kernels runs."""
    return LanguageModel(weights, TorchOperators(dtype, weights.config.operator_sizes.ngroups), rotated=rotated)


class PlainLoop(TorchOperators):
    """Operators whose gradients are autograd's through a loop over time."""

    def __init__(self, ngroups: int) -> None:
        super().__init__(torch.float32, ngroups)

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        residual += x
        read = residual.clone()
        return F.rms_norm(read if read.requires_grad else read.requires_grad_(), weight.shape, weight, eps)


class Shown:
    """A tap that keeps everything."""

    def __init__(self) -> None:
        self.values: dict[tuple[int, str], list[torch.Tensor]] = {}

    def __call__(self, layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        self.values.setdefault((layer, site), []).append(values.float().cpu().clone())


def shown(model: LanguageModel, documents: list[list[int]]) -> dict[tuple[int, str], torch.Tensor]:
    """Every site's values, rows in order."""
    tap = Shown()
    typed: Tap = tap
    model.hidden(Batch.pack(documents), typed)
    return {key: torch.cat(parts) for key, parts in tap.values.items()}
