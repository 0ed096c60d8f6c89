"""A run folder: writes the files of its tables and `run.json`, and removes what only an unfinished run needs.

`documents`, `activations` and `block_counts` are written block by block, as folders with a file for each block that has
rows. `counts`, `sensitivities`, `second_moments` and `position_counts` are large and made at the end: folders of parts.
The other tables are a file each.
"""

from __future__ import annotations

import platform
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from types import MappingProxyType, TracebackType
from typing import Any

import pyarrow as pa

from quambase.collector.checkpoint import CHECKPOINT
from quambase.collector.second_moments import (
    MOMENTS,
    moment_parts_of,
    moment_widths,
    moments_file,
    stored_second_moments,
)
from quambase.collector.sensitivity import (
    SENSITIVITY,
    acting_sites,
    sensitivity_file,
    sensitivity_parts_of,
    stored_sensitivities,
)
from quambase.collector.statistics import Encoding, RunStatistics, SiteLayout
from quambase.collector.tables.table_rows import (
    Locate,
    channels_rows,
    counts_parts,
    groups_rows,
    outliers_rows,
    position_channels_rows,
    position_counts_parts,
    position_stats_maker,
    site_stats_maker,
)
from quambase.schema.checksums import file_damage, file_sha256
from quambase.schema.errors import DatabaseInvalid, RunBusy
from quambase.schema.files import locked, remove_lock, remove_strays
from quambase.schema.sites import SiteKey
from quambase.schema.stored.manifest import SHARDS, Manifest, TableFile, table_of
from quambase.schema.stored.runs import list_runs, sound_manifests
from quambase.schema.tables import RUN_TABLES, write_table

BLOCK_TABLES = ("documents", "activations", "block_counts")
"""The tables that are written block by block."""


def block_file(table: str, block: int) -> str:
    """The file of a block's rows, as a path in the run folder."""
    return f"{table}/block-{block:05d}.parquet"


def part_file(number: int, table: str = "counts") -> str:
    """The file of a part of a table that is written at the end, in the same way."""
    return f"{table}/part-{number:03d}.parquet"


def write_file(folder: Path, file: str, rows: pa.Table) -> TableFile:
    """Write rows of a table to one of its files; ``file`` is its path in the run folder. OSError."""
    table = table_of(file)
    write_table(folder / file, table, rows, RUN_TABLES[table])
    return TableFile(rows.num_rows, file_sha256(folder / file))


WRITERS = 4
"""Threads that write blocks' files: raw activations take longer to encode than a GPU takes for a block."""

UNWRITTEN_BYTES = 1 << 28
"""Largest number of bytes of rows that may be unwritten."""


class BlockFiles(AbstractContextManager["BlockFiles"]):
    """Writes the files of blocks, in threads, while later blocks are observed.

    folder  the run's
    there   the files of a checkpoint's blocks, which are verified: DatabaseInvalid
    """

    def __init__(self, folder: Path, there: Mapping[str, TableFile] | None = None) -> None:
        self._folder, self._files = folder, dict(there or {})
        for file, entry in self._files.items():
            if damage := file_damage(folder / file, entry.sha256):
                raise DatabaseInvalid(
                    f"{folder / file} {damage}, so this unfinished run cannot be completed; remove {folder} and "
                    "collect again"
                )
        self._pool = ThreadPoolExecutor(WRITERS)
        self._pending: deque[tuple[str, int, Future[TableFile]]] = deque()  # with the bytes of their rows
        self._lock = Lock()

    def add(self, block: int, documents: pa.Table, activations: pa.Table) -> None:
        """Write the rows of block number ``block``; waits while more than UNWRITTEN_BYTES are unwritten.

        OSError, perhaps of an earlier block.
        """
        self._add(block, {"documents": documents, "activations": activations})

    def add_counts(self, block: int, block_counts: pa.Table) -> None:
        """As `add`: the rows of the table `block_counts`."""
        self._add(block, {"block_counts": block_counts})

    def _add(self, block: int, tables: Mapping[str, pa.Table]) -> None:
        for table, rows in tables.items():
            if rows.num_rows:
                file = block_file(table, block)
                pending = self._pool.submit(write_file, self._folder, file, rows)
                with self._lock:
                    self._pending.append((file, rows.nbytes, pending))
        self._wait(UNWRITTEN_BYTES)

    def written(self) -> dict[str, TableFile]:
        """Wait for the files of every block so far; returns them and those of the checkpoint. OSError."""
        self._wait(-1)  # for all of them
        return dict(self._files)

    def _wait(self, most: int) -> None:
        """Wait for the oldest files until at most ``most`` bytes of rows are unwritten."""
        while True:
            with self._lock:
                if not self._pending or (
                    sum(size for _, size, _ in self._pending) <= most and not self._pending[0][2].done()
                ):
                    return
                file, _, pending = self._pending.popleft()
            entry = pending.result()
            with self._lock:
                self._files[file] = entry

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the files that are being written; cancel the others."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def write_statistics(
    folder: Path,
    run: str,
    statistics: RunStatistics,
    encoding: Encoding,
    locate: Locate,
    others: Mapping[str, Sequence[Callable[[], pa.Table]]] = MappingProxyType({}),
) -> dict[str, TableFile]:
    """Write the tables made of a run's statistics, which are on the host, in threads; returns their files. OSError.

    ``others``: further tables, and the functions that make the parts of each.
    """

    def write(file: str, make: Callable[[], pa.Table]) -> TableFile:
        return write_file(folder, file, make())

    with ThreadPoolExecutor(pa.cpu_count()) as pool:
        site_stats = site_stats_maker(run, statistics, encoding, pool)
        # The longest tasks first.
        made: dict[str, Callable[[], pa.Table]] = {
            "channels.parquet": partial(channels_rows, run, statistics),
            **{part_file(number): part for number, part in enumerate(counts_parts(run, statistics, encoding))},
            **{part_file(number, table): part for table, parts in others.items() for number, part in enumerate(parts)},
            **_position_tables(run, statistics, encoding, pool),
            "outliers.parquet": partial(outliers_rows, run, statistics, encoding, locate),
            "groups.parquet": partial(groups_rows, run, statistics.index),
            "site_stats.parquet": site_stats,
        }
        pending = {file: pool.submit(write, file, make) for file, make in made.items()}
        return {file: entry.result() for file, entry in pending.items()}


