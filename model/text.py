"""Texts: local files, the bundled sample, the reference texts of the Python installation, data sets on the hub."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import itertools
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import duckdb
import pyarrow as pa

from quambase.model.hub import HubError, fetch_file, mend
from quambase.schema.errors import DataInvalid, UnknownName

SAMPLE = Path(__file__).with_name("bundled") / "sample"
"""Folder of the bundled sample text."""

BUNDLED_DATA: dict[str, str] = {
    "sample:calibration": "calibration.jsonl",
    "sample:evaluation": "evaluation.jsonl",
    "sample:last-word": "last_word.jsonl",
}
"""Names of the bundled texts, written by SAMPLE_AUTHORS (`quambase generate`)."""

SAMPLE_AUTHORS = ("mamba-5m", "mamba2-8m")
"""The bundled models that wrote the bundled texts, a document each in turn."""

PYTHON_DOCS = ("python-docs:calibration", "python-docs:evaluation")
"""Real English on every machine: Python's language reference (`pydoc_data.topics`), every other topic, in passages."""

PASSAGE = 1500
"""Characters after which a topic of the language reference is cut at the next blank line."""

HUB_DATA: dict[str, str] = {
    "pile-val": "hf:monology/pile-uncopyrighted:val.jsonl.zst",
    "wikitext2": "hf:Salesforce/wikitext:wikitext-2-raw-v1/test-00000-of-00001.parquet",
    "lambada": "hf:EleutherAI/lambada_openai:data/lambada_test_en.jsonl",
}
"""Short names of data sets on the hub, as ``hf:REPOSITORY:FILE``."""


@dataclass(frozen=True)
class Document:
    """One text: its place in the file and the SHA-256 of its UTF-8 bytes."""

    index: int
    text: str
    sha256: str


def read_documents(data: str, limit: int | None = None) -> Iterator[Document]:
    """The documents of ``data`` in file order, at most ``limit``; empty ones are delivered too, with their number.

    ``data``: a .txt (documents apart by blank lines), .jsonl, .parquet or .csv file (column ``text``), also .gz or
    .zst; ``sample:…``, ``python-docs:…``; ``pile-val``, ``wikitext2``, ``lambada`` or ``hf:REPOSITORY:FILE``.
    DataInvalid: missing, unreadable, or without a text column.
    """
    for index, text in enumerate(itertools.islice(_texts(data), limit)):
        yield Document(index, text, hashlib.sha256(text.encode("utf-8")).hexdigest())


def _texts(data: str) -> Iterator[str]:
    if data in PYTHON_DOCS:
        return _python_docs(PYTHON_DOCS.index(data))
    if data in BUNDLED_DATA:
        return _file_texts(SAMPLE / BUNDLED_DATA[data])
    if Path(data).exists():
        return _file_texts(Path(data))
    source = HUB_DATA.get(data, data)
    if source.startswith("hf:"):
        return _file_texts(_from_hub(source))
    hint = UnknownName.of("data", data, [*BUNDLED_DATA, *PYTHON_DOCS, *HUB_DATA])
    raise DataInvalid(f"no file {data} here, and it is no known name ({hint})")


def _python_docs(part: int) -> Iterator[str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    distinct = dict.fromkeys(topics[name] for name in sorted(topics))  # some topics share a text
    first_topic: dict[str, int] = {}  # and some share passages
    for number, text in enumerate(distinct):
        for passage in _passages(text):
            first_topic.setdefault(passage, number)
    return (passage for passage, number in first_topic.items() if number % 2 == part)


def _passages(text: str) -> Iterator[str]:
    """``text`` cut at blank lines into passages of about PASSAGE characters."""
    held: list[str] = []
    for paragraph in text.split("\n\n"):
        held.append(paragraph)
        if sum(map(len, held)) >= PASSAGE:
            yield "\n\n".join(held).strip("\n")
            held = []
    if held and (rest := "\n\n".join(held).strip("\n")):
        yield rest


def _file_texts(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise DataInvalid(f"{path} is not a file; expected .txt, .jsonl, .parquet or .csv, also .gz or .zst")
    kinds = [suffix.lower() for suffix in path.suffixes]
    kind = next((k for k in reversed(kinds) if k in (".txt", ".jsonl", ".json", ".parquet", ".csv")), None)
    if kind is None:
        raise DataInvalid(f"{path.name} is of unknown kind; expected .txt, .jsonl, .parquet or .csv, also .gz or .zst")
    return _plain_texts(path) if kind == ".txt" else _table_texts(path, kind)


def _plain_texts(path: Path) -> Iterator[str]:
    """Documents of a text file: runs of lines between blank lines."""
    lines: list[str] = []
    try:
        with _open(path) as file:
            for raw in file:
                line = raw.decode("utf-8")
                if line.strip():
                    lines.append(line)
                elif lines:
                    yield "".join(lines).rstrip("\r\n")
                    lines = []
    except UnicodeDecodeError as error:
        raise DataInvalid(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start} of a line); convert it"
        ) from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataInvalid(f"{path} cannot be read ({error}); {mend(path, 'it may be cut short')}") from None
    if lines:
        yield "".join(lines).rstrip("\r\n")


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if path.suffix == ".zst":
        return io.BufferedReader(cast(io.RawIOBase, pa.CompressedInputStream(str(path), "zstd")))
    return path.open("rb")


def _table_texts(path: Path, kind: str) -> Iterator[str]:
    """The column ``text`` of a .jsonl, .parquet or .csv file, in file order, through DuckDB."""
    reader = {
        ".jsonl": "read_json(?, format = 'newline_delimited', records = true)",
        ".json": "read_json(?)",
        ".parquet": "read_parquet(?)",
        ".csv": "read_csv(?, header = true)",
    }[kind]
    settings: dict[str, str | bool | int | float | list[str]] = {
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    with duckdb.connect(config=settings) as connection:
        try:
            names = connection.sql(f"select * from {reader} limit 0", params=[str(path)]).columns
            column = "text" if "text" in names else names[0] if len(names) == 1 else None
            if column is None:
                raise DataInvalid(f"{path} has the columns {', '.join(names)}; expected one called text")
            quoted = column.replace('"', '""')
            rows = connection.execute(f'select "{quoted}" from {reader}', [str(path)])
            while batch := rows.fetchmany(256):
                for (text,) in batch:
                    yield "" if text is None else str(text)
        except duckdb.Error as error:
            first = str(error).splitlines()[0]
            raise DataInvalid(f"{path} cannot be read as {kind[1:]} ({first}); {mend(path, 'check it')}") from None


def _from_hub(source: str) -> Path:
    repository, _, name = source.removeprefix("hf:").partition(":")
    if not repository or not name:
        raise DataInvalid(f"'{source}' is not of the form hf:REPOSITORY:FILE")
    try:
        return fetch_file(repository, name, dataset=True)
    except HubError as error:
        raise DataInvalid(
            f"{source} is not in the local hub cache and could not be fetched ({error}); or download the file on a "
            "machine with a network and pass it: --data FILE"
        ) from None


def data_name(data: str | Path) -> tuple[str, str | None]:
    """What a text is called, however its path was typed, and the file's absolute path: the file's own name and that,
    or for a known name this name and None.
    """
    name = str(data)
    known = name in BUNDLED_DATA or name in PYTHON_DOCS or not Path(name).exists()
    return (name, None) if known else (Path(name).resolve().name, str(Path(name).resolve()))
