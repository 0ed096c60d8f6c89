"""A killed run resumes from a checkpoint: its statistics up to some block in one file, replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from quambase.collector.statistics import Moments, RunStatistics, SiteLayout
from quambase.model.inputs.array_files import Array, read_npz
from quambase.schema.errors import DatabaseInvalid, first_line
from quambase.schema.files import replacing
from quambase.schema.manifest import FileName, TableFile
from quambase.schema.sites import SiteKey

CHECKPOINT = "checkpoint.npz"


class Checkpoint(NamedTuple):
    """The first ``blocks`` blocks of a run or a shard: their statistics, and the files that hold their rows."""

    blocks: int
    statistics: RunStatistics
    files: dict[str, TableFile]


def save_checkpoint(folder: Path, blocks: int, statistics: RunStatistics, files: Mapping[str, TableFile]) -> None:
    """Write a `Checkpoint`; ``statistics`` are on the host, ``files`` on the disk. Counts are stored sparsely."""
    counts = statistics.counts.numpy().reshape(-1)
    present = np.flatnonzero(counts)
    arrays = {
        "blocks": np.array(blocks),
        "files": np.array(json.dumps({file: asdict(entry) for file, entry in files.items()})),
        "shared": np.array(json.dumps([[key, source] for key, source in statistics.index.shared.items()])),
        "present": present.astype(np.min_scalar_type(counts.size)),
        "counts": counts[present],
        "top": statistics.top.numpy(),
        **{field.name: getattr(statistics.moments, field.name).numpy() for field in fields(Moments)},
    }
    with replacing(folder / CHECKPOINT) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_checkpoint(folder: Path, layouts: Mapping[SiteKey, SiteLayout], most: int) -> Checkpoint:
    """Read what `save_checkpoint` wrote; a checkpoint of no block if there is none. DatabaseInvalid: the file is
    damaged.
    """
    statistics = RunStatistics.empty(layouts, most)
    path = folder / CHECKPOINT
    if not path.exists():
        return Checkpoint(0, statistics, {})
    try:
        return _filled(statistics, read_npz(path))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, msgspec.ValidationError) as error:
        raise DatabaseInvalid(
            f"{path} is damaged ({first_line(error)}); delete the folder {folder} and run the same command again"
        ) from None


def _filled(statistics: RunStatistics, arrays: Mapping[str, Array]) -> Checkpoint:
    """The checkpoint of what `save_checkpoint` stored; fills ``statistics``, which are empty. ValueError, KeyError,
    TypeError, RecursionError, msgspec.ValidationError: something is missing, of another shape or of another type.
    """
    counts, present = statistics.counts.numpy().reshape(-1), arrays["present"]
    _check(present.dtype.kind == "u" and present.ndim == 1 and (present < counts.size).all(), "places of counts")
    counts[present] = _of(arrays, "counts", np.zeros(present.size, np.int64))
    parts = {"top": statistics.top} | {field.name: getattr(statistics.moments, field.name) for field in fields(Moments)}
    for name, part in parts.items():
        part.copy_(torch.from_numpy(_of(arrays, name, part.numpy())))
    texts = {name: arrays[name] for name in ("shared", "files")}
    _check(all(text.dtype.kind == "U" and text.ndim == 0 for text in texts.values()), "texts")
    known = statistics.index.layouts.keys()
    for key, source in json.loads(str(texts["shared"])):
        _check(isinstance(key, list) and isinstance(source, list), "sites")
        _check({tuple(key), tuple(source)} <= known, "sites")
        statistics.index.share(tuple(key), tuple(source))
    blocks = _of(arrays, "blocks", np.array(0))
    _check(blocks >= 0, "blocks")
    files = msgspec.convert(json.loads(str(texts["files"])), dict[FileName, TableFile])
    return Checkpoint(int(blocks), statistics, files)


def _of(arrays: Mapping[str, Array], name: str, like: Array) -> Array:
    """The array of this name. ValueError unless it has the shape and the type of ``like``."""
    found = arrays[name]
    _check(found.shape == like.shape and found.dtype == like.dtype, name)
    return found


def _check(right: object, what: str) -> None:
    if not right:
        raise ValueError(f"its {what} are not those of this run")
