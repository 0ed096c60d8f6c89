"""From accumulated statistics to a finished run folder: tables, checksums, `run.json`, and the lock."""

from __future__ import annotations

import platform
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from quambase.collector.checkpoint import CHECKPOINT
from quambase.collector.statistics import Encoding, SiteStatistics
from quambase.collector.table_rows import (
    PIECE_ROWS,
    Locate,
    channels_pieces,
    counts_pieces,
    groups_pieces,
    outliers_pieces,
    site_stats_pieces,
)
from quambase.schema.errors import DatabaseInvalid, RunBusy
from quambase.schema.files import locked, remove_strays, replacing
from quambase.schema.manifest import SHARDS, Manifest, TableFile
from quambase.schema.runs import list_runs, sound_manifests
from quambase.schema.sites import SiteKey
from quambase.schema.tables import (
    ACTIVATIONS,
    DOCUMENTS,
    RUN_TABLES,
    Piece,
    as_made,
    cast_to,
    encode_pieces,
    encoded_table,
    write_encoded,
    write_joined,
)

PARTS = "parts"
"""Folder, inside an unfinished run, of what each block adds to `documents` and `activations`."""

_ONE_DICTIONARY = pa.ipc.IpcWriteOptions(unify_dictionaries=True)
"""An Arrow file has one of each column."""

DOCUMENTS_PART, ACTIVATIONS_PART = "documents.arrow", "activations.parquet"

PART_FILES = (DOCUMENTS_PART, ACTIVATIONS_PART)
"""What a block leaves there: few rows of `documents`, in Arrow's own format, and its row group of `activations`."""


def part_folder(folder: Path, block: int) -> Path:
    """Placement block number ``block`` leaves its rows until the run is complete."""
    return folder / PARTS / f"block-{block:05d}"


UNSAVED = 1 << 28
"""Bytes of parts, about, that stay in memory until they have to be on the disk."""


def encoded_part(activations: pa.Table) -> memoryview:
    """The bytes of a part's file of its rows of `activations`."""
    return encoded_table("activations", activations if activations.num_rows else None, ACTIVATIONS)


def write_part(part: Path, documents: pa.Table, activations: memoryview) -> None:
    """Write one block's rows of `documents`, and its `encoded_part`, into its folder."""
    made = as_made(DOCUMENTS)
    with (
        replacing(part / DOCUMENTS_PART) as temporary,
        pa.ipc.new_file(str(temporary), made, options=_ONE_DICTIONARY) as file,
    ):
        file.write_table(cast_to(documents, made))
    with replacing(part / ACTIVATIONS_PART) as temporary:
        temporary.write_bytes(activations)


PIECE_BYTES = 1 << 22
"""Bytes of rows of `documents` that are joined, about."""


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """DatabaseInvalid if a part is gone, cut short, or an earlier version's."""
    try:
        yield
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else "is cut short or altered"
        raise DatabaseInvalid(
            f"{path} {what}, so this unfinished run cannot be completed; remove {path.parents[2]} and collect again"
        ) from None


class _Part:
    """A part: in memory, or on the disk, whence it is read."""

    def __init__(self, folder: Path, documents: pa.Table | None = None, activations: memoryview | None = None) -> None:
        self.folder, self._documents, self._activations = folder, documents, activations

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return sum(held.nbytes for held in (self._documents, self._activations) if held is not None)

    def save(self) -> None:
        """Write it to the disk, and keep it in memory no longer."""
        if self._documents is not None and self._activations is not None:
            write_part(self.folder, self._documents, self._activations)
        self._documents = self._activations = None

    def documents(self) -> pa.Table:
        """Its rows of `documents`."""
        if (documents := self._documents) is not None:
            return documents
        path = self.folder / DOCUMENTS_PART
        with _readable(path), pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all()

    def activations(self) -> memoryview:
        """The bytes of its file of `activations`."""
        if (activations := self._activations) is not None:
            return activations
        path = self.folder / ACTIVATIONS_PART
        with _readable(path), pa.memory_map(str(path)) as file:
            pq.read_metadata(file)  # so that it is a whole file
            file.seek(0)
            return memoryview(file.read_buffer())