def tables_of_parts(
    run: str,
    identity: Mapping[str, Any],
    family: str,
    layouts: Mapping[SiteKey, SiteLayout],
    folder_of: Callable[[int], Path],
) -> dict[str, Sequence[Callable[[], pa.Table]]]:
    """The ``others`` of `write_statistics`: the tables of a few documents, from the files of their parts.

    ``folder_of``: the folder of the run or shard that has the file of a part. DataInvalid: a file is damaged.
    """
    sensitivity = [folder_of(part) / sensitivity_file(part) for part in range(sensitivity_parts_of(identity))]
    moments = [folder_of(part) / moments_file(part) for part in range(moment_parts_of(identity))]
    return {
        "sensitivities": stored_sensitivities(run, acting_sites(layouts, family), sensitivity),
        "second_moments": stored_second_moments(run, moment_widths(layouts), moments),
    }


def _position_tables(
    run: str, statistics: RunStatistics, encoding: Encoding, pool: ThreadPoolExecutor
) -> dict[str, Callable[[], pa.Table]]:
    """The functions that make the files of the tables by position."""
    parts = position_counts_parts(run, statistics, encoding)
    return {
        **{part_file(number, "position_counts"): part for number, part in enumerate(parts)},
        "position_channels.parquet": partial(position_channels_rows, run, statistics),
        "position_stats.parquet": position_stats_maker(run, statistics, encoding, pool),
    }


def every_table(folder: Path, files: Mapping[str, TableFile]) -> dict[str, TableFile]:
    """The files of a whole run in order. A table without files gets one without rows, so that its columns exist.
    OSError.
    """
    found = dict(files)
    parts = ("counts", "sensitivities", "second_moments", "position_counts")
    for file in (*(part_file(0, table) for table in parts), *(block_file(table, 0) for table in BLOCK_TABLES)):
        if table_of(file) not in map(table_of, files):
            found[file] = write_file(folder, file, RUN_TABLES[table_of(file)].empty_table())
    return in_order(found)


def in_order(files: Mapping[str, TableFile]) -> dict[str, TableFile]:
    """Files of a run by table, each table's in the order of its rows."""
    tables = list(RUN_TABLES)
    # The length sorts numbers with more digits last.
    return dict(sorted(files.items(), key=lambda item: (tables.index(table_of(item[0])), len(item[0]), item[0])))


def finish_run(folder: Path, manifest: Manifest) -> Manifest:
    """Number the run, write `run.json`, which completes it, and remove what only an unfinished run needs. Returns the
    manifest as written. DatabaseInvalid: a file of it was removed meanwhile.
    """
    if missing := [file for file in manifest.tables if not (folder / file).exists()]:
        raise DatabaseInvalid(
            f"{folder / missing[0]} was removed while the run was written; run the same command again, and leave the "
            "database alone meanwhile"
        )
    # Readers of a table's whole folder must not find files that a killed process of another version left.
    for path in folder.glob("*/*.parquet"):
        if path.relative_to(folder).as_posix() not in manifest.tables:
            path.unlink()
    with locked(folder.parent, wait=True):  # one process at a time, so that no two runs have the same number
        before, _ = sound_manifests(list_runs(folder.parent.parent)[0])
        number = 1 + (before[0].age()[0] if before else 0)
        numbered = replace(manifest, created={"number": number, **manifest.created})
        numbered.save(folder)
    _clear(folder)
    return numbered


def clear_leftovers(folder: Path) -> None:
    """Remove what a process left in a complete run's folder if it was killed right after writing `run.json`.

    Does nothing if there is nothing, if another process holds the lock, or if the folder cannot be written.
    """
    remove_lock(folder.parent)
    if any((folder / name).exists() for name in (SHARDS, SENSITIVITY, MOMENTS, CHECKPOINT, ".lock")):
        with suppress(RunBusy, OSError), locked(folder):
            _clear(folder)


def clear_shard(folder: Path) -> None:
    """`clear_leftovers` of a complete shard's folder, which keeps all but locks and temporary files."""
    if (folder / ".lock").exists() or any(folder.rglob(".*.tmp")):
        with suppress(RunBusy, OSError), locked(folder):
            _remove_strays(folder)


def _clear(folder: Path) -> None:
    for inner in (SHARDS, SENSITIVITY, MOMENTS):
        shutil.rmtree(folder / inner, ignore_errors=True)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    _remove_strays(folder)


def _remove_strays(folder: Path) -> None:
    for place in (folder, *(folder / table for table in RUN_TABLES)):
        remove_strays(place)


def versions() -> dict[str, Any]:
    """The software and the machine that made a run."""
    packages = ("quambase", "torch", "numpy", "pyarrow", "numba", "tokenizers")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "host": {"machine": platform.machine(), "system": platform.system(), "processor": platform.processor()},
    }
