"""From a model's name to its weights and tokenizer: bundled models, local folders, short names, hub ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from quambase.model.block import ModelConfig
from quambase.model.block_kinds import read_config
from quambase.model.inputs.hub import mend
from quambase.model.inputs.settings import Settings, read_json_object, shown
from quambase.model.inputs.sources import (
    PYTORCH,
    PYTORCH_INDEX,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    find_sources,
    is_bundled,
)
from quambase.model.inputs.tensor_files import read_pytorch, read_safetensors
from quambase.model.inputs.tokenizer import Tokenizer, load_tokenizer
from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.weights import ModelWeights, weights_digest, weights_from_tensors
from quambase.schema.errors import CheckpointInvalid


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model. ``path`` is its folder; the hashes identify weights (tensor bytes, config) and tokenizer."""

    name: str
    path: Path
    bundled: bool
    any_weights: ModelWeights
    tokenizer: Tokenizer
    weights_sha256: str
    tokenizer_sha256: str

    @property
    def family(self) -> str:
        """The kind of its blocks: a key of `quambase.schema.sites.FAMILIES`."""
        return self.any_weights.config.kind

    def floating(self) -> LanguageModel:
        """The model as it was trained, ready to run on the CPU."""
        return floating_model(self.any_weights)


def load_model(name: str, *, tokenizer: str | None = None) -> LoadedModel:
    """Load a model by bundled name, local folder, short name (``mamba-130m``) or hub id.

    ``tokenizer`` is a tokenizer.json, a folder holding one, or a hub id; by default the one beside the weights.
    Errors: ModelNotFound, CheckpointInvalid.
    """
    sources = find_sources(name, tokenizer)
    folder = sources.folder
    found = load_tokenizer(sources.tokenizer)  # before the weights, so that a wrong one is reported early
    weights = load_weights(folder)
    found = found.for_rows(weights.config.vocab_size)
    return LoadedModel(
        # A local folder is recorded by its own name, so that a run does not depend on where the folder was.
        name=Path(name).resolve().name if Path(name).is_dir() else name,
        path=folder,
        bundled=is_bundled(name),
        any_weights=weights,
        tokenizer=found,
        weights_sha256=weights_digest(weights),
        tokenizer_sha256=found.sha256,
    )


def load_weights(folder: Path) -> ModelWeights:
    """Read config.json and the weights of a model folder, mamba-ssm or Hugging Face layout; float32.

    Prefers safetensors (one file or an index) to pytorch_model.bin, which is read with ``weights_only=True``.
    """
    config, tied = _config(folder)
    return weights_from_tensors(config, _read_tensors(folder), tied)


def _config(folder: Path) -> tuple[ModelConfig, bool]:
    """The sizes in config.json, and whether it ties the head to the embedding."""
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointInvalid(f"{path} is missing; expected a model folder with config.json and weights")
    return read_config(Settings(read_json_object(path)), path)


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's weights. A single file takes precedence over an index, as in transformers."""
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
    """The files that an index names, each once. Only files in the index's own folder are accepted."""
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
