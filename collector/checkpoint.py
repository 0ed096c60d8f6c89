"""A killed run resumes from a checkpoint: its statistics up to some block in one file, replaced atomically."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from quambase.collector.statistics import Moments, RunStatistics, SiteLayout
from quambase.schema.errors import DatabaseInvalid
from quambase.schema.files import replacing
from quambase.schema.json_files import as_type
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
        with np.load(path, allow_pickle=False) as arrays:
            statistics.counts.numpy().reshape(-1)[arrays["present"]] = arrays["counts"]
            statistics.top.copy_(torch.from_numpy(arrays["top"]))
            for field in fields(Moments):
                getattr(statistics.moments, field.name).copy_(torch.from_numpy(arrays[field.name]))
            for key, source in json.loads(str(arrays["shared"])):
                statistics.index.share(tuple(key), tuple(source))
            listed = json.loads(str(arrays["files"]))
            advice = f"delete the folder {folder} and run the same command again"
            files = as_type(listed, dict[FileName, TableFile], path, DatabaseInvalid, advice)
            return Checkpoint(int(arrays["blocks"]), statistics, files)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0]
        raise DatabaseInvalid(
            f"{path} is damaged ({reason}); delete the folder {folder} and run the same command again"
        ) from None
