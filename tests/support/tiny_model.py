"""Tiny random models of both families on disk with a real tokenizer, and texts of unequal length."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from quambase.model.mamba1 import MambaConfig
from quambase.model.mamba2 import Mamba2Config
from quambase.model.weights import random_weights, tensors_of

WORDS = [f"w{i}" for i in range(59)]
TEXTS = ["w1 w2 w3", "", "w4", " ".join(WORDS[:40]), "w9 w9", " ".join(WORDS[20:] * 2), "", "w5 w6 w7 w8", "w0 " * 33]


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """d_model 16, 2 layers, d_inner 32, d_state 4, dt_rank 1, 60 tokens: a word each."""
    config = MambaConfig(d_model=16, n_layer=2, vocab_size=64, d_inner=32, d_state=4, d_conv=4, dt_rank=1)
    raw = {"d_model": 16, "n_layer": 2, "vocab_size": 60, "ssm_cfg": {"d_state": 4}}
    return write_model(folder, raw, tensors_of(random_weights(config, seed)))


def write_tiny_mamba2(folder: Path, ngroups: int = 2, d_model: int = 16) -> Path:
    """2 layers, d_model / 4 heads of 8 channels, d_state 4, the same tokens."""
    config = Mamba2Config(d_model, 2, vocab_size=64, d_inner=2 * d_model, d_state=4, headdim=8, ngroups=ngroups)
    ssm = {"layer": "Mamba2", "d_state": 4, "headdim": 8, "ngroups": ngroups}
    raw = {"d_model": d_model, "n_layer": 2, "vocab_size": 60, "ssm_cfg": ssm}
    return write_model(folder, raw, tensors_of(random_weights(config)))


def write_model(folder: Path, raw: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    """A model folder of 60 tokens: a word each."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_texts(path: Path, texts: list[str] = TEXTS) -> Path:
    """A .jsonl of ``texts``."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
