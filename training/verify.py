"""Cross-checks of an exported model with mamba-ssm on a CUDA device."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch

from training.export import write_pytorch_model
from training.heldout import Forward


def mamba_ssm_forward(folder: Path, dtype: torch.dtype) -> Forward:
    """ids (b, l) -> logits (b, l, v) of mamba-ssm's own model, read by its ``from_pretrained`` from our export."""
    from mamba_ssm import MambaLMHeadModel

    with tempfile.TemporaryDirectory() as name:
        path = write_pytorch_model(folder, Path(name))
        model: Any = MambaLMHeadModel.from_pretrained(str(path), device="cuda", dtype=dtype)
    model.eval()
    for block in model.backbone.layers:
        # The fused paths need causal-conv1d, which is not required here.
        block.mixer.use_fast_path = block.mixer.use_mem_eff_path = False
    return lambda ids: cast(torch.Tensor, model(ids).logits)
