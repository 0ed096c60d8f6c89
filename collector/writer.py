"""From accumulated statistics to a finished run folder: tables, checksums, `run.json`, and the lock."""

from __future__ import annotations

import fcntl
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from quambase.collector.rows import (
    Key,
    Locate,
    PatternOrder,
    channels_rows,
    counts_rows,
    groups_rows,
    outliers_rows,
    site_stats_rows,
)
from quambase.collector.statistics import Encoding, SiteStatistics
from quambase.schema.errors import RunBusy
from quambase.schema.manifest import Manifest, TableFile
from quambase.schema.tables import ACTIVATIONS, DOCUMENTS, RUN_TABLES, file_sha256, write_table

PARTS = "parts"
"""Folder, inside an unfinished run, of what each block adds to `documents` and `activations`."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; RunBusy if another holds it. The lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunBusy(
                f"another process is writing run {folder.name}; wait for it, or stop it and run the same command again"
            ) from None
        yield
        path.unlink(missing_ok=True)


def part_folder(folder: Path, block: int) -> Path:
    """Where block number ``block`` leaves its rows until the run is complete."""
    return folder / PARTS / f"block-{block:05d}"


def write_part(folder: Path, block: int, documents: pa.Table, activations: pa.Table) -> None:
    """Write one block's rows of `documents` and `activations`."""
    part = part_folder(folder, block)
    write_table(part / "documents.parquet", "documents", documents, DOCUMENTS)
    write_table(part / "activations.parquet", "activations", activations, ACTIVATIONS)


def _part_rows(folder: Path, blocks: int, name: str) -> Iterator[pa.Table]:
    """The parts of one table in block order, a row group at a time."""
    for block in range(blocks):
        with pq.ParquetFile(part_folder(folder, block) / f"{name}.parquet") as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group)


def write_run(
    folder: Path,
    run: str,
    statistics: Mapping[Key, SiteStatistics],
    encoding: Encoding,
    locate: Locate,
    blocks: int,
) -> dict[str, TableFile]:
    """Write every table of a run from its statistics and its ``blocks`` parts; rows and checksums by file name."""
    order = PatternOrder(encoding)
    tables: dict[str, Iterator[pa.Table]] = {
        "counts": counts_rows(run, statistics, order),
        "site_stats": site_stats_rows(run, statistics, order),
        "channels": channels_rows(run, statistics),
        "documents": _part_rows(folder, blocks, "documents"),
        "outliers": outliers_rows(run, statistics, encoding, locate),
        "activations": _part_rows(folder, blocks, "activations"),
        "groups": groups_rows(run, {key: stats.layout for key, stats in statistics.items()}),
    }
    written = {}
    for name, schema in RUN_TABLES.items():
        path = folder / f"{name}.parquet"
        rows = write_table(path, name, _gathered(tables[name]), schema)
        written[path.name] = TableFile(rows, file_sha256(path))
    return written


def _gathered(pieces: Iterator[pa.Table], rows: int = 1 << 18) -> Iterator[pa.Table]:
    """Small tables joined to pieces of about ``rows`` rows, so that row groups are of a useful size."""
    held: list[pa.Table] = []
    for piece in pieces:
        held.append(piece)
        if sum(table.num_rows for table in held) >= rows:
            yield pa.concat_tables(held).combine_chunks()
            held = []
    if held:
        yield pa.concat_tables(held).combine_chunks()


def finish_run(folder: Path, manifest: Manifest) -> None:
    """Write `run.json`, which makes the run complete, and clear what only an unfinished run needs."""
    manifest.save(folder)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    for leftover in (*folder.glob("checkpoint.npz"), *folder.glob(".*.tmp")):
        leftover.unlink(missing_ok=True)


def versions() -> dict[str, Any]:
    """What a run was made with."""
    packages = ("quambase", "torch", "numpy", "pyarrow", "numba", "tokenizers")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "host": {"machine": platform.machine(), "system": platform.system(), "processor": platform.processor()},
    }
