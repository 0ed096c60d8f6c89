"""Changes files that hold others: safetensors, .npy, archives (.npz, what torch.save writes), Parquet, packed texts."""

from __future__ import annotations

import gzip
import io
import lzma
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from functools import lru_cache
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzz_bytes import INTEGERS, boundary, change_bytes
from fuzz_json import change_json

BOMB = 400 << 20
"""Bytes that a small file claims to hold."""

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "U64", "X")


def change_safetensors(random: Random, data: bytes) -> bytes:
    """A .safetensors file with another header: its length, its JSON, a tensor's type, shape or place."""
    (size,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + size], data[8 + size :]
    kind = random.randrange(6)
    if kind == 0:
        length = random.choice((size - 1, size + 1, 0, 1, 8, len(data), len(data) - 8, *INTEGERS)) % 2**64
        return struct.pack("<Q", length) + header + rest
    if kind == 1:
        header = re.sub(rb'"dtype":"[^"]*"', _once(random, f'"dtype":"{random.choice(DTYPES)}"'.encode()), header)
    elif kind == 2:
        numbers = list(re.finditer(rb"\d+", header))
        chosen = random.choice(numbers)
        header = header[: chosen.start()] + str(random.choice(INTEGERS)).encode() + header[chosen.end() :]
    elif kind == 3:
        rest = change_bytes(random, rest)
    else:
        header = change_json(random, header)
    if random.random() < 0.3:
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + rest


def _once(random: Random, new: bytes) -> Callable[[re.Match[bytes]], bytes]:
    """A replacement for `re.sub` that takes about every third match."""
    return lambda match: new if random.random() < 0.3 else match[0]


DESCRIPTIONS = (
    "<f8",
    "<f4",
    ">f4",
    "<f2",
    "<i8",
    "|u1",
    "|O",
    "<U9999999",
    "<c16",
    "<M8[ns]",
    "|S1",
    "|V8",
    "<f16",
    "",
)


def change_npy(random: Random, data: bytes) -> bytes:
    """A .npy file with another header: version, length, type, order or shape."""
    kind = random.randrange(5)
    if kind == 0:
        return change_bytes(random, data)
    if kind == 1:
        return data[:6] + boundary(random)[:2].ljust(2, b"\0") + data[8:]
    (size,) = struct.unpack("<H", data[8:10])
    header, rest = data[10 : 10 + size], data[10 + size :]
    if kind == 2:
        new = f"'descr': '{random.choice(DESCRIPTIONS)}'".encode()
        header = re.sub(rb"'descr': '[^']*'", lambda match: new, header)
    elif kind == 3:
        sizes = ", ".join(str(random.choice(INTEGERS)) for _ in range(random.randrange(4)))
        shape = random.choice(
            (f"({sizes},)", "()", "(-1,)", "(10**12,)", "None", "(1e12,)", "('x',)", "(" * 300 + ")" * 300)
        )
        header = re.sub(rb"'shape': \([^)]*\)", lambda match: f"'shape': {shape}".encode(), header)
    else:
        header = change_bytes(random, header)
    length = len(header) if random.random() < 0.9 else random.randrange(1 << 16)
    return data[:8] + struct.pack("<H", min(length, 0xFFFF)) + header + rest


def change_pickle(random: Random, data: bytes) -> bytes:
    """A pickle with another integer (a size, a stride, an offset), or changed bytes."""
    if random.random() < 0.4:
        return change_bytes(random, data)
    ends = {"BININT1": 1, "BININT2": 2, "BININT": 4, "LONG1": None}
    found = [(place, ends[op.name]) for op, _, place in pickletools.genops(data) if op.name in ends]
    if not found:
        return change_bytes(random, data)
    place, size = random.choice(found)
    assert place is not None
    size = data[place + 1] + 1 if size is None else size
    number = random.choice(INTEGERS)
    long = number.to_bytes(9, "little", signed=True)
    return data[:place] + b"\x8a" + bytes([len(long)]) + long + data[place + 1 + size :]


