"""Model folders: what the loader, mamba-ssm's ``from_pretrained`` and a reader of the model card need."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quambase.schema.errors import CheckpointInvalid
from quambase.schema.files import replacing
from training.loop import CHECKPOINT, LOG
from training.networks import LanguageModel
from training.shape import Shape


def export_model(
    state: dict[str, Tensor], shape: Shape, tokenizer: Path, folder: Path, *, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write config.json, model.safetensors (``dtype``, head tied and left out) and tokenizer.json to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read
    (folder / "config.json").write_text(json.dumps(shape.config_json(), indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    return folder


def export_run(run: Path, tokenizer: Path, folder: Path) -> Path:
    """`export_model` of a training run's checkpoint; the log goes beside it."""
    path = run / CHECKPOINT
    if not path.exists():
        raise CheckpointInvalid(f"{path} is missing; expected the folder of a training run")
    found = torch.load(path, map_location="cpu", weights_only=True)
    export_model(found["model"], Shape(**found["identity"]["shape"]), tokenizer, folder)
    if (run / LOG).exists():
        shutil.copyfile(run / LOG, folder / LOG)
    return folder


def write_pytorch_model(folder: Path, destination: Path) -> Path:
    """A copy of a model folder that mamba-ssm's ``from_pretrained`` reads: config.json and pytorch_model.bin.

    The tied head is in it as ``lm_head.weight``, since mamba-ssm loads strictly.
    """
    destination.mkdir(parents=True, exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    with replacing(destination / "pytorch_model.bin") as temporary:
        torch.save(tensors, temporary)
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(folder / name, destination / name)
    return destination


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape that `Shape.config_json` wrote as ``config``."""
    ssm = dict(config["ssm_cfg"])
    architecture: Literal["mamba1", "mamba2"] = "mamba2" if ssm.pop("layer", "Mamba1") == "Mamba2" else "mamba1"
    return Shape(architecture, config["d_model"], config["n_layer"], config["vocab_size"], **ssm)


def read_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The network of a model folder written by `export_model`, activations of ``dtype``."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = LanguageModel(shape_of(config), dtype=dtype)
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return model
