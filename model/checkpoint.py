"""From a model's name to its weights and tokenizer: bundled models, local folders, short names, hub ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from quambase.model.backbone import Backbone
from quambase.model.hub import mend
from quambase.model.mamba import Mamba
from quambase.model.mamba2 import Mamba2
from quambase.model.mamba2_weights import Mamba2Config, Mamba2Weights, mamba2_weights_from_tensors
from quambase.model.settings import Settings, read_json_object, shown
from quambase.model.sources import (
    PYTORCH,
    PYTORCH_INDEX,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    find_sources,
    is_bundled,
)
from quambase.model.tensor_files import read_pytorch, read_safetensors
from quambase.model.tokenizer import Tokenizer, load_tokenizer
from quambase.model.weights import MambaConfig, MambaWeights, weights_from_tensors
from quambase.schema.errors import CheckpointInvalid
from quambase.schema.sites import MAMBA1, MAMBA2


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


def load_model(name: str, *, tokenizer: str | None = None) -> LoadedModel:
    """Load a model by bundled name, local folder, short name (``mamba-130m``) or hub id.

    ``tokenizer`` is a tokenizer.json, a folder holding one, or a hub id; by default the one beside the weights.
    Errors: ModelNotFound, CheckpointInvalid.
    """
    sources = find_sources(name, tokenizer)
    folder = sources.folder
    found = load_tokenizer(sources.tokenizer)  # before the weights: it takes less time to be wrong
    weights = load_weights(folder)
    found = found.for_rows(weights.config.vocab_size)
    return LoadedModel(
        # A local folder is called by its own name, so that a run does not depend on where it lay.
        name=Path(name).resolve().name if Path(name).is_dir() else name,
        path=folder,
        bundled=is_bundled(name),
        any_weights=weights,
        tokenizer=found,
        weights_sha256=weights_digest(weights),
        tokenizer_sha256=found.sha256,
    )


def load_weights(folder: Path) -> MambaWeights | Mamba2Weights:
    """Read config.json and the weights of a model folder, mamba-ssm or Hugging Face layout; float32.

    safetensors (one file or an index) before pytorch_model.bin, which is read with ``weights_only=True``.
    """
    config, tied = _config(folder)
    tensors = _read_tensors(folder)
    if isinstance(config, Mamba2Config):
        return mamba2_weights_from_tensors(config, tensors, tied)
    return weights_from_tensors(config, tensors, tied)


def _config(folder: Path) -> tuple[MambaConfig | Mamba2Config, bool]:
    """The sizes in config.json, whichever family and layout it describes, and whether the head is tied there.

    ``model_type`` says which layout's keys count, as it does for transformers: a converted model may carry both, and
    transformers keeps only its own up to date.
    """
    if not (folder / "config.json").exists():
        raise CheckpointInvalid(
            f"{folder / 'config.json'} is missing; expected a model folder with config.json and weights"
        )
    raw = Settings(read_json_object(folder / "config.json"))
    kind = raw.word("model_type", "")
    old_keys = "d_model" in raw and "hidden_size" not in raw
    if kind == "mamba" and not old_keys:
        return MambaConfig.from_hugging_face(raw.values), raw.flag("tie_word_embeddings", True)
    if kind == "mamba2" and not old_keys:
        return Mamba2Config.from_hugging_face(raw.values), raw.flag("tie_word_embeddings", False)
    if kind in ("", "mamba", "mamba2") and ("d_model" in raw or "n_layer" in raw):
        ssm = raw.section("ssm_cfg")
        ssm.only("layer", "Mamba1", "Mamba2")
        tied = raw.flag("tie_embeddings", True)
        if ssm.word("layer", "Mamba1") == "Mamba1":
            return MambaConfig.from_mamba_ssm(raw.values), tied
        return Mamba2Config.from_mamba_ssm(raw.values), tied
    raise CheckpointInvalid(
        f"{folder / 'config.json'} describes a {shown(kind) if kind else 'model of unknown type'}; expected Mamba-1 or "
        "Mamba-2 in mamba-ssm layout (d_model, n_layer) or Hugging Face layout (model_type mamba or mamba2)"
    )


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's weights. One file comes before an index, as in transformers: it is the newer."""
    for name in (SAFETENSORS, SAFETENSORS_INDEX, PYTORCH, PYTORCH_INDEX):
        path = folder / name
        if path.exists():
            files = [path] if path.suffix != ".json" else _shards(path)
            tensors: dict[str, torch.Tensor] = {}
            for file in files:
                tensors |= _read_tensor_file(file)
            return tensors
    raise CheckpointInvalid(f"{folder} holds no weights; expected {SAFETENSORS} or {PYTORCH}")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, each once. They lie beside it: an index leads nowhere else."""
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointInvalid(f"{index} has no weight_map of tensors to files; {mend(index)}")
    ending = ".safetensors" if index.name == SAFETENSORS_INDEX else ".bin"
    for name in names.values():
        if not (isinstance(name, str) and name.endswith(ending) and _is_plain(name)):
            raise CheckpointInvalid(f"{index} names {shown(name)}; expected a {ending} file beside it")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.exists():
            raise CheckpointInvalid(
                f"{file} is missing, though the index names it; the download is incomplete: repeat it"
            )
    return files


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in the same folder."""
    return Path(name).name == name and name.isprintable() and len(name) <= 200


def _read_tensor_file(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path, CheckpointInvalid)
    loaded = read_pytorch(path, CheckpointInvalid)
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in loaded.items()
    ):
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
