"""The runs of a database folder, and those that ``--run`` names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from quambase.schema.errors import DatabaseInvalid, UnknownName
from quambase.schema.stored.manifest import MANIFEST, Manifest
from quambase.schema.tables import LATER_COLUMNS, RUN_TABLES, RUNS, read_table


def list_runs(path: Path) -> tuple[list[Path], list[Path]]:
    """The run folders of the database ``path``, complete ones and unfinished ones, by name.

    DatabaseInvalid when there is no such database.
    """
    if not (path / "runs").is_dir():
        raise DatabaseInvalid(
            f"there is no database at {path} (it has no folder runs); run `collect --model NAME --db {path}`"
        )
    folders = sorted(p for p in (path / "runs").iterdir() if p.is_dir() and not p.name.startswith("."))
    complete = [p for p in folders if (p / MANIFEST).exists()]
    return complete, [p for p in folders if p not in complete]


def sound_manifests(folders: Iterable[Path]) -> tuple[list[Manifest], list[str]]:
    """The manifests of complete run folders, newest first, and a line for each that is damaged."""
    found, damaged = [], []
    for folder in folders:
        try:
            found.append(Manifest.load(folder))
        except DatabaseInvalid as error:
            damaged.append(f"run {folder.name} is left out: {error}")
    return sorted(found, key=Manifest.age, reverse=True), damaged


def select_runs(path: Path, run: str | None) -> tuple[list[Manifest], list[str]]:
    """The manifests of the runs that ``run`` (None, an id or its beginning, ``"all"``) names; see `StatsDB`. Then
    lines for the user: which runs these are, and which damaged ones are left out.
    """
    complete, unfinished = list_runs(path)
    if run not in (None, "all"):
        chosen = [p for p in complete + unfinished if p.name.startswith(str(run))]
        exact = [p for p in chosen if p.name == run]
        if len(exact or chosen) > 1:
            raise UnknownName(f"'{run}' begins {len(chosen)} run ids: {_names(chosen)}; write more of it")
        if not chosen:
            raise UnknownName.of("run", str(run), [p.name for p in complete + unfinished])
        named = [Manifest.load(folder) for folder in exact or chosen]
        return named, [f"run {named[0].run}"]
    found, damaged = sound_manifests(complete)
    if not found:
        waiting = f" ({len(unfinished)} unfinished: {_names(unfinished)})" if unfinished else ""
        raise DatabaseInvalid(damaged[0] if damaged else f"{path} holds no complete run{waiting}; run `collect`")
    if run is not None:
        return found, [f"runs {', '.join(sorted(m.run for m in found))}", *damaged]
    others = f", the newest of {len(found)}; --run takes another" if len(found) > 1 else ""
    return found[:1], [f"run {found[0].run}{others}", *damaged]


def read_run_table(folder: Path, manifest: Manifest, name: str) -> pa.Table:
    """All rows of a run's table, in order; DatabaseInvalid: a file is missing, altered or of another table."""
    schema = RUN_TABLES[name]
    manifest.verify(folder, manifest.files_of(name))
    parts = [read_table(folder / file, schema, LATER_COLUMNS.get(name)) for file in manifest.files_of(name)]
    return pa.concat_tables(parts) if parts else schema.empty_table()


def overview(folders: Iterable[Path]) -> tuple[pa.Table, list[str]]:
    """A row of OVERVIEW for each complete run, newest first; then a line for each that is damaged."""
    found, damaged = sound_manifests(folders)
    places = {folder.name: folder for folder in folders}
    rows = [_row(m, places[m.run]) for m in found]
    return pa.Table.from_pylist(rows, schema=OVERVIEW), damaged


OVERVIEW = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("run", "model", "text")),
        *(pa.field(name, pa.int64()) for name in ("documents", "tokens")),
        pa.field("MB", pa.float64()),
        pa.field("begun", pa.string()),
    ]
)
"""The columns of `quambase runs`; ``begun`` is UTC."""


def describe_run(manifest: Manifest, folder: Path) -> pa.Table:
    """One row of OVERVIEW."""
    return pa.Table.from_pylist([_row(manifest, folder)], schema=OVERVIEW)


def _row(manifest: Manifest, folder: Path) -> dict[str, Any]:
    files = [folder / name for name in manifest.tables]
    return {
        "run": manifest.run,
        "model": manifest.model.name,
        "text": manifest.data.name,
        "documents": manifest.data.documents,
        "tokens": manifest.data.tokens,
        "MB": round(sum(path.stat().st_size for path in files if path.exists()) / 1e6, 1),
        "begun": str(manifest.created.get("started", "")).replace("T", " ").rstrip("Z"),
    }


def _names(folders: list[Path]) -> str:
    return ", ".join(p.name for p in folders)


def runs_table(manifests: list[Manifest]) -> pa.Table:
    """The view `runs` of ``manifests``."""

    def row(m: Manifest) -> dict[str, Any]:
        texts = {"identity": m.identity, "created": m.created}
        return {
            "run": m.run,
            "model": m.model.name,
            "model_path": m.model.path,
            "data": m.data.name,
            "format_version": m.format_version,
            "family": m.model.family,
            **{name: m.model.sizes.get(name) for name in ("n_layer", "d_model", "headdim", "ngroups")},
            "grouping": m.model.groups.variant if m.model.groups else None,
            **{name: getattr(m.data, name) for name in ("documents", "empty", "truncated", "tokens")},
            **{name: json.dumps(value, sort_keys=True, default=str) for name, value in texts.items()},
        }

    return pa.Table.from_pylist([row(m) for m in manifests], schema=RUNS)
