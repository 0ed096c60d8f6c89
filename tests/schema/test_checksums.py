"""A file's own checksum: every changed bit of a file is found, JSON and Parquet alike."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quambase.analyzer.analyze import analyze
from quambase.schema.checksums import CHECKSUM, PLACEHOLDER, add_checksum, check_own
from quambase.schema.errors import DatabaseInvalid, ScalesInvalid
from quambase.schema.json_files import Count, Sha256, Size, as_type, read_json, write_json
from quambase.schema.scale_table import read_scales
from quambase.schema.tables import RESULTS, read_table, write_table

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def results_file(path: Path) -> Path:
    row = dict.fromkeys(RESULTS.names) | {"evaluation": "e", "nll": 1.5}
    write_table(path, "results", pa.Table.from_pylist([row] * 40, schema=RESULTS), RESULTS)
    return path


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_the_checksum_is_that_of_the_file_with_zeros_in_its_place(
    tmp_path_factory: pytest.TempPathFactory, before: bytes, after: bytes
) -> None:
    path = tmp_path_factory.mktemp("own") / "file"
    whole = before + PLACEHOLDER.encode() + after
    path.write_bytes(whole)
    assert check_own(whole) == "wrong"  # not yet the right one
    add_checksum(path)
    expected = f"{CHECKSUM}:{hashlib.sha256(whole).hexdigest()}".encode()
    assert path.read_bytes() == before + expected + after
    assert check_own(path.read_bytes()) == "right"


def test_no_place_for_a_checksum(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"nothing")
    assert check_own(b"nothing") == "none"
    with pytest.raises(ValueError, match="no place for its checksum"):
        add_checksum(tmp_path / "file")


@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=6))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_json_comes_back(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    content.pop(CHECKSUM, None)
    write_json(path, content)
    assert read_json(path, DatabaseInvalid, "advice") == content


def test_half_of_a_surrogate_pair_is_stored(tmp_path: Path) -> None:
    """As the path of a model that is not UTF-8 has it."""
    write_json(tmp_path / "a.json", {"path": "a\udcff"})
    assert read_json(tmp_path / "a.json", DatabaseInvalid, "") == {"path": "a\udcff"}


def test_every_bit_of_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"format_version": 2, "name": "é", "scales": [0.5, 1e-9], "flag": True})
    content = path.read_bytes()
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(
            DatabaseInvalid, match=r"a\.json .*; do this|a\.json has format version .*: upgrade quambase"
        ):
            read_json(path, DatabaseInvalid, "do this", 2)


def test_every_byte_of_a_parquet_file(tmp_path: Path) -> None:
    path = results_file(tmp_path / "a.parquet")
    assert read_table(path, RESULTS).num_rows == 40
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        if check_own(bytes(changed)) == "none":  # the mark itself: whoever needs a checksum misses it
            assert content.rfind(f"{CHECKSUM}:".encode()) <= place < content.rfind(f"{CHECKSUM}:".encode()) + 80
            continue
        with pytest.raises(DatabaseInvalid, match=r"a\.parquet .*; restore it or make it again$"):
            read_table(path, RESULTS)
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(DatabaseInvalid, match=r"not a readable Parquet file|was altered or cut short"):
            read_table(path, RESULTS)


def test_a_scale_table_cannot_become_one_of_an_earlier_version(fabricated_database: Path, tmp_path: Path) -> None:
    """Those have no checksum, but what is left of one gives the table away: its name stands there twice."""
    path = tmp_path / "scales.parquet"
    analyze(fabricated_database, strategies=["absmax"], out=path)
    content, version, name = path.read_bytes(), b'"format_version":2,"granularity"', CHECKSUM.encode()
    assert content.count(version) == 1 and content.count(name) == 2 and read_scales(path)
    aged = content.replace(version, version.replace(b"2", b"1"))
    second = aged.rindex(name)
    for damaged in (aged, aged.replace(name, b"-" * len(name), 1), aged[:second] + b"-" + aged[second + 1 :]):
        assert len(damaged) == len(content) and damaged != content
        path.write_bytes(damaged)
        with pytest.raises(ScalesInvalid, match="altered or cut short"):
            read_scales(path)
    table = pq.read_table(pa.BufferReader(content))  # an edited table whose author chose a version
    metadata = {b"quambase": table.schema.metadata[b"quambase"].replace(version, version.replace(b"2", b"-1"))}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(ScalesInvalid, match="has format version -1"):
        read_scales(path)


def test_equal_tables_are_equal_bytes(tmp_path: Path) -> None:
    assert results_file(tmp_path / "a.parquet").read_bytes() == results_file(tmp_path / "b.parquet").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'"\xff"', "is not valid JSON"),
        (b"[1]", "holds no JSON object"),
        (b'{"format_version": 3}', "has format version 3; this quambase reads up to 2: upgrade"),
        (b'{"format_version": true}', "has format version True"),
        (b'{"format_version": 0}', "has format version 0"),
        (b'{"format_version": -2147483648}', "has format version -2147483648"),
        (b'{"format_version": 2, "checked": true}', "was altered or cut short"),
        (b'{"format_version": 1, "quambase-sha256": "quambase-sha256:' + b"0" * 64 + b'"}', "was altered or cut short"),
    ],
)
def test_what_is_no_json_of_ours(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DatabaseInvalid, match=message) as caught:
        read_json(path, DatabaseInvalid, "do this", 2)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


def test_a_file_of_an_earlier_version_has_no_checksum(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"format_version": 1}')
    assert read_json(tmp_path / "a.json", DatabaseInvalid, "", 2) == {"format_version": 1}


def test_a_folder_or_a_pipe_is_no_file(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(DatabaseInvalid, match="is not a regular file"):
            read_json(path, DatabaseInvalid, "")
        with pytest.raises(DatabaseInvalid, match="is not a regular file"):
            read_table(path, RESULTS)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none", DatabaseInvalid, "")


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ("1", int),
        (True, int),
        (1.5, int),
        (-1, Count),
        (2**63, Count),
        (2**31, Size),
        ("a" * 63, Sha256),
        ("A" * 64, Sha256),
        ("a" * 64 + "\n", Sha256),
        ({"a": 1}, dict[str, str]),
        (None, str),
    ],
)
def test_values_of_other_types(raw: object, kind: Any) -> None:
    with pytest.raises(DatabaseInvalid, match=r"^x is damaged \(.*\); do this$"):
        as_type(raw, kind, Path("x"), DatabaseInvalid, "do this")
    assert msgspec.convert("a" * 64, Sha256) == "a" * 64


def test_an_error_is_one_printable_line() -> None:
    assert str(DatabaseInvalid("a\nb \x1b[31mred\ud800")) == r"a b \x1b[31mred\ud800"
    long = str(DatabaseInvalid("begins " + "x" * 90_000 + "; do this"))
    assert len(long) == 1000 and long.startswith("begins") and long.endswith("; do this")


# Read in one thread -------------------------------------------------------------------------------

THREADS = """
import os, sys
from pathlib import Path
from quambase.schema.errors import DatabaseInvalid, ScalesInvalid
from quambase.schema.tables import open_table
before = len(os.listdir("/proc/self/task"))
table, _ = open_table(Path(sys.argv[1]), DatabaseInvalid, "")
assert table.num_rows and len(os.listdir("/proc/self/task")) == before
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_a_table_is_read_without_threads_of_arrow(tmp_path: Path) -> None:
    """One that still held the file's bytes when Python ended aborted the process, one time in thirty."""
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({f"column {i}": range(200) for i in range(12)}), file)
    found = subprocess.run([sys.executable, "-c", THREADS, str(file)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("in_file", [False, True])
def test_a_parquet_file_that_states_too_many_rows_is_refused_before_memory_is_asked_for(
    tmp_path: Path, in_file: bool
) -> None:
    """8.2 * 10^9 rows in a part, which are 33 GB a column; in the whole file, too, or not."""
    path, rows = tmp_path / "x.parquet", 3931
    pq.write_table(pa.table({"value": pa.array(range(rows), pa.int32())}), path)

    def stated(number: int) -> bytes:
        """Thrift's field of 64 bits behind another: twice the number, seven bits a byte."""
        found, left = [], 2 * number
        while left:
            found.append(left & 127 | (128 if left > 127 else 0))
            left >>= 7
        return bytes([0x16, *found])

    whole = path.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")
    footer = whole[-8 - length : -8]
    before, _, after = footer.rpartition(stated(rows))
    footer = before + stated(8_253_832_155) + after
    if in_file:
        footer = footer.replace(stated(rows), stated(8_253_832_155), 1)
    path.write_bytes(whole[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    told = "states a size of 33,015,328,620 bytes" if in_file else "states 3,931 rows, and 8,253,832,155 in its parts"
    with pytest.raises(DatabaseInvalid, match=told):
        read_table(path, pa.schema([("value", pa.int32())]))
