"""Reads texts: local files, the bundled sample, reference texts of the Python installation, data sets on the hub."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import importlib
import io
import itertools
import json
import lzma
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from quambase.model.inputs.files import check_file
from quambase.model.inputs.hub import mend
from quambase.model.inputs.names import BUNDLED_DATA, PYTHON_DOCS, SAMPLE
from quambase.model.inputs.sources import find_text
from quambase.schema.errors import DataInvalid, first_line

PASSAGE = 1500
"""Characters after which a topic of the language reference is split at the next blank line."""

KINDS = ".txt, .jsonl, .json, .parquet or .csv, also .gz, .zst or .xz"

EXPECTED = "expected text (a string, or null for an empty document)"

LONGEST = 1 << 26
"""Largest accepted document, in characters. A tokenizer needs some fifty bytes for each, and a malicious archive must
not exhaust memory.
"""

PIECE = 1 << 20
"""Bytes of a line that are read at a time."""

PARQUET_ROWS = 4
"""Rows of a Parquet file that are decoded at a time: each may have a text of the largest size."""

MOST_UNPACKED = 1000
"""Characters of text for each byte of a file, above LONGEST in all: no text of people is packed as closely."""

HEAD = 1000
"""JSON rows that are searched for the text column."""

CLUSTER_COLUMNS = ("cluster", "book", "topic", "source", "file")
"""Columns that tell where a text comes from. The first one with a value names the row's cluster."""

LONGEST_CLUSTER = 100
"""Longest name of a cluster in characters: a longer one (a whole text in a column ``source``) is replaced by its
SHA-256.
"""


@dataclass(frozen=True)
class Document:
    """One text: its index in the file, the SHA-256 of its UTF-8 bytes, and the book, topic or file it is a part of.

    Documents of one ``cluster`` resemble each other, so statistics treat a cluster as one unit; None: unknown.
    """

    index: int
    text: str
    sha256: str
    cluster: str | None = None


Row = tuple[str, str | None]
"""A text and its cluster, None if that is not known."""


def read_documents(data: str, limit: int | None = None) -> Iterator[Document]:
    """The documents of ``data`` in file order, at most ``limit``, empty ones included.

    ``data``: a .txt (documents separated by blank lines), .jsonl, .json, .parquet or .csv file (column ``text``), also
    .gz, .zst or .xz; ``sample:…``, ``python-docs:…``; ``pile-val``, ``wikitext2``, ``lambada`` or
    ``hf:REPOSITORY:FILE``. Texts are not changed in any character.
    A text's cluster is the value of one of CLUSTER_COLUMNS, in ``python-docs:…`` the topic, and else unknown.
    DataInvalid: missing, unreadable, or without a column of text.
    """
    for index, (text, cluster) in enumerate(itertools.islice(_texts(data), limit)):
        _check_size(data, len(text), f"document {index}")
        try:
            content = text.encode("utf-8")
        except UnicodeEncodeError:
            raise DataInvalid(f"{data} holds half of a surrogate pair in document {index}; expected text") from None
        yield Document(index, text, hashlib.sha256(content).hexdigest(), cluster)


def _texts(data: str) -> Iterator[Row]:
    if data in PYTHON_DOCS:
        return _python_docs(PYTHON_DOCS.index(data))
    if data in BUNDLED_DATA:
        return _file_texts(SAMPLE / BUNDLED_DATA[data])
    return _file_texts(find_text(data) or Path(data))


def _python_docs(part: int) -> Iterator[Row]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    distinct: dict[str, str] = {}
    for name in sorted(topics):
        distinct.setdefault(topics[name], name)  # some topics share a text
    first_topic: dict[str, tuple[int, str]] = {}  # and some share passages
    for number, (text, name) in enumerate(distinct.items()):
        for passage in _passages(text):
            first_topic.setdefault(passage, (number, name))
    return ((passage, name) for passage, (number, name) in first_topic.items() if number % 2 == part)


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


def _cluster(row: Mapping[str, object]) -> str | None:
    """The cluster of a row of columns."""
    for name in CLUSTER_COLUMNS:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            value = f"{value:.17g}"  # JSON's integers are read as floats too; NaN is a missing value
        if isinstance(value, str) and value.strip():
            content = value.encode("utf-8", "backslashreplace")
            return hashlib.sha256(content).hexdigest() if len(value) > LONGEST_CLUSTER else content.decode()
    return None


def _file_texts(path: Path) -> Iterator[Row]:
    """The texts of one file (its name is not a pattern), read lazily."""
    endings = [suffix.lower() for suffix in path.suffixes]
    kind = next((ending for ending in reversed(endings) if ending in _READERS), None)
    if not path.is_file():
        raise DataInvalid(f"{path} is not a file; expected {KINDS}")
    if kind is None:
        raise DataInvalid(f"{path.name} is of unknown kind; expected {KINDS}")
    if path.stat().st_size:
        check_file(path, DataInvalid)
    return _not_unpacked(path, _READERS[kind](path))


