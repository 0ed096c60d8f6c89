"""From a model's name to its weights and tokenizer: bundled models, local folders, short names, hub ids."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from quambase.model.backbone import Backbone
from quambase.model.hub import HubError, fetch_snapshot, mend
from quambase.model.mamba import Mamba
from quambase.model.mamba2 import Mamba2
from quambase.model.mamba2_weights import Mamba2Config, Mamba2Weights, mamba2_weights_from_tensors
from quambase.model.tokenizer import Tokenizer, load_tokenizer
from quambase.model.weights import MambaConfig, MambaWeights, weights_from_tensors
from quambase.schema.errors import CheckpointInvalid, ModelNotFound, UnknownName
from quambase.schema.sites import MAMBA1, MAMBA2

BUNDLED = Path(__file__).with_name("bundled")
"""Folder of the models that ship with the package."""

NEOX = "EleutherAI/gpt-neox-20b"

SHORT_NAMES: dict[str, str] = {
    **{f"mamba-{size}": f"state-spaces/mamba-{size}" for size in ("130m", "370m", "790m", "1.4b", "2.8b")},
    **{f"mamba2-{size}": f"state-spaces/mamba2-{size}" for size in ("130m", "370m", "780m", "1.3b", "2.7b")},
}
"""Short name to hub id; their tokenizer is GPT-NeoX-20B's."""


@dataclass(frozen=True)
class LoadedModel:
    """A model as found: ``path`` is its folder; the hashes identify weights (tensor bytes, config) and tokenizer."""

    name: str
    path: Path
    bundled: bool
    any_weights: MambaWeights | Mamba2Weights
    tokenizer: Tokenizer
    weights_sha256: str
    tokenizer_sha256: str

    @property
    def family(self) -> str:
        """``mamba1`` or ``mamba2``."""
        return MAMBA2 if isinstance(self.any_weights, Mamba2Weights) else MAMBA1

    @property
    def weights(self) -> MambaWeights:
        """A Mamba-1's weights; CheckpointInvalid for another family."""
        if isinstance(self.any_weights, MambaWeights):
            return self.any_weights
        raise CheckpointInvalid(f"{self.name} is a Mamba-2 model and this needs a Mamba-1; name one with --model")

    @property
    def config(self) -> MambaConfig:
        """A Mamba-1's sizes; CheckpointInvalid for another family."""
        return self.weights.config

    def floating(self) -> Backbone:
        """The model as it was trained, ready to run."""
        return floating_model(self.any_weights)


def floating_model(weights: MambaWeights | Mamba2Weights, *, rotated: bool = False) -> Backbone:
    """The forward pass of weights of any family; ``rotated``: they were prepared."""
    if isinstance(weights, Mamba2Weights):
        return Mamba2(weights, rotated=rotated)
    return Mamba(weights, rotated=rotated)


def bundled_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(folder.parent.name for folder in BUNDLED.glob("*/config.json"))


def load_model(name: str, *, tokenizer: str | None = None) -> LoadedModel:
    """Load a model by bundled name, local folder, short name (``mamba-130m``) or hub id.

    ``tokenizer`` is a tokenizer.json, a folder holding one, or a hub id; by default the one beside the weights.
    Errors: ModelNotFound, CheckpointInvalid.
    """
    folder, family = resolve(name)
    weights = load_weights(folder)
    found = load_tokenizer(folder, name=tokenizer, family=family)
    if found.size > weights.config.vocab_size:
        raise CheckpointInvalid(
            f"tokenizer {found.path} has {found.size} tokens, the model's embedding {weights.config.vocab_size} rows; "
            "name the right one with --tokenizer"
        )
    return LoadedModel(
        # A local folder is called by its own name, so that a run does not depend on where it lay.
        name=Path(name).resolve().name if Path(name).is_dir() else name,
        path=folder,
        bundled=folder.parent == BUNDLED,
        any_weights=weights,
        tokenizer=found,
        weights_sha256=weights_digest(weights),
        tokenizer_sha256=found.sha256,
    )


