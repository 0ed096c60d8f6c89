"""Which runs a database folder holds, and which of them a command means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from quambase.schema.errors import DatabaseInvalid, UnknownName
from quambase.schema.manifest import MANIFEST, Manifest

RUNS = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("run", "model", "family", "model_path")),
        *(pa.field(name, pa.int64()) for name in ("n_layer", "d_model", "headdim", "ngroups")),
        pa.field("grouping", pa.string()),
        pa.field("data", pa.string()),
        *(pa.field(n, pa.int64()) for n in ("documents", "empty", "truncated", "tokens", "format_version")),
        *(pa.field(name, pa.string()) for name in ("identity", "created")),
    ]
)
"""The view `runs`: one row per manifest."""


def list_runs(path: Path) -> tuple[list[Path], list[Path]]:
    """The run folders of the database ``path``: complete ones, newest first, and unfinished ones by name.

    DatabaseInvalid when there is no such database.
    """
    if not (path / "runs").is_dir():
        raise DatabaseInvalid(
            f"there is no database at {path} (it has no folder runs); run `collect --model NAME --db {path}`"
        )
    folders = sorted(p for p in (path / "runs").iterdir() if p.is_dir() and not p.name.startswith("."))
    complete = [p for p in folders if (p / MANIFEST).exists()]
    unfinished = [p for p in folders if not (p / MANIFEST).exists()]
    # run.json is written last, so its time is the run's end; equal times fall back on the id.
    complete.sort(key=lambda p: ((p / MANIFEST).stat().st_mtime_ns, p.name), reverse=True)
    return complete, unfinished


def select_runs(path: Path, run: str | None) -> list[Path]:
    """The run folders that ``run`` (None, an id or its beginning, ``"all"``) stands for; see `StatsDB`."""
    complete, unfinished = list_runs(path)
    if run not in (None, "all"):
        chosen = [p for p in complete + unfinished if p.name.startswith(str(run))]
        exact = [p for p in chosen if p.name == run]
        if len(exact or chosen) > 1:
            raise UnknownName(f"'{run}' begins {len(chosen)} run ids: {_names(chosen)}; write more of it")
        if not chosen:
            raise UnknownName.of("run", str(run), [p.name for p in complete + unfinished])
        return exact or chosen
    if not complete:
        waiting = f" ({len(unfinished)} unfinished: {_names(unfinished)})" if unfinished else ""
        raise DatabaseInvalid(f"{path} holds no complete run{waiting}; run `collect` (again) to make one")
    return complete[:1] if run is None else complete


def _names(folders: list[Path]) -> str:
    return ", ".join(p.name for p in folders)


def runs_table(manifests: list[Manifest]) -> pa.Table:
    """The view `runs` of ``manifests``."""

    def row(m: Manifest) -> dict[str, Any]:
        texts = {"identity": m.identity, "created": m.created}
        return {
            "run": m.run,
            "model": m.model.get("name"),
            "model_path": None if m.model.get("path") is None else str(m.model["path"]),
            "data": m.data.get("name"),
            "format_version": m.format_version,
            **{name: m.model.get(name) for name in ("family", "n_layer", "d_model", "headdim", "ngroups")},
            "grouping": (m.model.get("groups") or {}).get("variant"),
            **{name: m.data.get(name) for name in ("documents", "empty", "truncated", "tokens")},
            **{name: json.dumps(value, sort_keys=True, default=str) for name, value in texts.items()},
        }

    return pa.Table.from_pylist([row(m) for m in manifests], schema=RUNS)