def _packed(entries: list[tuple[str, bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content, method in entries:
            information = zipfile.ZipInfo(name)
            information.compress_type = method
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a doubled name
                archive.writestr(information, content)
    return buffer.getvalue()


def change_zip(random: Random, data: bytes) -> bytes:
    """An archive with one entry changed, packed, dropped, doubled or renamed, or with false sizes in its directory."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(name, archive.read(name), zipfile.ZIP_STORED) for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return data
    place = random.randrange(len(entries))
    name, content, method = entries[place]
    kind = random.randrange(10)
    if kind <= 4:
        change = change_npy if name.endswith(".npy") else change_pickle if name.endswith(".pkl") else change_bytes
        entries[place] = (name, change(random, content), method)
    elif kind == 5:
        entries[place] = (name, content, zipfile.ZIP_DEFLATED)
    elif kind == 6:
        del entries[place]
    elif kind == 7:
        other = random.choice(entries)[0]
        entries[place] = (
            random.choice((other, name + "x", "../" + name, "/x", "x" * 300, name.upper())),
            content,
            method,
        )
    elif kind == 8:
        entries[place] = (name, random.choice(entries)[1], method)
    else:
        plain = _packed(entries)
        # The sizes in the central directory: signature, 20 bytes, then packed and real size in four bytes each.
        start = random.choice([match.start() for match in re.finditer(b"PK\x01\x02", plain)])
        at = start + random.choice((10, 16, 20, 24, 28, 30, 42))
        number = boundary(random)[:4].ljust(4, b"\0")
        return plain[:at] + number + plain[at + 4 :]
    return _packed(entries)


def change_footer(random: Random, data: bytes) -> bytes:
    """A Parquet file with changed bytes in its footer, or another length of it."""
    (size,) = struct.unpack("<I", data[-8:-4])
    start = max(4, len(data) - 8 - size)
    if random.random() < 0.1:
        return data[:-8] + boundary(random)[:4].ljust(4, b"\xff") + b"PAR1"
    footer = change_bytes(random, data[start:-8])
    length = len(footer) if random.random() < 0.9 else size
    return data[:start] + footer + struct.pack("<I", length) + b"PAR1"


TYPES = (
    *(
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.int8(),
        pa.int64(),
        pa.uint64(),
        pa.float16(),
        pa.float64(),
        pa.bool_(),
    ),
    *(pa.null(), pa.date32(), pa.timestamp("ns"), pa.list_(pa.int64()), pa.struct([("a", pa.int64())])),
    *(pa.dictionary(pa.int32(), pa.string()), pa.decimal128(38, 10), pa.duration("s"), pa.list_(pa.float64())),
)

EXTREMES = (
    *(
        None,
        0,
        -1,
        2**31 - 1,
        -(2**31),
        2**63 - 1,
        -(2**63),
        float("nan"),
        float("inf"),
        -float("inf"),
        1e308,
        5e-324,
        -0.0,
    ),
    *("", "x", "../x", "\x1b[31m", "\x00", "é" * 100, "x" * 5000, True, [], [1.0], [float("nan")], [None]),
)


def _other_values(random: Random, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column with an extreme value in one row or in all."""
    values = column.to_pylist()
    for _ in range(20):
        new = random.choice(EXTREMES)
        place = random.randrange(len(values)) if values and random.random() < 0.7 else None
        try:
            changed = [new if place in (None, i) else value for i, value in enumerate(values)]
            return pa.chunked_array([pa.array(changed, column.type)])
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            continue
    return column


def _other_column(random: Random, table: pa.Table) -> pa.Table:
    """The table with one column changed."""
    place = random.randrange(table.num_columns)
    field, column = table.schema.field(place), table.column(place)
    kind = random.randrange(7)
    if kind == 0:
        return table.remove_column(place)
    if kind == 1:
        return table.append_column(field, column)
    if kind == 2:
        name = random.choice(("", "x", field.name + " ", "\x1b[31m", "text", "layer", "é"))
        return table.rename_columns([name if i == place else old for i, old in enumerate(table.column_names)])
    if kind == 3:
        kind_ = random.choice(TYPES)
        try:
            new = column.cast(kind_)
        except (pa.ArrowException, TypeError, ValueError):
            new = pa.nulls(table.num_rows, kind_)
        return table.set_column(place, pa.field(field.name, kind_), new)
    return table.set_column(place, field, _other_values(random, column))


def change_table(random: Random, data: bytes) -> bytes:
    """A Parquet file with another column, other rows or other metadata, written anew."""
    table = pq.read_table(io.BytesIO(data))
    kind = random.randrange(6)
    if kind <= 2 and table.num_columns:
        table = _other_column(random, table)
    elif kind == 3:
        rows = table.num_rows
        start = random.randrange(rows + 1)
        table = random.choice(
            (
                table.slice(0, 0),
                table.slice(start),
                pa.concat_tables([table, table.slice(start)]),
                table.slice(0, start),
            )
        )
    else:
        metadata = dict(table.schema.metadata or {b"quambase": b"{}"})
        key = random.choice(sorted(metadata))
        change = random.choice((change_json, change_json, change_bytes))
        metadata[key] = change(random, metadata[key])
        table = table.replace_schema_metadata(metadata)
    buffer = io.BytesIO()
    try:
        pq.write_table(table, buffer, compression=random.choice(("zstd", "none", "snappy")))
    except (pa.ArrowException, ValueError, UnicodeError):  # what Parquet cannot hold
        return data
    return buffer.getvalue()


def packed(name: str, content: bytes) -> bytes:
    """``content`` packed as the ending of ``name`` says; equal content gives equal bytes."""
    if name.endswith(".gz"):
        return gzip.compress(content, 1, mtime=0)
    if name.endswith(".xz"):
        return lzma.compress(content, preset=0)
    return pa.compress(content, "zstd", asbytes=True) if name.endswith(".zst") else content


@lru_cache(maxsize=4)
def bomb(kind: str) -> bytes:
    """A small file that claims BOMB bytes: an archive entry, a text (.gz, .xz, .zst) or a Parquet file of one text."""
    if kind == "parquet":
        buffer = io.BytesIO()
        table = pa.table({"text": pa.array(["a" * BOMB])})
        pq.write_table(table, buffer, compression="zstd", write_statistics=False)
        return buffer.getvalue()
    if kind == "parquet dictionary":
        buffer = io.BytesIO()
        text = "a" * (60 << 20)
        indices = pa.array(np.zeros(1000, np.int32))
        table = pa.table({"text": pa.DictionaryArray.from_arrays(indices, pa.array([text]))})
        pq.write_table(table, buffer, compression="zstd", write_statistics=False, dictionary_pagesize_limit=1 << 30)
        return buffer.getvalue()
    if kind == "zip":
        return _packed([("archive/data.pkl", b"\0" * BOMB, zipfile.ZIP_DEFLATED)])
    if kind == "npz":
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (BOMB,)})
        return _packed([("present.npy", head.getvalue() + b"\0" * BOMB, zipfile.ZIP_DEFLATED)])
    return packed(kind, b"a" * BOMB)