def resolve(name: str) -> tuple[Path, str | None]:
    """The folder of a model's files (downloaded if on the hub) and the hub id of its family's tokenizer."""
    local = Path(name)
    if local.is_dir():
        return local, None
    if name in bundled_models():
        return BUNDLED / name, None
    if name in SHORT_NAMES:
        return _from_hub(SHORT_NAMES[name]), NEOX
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return _from_hub(name), NEOX if name.startswith("state-spaces/") else None
    hint = UnknownName.of("model", name, [*bundled_models(), *SHORT_NAMES])
    raise ModelNotFound(
        f"{hint}; or give a folder with config.json and weights, or a hub id such as state-spaces/mamba-130m"
    )


def _from_hub(repository: str) -> Path:
    """Download a hub repository's config, weights and tokenizer into the hub's cache; the snapshot folder."""
    advice = f"download {repository} on a machine with a network and pass its folder: --model FOLDER"
    patterns = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model.bin"]
    try:
        return fetch_snapshot(repository, patterns)
    except HubError as error:
        raise ModelNotFound(
            f"{repository} is not in the local hub cache and could not be fetched ({error}); or {advice}"
        ) from None


def load_weights(folder: Path) -> MambaWeights | Mamba2Weights:
    """Read config.json and the weights of a model folder, mamba-ssm or Hugging Face layout; float32.

    safetensors (one file or an index) before pytorch_model.bin, which is read with ``weights_only=True``.
    """
    config = _config(folder)
    tensors = _read_tensors(folder)
    if isinstance(config, Mamba2Config):
        return mamba2_weights_from_tensors(config, tensors)
    return weights_from_tensors(config, tensors)


def _config(folder: Path) -> MambaConfig | Mamba2Config:
    """The sizes in config.json, whichever family and layout it describes."""
    raw = read_config(folder)
    if "d_model" in raw and "n_layer" in raw:
        layer = (raw.get("ssm_cfg") or {}).get("layer", "Mamba1")
        if layer == "Mamba1":
            return MambaConfig.from_mamba_ssm(raw)
        if layer == "Mamba2":
            return Mamba2Config.from_mamba_ssm(raw)
        raise CheckpointInvalid(
            f"{folder / 'config.json'} says ssm_cfg.layer = {layer}; this version reads Mamba1 and Mamba2 models"
        )
    if raw.get("model_type") == "mamba":
        return MambaConfig.from_hugging_face(raw)
    if raw.get("model_type") == "mamba2":
        return Mamba2Config.from_hugging_face(raw)
    raise CheckpointInvalid(
        f"{folder / 'config.json'} describes a '{raw.get('model_type', 'model of unknown type')}'; expected Mamba-1 or "
        "Mamba-2 in mamba-ssm layout (d_model, n_layer) or Hugging Face layout (model_type mamba or mamba2)"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON object in ``folder/config.json``; CheckpointInvalid if there is none."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointInvalid(f"{path} is missing; expected a model folder with config.json and weights") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointInvalid(f"{path} is not valid JSON ({error}); {mend(path)}") from None
    if not isinstance(raw, dict):
        raise CheckpointInvalid(f"{path} holds no JSON object; download it again")
    return raw


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).exists()][:1]
    if not names:
        raise CheckpointInvalid(f"{folder} holds no weights; expected model.safetensors or pytorch_model.bin")
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        tensors |= _read_tensor_file(folder / name)
    return tensors


def _read_tensor_file(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointInvalid(
            f"{path} is missing, though the index names it; the download is incomplete: repeat it"
        ) from None
    except pickle.UnpicklingError:
        raise CheckpointInvalid(
            f"{path} holds more than tensors; it is not loaded, since a pickle can run code"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointInvalid(f"{path} cannot be read ({first}); it may be cut short: {mend(path)}") from None
    if not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise CheckpointInvalid(f"{path} is not a state dict of tensors")
    return loaded


def weights_digest(weights: MambaWeights | Mamba2Weights) -> str:
    """SHA-256 over configuration and every tensor's float32 bytes: the same for the same model in any layout."""
    digest = hashlib.sha256(repr(weights.config).encode())
    for tensor in (weights.embedding, weights.norm_f, weights.lm_head):
        digest.update(tensor.contiguous().numpy().tobytes())
    for layer in weights.layers:
        for tensor in vars(layer).values():
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
