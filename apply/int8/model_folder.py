"""Stores an INT8 model in a folder: tensors, settings, and the origin of its scales.

model.safetensors  int8 weights and their scales, float16 weights of operators in 16 bit, the embedding and head, every
                   activation scale
config.json        sizes, settings, source model and hashes, strategy, operators in 16 bit
scales.parquet     the rows of the scale table that were used (and upstream's, for comparison)
tokenizer.json     the source model's tokenizer
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quambase.apply.int8.arithmetic import Int8Weight, SplitInt8Weight
from quambase.apply.int8.block import Int8BlockKind, Int8BlockWeights
from quambase.apply.int8.block_kinds import BY_FORMAT, int8_kind_of
from quambase.apply.int8.build import AnyInt8Model, on_host
from quambase.apply.int8.group_scales import values_of, zero_points_of
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.apply.int8.weights import Int8ModelWeights
from quambase.model.block import ModelConfig
from quambase.model.block_kinds import KINDS
from quambase.schema import FORMAT_VERSION
from quambase.schema.checksums import file_sha256
from quambase.schema.errors import CheckpointInvalid, OutputRefused, first_line
from quambase.schema.files import locked, replacing
from quambase.schema.json_files import as_type, write_json
from quambase.schema.scale_table import Scale, write_scales
from quambase.schema.stored.int8_models import (
    AGAIN,
    CONFIG,
    SCALES,
    TENSORS,
    TOKENIZER,
    UNFINISHED,
    check_files,
    read_about,
)
from quambase.schema.values.number_format import Affine


@dataclass(frozen=True)
class StoredModel:
    """A loaded INT8 model folder; ``about``: the content of its config.json."""

    folder: Path
    model: Int8LanguageModel
    about: dict[str, Any]
    tensors_sha256: str


_BEGUN = re.compile(rf"\.lock|\.{CONFIG}\..*\.tmp")
"""What `save_model` leaves in a new folder if it is killed before config.json is there."""


def refuse_foreign_folder(folder: Path) -> None:
    """OutputRefused unless ``folder`` is new, empty, or has an INT8 model of quambase; called before any work."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputRefused(f"{folder} is a file; expected a folder to write the INT8 model to")
    if all(_BEGUN.fullmatch(path.name) for path in folder.iterdir()):
        return
    if not is_int8_model(folder):
        raise OutputRefused(
            f"{folder} holds files that are not an INT8 model of quambase; name a new or empty folder with --out"
        )


def is_int8_model(folder: Path) -> bool:
    """Whether ``folder`` has an INT8 model of quambase, finished or not."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("family") in BY_FORMAT


def save_model(
    folder: Path,
    model: Int8LanguageModel,
    about: dict[str, Any],
    tokenizer: Path | None = None,
    scales: tuple[pa.Table, dict[str, Any]] | None = None,
) -> None:
    """Write ``model`` to ``folder``. config.json is written first, marked as unfinished, and completed at the end.

    about    further entries of config.json: source model, hashes, strategy
    scales   the rows of the scale table that were used, and their provenance

    RunBusy: another process is writing the folder. OSError, also on a full disk, which safetensors reports as an error
    of its own.
    """
    # Two processes that write one folder could otherwise leave the tensors of one with the settings of the other.
    with locked(folder, f"the model {folder}"):
        family = int8_kind_of(model.config).format
        write_json(folder / CONFIG, {"format_version": FORMAT_VERSION, "family": family, UNFINISHED: True})
        with replacing(folder / TENSORS) as temporary:
            try:
                save_file(_tensors(model), temporary)
            except SafetensorError as error:
                number = re.search(r"os error (\d+)", str(error))
                code = int(number[1]) if number else errno.EIO
                raise OSError(code, os.strerror(code), str(folder / TENSORS)) from None
        for name in (TOKENIZER, SCALES):
            (folder / name).unlink(missing_ok=True)  # of an earlier model in this folder
        if tokenizer is not None:
            with replacing(folder / TOKENIZER) as temporary:
                shutil.copyfile(tokenizer, temporary)
        if scales is not None:
            write_scales(folder / SCALES, *scales)
        config = {
            "format_version": FORMAT_VERSION,
            "family": family,
            "sizes": asdict(model.config),
            "quantize_lm_head": model.quantized_lm_head,
            "quantize_embedding": model.weights.embedding_scales is not None,
            "compat": model.compat,
            "weight_bits": model.weights.weight_bits,
            **({"gptq": True} if model.weights.gptq else {}),
            "kept_16bit": [list(operator) for operator in sorted(model.in_16_bit)],
            "tensors_sha256": file_sha256(folder / TENSORS),
            "files": {name: file_sha256(folder / name) for name in (TOKENIZER, SCALES) if (folder / name).exists()},
            **about,
        }
        write_json(folder / CONFIG, config)


def weights_digest(model: AnyInt8Model) -> str:
    """SHA-256 over the names and bytes of all tensors of a model except its activation scales."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors_but_scales(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(model: Int8LanguageModel) -> dict[str, torch.Tensor]:
    found = _tensors_but_scales(model)
    for (layer_number, site), value in model.scales.items():
        values, zero_points = values_of(value), zero_points_of(value)
        found[f"activation_scales.{layer_number}.{site}"] = values if isinstance(value, tuple) else values[0]
        if zero_points.any():
            found[f"activation_zero_points.{layer_number}.{site}"] = zero_points
    return found


