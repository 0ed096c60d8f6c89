"""A run's statistics up to some block in one file, replaced atomically: what a killed run resumes from."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

from quambase.collector.statistics import Moments, SiteLayout, SiteStatistics
from quambase.schema.errors import DatabaseInvalid
from quambase.schema.files import replacing
from quambase.schema.sites import SiteKey

CHECKPOINT = "checkpoint.npz"


def save_checkpoint(folder: Path, blocks: int, statistics: Mapping[SiteKey, SiteStatistics]) -> None:
    """Write the statistics of the first ``blocks`` blocks. Counts are stored sparsely, sites in sorted order."""
    arrays: dict[str, np.ndarray] = {"blocks": np.array(blocks)}
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


def load_checkpoint(
    folder: Path, layouts: Mapping[SiteKey, SiteLayout], most: int
) -> tuple[int, dict[SiteKey, SiteStatistics]]:
    """The number of blocks done and their statistics; nothing done where there is no checkpoint.

    DatabaseInvalid if the file is damaged.
    """
    statistics = {key: SiteStatistics.empty(layout, most) for key, layout in layouts.items()}
    path = folder / CHECKPOINT
    if not path.exists():
        return 0, statistics
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for number, key in enumerate(sorted(statistics)):
                stats = statistics[key]
                stats.counts.ravel()[arrays[f"{number}.present"]] = arrays[f"{number}.counts"]
                for field in fields(Moments):
                    setattr(stats.moments, field.name, arrays[f"{number}.{field.name}"])
                stats.top = [arrays[f"{number}.top{g}"] for g in range(len(stats.layout.names))]
            return int(arrays["blocks"]), statistics
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0]
        raise DatabaseInvalid(
            f"{path} is damaged ({reason}); delete the folder {folder} and run the same command again"
        ) from None
