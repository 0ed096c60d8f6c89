"""Joined Parquet files are the very file that pyarrow writes of the same row groups."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.schema import parquet_files
from quambase.schema.files import file_sha256
from quambase.schema.parquet_files import joined
from quambase.schema.tables import (
    ACTIVATIONS,
    COUNTS,
    SCALES,
    as_made,
    encode_pieces,
    encoded_table,
    write_encoded,
    write_joined,
    write_table,
)

SCHEMA = pa.schema(
    [
        pa.field("word", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        ("number", pa.int64()),
        ("value", pa.float64()),
        ("flag", pa.bool_()),
        ("list", pa.list_(pa.float32())),
    ],
    metadata={"a": "b"},
)


def rows(seed: int, size: int) -> pa.Table:
    """Some of every type, nulls among them."""
    generator = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "word": pa.array([f"word {i % 3}" for i in range(size)], pa.string()).dictionary_encode(),
        "number": [None if i % 5 == 4 else int(i) for i in generator.integers(-(2**60), 2**60, size)],
        "value": generator.normal(size=size),
        "flag": generator.random(size) < 0.5,
        "list": [generator.normal(size=i % 4) for i in range(size)],
    }
    return pa.table(columns, schema=SCHEMA)


def written(tables: Sequence[pa.Table], **options: Any) -> bytes:
    """By pyarrow, a row group for each."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd", **options) as writer:
        for table in tables:
            writer.write_table(table)
    return sink.getvalue()


@settings(deadline=None, max_examples=40)
@given(
    # More than 14 files, row groups or columns are written as another kind of list.
    st.lists(st.lists(st.integers(1, 40), max_size=3), min_size=1, max_size=20),
    st.fixed_dictionaries({"write_statistics": st.booleans(), "store_schema": st.booleans()}),
)
def test_joined_files_are_the_file_of_their_row_groups(sizes: list[list[int]], options: dict[str, bool]) -> None:
    tables = [[rows(100 * i + j, size) for j, size in enumerate(of_file)] for i, of_file in enumerate(sizes)]
    found = b"".join(joined(written(of_file, **options) for of_file in tables))
    assert found == written([table for of_file in tables for table in of_file], **options)
    whole = pa.concat_tables([SCHEMA.empty_table(), *(table for of_file in tables for table in of_file)])
    assert pq.read_table(io.BytesIO(found))["value"].equals(whole["value"])


def _values(kinds: st.SearchStrategy[tuple[int, Any]]) -> st.SearchStrategy[tuple[int, Any]]:
    """Structs and lists of values of ``kinds`` (type, value), as Thrift's compact protocol numbers types."""
    numbers = st.integers(-(2**15), 2**15 - 1)
    structs = st.lists(st.tuples(numbers, kinds), max_size=5, unique_by=lambda field: field[0])
    # A byte is a list of bools' element too.
    lists = st.lists(kinds, max_size=18).map(lambda items: [item for item in items if item[0] == items[0][0]])
    return structs.map(lambda fields: (12, parquet_files._Struct(dict(fields)))) | lists.map(
        lambda items: (9, parquet_files._Items(items[0][0] if items else 8, [value for _, value in items]))
    )


_SCALARS = (
    st.tuples(st.sampled_from([4, 5, 6]), st.integers(-(2**63), 2**63 - 1))
    | st.tuples(st.just(8), st.binary(max_size=200))
    | st.tuples(st.just(3), st.integers(0, 255))
    | st.tuples(st.just(7), st.binary(min_size=8, max_size=8))
)


@given(st.recursive(_SCALARS, _values, max_leaves=20), st.booleans())
def test_a_struct_is_read_as_it_was_written(value: tuple[int, Any], flag: bool) -> None:
    """Negative numbers and gaps between fields too, which pyarrow's footers have few of."""
    struct = parquet_files._Struct({1: value, 3: (1 if flag else 2, flag), 200: (5, -1), 7: (4, 7)})
    writer = parquet_files._Writer()
    writer.struct(struct)
    reader = parquet_files._Reader(bytes(writer.data) + b"more")
    assert reader.struct() == struct
    assert reader.place == len(writer.data)


