"""`run.json`: what a run is, written last and atomically, so a folder without it is an unfinished run."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from quambase.schema import RUN_FORMAT_VERSION
from quambase.schema.errors import DatabaseInvalid
from quambase.schema.files import check_format_version, file_damage, replacing
from quambase.schema.model_info import ModelInfo, TextInfo

MANIFEST = "run.json"

SHARDS = "shards"
"""Folder, inside an unfinished run, of a folder for each shard of it: ``0-of-4``."""


@dataclass(frozen=True)
class TableFile:
    """One Parquet file of a run: its rows and the SHA-256 of its bytes."""

    rows: int
    sha256: str


def table_of(file: str) -> str:
    """The table to which a file of a run belongs, by its path in the run folder: ``counts`` of
    ``counts/part-000.parquet`` and of ``counts.parquet``.
    """
    return PurePosixPath(file).parts[0].removesuffix(".parquet")


_FILE = re.compile(r"\w+(/[\w-]+)?\.parquet")


def table_files(raw: dict[str, Any]) -> dict[str, TableFile]:
    """What a manifest's JSON says of its tables. ValueError: an entry of another form, a path out of the run folder."""
    if strange := [name for name in raw if not _FILE.fullmatch(name)]:
        raise ValueError(f"{strange[0]} is no file of a table")
    return {name: TableFile(_typed(entry, "rows", int), _typed(entry, "sha256", str)) for name, entry in raw.items()}


@dataclass(frozen=True)
class Manifest:
    """Everything `run.json` says.

    run        the run id: a hash of ``identity``
    identity   what determines the bytes of the tables: model weights and tokenizer hashes, documents,
               sites, grouping, activation dtype, samples, sequence length, block size, device type,
               torch version, format version
    model      name, family, sizes, order of heads and channels
    data       the text: name, documents, tokens
    tables     file, as a path in the run folder, to rows and checksum; each table's files in the order of its rows
    sites      the (layer, site) pairs observed
    created    number (1 for the first run that the database completed, then 2, ...), versions, host, timings: what may
               differ between two equal runs
    """

    run: str
    identity: dict[str, Any]
    model: ModelInfo
    data: TextInfo
    tables: dict[str, TableFile]
    sites: list[tuple[int, str]]
    created: dict[str, Any] = field(default_factory=dict)
    format_version: int = RUN_FORMAT_VERSION

    def age(self) -> tuple[int, str, str]:
        """What orders a database's runs, oldest first: the number it gave the run when the run was complete; among
        equal numbers (runs copied together) when the run began, then its id. Never the time of a file.
        """
        number = self.created.get("number")
        return number if isinstance(number, int) else 0, str(self.created.get("started", "")), self.run

    def files_of(self, table: str) -> list[str]:
        """The files of a table, in the order of its rows; none if the run has no such table."""
        return [file for file in self.tables if table_of(file) == table]

    def save(self, folder: Path) -> None:
        """Write ``folder/run.json`` atomically."""
        with replacing(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """As `run.json` stores it."""
        typed = {"model": self.model.to_json(), "data": self.data.to_json()}
        plain = {"tables": {file: asdict(entry) for file, entry in self.tables.items()}}
        return {f.name: getattr(self, f.name) for f in fields(self)} | typed | plain

    @classmethod
    def from_json(cls, raw: dict[str, Any], version: int) -> Manifest:
        """What `to_json` gave. ValueError, TypeError or KeyError: something is missing or of another type."""
        return cls(
            run=_typed(raw, "run", str),
            identity=_typed(raw, "identity", dict),
            model=ModelInfo.from_json(_typed(raw, "model", dict)),
            data=TextInfo.from_json(_typed(raw, "data", dict)),
            tables=table_files(_typed(raw, "tables", dict)),
            sites=[(int(layer), str(site)) for layer, site in _typed(raw, "sites", list)],
            created=_typed(raw, "created", dict),
            format_version=version,
        )

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
        found_version = raw.get("format_version") if isinstance(raw, dict) else None
        version = check_format_version(path, found_version, RUN_FORMAT_VERSION)
        missing = {f.name for f in fields(cls)} - raw.keys()
        if missing:
            raise DatabaseInvalid(f"{path} lacks {', '.join(sorted(missing))}; restore it or collect again")
        try:
            found = cls.from_json(raw, version)
        except (ValueError, TypeError, KeyError) as error:
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
            if damage := file_damage(folder / name, entry.sha256):
                raise DatabaseInvalid(
                    f"{folder / name} {damage}; restore it or delete the run folder and collect again"
                )


def _typed(raw: Any, key: str, kind: type) -> Any:
    """``raw[key]``; ValueError unless ``raw`` is a dict that has it and it is a ``kind``."""
    if not isinstance(raw, dict) or not isinstance(raw.get(key), kind):
        raise ValueError(f"its {key} is no {kind.__name__}")
    return raw[key]
