"""`run.json`: what a run is, written last and atomically, so a folder without it is an unfinished run."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from quambase.schema import FORMAT_VERSION
from quambase.schema.errors import DatabaseInvalid
from quambase.schema.files import file_sha256, replacing

MANIFEST = "run.json"

SHARDS = "shards"
"""Folder, inside an unfinished run, of a folder for each shard of it: ``0-of-4``."""


@dataclass(frozen=True)
class TableFile:
    """One Parquet file of a run: its rows and the SHA-256 of its bytes."""

    rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything `run.json` says.

    run        the run id: a hash of ``identity``
    identity   what determines the bytes of the tables: model weights and tokenizer hashes, documents,
               sites, grouping, activation dtype, samples, sequence length, block size, device type,
               torch version, format version
    model      name, path, family ("mamba1", "mamba2", or "tensor" for an import), n_layer, d_model, d_inner, d_state,
               vocab_size; of Mamba-1 dt_rank, of Mamba-2 headdim and ngroups; of a reordered Mamba-2 groups: variant,
               where its statistics are from, and layers, a `quambase.schema.groups.LayerGroups` each
    data       name, path (null for a known name), documents, empty, truncated, tokens
    tables     file name to rows and checksum
    sites      the (layer, site) pairs observed
    created    number (1 for the first run that the database completed, then 2, ...), versions, host, timings: what may
               differ between two equal runs
    """

    run: str
    identity: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    tables: dict[str, TableFile]
    sites: list[tuple[int, str]]
    created: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def age(self) -> tuple[int, str, str]:
        """What orders a database's runs, oldest first: the number it gave the run when the run was complete; among
        equal numbers (runs copied together) when the run began, then its id. Never the time of a file.
        """
        number = self.created.get("number")
        return number if isinstance(number, int) else 0, str(self.created.get("started", "")), self.run

    def save(self, folder: Path) -> None:
        """Write ``folder/run.json`` atomically."""
        with replacing(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read ``folder/run.json``. DatabaseInvalid: missing (unfinished run), not JSON, or a newer format."""
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DatabaseInvalid(
                f"run {folder.name} is unfinished (no {MANIFEST}); run the same collect command again to resume it"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DatabaseInvalid(f"{path} is not valid JSON ({error}); restore it or collect again") from None
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise DatabaseInvalid(
                f"{path} has format version {version}; this quambase reads up to {FORMAT_VERSION}: upgrade quambase"
            )
        missing = {f.name for f in fields(cls)} - raw.keys()
        if missing:
            raise DatabaseInvalid(f"{path} lacks {', '.join(sorted(missing))}; restore it or collect again")
        try:
            found = cls(
                run=_typed(raw, "run", str),
                **{key: _typed(raw, key, dict) for key in ("identity", "model", "data", "created")},
                tables={
                    str(name): TableFile(_typed(entry, "rows", int), _typed(entry, "sha256", str))
                    for name, entry in _typed(raw, "tables", dict).items()
                },
                sites=[(int(layer), str(site)) for layer, site in _typed(raw, "sites", list)],
                format_version=version,
            )
        except (ValueError, TypeError) as error:
            raise DatabaseInvalid(f"{path} is damaged ({error}); restore it or collect again") from None
        # Names of files are made of it: another run's would be read in its place.
        if found.run != folder.name:
            raise DatabaseInvalid(f"{path} tells of run {found.run}, not of {folder.name}; rename or restore it")
        return found

    def verify(self, folder: Path, names: Collection[str] | None = None) -> None:
        """Check the checksums of the table files ``names`` (None: all).

        DatabaseInvalid names the first that is missing, was cut short or altered.
        """
        for name, entry in self.tables.items():
            if names is not None and name not in names:
                continue
            path = folder / name
            if not path.exists():
                raise DatabaseInvalid(f"{path} is missing; restore it or collect again")
            if file_sha256(path) != entry.sha256:
                raise DatabaseInvalid(
                    f"{path} was altered or cut short since it was written (its checksum differs); "
                    "restore it or delete the run folder and collect again"
                )


def _typed(raw: Any, key: str, kind: type) -> Any:
    """``raw[key]``; ValueError unless ``raw`` is a dict that has it and it is a ``kind``."""
    if not isinstance(raw, dict) or not isinstance(raw.get(key), kind):
        raise ValueError(f"its {key} is no {kind.__name__}")
    return raw[key]