def test_numbered_row_groups_are_numbered_anew() -> None:
    """pyarrow does not number them."""

    def numbered(file: bytes) -> bytes:
        size = int.from_bytes(file[-8:-4], "little")
        footer = parquet_files._Reader(file[-8 - size : -8]).struct()
        for i, group in enumerate(footer.structs(4)):
            group.fields[7] = 4, i
        writer = parquet_files._Writer()
        writer.struct(footer)
        return file[: -8 - size] + bytes(writer.data) + len(writer.data).to_bytes(4, "little") + b"PAR1"

    tables = [rows(i, 5) for i in range(3)]
    found = b"".join(joined([numbered(written(tables[:2])), numbered(written(tables[2:]))]))
    assert found == numbered(written(tables))


def test_more_row_groups_and_wider_offsets_than_a_byte_can_count() -> None:
    tables = [rows(i, 300) for i in range(150)]
    assert b"".join(joined(written([table]) for table in tables)) == written(tables)


def test_what_cannot_be_joined_is_refused() -> None:
    other = io.BytesIO()
    pq.write_table(pa.table({"word": ["x"]}), other)
    with pytest.raises(ValueError, match="different schemas"):
        list(joined([written([rows(0, 3)]), other.getvalue()]))
    with pytest.raises(ValueError, match="no files"):
        list(joined([]))


def counts(seed: int, size: int) -> pa.Table:
    """Rows of `counts`."""
    generator = np.random.default_rng(seed)
    columns = {
        "run": ["run"] * size,
        "layer": np.full(size, seed),
        "site": [f"site {seed % 3}"] * size,
        "group_name": ["all"] * size,
        "value": np.sort(generator.normal(size=size)),
        "count": generator.integers(1, 1 << 40, size),
    }
    return pa.table(columns, schema=COUNTS).cast(as_made(COUNTS))


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("pieces", [0, 1, 5, 100])
def test_pieces_are_written_as_a_table_is(tmp_path: Path, pieces: int, threads: int, at_once: bool) -> None:
    made = [counts(i, 10 + 200 * (i % 4)) for i in range(pieces)]
    with ThreadPoolExecutor(threads) as pool:
        encoded = encode_pieces("counts", [lambda table=table: table for table in made], COUNTS, pool)
        found = write_encoded(tmp_path / "pieces.parquet", "counts", list(encoded) if at_once else encoded, COUNTS)
    rows = write_table(tmp_path / "table.parquet", "counts", made, COUNTS)
    assert found == (rows, file_sha256(tmp_path / "table.parquet"))
    assert (tmp_path / "pieces.parquet").read_bytes() == (tmp_path / "table.parquet").read_bytes()
    if pieces:
        (answer,) = duckdb.sql(f"SELECT count(*), sum(count) FROM '{tmp_path / 'pieces.parquet'}'").fetchall()
        assert answer == (rows, sum(int(np.sum(table["count"].to_numpy())) for table in made))


def test_a_piece_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> pa.Table:
        raise ValueError("this one")

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="this one"):
        encoded = encode_pieces("counts", [lambda: counts(0, 5), fail], COUNTS, pool)
        write_encoded(tmp_path / "x.parquet", "counts", encoded, COUNTS)
    assert not list(tmp_path.iterdir())


def test_files_of_no_rows_are_joined_to_one(tmp_path: Path) -> None:
    empty = encoded_table("activations", None, ACTIVATIONS)
    assert write_joined(tmp_path / "x.parquet", [empty, empty])[0] == 0
    assert pq.read_table(tmp_path / "x.parquet").schema.equals(ACTIVATIONS)
    table = SCALES.empty_table()
    assert pq.read_table(pa.BufferReader(encoded_table("scales", table, SCALES))).schema.equals(SCALES)
