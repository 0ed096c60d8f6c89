"""A run's statistics up to some block in one file, replaced atomically: what a killed run resumes from."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quambase.collector.statistics import Moments, SiteLayout, SiteStatistics
from quambase.schema.errors import DatabaseInvalid
from quambase.schema.files import replacing
from quambase.schema.manifest import TableFile, table_files
from quambase.schema.sites import SiteKey

CHECKPOINT = "checkpoint.npz"


class Checkpoint(NamedTuple):
    """The first ``blocks`` blocks of a run or a shard: their statistics, and the files that hold their rows."""

    blocks: int
    statistics: dict[SiteKey, SiteStatistics]
    files: dict[str, TableFile]


def save_checkpoint(
    folder: Path, blocks: int, statistics: Mapping[SiteKey, SiteStatistics], files: Mapping[str, TableFile]
) -> None:
    """Write a `Checkpoint`; ``files`` are on the disk. Counts are stored sparsely, sites in sorted order."""
    listed = json.dumps({file: asdict(entry) for file, entry in files.items()})
    arrays: dict[str, np.ndarray] = {"blocks": np.array(blocks), "files": np.array(listed)}
    for number, key in enumerate(sorted(statistics)):
        stats = statistics[key]
        flat = stats.counts.ravel()
        present = np.flatnonzero(flat)
        arrays[f"{number}.present"] = present.astype(np.uint32)
        arrays[f"{number}.counts"] = flat[present]
        for field in fields(Moments):
            arrays[f"{number}.{field.name}"] = getattr(stats.moments, field.name)
        for g, top in enumerate(stats.top):
            arrays[f"{number}.top{g}"] = top
    with replacing(folder / CHECKPOINT) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_checkpoint(folder: Path, layouts: Mapping[SiteKey, SiteLayout], most: int) -> Checkpoint:
    """What `save_checkpoint` wrote; of no block where there is none. DatabaseInvalid if the file is damaged."""
    statistics = {key: SiteStatistics.empty(layout, most) for key, layout in layouts.items()}
    path = folder / CHECKPOINT
    if not path.exists():
        return Checkpoint(0, statistics, {})
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for number, key in enumerate(sorted(statistics)):
                stats = statistics[key]
                stats.counts.ravel()[arrays[f"{number}.present"]] = arrays[f"{number}.counts"]
                for field in fields(Moments):
                    setattr(stats.moments, field.name, arrays[f"{number}.{field.name}"])
                stats.top = [arrays[f"{number}.top{g}"] for g in range(len(stats.layout.names))]
            files = table_files(json.loads(str(arrays["files"])))
            return Checkpoint(int(arrays["blocks"]), statistics, files)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0]
        raise DatabaseInvalid(
            f"{path} is damaged ({reason}); delete the folder {folder} and run the same command again"
        ) from None
