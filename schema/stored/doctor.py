"""`doctor`: compares every file of a database with its checksum, and reports odd values and the versions it runs on."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pyarrow as pa

from quambase.schema.checksums import CHECKSUM, file_damage
from quambase.schema.errors import DatabaseInvalid, QuambaseError, first_line
from quambase.schema.json_files import as_type, read_json
from quambase.schema.scale_table import read_scales
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.int8_models import LAST, SCALES, check_files, last_applied, read_about
from quambase.schema.stored.manifest import MANIFEST, SHARDS, Manifest
from quambase.schema.stored.results import EVALUATION, read_results
from quambase.schema.stored.runs import list_runs
from quambase.schema.tables import RESULTS, read_table

PACKAGES = ("quambase", "torch", "numpy", "pyarrow", "duckdb", "numba", "tokenizers", "safetensors", "mamba-ssm")

BAD = "bad"
"""The status that makes the check fail."""

REPORT = pa.schema([(name, pa.string()) for name in ("check", "subject", "status", "detail")])


def examine(db: Path) -> pa.Table:
    """Rows of `REPORT`: versions; every file that is read again, compared with its checksum: of runs, also unfinished
    ones and their shards, of evaluations, scale tables and INT8 models; values that are not finite.

    ``status`` is ``ok``, ``note`` or ``bad``; ``detail`` says what to do. DatabaseInvalid when there is no database at
    ``db``.
    """
    rows = [_row("version", "python", "ok", sys.version.split()[0])]
    for package in PACKAGES:
        try:
            rows.append(_row("version", package, "ok", version(package)))
        except PackageNotFoundError:
            rows.append(_row("version", package, "note", "not installed"))
    complete, unfinished = list_runs(db)
    for folder in complete:
        rows += _run(db, folder)
    for folder in unfinished:
        rows += _unfinished(folder)
    if not complete:
        rows.append(_row("run", str(db), BAD, "no complete run; `collect` makes one"))
    known = {folder.name for folder in complete}
    return pa.Table.from_pylist([*rows, *_evaluations(db), *_scales(db, known), *_models(db)], schema=REPORT)


def _run(db: Path, folder: Path) -> Iterator[dict[str, str]]:
    try:
        manifest = Manifest.load(folder)
        manifest.verify(folder)
        size = sum((folder / name).stat().st_size for name in manifest.tables)
        own = "" if CHECKSUM.encode() in (folder / MANIFEST).read_bytes() else f", {MANIFEST} of a version without one"
        yield _row("run", folder.name, "ok", f"complete, checksums right{own}, {size / 1e6:.1f} MB")
        yield from _values(db, folder.name)
    except QuambaseError as error:
        yield _row("run", folder.name, BAD, str(error))


def _unfinished(folder: Path) -> Iterator[dict[str, str]]:
    """An unfinished run: what its last checkpoint has, and each of its shards."""
    shards = sorted((folder / SHARDS).glob("*-of-*"))
    names = ", ".join(path.name.replace("-of-", "/") for path in shards)
    begun = f", shards begun: {names}; `quambase merge` joins them" if shards else ""
    places = [(folder.name, folder)] if not shards else [(f"{folder.name} {path.name}", path) for path in shards]
    yield _row("run", folder.name, "note", f"unfinished{begun}; run the same collect command again to resume it")
    for name, place in places:
        if damage := _damage_of_unfinished(place):
            yield _row("part", name, BAD, f"{damage}; remove {place} and collect again")
        elif shards:
            state = "complete" if (place / "shard.json").exists() else "unfinished"
            yield _row("part", name, "ok", f"{state}, checksums right")


def _damage_of_unfinished(folder: Path) -> str | None:
    """What is wrong with the files that an unfinished run's folder, or a shard's, lists; None if nothing."""
    try:
        files: dict[str, str] = {}
        if (shard := folder / "shard.json").exists():
            found = read_json(shard, DatabaseInvalid, "collect the shard again")
            listed = {**as_type(found.get("files"), dict[str, str], shard, DatabaseInvalid, "collect the shard again")}
            files = listed | {name: entry["sha256"] for name, entry in found["manifest"]["tables"].items()}
        elif (checkpoint := folder / "checkpoint.npz").exists():
            with np.load(checkpoint, allow_pickle=False) as arrays:
                for name in arrays.files:  # NumPy compares the checksum of each
                    _ = arrays[name]
                files = {name: entry["sha256"] for name, entry in json.loads(str(arrays["files"])).items()}
        for name, sha256 in files.items():
            if damage := file_damage(folder / name, sha256):
                return f"{folder / name} {damage}"
    except DatabaseInvalid as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, RecursionError) as error:
        return f"its record of what is finished is damaged ({first_line(error)})"
    return None


def _evaluations(db: Path) -> Iterator[dict[str, str]]:
    for folder in sorted(path for path in (db / "results").glob("*") if path.is_dir()):
        if not (folder / EVALUATION).exists():
            yield _row("evaluation", folder.name, "note", _unfinished_evaluation(folder))
            continue
        try:
            rows = read_results(folder).num_rows
            yield _row("evaluation", folder.name, "ok", f"finished, checksums right, {rows} rows")
        except DatabaseInvalid as error:
            yield _row("evaluation", folder.name, BAD, str(error))


def _unfinished_evaluation(folder: Path) -> str:
    parts = sorted((folder / "parts").glob("*.parquet"))
    damaged = 0
    for part in parts:
        try:
            read_table(part, RESULTS, checked=True)
        except DatabaseInvalid:
            damaged += 1
    again = f", of which {damaged} are damaged and will be scored again" if damaged else ""
    return f"unfinished, {len(parts)} blocks done{again}; run the same command again to resume it"


def _scales(db: Path, runs: set[str]) -> Iterator[dict[str, str]]:
    """The scale tables that commands find by themselves: the database's and this folder's."""
    for path in dict.fromkeys((db / "scales.parquet", Path("scales.parquet"))):
        if not path.is_file():
            continue
        try:
            table = read_scales(path)
        except QuambaseError as error:
            yield _row("scales", str(path), BAD, str(error))
            continue
        strange = [run for run in table.runs() if run not in runs]
        what = f"checksum right, {table.table.num_rows} scales of run {', '.join(table.runs())}"
        if strange:
            yield _row("scales", str(path), "note", f"{what}, which {db} does not have")
        else:
            yield _row("scales", str(path), "ok", what)


def _models(db: Path) -> Iterator[dict[str, str]]:
    """The INT8 models in the database, and whether the one applied last is there."""
    for folder in sorted(path for path in (db / "models").glob("*") if path.is_dir() and not path.name.startswith(".")):
        try:
            about = read_about(folder)
            check_files(folder, about)
            if (folder / SCALES).exists():
                read_scales(folder / SCALES)
            yield _row("model", folder.name, "ok", f"checksums right, strategy {about['strategy']}")
        except QuambaseError as error:
            yield _row("model", folder.name, BAD, str(error))
    if (db / "models" / LAST).exists():
        try:
            last = last_applied(db)
            if not last.is_dir():
                yield _row("model", LAST, "note", f"the model applied last, {last}, is gone; run `apply` again")
        except QuambaseError as error:
            yield _row("model", LAST, BAD, str(error))


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
