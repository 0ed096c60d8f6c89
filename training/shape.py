"""Sizes of the two reference models and their mamba-ssm configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Shape:
    """Sizes of a Mamba-1 or Mamba-2 language model with a tied head.

    ``headdim`` and ``ngroups`` (SSD groups, which share B and C) belong to Mamba-2 alone.
    """

    architecture: Literal["mamba1", "mamba2"]
    d_model: int = 256
    n_layer: int = 12
    vocab_size: int = 8192
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    headdim: int = 32
    ngroups: int = 2

    @property
    def d_inner(self) -> int:
        """Channels of the scan."""
        return self.expand * self.d_model

    @property
    def dt_rank(self) -> int:
        """Rank of Mamba-1's time-step projection."""
        return math.ceil(self.d_model / 16)

    @property
    def heads(self) -> int:
        """Heads of Mamba-2."""
        return self.d_inner // self.headdim

    def config_json(self) -> dict[str, Any]:
        """The content of mamba-ssm's config.json."""
        if self.architecture == "mamba1":
            ssm: dict[str, Any] = {"layer": "Mamba1", "d_state": self.d_state}
        else:
            ssm = {"layer": "Mamba2", "d_state": self.d_state, "headdim": self.headdim, "ngroups": self.ngroups}
        return {
            "d_model": self.d_model,
            "n_layer": self.n_layer,
            "vocab_size": self.vocab_size,
            "ssm_cfg": ssm | {"d_conv": self.d_conv, "expand": self.expand},
            "rms_norm": True,
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": 8,
            "tie_embeddings": True,
        }


SHAPES: dict[str, Shape] = {
    "mamba-5m": Shape("mamba1", n_layer=7),
    "mamba2-8m": Shape("mamba2", d_state=64),
}
"""The reference models."""
