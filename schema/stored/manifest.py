"""`run.json`: what a run is, written last and atomically, so a folder without it is an unfinished run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypedDict

import msgspec

from quambase.schema import RUN_FORMAT_VERSION
from quambase.schema.checksums import file_damage
from quambase.schema.errors import DatabaseInvalid
from quambase.schema.files import check_format_version
from quambase.schema.json_files import Count, Sha256, Size, as_type, read_json, write_json
from quambase.schema.stored.model_info import ModelInfo, TextInfo

MANIFEST = "run.json"

SHARDS = "shards"
"""Folder, inside an unfinished run, of a folder for each shard of it: ``0-of-4``."""


@dataclass(frozen=True)
class TableFile:
    """One Parquet file of a run: its rows and the SHA-256 of its bytes."""

    rows: Count
    sha256: Sha256


def table_of(file: str) -> str:
    """The table to which a file of a run belongs, by its path in the run folder: ``counts`` of
    ``counts/part-000.parquet`` and of ``counts.parquet``.
    """
    return PurePosixPath(file).parts[0].removesuffix(".parquet")


FileName = Annotated[str, msgspec.Meta(pattern=r"^\w+(/[\w-]+)?\.parquet\Z")]
"""The path of a table's file in its run folder, never out of it."""


class _FewDocuments(TypedDict):
    documents: Count
    tokens: Count


class _KnownIdentity(TypedDict, total=False):
    """The entries of an identity that are read again."""

    weights_sha256: str
    samples: Count
    seq_len: Count
    block: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    sites: list[str]
    activation_dtype: str
    outliers: Size
    sensitivity: _FewDocuments
    second_moments: _FewDocuments
    by_block: bool
    by_position: bool
    state_every: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class _KnownCreated(TypedDict, total=False):
    number: Count
    started: str
    versions: dict[str, str]


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
    tables: dict[FileName, TableFile]
    sites: list[tuple[int, str]]
    created: dict[str, Any] = field(default_factory=dict)
    format_version: int = RUN_FORMAT_VERSION

    def age(self) -> tuple[int, str, str]:
        """What orders a database's runs, oldest first: the number it gave the run when the run was complete; among
        equal numbers (runs copied together) when the run began, then its id. Never the time of a file.
        """
        return self.created.get("number", 0), self.created.get("started", ""), self.run

    def files_of(self, table: str) -> list[str]:
        """The files of a table, in the order of its rows; none if the run has no such table."""
        return [file for file in self.tables if table_of(file) == table]

    def save(self, folder: Path) -> None:
        """Write ``folder/run.json`` atomically, with its checksum."""
        write_json(folder / MANIFEST, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """As `run.json` stores it."""
        typed = {"model": self.model.to_json(), "data": self.data.to_json()}
        plain = {"tables": {file: asdict(entry) for file, entry in self.tables.items()}}
        return {f.name: getattr(self, f.name) for f in fields(self)} | typed | plain

    @classmethod
    def from_json(cls, raw: dict[str, Any], path: Path, advice: str) -> Manifest:
        """What `to_json` gave, of the file ``path``. DatabaseInvalid, whose line ends in ``advice``: a newer format,
        something is missing or of another type.
        """
        check_format_version(path, raw.get("format_version"), RUN_FORMAT_VERSION)
        model = raw.get("model")
        for key, known in (("identity", _KnownIdentity), ("created", _KnownCreated)):
            as_type({key: raw.get(key)}, dict[str, known], path, DatabaseInvalid, advice)  # type: ignore[valid-type]
        nested = raw | {"model": ModelInfo.nested(model)} if isinstance(model, dict) else raw
        return as_type(nested, cls, path, DatabaseInvalid, advice)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read ``folder/run.json``. DatabaseInvalid: missing (unfinished run), damaged or altered, of another run or a
        newer format.
        """
        path = folder / MANIFEST
        advice = "restore it, or delete the run folder and collect again"
        try:
            raw = read_json(path, DatabaseInvalid, advice, RUN_FORMAT_VERSION)
        except FileNotFoundError:
            raise DatabaseInvalid(
                f"run {folder.name} is unfinished (no {MANIFEST}); run the same collect command again to resume it"
            ) from None
        found = cls.from_json(raw, path, advice)
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
