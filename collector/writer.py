"""From accumulated statistics to a finished run folder: tables, checksums, `run.json`, and the lock."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from quambase.collector.rows import (
    PIECE_ROWS,
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
from quambase.schema.errors import DatabaseInvalid, RunBusy
from quambase.schema.manifest import SHARDS, Manifest, TableFile
from quambase.schema.tables import RUN_TABLES, as_made, cast_to, file_sha256, replacing, write_table

PARTS = "parts"
"""Folder, inside an unfinished run, of what each block adds to `documents` and `activations`."""

_ONE_DICTIONARY = pa.ipc.IpcWriteOptions(unify_dictionaries=True)
"""An Arrow file has one of each column."""

PART_FILES = {f"{name}.arrow": RUN_TABLES[name] for name in ("documents", "activations")}
"""What a block leaves there: Arrow's own format, which takes a fraction of Parquet's time to write."""


@contextmanager
def locked(folder: Path, what: str | None = None) -> Iterator[None]:
    """Hold the run folder for this process; RunBusy if another holds it. The lock goes with the process.

    ``what``: the folder's name in that message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunBusy(
                    f"another process is writing {what or f'run {folder.name}'}; wait for it, or stop it and run the "
                    "same command again"
                ) from None
            # The process that held it before may have removed the file between our opening and our locking it.
            if not _lies_at(file.fileno(), path):
                continue
            yield
            path.unlink(missing_ok=True)
            return


def _lies_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def part_folder(folder: Path, block: int) -> Path:
    """Where block number ``block`` leaves its rows until the run is complete."""
    return folder / PARTS / f"block-{block:05d}"


def write_part(folder: Path, block: int, documents: pa.Table, activations: pa.Table) -> None:
    """Write one block's rows of `documents` and `activations`."""
    part = part_folder(folder, block)
    for (name, schema), table in zip(PART_FILES.items(), (documents, activations), strict=True):
        made = as_made(schema)
        with (
            replacing(part / name) as temporary,
            pa.ipc.new_file(str(temporary), made, options=_ONE_DICTIONARY) as file,
        ):
            file.write_table(cast_to(table, made))


PART_ROWS = 1 << 20
"""Rows of a part that are read at once; the row groups of the tables follow from it."""

PIECE_BYTES = 1 << 22
"""Bytes of rows that are joined, about: a part of `activations` is written from the file as it is, since memory that a
process has not had yet takes longer to get than the rows to write.
"""


def _part_rows(parts: Sequence[Path], name: str) -> Iterator[pa.Table]:
    """The parts of one table in block order, some rows at a time."""
    for part in parts:
        table = cast_to(_read_part(part / f"{name}.arrow"), as_made(RUN_TABLES[name]))
        for start in range(0, table.num_rows, PART_ROWS):
            yield table.slice(start, PART_ROWS)


def _read_part(path: Path) -> pa.Table:
    """Map a part in memory; DatabaseInvalid if it is gone, cut short, or an earlier version's Parquet."""
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all()
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else "is cut short or altered"
        raise DatabaseInvalid(
            f"{path} {what}, so this unfinished run cannot be completed; remove {path.parents[2]} and collect again"
        ) from None


def write_run(
    folder: Path,
    run: str,
    statistics: Mapping[Key, SiteStatistics],
    encoding: Encoding,
    locate: Locate,
    parts: Sequence[Path],
) -> dict[str, TableFile]:
    """Write every table of a run from its statistics and its blocks' part folders, in order; rows and checksums by
    file name.
    """
    order = PatternOrder(encoding)
    tables: dict[str, Iterator[pa.Table]] = {
        "counts": counts_rows(run, statistics, order),
        "site_stats": site_stats_rows(run, statistics, order),
        "channels": channels_rows(run, statistics),
        "documents": _part_rows(parts, "documents"),
        "outliers": outliers_rows(run, statistics, encoding, locate),
        "activations": _part_rows(parts, "activations"),
        "groups": groups_rows(run, {key: stats.layout for key, stats in statistics.items()}),
    }

    def write(name: str) -> TableFile:
        path = folder / f"{name}.parquet"
        rows = write_table(path, name, _ahead(_gathered(tables[name])), RUN_TABLES[name])
        return TableFile(rows, file_sha256(path))

    with ThreadPoolExecutor(len(tables)) as pool:
        return {f"{name}.parquet": table for name, table in zip(RUN_TABLES, pool.map(write, RUN_TABLES), strict=True)}


def _ahead(pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same pieces, each made while the one before is being written."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = pool.submit(next, pieces, None)
            yield piece


def _gathered(pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Small tables joined to pieces of about PIECE_ROWS rows or PIECE_BYTES."""
    held: list[pa.Table] = []
    rows = size = 0
    for piece in pieces:
        held.append(piece)
        rows += piece.num_rows
        size += piece.nbytes
        if rows >= PIECE_ROWS or size >= PIECE_BYTES:
            yield _joined(held)
            held, rows, size = [], 0, 0
    if held:
        yield _joined(held)


def _joined(held: Sequence[pa.Table]) -> pa.Table:
    return held[0] if len(held) == 1 else pa.concat_tables(held).combine_chunks()


def finish_run(folder: Path, manifest: Manifest) -> None:
    """Write `run.json`, which makes the run complete, and clear what only an unfinished run needs."""
    manifest.save(folder)
    for name in (PARTS, SHARDS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for leftover in (*folder.glob("checkpoint.npz"), *folder.glob(".*.tmp")):
        leftover.unlink(missing_ok=True)


def versions() -> dict[str, Any]:
    """What a run was made with."""
    packages = ("quambase", "torch", "numpy", "pyarrow", "numba", "tokenizers")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "host": {"machine": platform.machine(), "system": platform.system(), "processor": platform.processor()},
    }
