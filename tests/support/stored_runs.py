"""Tables of a run folder as anybody reads them: without its manifest, by the names of the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from quambase.schema.checksums import file_sha256
from quambase.schema.stored.manifest import Manifest, TableFile
from quambase.schema.tables import RUN_TABLES, write_table


def table_files(folder: Path, name: str) -> list[Path]:
    """The files of a table, in the order of its rows."""
    single = folder / f"{name}.parquet"
    return [single] if single.exists() else sorted((folder / name).glob("*.parquet"))


def stored_table(folder: Path, name: str) -> pa.Table:
    """All rows of a table."""
    return pa.concat_tables([pq.read_table(path, partitioning=None) for path in table_files(folder, name)])


def bytes_of(folder: Path) -> dict[str, str]:
    """Every file of the run's tables, as a path in its folder, and the SHA-256 of its bytes."""
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in folder.rglob("*.parquet")}


def write_as_version_1(folder: Path, to: Path) -> Path:
    """Write the run in ``folder`` once more in format version 1, in which each table is one file; its folder."""
    tables = {}
    for name, schema in RUN_TABLES.items():
        table, path = stored_table(folder, name), to / folder.name / f"{name}.parquet"
        write_table(path, name, table, schema)
        tables[path.name] = TableFile(table.num_rows, file_sha256(path))
    replace(Manifest.load(folder), tables=tables, format_version=1).save(to / folder.name)
    return to / folder.name
