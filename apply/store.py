"""An INT8 model as a folder: tensors, settings, and where its scales come from.

model.safetensors  int8 weights and their scales, the embedding and head, every activation scale
config.json        sizes, settings, source model and hashes, strategy
scales.parquet     the rows of the scale table that were loaded (and upstream's, to compare with)
tokenizer.json     the source model's tokenizer
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quambase.apply.int8 import Int8Weight
from quambase.apply.quamba1 import Int8Mamba
from quambase.apply.weights import Int8Layer, Int8Weights
from quambase.model.weights import MambaConfig
from quambase.schema import FORMAT_VERSION
from quambase.schema.errors import CheckpointInvalid
from quambase.schema.tables import file_sha256, replacing

FAMILY = "quamba1-w8a8"
CONFIG, TENSORS, SCALES, TOKENIZER = "config.json", "model.safetensors", "scales.parquet", "tokenizer.json"

LAST = "last.txt"
"""In the database's ``models`` folder: the path of the model applied last."""


@dataclass(frozen=True)
class StoredModel:
    """A loaded INT8 model folder; ``about`` is what its config.json says beside the sizes."""

    folder: Path
    model: Int8Mamba
    about: dict[str, Any]
    tensors_sha256: str


def save_model(folder: Path, model: Int8Mamba, about: dict[str, Any], tokenizer: Path | None = None) -> None:
    """Write ``model`` to ``folder``; config.json last, so a folder without it is unfinished.

    ``about``: source model, hashes, strategy: whatever JSON should be kept beside the settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    with replacing(folder / TENSORS) as temporary:
        save_file(_tensors(model), temporary)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / TOKENIZER)
    config = {
        "format_version": FORMAT_VERSION,
        "family": FAMILY,
        "sizes": asdict(model.config),
        "quantize_lm_head": model.quantized_lm_head,
        "quantize_embedding": model.weights.embedding_scales is not None,
        "compat": model.compat,
        "tensors_sha256": file_sha256(folder / TENSORS),
        **about,
    }
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _tensors(model: Int8Mamba) -> dict[str, torch.Tensor]:
    weights = model.weights
    found: dict[str, torch.Tensor] = {"embedding": weights.embedding}
    if weights.embedding_scales is not None:
        found["embedding.scales"] = weights.embedding_scales
    named = {
        f"layers.{i}.{f.name}": getattr(layer, f.name) for i, layer in enumerate(weights.layers) for f in fields(layer)
    }
    if isinstance(weights.lm_head, Int8Weight):
        named["lm_head"] = weights.lm_head
    else:
        found["lm_head"] = weights.lm_head
    for name, weight in named.items():
        found[name] = weight.codes
        found[f"{name}.scale"] = torch.tensor(weight.scale, dtype=torch.float32)
    for (layer, site), scale in model.scales.items():
        found[f"activation_scales.{layer}.{site}"] = torch.tensor(scale, dtype=torch.float32)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def load_stored(folder: Path) -> StoredModel:
    """Load a folder written by `save_model`, to the same bits.

    CheckpointInvalid: no such folder, unfinished, another family or newer format, a tensor missing, or
    altered since.
    """
    about = read_about(folder)
    path = folder / TENSORS
    try:
        digest = file_sha256(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (FileNotFoundError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointInvalid(f"{path} cannot be read ({first}); run `apply` again") from None
    if digest != about["tensors_sha256"]:
        raise CheckpointInvalid(f"{path} was altered since `apply` wrote it (its checksum differs); run `apply` again")
    try:
        weights, scales = _model_parts(MambaConfig(**about["sizes"]), tensors, bool(about["quantize_lm_head"]))
    except (KeyError, TypeError) as error:
        raise CheckpointInvalid(f"{folder} lacks {error}; run `apply` again") from None
    return StoredModel(folder, Int8Mamba(weights, scales, compat=about["compat"]), about, digest)


def _model_parts(
    config: MambaConfig, tensors: dict[str, torch.Tensor], quantized_head: bool
) -> tuple[Int8Weights, dict[tuple[int, str], float]]:
    def weight(name: str) -> Int8Weight:
        return Int8Weight(tensors[name], float(tensors[f"{name}.scale"]))

    layers = tuple(
        Int8Layer(**{f.name: weight(f"layers.{i}.{f.name}") for f in fields(Int8Layer)}) for i in range(config.n_layer)
    )
    head = weight("lm_head") if quantized_head else tensors["lm_head"]
    scales: dict[tuple[int, str], float] = {}
    for name, tensor in tensors.items():
        if name.startswith("activation_scales."):
            _, layer, site = name.split(".", 2)
            scales[int(layer), site] = float(tensor)
    return Int8Weights(tensors["embedding"], tensors.get("embedding.scales"), head, config, layers), scales


def read_about(folder: Path) -> dict[str, Any]:
    """``folder/config.json``; CheckpointInvalid if it is missing, another family or a newer format."""
    path = folder / CONFIG
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointInvalid(f"{folder} holds no INT8 model (no {CONFIG}); make one with `apply`") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointInvalid(f"{path} is not valid JSON ({error}); run `apply` again") from None
    if not isinstance(about, dict) or about.get("family") != FAMILY:
        raise CheckpointInvalid(f"{folder} is no {FAMILY} model; make one with `apply`")
    if about["format_version"] > FORMAT_VERSION:
        raise CheckpointInvalid(
            f"{path} has format version {about['format_version']}; this quambase reads up to "
            f"{FORMAT_VERSION}: upgrade quambase"
        )
    return about


def remember(db: Path, folder: Path) -> None:
    """Record ``folder`` as the model applied last in this database."""
    with replacing(db / "models" / LAST) as temporary:
        temporary.write_text(f"{folder.resolve()}\n", encoding="utf-8")


def last_applied(db: Path) -> Path:
    """The model applied last; CheckpointInvalid if there is none."""
    path = db / "models" / LAST
    if not path.exists():
        raise CheckpointInvalid(
            f"no model was applied in {db} yet; run `apply`, name a model folder, or give --scales FILE"
        )
    return Path(path.read_text(encoding="utf-8").strip())