def _tensors_but_scales(model: AnyInt8Model) -> dict[str, torch.Tensor]:
    weights = model.weights
    found: dict[str, torch.Tensor] = {"embedding": weights.embedding}
    if weights.embedding_scales is not None:
        found["embedding.scales"] = weights.embedding_scales
    named: dict[str, torch.Tensor | Int8Weight | SplitInt8Weight] = {"lm_head": weights.lm_head}
    for i, layer in enumerate(weights.layers):
        named |= {f"layers.{i}.{name}": weight for name, weight in vars(layer).items()}
    for name, weight in named.items():
        if isinstance(weight, torch.Tensor):
            found[name] = weight
            continue
        found[name] = weight.codes
        scale = weight.scales if isinstance(weight, SplitInt8Weight) else weight.scale
        found[f"{name}.scale"] = torch.tensor(scale, dtype=torch.float32)
    found |= {f"channel_groups.{i}": torch.stack(list(maps)) for i, maps in enumerate(model.channel_groups)}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def load_stored(folder: Path) -> StoredModel:
    """Load a folder written by `save_model`, to the same bits.

    CheckpointInvalid: the folder is missing, unfinished, of another family or a newer format, lacks a tensor, or was
    altered.
    """
    about = read_about(folder)
    if about["family"] not in BY_FORMAT:
        raise CheckpointInvalid(f"{folder} is no {' or '.join(BY_FORMAT)} model; make one with `apply`")
    sizes = KINDS[BY_FORMAT[about["family"]].name].config
    config = as_type(about.get("sizes"), sizes, folder / CONFIG, CheckpointInvalid, AGAIN)
    check_files(folder, about)
    path = folder / TENSORS
    try:
        with safe_open(path, framework="pt") as file:
            _check_shapes(folder, file, _shapes(about, config))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        model = _model_of(about, config, tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise CheckpointInvalid(f"{path} is not a whole INT8 model ({first_line(error)}); {AGAIN}") from None
    return StoredModel(folder, model, about, about["tensors_sha256"])


def _shapes(about: dict[str, Any], config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """The name and shape of every weight of a model of this configuration, layer by layer; None: there is no such
    tensor.
    """
    whole = (config.vocab_size, config.d_model)
    yield from (("embedding", whole), ("lm_head", whole))
    if about["quantize_embedding"]:
        yield "embedding.scales", whole[:1]
    names = [field.name for field in fields(BY_FORMAT[about["family"]].weights)]  # type: ignore[arg-type]
    shapes = config.block_shapes()
    for layer in range(config.n_layer):
        yield from ((f"layers.{layer}.{name}", shapes[name]) for name in names)
    yield f"layers.{config.n_layer}.{names[0]}", None


def _check_shapes(folder: Path, file: Any, expected: Iterable[tuple[str, tuple[int, ...] | None]]) -> None:
    """CheckpointInvalid names the first tensor whose shape is not the expected one, before any is read: a model of
    other sizes would be computed without an error, or ask for memory beyond all bounds.
    """
    there = set(file.keys())
    for name, shape in expected:
        found = tuple(file.get_slice(name).get_shape()) if name in there else None
        if found != shape:
            is_there = "is missing" if found is None else f"has shape {found}"
            implied = "that there is none" if shape is None else str(shape)
            raise CheckpointInvalid(
                f"{folder / TENSORS}: {name} {is_there}; the sizes in {CONFIG} imply {implied}: {AGAIN}"
            )


def _model_of(about: dict[str, Any], config: ModelConfig, tensors: dict[str, torch.Tensor]) -> Int8LanguageModel:
    kind = BY_FORMAT[about["family"]]
    head = _whole(tensors, "lm_head") if about["quantize_lm_head"] else tensors["lm_head"]
    scales: dict[tuple[int, str], Scale] = {}
    for name, tensor in tensors.items():
        if name.startswith("activation_scales."):
            _, layer, site = name.split(".", 2)
            scales[int(layer), site] = _scale_of(tensor, tensors.get(f"activation_zero_points.{layer}.{site}"))
    layers = tuple(_layer(kind, config, tensors, f"layers.{i}.") for i in range(config.n_layer))
    embedding, rounding = (tensors["embedding"], tensors.get("embedding.scales")), about.get("gptq", False)
    weights = Int8ModelWeights(config, *embedding, head, layers, about.get("weight_bits", 8), rounding)
    grouped = range(config.n_layer if "channel_groups.0" in tensors else 0)
    groups = [list(tensors[f"channel_groups.{i}"]) for i in grouped]
    return Int8LanguageModel(on_host(weights), scales, channel_groups=groups, compat=about["compat"])


def _layer(kind: Int8BlockKind, config: ModelConfig, tensors: dict[str, torch.Tensor], prefix: str) -> Int8BlockWeights:
    """One block's weights, each of its field's type."""
    widths = kind.weights.widths(config)
    weights: dict[str, Any] = {}
    for field in fields(kind.weights):  # type: ignore[arg-type]
        name = prefix + field.name
        if f"{name}.scale" not in tensors:
            weights[field.name] = _unquantized(tensors, name)
        elif tensors[f"{name}.scale"].dim():
            scales = tuple(tensors[f"{name}.scale"].tolist())
            parts = widths.get(field.name, ())
            parts = parts if len(parts) == len(scales) else (1,) * len(scales)  # one scale a row: weights in 4 bits
            weights[field.name] = SplitInt8Weight(tensors[name], scales, parts)
        else:
            weights[field.name] = _whole(tensors, name)
    return kind.weights(**weights)


def _unquantized(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor that has no scale. KeyError: it is codes, whose scale is missing."""
    if tensors[name].dtype == torch.int8:
        raise KeyError(f"{name}.scale")
    return tensors[name]


def _scale_of(tensor: torch.Tensor, zero_points: torch.Tensor | None) -> Scale:
    """A float, a tuple, or a tuple of tuples: as many axes as ``tensor``; with ``zero_points`` (groups,) or without."""
    if tensor.dim() == 2:
        return tuple(map(tuple, tensor.tolist()))
    values = tensor.reshape(-1).tolist()
    zeros = [0] * len(values) if zero_points is None else zero_points.tolist()
    parts = tuple(Affine(value, zero) if zero else value for value, zero in zip(values, zeros, strict=True))
    return parts if tensor.dim() else parts[0]


def _whole(tensors: dict[str, torch.Tensor], name: str) -> Int8Weight:
    return Int8Weight(tensors[name], float(tensors[f"{name}.scale"]))
