"""`doctor`: checks every file and value of a database, and reports the versions it runs on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pyarrow as pa

from quambase.schema.errors import DatabaseInvalid, QuambaseError
from quambase.schema.manifest import SHARDS, Manifest
from quambase.schema.results import EVALUATION, read_results
from quambase.schema.runs import list_runs
from quambase.schema.sql.database import StatsDB

PACKAGES = ("quambase", "torch", "numpy", "pyarrow", "duckdb", "numba", "tokenizers", "safetensors", "mamba-ssm")

BAD = "bad"
"""The status that makes the check fail."""

REPORT = pa.schema([(name, pa.string()) for name in ("check", "subject", "status", "detail")])


def examine(db: Path) -> pa.Table:
    """Rows of `REPORT`: versions, every run's completeness and checksums (all files), values that are not finite, every
    evaluation's completeness and checksum.

    ``status`` is ``ok``, ``note`` or ``bad``. DatabaseInvalid when there is no database at ``db``.
    """
    rows = [_row("version", "python", "ok", sys.version.split()[0])]
    for package in PACKAGES:
        try:
            rows.append(_row("version", package, "ok", version(package)))
        except PackageNotFoundError:
            rows.append(_row("version", package, "note", "not installed"))
    complete, unfinished = list_runs(db)
    for folder in complete:
        try:
            manifest = Manifest.load(folder)
            manifest.verify(folder)
            size = sum((folder / name).stat().st_size for name in manifest.tables)
            rows.append(_row("run", folder.name, "ok", f"complete, checksums right, {size / 1e6:.1f} MB"))
            rows += _values(db, folder.name)
        except QuambaseError as error:
            rows.append(_row("run", folder.name, BAD, str(error)))
    for folder in unfinished:
        shards = sorted(path.name.replace("-of-", "/") for path in (folder / SHARDS).glob("*-of-*"))
        begun = f", shards begun: {', '.join(shards)}; `quambase merge` joins them" if shards else ""
        rows.append(
            _row("run", folder.name, "note", f"unfinished{begun}; run the same collect command again to resume it")
        )
    if not complete:
        rows.append(_row("run", str(db), BAD, "no complete run"))
    rows += _evaluations(db)
    return pa.Table.from_pylist(rows, schema=REPORT)


def _evaluations(db: Path) -> Iterator[dict[str, str]]:
    for folder in sorted(path for path in (db / "results").glob("*") if path.is_dir()):
        if not (folder / EVALUATION).exists():
            yield _row("evaluation", folder.name, "note", "unfinished; run the same command again to resume it")
            continue
        try:
            rows = read_results(folder).num_rows
            yield _row("evaluation", folder.name, "ok", f"finished, checksum right, {rows} rows")
        except DatabaseInvalid as error:
            yield _row("evaluation", folder.name, BAD, str(error))


def _values(db: Path, run: str) -> list[dict[str, str]]:
    with StatsDB(db, run) as database:
        rows = database.query("nonfinite_values", {"run": run}).to_pylist()
    if not rows:
        return [_row("values", run, "ok", "every value is finite")]
    return [
        _row(
            "values",
            f"{run} layer {row['layer']} {row['site']}",
            BAD,
            f"{row['nonfinite']} NaN or infinite, {row['overflow']} of them finite before rounding to 16 bits",
        )
        for row in rows
    ]


def _row(check: str, subject: str, status: str, detail: str) -> dict[str, str]:
    return {"check": check, "subject": subject, "status": status, "detail": detail}
