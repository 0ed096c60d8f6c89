"""A killed run resumes from a checkpoint: its statistics up to some block in one file, replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from quambase.collector.statistics import Moments, RunStatistics, SiteLayout
from quambase.model.inputs.array_files import Array, read_npz
from quambase.schema.errors import DatabaseInvalid, first_line
from quambase.schema.files import replacing
from quambase.schema.sites import SiteKey
from quambase.schema.stored.manifest import FileName, TableFile
from quambase.schema.values.positions import buckets_of

CHECKPOINT = "checkpoint.npz"


def position_buckets(identity: Mapping[str, Any]) -> int:
    """How many buckets of positions a run of this ``identity`` has."""
    return buckets_of(int(identity["seq_len"])) if identity.get("by_position") else 0


class Checkpoint(NamedTuple):
    """The first ``blocks`` blocks of a run or a shard: their statistics, and the files that hold their rows."""

    blocks: int
    statistics: RunStatistics
    files: dict[str, TableFile]


def save_checkpoint(folder: Path, blocks: int, statistics: RunStatistics, files: Mapping[str, TableFile]) -> None:
    """Write a `Checkpoint`; ``statistics`` are on the host, ``files`` on the disk. Counts are stored sparsely."""
    present, counts = _sparse(statistics)
    arrays = {
        "blocks": np.array(blocks),
        "files": np.array(json.dumps({file: asdict(entry) for file, entry in files.items()})),
        "shared": np.array(json.dumps([[key, source] for key, source in statistics.index.shared.items()])),
        "present": present,
        "counts": counts,
        "top": statistics.top.numpy(),
        **{name: getattr(statistics.moments, name).numpy() for name in EVERY},
        **{name: array for b, bucket in enumerate(statistics.buckets) for name, array in _of_bucket(b, bucket).items()},
    }
    with replacing(folder / CHECKPOINT) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _sparse(statistics: RunStatistics) -> tuple[Array, Array]:
    """The places of the counts that are not 0, and those counts."""
    counts = statistics.counts.numpy().reshape(-1)
    present = np.flatnonzero(counts)
    return present.astype(np.min_scalar_type(counts.size)), counts[present]


EVERY, USED = tuple(field.name for field in fields(Moments)), ("integers", "extrema")
"""The moments that are stored of a run, and of a bucket of positions."""


def _of_bucket(number: int, bucket: RunStatistics) -> dict[str, Array]:
    """What a checkpoint stores of a bucket of positions, by name."""
    parts = dict(zip(("present", "counts"), _sparse(bucket), strict=True))
    parts |= {name: getattr(bucket.moments, name).numpy() for name in USED}
    return {f"bucket{number}_{name}": array for name, array in parts.items()}


def load_checkpoint(folder: Path, layouts: Mapping[SiteKey, SiteLayout], most: int, buckets: int = 0) -> Checkpoint:
    """Read what `save_checkpoint` wrote; a checkpoint of no block if there is none. ``buckets``: of positions.
    DatabaseInvalid: the file is damaged.
    """
    statistics = RunStatistics.empty(layouts, most, buckets)
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
    _fill(statistics, arrays, "", EVERY)
    for b, bucket in enumerate(statistics.buckets):
        _fill(bucket, arrays, f"bucket{b}_", USED)
    statistics.top.copy_(torch.from_numpy(_of(arrays, "top", statistics.top.numpy())))
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


def _fill(statistics: RunStatistics, arrays: Mapping[str, Array], prefix: str, moments: Sequence[str]) -> None:
    """Fill the counts from what `_sparse` gave, and the ``moments``, stored under these names with ``prefix``."""
    counts, present = statistics.counts.numpy().reshape(-1), arrays[f"{prefix}present"]
    _check(present.dtype.kind == "u" and present.ndim == 1 and (present < counts.size).all(), "places of counts")
    counts[present] = _of(arrays, f"{prefix}counts", np.zeros(present.size, np.int64))
    for name in moments:
        part = getattr(statistics.moments, name)
        part.copy_(torch.from_numpy(_of(arrays, f"{prefix}{name}", part.numpy())))


def _of(arrays: Mapping[str, Array], name: str, like: Array) -> Array:
    """The array of this name. ValueError unless it has the shape and the type of ``like``."""
    found = arrays[name]
    _check(found.shape == like.shape and found.dtype == like.dtype, name)
    return found


def _check(right: object, what: str) -> None:
    if not right:
        raise ValueError(f"its {what} are not those of this run")
