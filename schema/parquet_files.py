"""Parquet files of one schema joined to one: their row groups, as they were encoded, under one footer.

pyarrow encodes the row groups of a file one after the other, which is most of the time that a run's tables take to be
written; encoded by several threads, each to a file of its own, they take a fraction. Neither pyarrow nor DuckDB joins
files without decoding them, so this reads and writes a footer: the struct FileMetaData of
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift in Thrift's compact protocol,
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md. The result is the very file that
pyarrow writes of the same row groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

MAGIC = b"PAR1"

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)

Value = object
"""bool, int, bytes (a double's eight too), `_Items`, `_Struct`."""


@dataclass
class _Items:
    """A list or set: the type of its elements, and they."""

    kind: int
    values: list[Value]


@dataclass
class _Struct:
    """Fields by number: type and value."""

    fields: dict[int, tuple[int, Value]] = field(default_factory=dict)

    def __contains__(self, number: int) -> bool:
        return number in self.fields

    def number(self, number: int) -> int:
        """An integer field."""
        value = self.fields[number][1]
        assert isinstance(value, int)
        return value

    def put(self, number: int, value: Value) -> None:
        """Change a field that is there."""
        self.fields[number] = self.fields[number][0], value

    def structs(self, number: int) -> list[_Struct]:
        """A field that is a list of structs."""
        items = self.fields[number][1]
        assert isinstance(items, _Items)
        return [value for value in items.values if isinstance(value, _Struct)]

    def struct(self, number: int) -> _Struct:
        """A field that is a struct."""
        value = self.fields[number][1]
        assert isinstance(value, _Struct)
        return value


class _Reader:
    """Reads values from ``data``, which starts with them."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def struct(self) -> _Struct:
        found = _Struct()
        number = 0
        while header := self._byte():
            kind = header & 15
            number = number + (header >> 4) if header >> 4 else self._signed()
            found.fields[number] = kind, kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind)
        return found

    def _value(self, kind: int) -> Value:
        if kind == _STRUCT:
            return self.struct()
        if kind in (_I16, _I32, _I64):
            return self._signed()
        if kind == _BINARY:
            return self._bytes(self._unsigned())
        if kind in (_LIST, _SET):
            header = self._byte()
            size = self._unsigned() if header >> 4 == 15 else header >> 4
            return _Items(header & 15, [self._value(header & 15) for _ in range(size)])
        if kind in (_TRUE, _FALSE, _BYTE):  # of a list: a byte each
            return self._byte()
        if kind == _DOUBLE:
            return self._bytes(8)
        raise ValueError(f"type {kind} is in no Parquet footer")

    def _byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def _bytes(self, size: int) -> bytes:
        self.place += size
        return self.data[self.place - size : self.place]

    def _unsigned(self) -> int:
        byte = self._byte()
        found, shift = byte & 127, 7
        while byte > 127:
            byte = self._byte()
            found |= (byte & 127) << shift
            shift += 7
        return found

    def _signed(self) -> int:
        folded = self._unsigned()
        return folded >> 1 ^ -(folded & 1)


class _Writer:
    """What `_Reader` reads."""

    def __init__(self) -> None:
        self.data = bytearray()

    def struct(self, struct: _Struct) -> None:
        before = 0
        for number, (kind, value) in struct.fields.items():
            if kind in (_TRUE, _FALSE):
                kind = _TRUE if value else _FALSE
            if 0 < number - before < 16:
                self.data.append(number - before << 4 | kind)
            else:
                self.data.append(kind)
                self._signed(number)
            before = number
            if kind not in (_TRUE, _FALSE):
                self._value(kind, value)
        self.data.append(0)

    def _value(self, kind: int, value: Value) -> None:
        if isinstance(value, _Struct):
            self.struct(value)
        elif isinstance(value, _Items):
            size = len(value.values)
            self.data.append(min(size, 15) << 4 | value.kind)
            if size >= 15:
                self._unsigned(size)
            for item in value.values:
                self._value(value.kind, item)
        elif isinstance(value, bytes):
            if kind == _BINARY:
                self._unsigned(len(value))
            self.data += value
        elif isinstance(value, int):
            if kind in (_TRUE, _FALSE, _BYTE):
                self.data.append(value)
            else:
                self._signed(value)

    def _unsigned(self, value: int) -> None:
        while value > 127:
            self.data.append(value & 127 | 128)
            value >>= 7
        self.data.append(value)

    def _signed(self, value: int) -> None:
        self._unsigned(value << 1 if value >= 0 else -value * 2 - 1)


# Numbers of fields in parquet.thrift.
_SCHEMA, _ROWS, _ROW_GROUPS = 2, 3, 4
_COLUMNS, _GROUP_PLACE, _ORDINAL = 1, 5, 7
_COLUMN_METADATA = 3
_CHUNK_PLACES = (2, 4, 6)  # of the metadata (0: nowhere else), of indices
_COLUMN_PLACES = (9, 10, 11, 14)  # of pages and of a Bloom filter


def joined(files: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The bytes of a file that has the row groups of ``files`` in turn, each a whole Parquet file in memory.

    All but the row groups is as the first has it. ValueError: no files, or one whose schema is not the first's.
    """
    place = len(MAGIC)
    whole: _Struct | None = None
    groups: list[Value] = []
    rows = 0
    yield MAGIC
    for file in files:
        size = int.from_bytes(file[-8:-4], "little")
        footer = _Reader(bytes(file[-8 - size : -8])).struct()
        whole = whole or footer
        if footer.fields[_SCHEMA] != whole.fields[_SCHEMA]:
            raise ValueError("files of different schemas cannot be joined")
        for group in footer.structs(_ROW_GROUPS):
            _move(group, place - len(MAGIC), len(groups))
            groups.append(group)
        rows += footer.number(_ROWS)
        body = file[len(MAGIC) : -8 - size]
        place += len(body)
        yield body
    if whole is None:
        raise ValueError("there are no files to join")
    whole.put(_ROWS, rows)
    whole.put(_ROW_GROUPS, _Items(_STRUCT, groups))
    writer = _Writer()
    writer.struct(whole)
    yield bytes(writer.data) + len(writer.data).to_bytes(4, "little") + MAGIC


def _move(group: _Struct, by: int, ordinal: int) -> None:
    """Let a row group lie ``by`` bytes further on, as number ``ordinal``."""
    if _ORDINAL in group:
        group.put(_ORDINAL, ordinal)
    _shift(group, (_GROUP_PLACE,), by)
    for chunk in group.structs(_COLUMNS):
        _shift(chunk, _CHUNK_PLACES, by)
        _shift(chunk.struct(_COLUMN_METADATA), _COLUMN_PLACES, by)


def _shift(struct: _Struct, numbers: Iterable[int], by: int) -> None:
    for number in numbers:
        if number in struct and struct.number(number):
            struct.put(number, struct.number(number) + by)