def _not_unpacked(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows. DataInvalid: they are far more text than the file can hold, so it is made to exhaust a machine."""
    size, most = 0, max(LONGEST, MOST_UNPACKED * path.stat().st_size)
    for text, cluster in rows:
        size += len(text)
        if size > most:
            raise _unpacks(path)
        yield text, cluster


def _unpacks(path: Path) -> DataInvalid:
    return DataInvalid(f"{path} unpacks to more than {MOST_UNPACKED:,} times its size; expected texts, check it")


def _plain_texts(path: Path) -> Iterator[Row]:
    """Documents of a text file: runs of lines between blank lines."""
    lines: list[str] = []
    size = 0
    for number, line in _lines(path):
        if line.strip():
            lines.append(line)
            size += len(line)
            _check_size(path, size, f"line {number}")
        elif lines:
            yield "".join(lines).rstrip("\r\n"), None
            lines, size = [], 0
    if lines:
        yield "".join(lines).rstrip("\r\n"), None


def _csv_texts(path: Path) -> Iterator[Row]:
    """The text column of a .csv with a header. Every field is text; the separator is a comma or, if the header has
    none, a semicolon, tab or bar.
    """
    # This setting is global to the process; its default (131,072) is below the largest text.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    lines = (line for _, line in _lines(path))
    header = next(lines, "")
    mark = next((mark for mark in ",;\t|" if mark in header), ",")
    reader = csv.reader(itertools.chain([header], lines), delimiter=mark, strict=True)
    try:
        names = next(reader, [])
        column = _column(path, names)
        origins = {name: place for place, name in enumerate(names) if name in CLUSTER_COLUMNS and place != column}
        for row in reader:
            if len(row) == len(names):
                yield row[column], _cluster({name: row[place] for name, place in origins.items()})
            elif row:
                raise DataInvalid(
                    f"{path} has {len(row)} fields in line {reader.line_num}; expected {len(names)}, as in its first "
                    "line: put texts in double quotes"
                )
            elif len(names) == 1:
                yield "", None  # with one column an empty line is an empty text, otherwise it is skipped
    except csv.Error as error:
        raise DataInvalid(f"{path} cannot be read as csv ({error} in line {reader.line_num}); check it") from None


def _parquet_texts(path: Path) -> Iterator[Row]:
    """The text column of a Parquet file, a few rows at a time."""
    try:
        # Not a Python file: a thread of Arrow's that still holds one when Python ends aborts the process.
        with pa.OSFile(os.fsencode(path)) as file:
            table = pq.ParquetFile(file)
            schema = table.schema_arrow
            field = schema.field(_column(path, schema.names))
            inner = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            if not any(is_text(inner) for is_text in _IS_TEXT):
                raise DataInvalid(f"{path} holds {_short(field.type)} in column {_short(field.name)}; {EXPECTED}")
            origins = [
                name
                for name in CLUSTER_COLUMNS
                if schema.names.count(name) == 1
                and name != field.name
                and not pa.types.is_nested(schema.field(name).type)
            ]
            _check_row_groups(path, table.metadata)
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[field.name, *origins]):
                for row in batch.to_pylist():
                    yield row[field.name] or "", _cluster({name: row[name] for name in origins})
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataInvalid(f"{path} cannot be read as parquet ({first_line(error)}); {mend(path, 'check it')}") from None


def _check_row_groups(path: Path, footer: pq.FileMetaData) -> None:
    """DataInvalid: by its footer, a row group unpacks to far more than the file can hold. A page is unpacked whole."""
    most = max(LONGEST, MOST_UNPACKED * path.stat().st_size)
    # Not each column's size: pyarrow ends the process where the statistics of a column are damaged.
    if any(footer.row_group(group).total_byte_size > most for group in range(footer.num_row_groups)):
        raise _unpacks(path)


def _json_texts(path: Path) -> Iterator[Row]:
    """The text column of JSON objects, one per line or in a list.

    A row without it is an empty text. The column is called text, or is the only one.
    """
    rows = _json_objects(path)
    head: list[tuple[int, dict[str, object]]] = []
    for line, row in itertools.islice(rows, HEAD):
        head.append((line, row))
        if "text" in row or (len(row) == 1 and isinstance(next(iter(row.values())), str)):
            break
    names = list(dict.fromkeys(name for _, row in head for name in row))
    if not names:
        yield from (("", None) for _ in head)
        return
    column = names[_column(path, names)]
    for line, row in itertools.chain(head, rows):
        if column != "text" and row.keys() - {column}:
            raise DataInvalid(
                f"{path} has the columns {_named(row)} in line {line}, and only {_short(column)} before it; expected "
                "one called text"
            )
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise DataInvalid(f"{path} holds {_json_type(value)} in column {_short(column)}, line {line}; {EXPECTED}")
        yield value or "", _cluster({name: row[name] for name in CLUSTER_COLUMNS if name in row and name != column})


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The objects of a JSON file and the line each begins in; they are separated by whitespace, or in a list."""
    # parse_int=float: numbers are not texts, and an int of thousands of digits would be an error.
    decode = json.JSONDecoder(parse_int=float).raw_decode
    waiting: list[str] = []
    size = enough = 0
    line = 1
    listed = after = False  # within a list; after a value, where a comma or the list's end must follow
    for number, piece in itertools.chain(_pieces(path), [(0, "")]):
        more = number > 0
        waiting.append(piece)
        size += len(piece)
        if more and size < enough:
            continue
        held, place = "".join(waiting), 0
        while True:
            start = _SPACE.match(held, place).end()  # type: ignore[union-attr] # always matches
            line += held.count("\n", place, start)
            place = start
            if place == len(held):
                break
            mark = held[place]
            if mark == "[" and not listed:
                listed, after, place = True, False, place + 1
                continue
            if listed and (mark == "]" or (mark == "," and after)):
                listed, after, place = mark == ",", False, place + 1
                continue
            try:
                if after:
                    raise json.JSONDecodeError("Expecting a comma or the end of the list", held, place)
                value, end = decode(held, place)
            except RecursionError:
                raise _bad_json(path, line, "nested too deep") from None
            except json.JSONDecodeError as error:
                if more and len(held) - place <= LONGEST:
                    break  # it may be incomplete: parse again with the next piece
                reason = f"no complete value in {LONGEST:,} characters: {error.msg}" if more else error.msg
                raise _bad_json(path, line + held.count("\n", place, error.pos), reason) from None
            if not isinstance(value, dict):
                raise _bad_json(path, line, f"{_json_type(value)}; expected objects with a text column")
            yield line, value
            line += held.count("\n", place, end)
            place, after = end, listed
        waiting = [held[place:]]
        size = len(waiting[0])
        enough = 2 * size  # so that a long value is not parsed again for every line of it
    if listed:
        raise _bad_json(path, line, "the list does not end")


def _bad_json(path: Path, line: int, reason: str) -> DataInvalid:
    return DataInvalid(f"{path} cannot be read as JSON ({reason}, in line {line}); {mend(path, 'check it')}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text file with their ends, and their numbers from 1."""
    held: list[str] = []
    size = number = 0
    for number, piece in _pieces(path):
        held.append(piece)
        size += len(piece)
        _check_size(path, size, f"line {number}")
        if piece.endswith("\n"):
            yield number, "".join(held)
            held, size = [], 0
    if held:
        yield number, "".join(held)


def _pieces(path: Path) -> Iterator[tuple[int, str]]:
    """A text file in pieces, each a line or a part of a long one, with the line's number from 1. A byte order mark is
    left out. DataInvalid: it is not UTF-8, or damaged.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    try:
        with _open(path) as file:
            while raw := file.readline(PIECE):
                if b"\0" in raw:  # as in UTF-16
                    raise DataInvalid(f"{path} is not UTF-8 text (a NUL character in line {line}); convert it")
                yield line, decoder.decode(raw)
                line += raw.endswith(b"\n")
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataInvalid(f"{path} is not UTF-8 text ({error.reason} in line {line}); convert it") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise DataInvalid(f"{path} cannot be read ({first_line(error)}); {mend(path, 'it may be cut short')}") from None


def _open(path: Path) -> IO[bytes]:
    packed = path.suffix.lower()
    if packed == ".xz":
        return lzma.open(path)
    if packed == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if packed == ".zst":
        return io.BufferedReader(cast(io.RawIOBase, pa.CompressedInputStream(str(path), "zstd")))
    return path.open("rb")


def _column(path: Path, names: list[str]) -> int:
    """Which column is the text: the one called so, or the only one."""
    if names.count("text") == 1:
        return names.index("text")
    if len(names) != 1:
        raise DataInvalid(f"{path} has the columns {_named(names)}; expected one called text")
    return 0


def _named(names: Iterable[str]) -> str:
    """Column names as part of an error, made printable and short."""
    return _short(", ".join(names)) or "none"


def _short(value: object) -> str:
    """A value as part of an error: printable, at most 200 characters."""
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return text if len(text) <= 200 else f"{text[:197]}..."


def _json_type(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    kinds = {dict: "an object", list: "a list", float: "a number", str: "a string"}
    return kinds.get(type(value), "null")


def _check_size(path: str | Path, size: int, place: str) -> None:
    if size > LONGEST:
        raise DataInvalid(f"{path} holds a text of more than {LONGEST:,} characters in {place}; cut it into documents")


_IS_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)

_SPACE = re.compile(r"[ \t\r\n]*")

_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _plain_texts,
    ".jsonl": _json_texts,
    ".json": _json_texts,
    ".parquet": _parquet_texts,
    ".csv": _csv_texts,
}