class JoinedParts(AbstractContextManager["JoinedParts"]):
    """The tables `documents` and `activations` of a run, which are written while its blocks' parts come in.

    A part is of use to a run that was stopped if a checkpoint counts its block: until then, or until there are many,
    parts stay in memory.

    folder  the run's
    parts   the parts' folders in the order of blocks, the first ``there`` of which are complete
    pool    where pieces of tables are made and encoded
    `add` and `tables` raise DatabaseInvalid where a part on the disk is gone or damaged, and OSError.
    """

    def __init__(self, folder: Path, parts: Sequence[Path], there: int) -> None:
        self.pool = ThreadPoolExecutor(pa.cpu_count())
        self._parts = parts
        self._coming: list[Future[_Part]] = [Future() for _ in parts]
        for part, coming in zip(parts, self._coming[:there], strict=False):
            coming.set_result(_Part(part))
        self._unsaved: deque[_Part] = deque()
        self._lock = Lock()
        self._writers = ThreadPoolExecutor(2)
        self._tables = {
            "documents": self._writers.submit(
                lambda: _write(folder, "documents", _encode("documents", _gathered(self._documents()), self.pool))
            ),
            "activations": self._writers.submit(
                lambda: TableFile(*write_joined(folder / "activations.parquet", self._activations()))
            ),
        }

    def add(self, block: int, documents: pa.Table, activations: pa.Table) -> None:
        """Take the part of block number ``block``; raises what went wrong with the tables, too."""
        try:
            for table in self._tables.values():
                if table.done():
                    table.result()
            part = _Part(self._parts[block], cast_to(documents, as_made(DOCUMENTS)), encoded_part(activations))
            with self._lock:
                self._unsaved.append(part)
            self._save_all_but(UNSAVED)
        except BaseException as error:
            self._coming[block].set_exception(error)  # for who waits for the tables
            raise
        self._coming[block].set_result(part)

    def save(self) -> None:
        """Write the parts so far to the disk."""
        self._save_all_but(0)

    def tables(self) -> dict[str, TableFile]:
        """Rows and checksums by the tables' names; waits until all parts are in them."""
        return {name: table.result() for name, table in self._tables.items()}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of tables that wait for parts which will not come."""
        for part in self._coming:
            part.cancel()
        self._writers.shutdown(wait=True)
        self.pool.shutdown(wait=True)

    def _save_all_but(self, most: int) -> None:
        """The oldest first, until ``most`` bytes are left."""
        leaving: list[_Part] = []
        with self._lock:
            size = sum(part.size for part in self._unsaved)
            while self._unsaved and size > most:
                leaving.append(self._unsaved.popleft())
                size -= leaving[-1].size
        for part in leaving:
            part.save()

    def _documents(self) -> Iterator[pa.Table]:
        """The parts of `documents` in block order."""
        for coming in self._coming:
            yield coming.result().documents()

    def _activations(self) -> Iterator[memoryview]:
        """The parts of `activations` in block order."""
        for coming in self._coming:
            yield coming.result().activations()


def write_run(
    folder: Path,
    run: str,
    statistics: Mapping[SiteKey, SiteStatistics],
    encoding: Encoding,
    locate: Locate,
    parts: JoinedParts,
) -> dict[str, TableFile]:
    """Write every table of a run from its statistics, and wait for those that its blocks' parts make; rows and
    checksums by file name. Errors as `JoinedParts`.
    """
    layouts = {key: stats.layout for key, stats in statistics.items()}
    pool = parts.pool

    def put(name: str, pieces: Iterable[Piece]) -> list[Future[memoryview]]:
        return list(_encode(name, pieces, pool))

    # All that the pool has to do is known before its threads compete with this one; what takes longest comes first.
    encoded = {
        "channels": put("channels", channels_pieces(run, statistics)),
        "counts": put("counts", counts_pieces(run, statistics, encoding)),
    }
    site_stats = list(site_stats_pieces(run, statistics, encoding, pool))
    encoded["outliers"] = put("outliers", outliers_pieces(run, statistics, encoding, locate))
    encoded["groups"] = put("groups", groups_pieces(run, layouts))
    encoded["site_stats"] = put("site_stats", site_stats)
    with ThreadPoolExecutor(len(encoded)) as writers:
        coming = {name: writers.submit(_write, folder, name, files) for name, files in encoded.items()}
        written = {name: table.result() for name, table in coming.items()} | parts.tables()
    return {f"{name}.parquet": written[name] for name in RUN_TABLES}


def _encode(name: str, pieces: Iterable[Piece], pool: Executor) -> Iterator[Future[memoryview]]:
    return encode_pieces(name, pieces, RUN_TABLES[name], pool)


def _write(folder: Path, name: str, encoded: Iterable[Future[memoryview]]) -> TableFile:
    return TableFile(*write_encoded(folder / f"{name}.parquet", name, encoded, RUN_TABLES[name]))


def _gathered(tables: Iterator[pa.Table]) -> Iterator[Piece]:
    """Small tables joined to pieces of about PIECE_ROWS rows or PIECE_BYTES."""
    held: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        size += table.nbytes
        if rows >= PIECE_ROWS or size >= PIECE_BYTES:
            yield partial(_joined, held)
            held, rows, size = [], 0, 0
    if held:
        yield partial(_joined, held)


def _joined(held: Sequence[pa.Table]) -> pa.Table:
    return held[0] if len(held) == 1 else pa.concat_tables(held).combine_chunks()


def finish_run(folder: Path, manifest: Manifest) -> Manifest:
    """Write `run.json`, which makes the run complete and numbers it, and clear what only an unfinished run needs; the
    manifest as it was written.
    """
    before, _ = sound_manifests(list_runs(folder.parent.parent)[0])
    number = 1 + (before[0].age()[0] if before else 0)
    numbered = replace(manifest, created={"number": number, **manifest.created})
    numbered.save(folder)
    _clear(folder)
    return numbered


def clear_leftovers(folder: Path) -> None:
    """Clear what a process left in a complete run's folder that was killed right after it had written `run.json`.

    Nothing happens where there is nothing, while another process is at it, or where the folder cannot be written.
    """
    if any((folder / name).exists() for name in (PARTS, SHARDS, CHECKPOINT, ".lock")):
        with suppress(RunBusy, OSError), locked(folder):
            _clear(folder)


def _clear(folder: Path) -> None:
    for name in (PARTS, SHARDS):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    remove_strays(folder)


def versions() -> dict[str, Any]:
    """What a run was made with."""
    packages = ("quambase", "torch", "numpy", "pyarrow", "numba", "tokenizers")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "host": {"machine": platform.machine(), "system": platform.system(), "processor": platform.processor()},
    }
