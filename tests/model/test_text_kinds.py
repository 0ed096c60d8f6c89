"""What is in a file of texts, to the character: every kind of file, written by others than its reader."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quambase.model.inputs import text
from quambase.model.inputs.text import read_documents
from quambase.schema.errors import DataInvalid, QuambaseError

VALUES = [
    "one, two",
    "",
    "true",
    "007",
    "1e5",
    "2024-01-01",
    "null",
    "NaN",
    'a "b" c',
    "drei\nvier\r\nfünf",
    " x\t",
    "日本",
]

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 516567560\n"


def texts(data: Path | str, limit: int | None = None) -> list[str]:
    return [document.text for document in read_documents(str(data), limit)]


def refusal(data: Path) -> str:
    with pytest.raises(DataInvalid) as error:
        texts(data)
    message = str(error.value)
    assert message.isprintable() and data.name in message, message
    return message


def as_jsonl(values: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": i, "text": v}, ensure_ascii=i % 2 == 0) + "\n" for i, v in enumerate(values)
    ).encode()


def as_array(values: list[str]) -> bytes:
    return json.dumps([{"text": v, "more": [{"x": [1, None]}, "]"]} for v in values]).encode()


def as_pretty(values: list[str]) -> bytes:
    return json.dumps([{"text": v, "n": {"text": 3}} for v in values], indent=2, ensure_ascii=False).encode()


def as_csv(values: list[str]) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["id", "text"], *([i, v] for i, v in enumerate(values))])
    return out.getvalue().encode()


def as_semicolons(values: list[str]) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=";", lineterminator="\n").writerows(
        [["text", "id"], *([v, i] for i, v in enumerate(values))]
    )
    return out.getvalue().encode()


def as_parquet(values: list[str], type_: pa.DataType | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"id": range(len(values)), "text": pa.array(values, type_ or pa.string())})
    pyarrow.parquet.write_table(table, sink, row_group_size=5)
    return sink.getvalue().to_pybytes()


WRITERS: dict[str, tuple[str, Callable[[list[str]], bytes]]] = {
    "jsonl": ("a.jsonl", as_jsonl),
    "array": ("a.json", as_array),
    "pretty": ("a.json", as_pretty),
    "lines": ("a.json", as_jsonl),
    "csv": ("a.csv", as_csv),
    "semicolons": ("a.csv", as_semicolons),
    "parquet": ("a.parquet", as_parquet),
    "large": ("a.parquet", lambda values: as_parquet(values, pa.large_string())),
    "categories": ("a.parquet", lambda values: as_parquet(values, pa.dictionary(pa.int32(), pa.string()))),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("packer", PACKERS)
def test_a_text_is_what_the_file_says(tmp_path: Path, kind: str, packer: str) -> None:
    name, write = WRITERS[kind]
    if packer and name == "a.parquet":
        (tmp_path / f"{name}{packer}").write_bytes(PACKERS[packer](write(VALUES)))
        assert "cannot be read as parquet" in refusal(tmp_path / f"{name}{packer}")
        return
    (tmp_path / f"{name}{packer}").write_bytes(PACKERS[packer](write(VALUES)))
    assert texts(tmp_path / f"{name}{packer}") == VALUES
    assert texts(tmp_path / f"{name}{packer}", 3) == VALUES[:3]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30), max_size=12),
    st.integers(1, 40),
)
def test_any_text_comes_back_from_any_kind(
    tmp_path_factory: pytest.TempPathFactory, values: list[str], piece: int
) -> None:
    """With pieces of a few bytes, which end within a character, a number, a value."""
    folder = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE", piece)
        for kind, (name, write) in WRITERS.items():
            if kind in ("csv", "semicolons") and any("\r" in v and "\n" not in v for v in values):
                continue  # Python's csv module writes a lone carriage return without quotes
            (folder / name).write_bytes(write(values))
            assert texts(folder / name) == values, kind


LIKE_PATTERNS = ["why?.jsonl", "data[1].jsonl", "a*.jsonl", "d[1]/t.jsonl", "{a,b}.csv", "%20.jsonl"]
LIKE_PARTITIONS = ["text=zzz/x.csv", "text=zzz/x.parquet", "text=zzz/x.jsonl"]


@pytest.mark.parametrize("name", [*LIKE_PATTERNS, *LIKE_PARTITIONS, "s3:/b.jsonl", "file:/b.parquet"])
def test_the_named_file_is_read_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write = {".jsonl": as_jsonl, ".csv": as_csv, ".parquet": as_parquet}[Path(name).suffix]
    for other in ("whyX.jsonl", "data1.jsonl", "ab.jsonl", "a.jsonl", "d1/t.jsonl", "a.csv", "b.csv", " .jsonl"):
        Path(other).parent.mkdir(exist_ok=True)
        Path(other).write_bytes(as_jsonl(["other"]) if other.endswith("jsonl") else as_csv(["other"]))
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(write(["mine", "too"]))
    assert texts(name) == ["mine", "too"]
    assert texts(tmp_path / name) == ["mine", "too"]


NOT_TEXT: dict[str, list[object]] = {
    "chat": [[{"role": "user", "content": "hello"}]],
    "ids": [[1, 2, 3]],
    "object": [{"content": "hello"}],
    "numbers": [42, 43],
    "fractions": [1.5],
    "booleans": [True, False],
}


@pytest.mark.parametrize("column", ["text", "messages"])
@pytest.mark.parametrize("kind", NOT_TEXT)
def test_a_column_that_is_no_text_is_refused_alike(tmp_path: Path, kind: str, column: str) -> None:
    rows = [{column: value} for value in NOT_TEXT[kind]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        message = refusal(tmp_path / name)
        assert f"in column {column}" in message and "expected text (a string" in message
    word = {"chat": "a list", "ids": "a list", "object": "an object", "booleans": "true or false"}.get(kind, "a number")
    assert f"holds {word} in column {column}, line 1;" in refusal(tmp_path / "a.jsonl")


def test_binary_parquet_is_no_text(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"text": [b"bytes"]}), tmp_path / "a.parquet")
    assert "holds binary in column text" in refusal(tmp_path / "a.parquet")


def test_one_number_among_texts_is_named_by_its_line(tmp_path: Path) -> None:
    lines = [json.dumps({"text": value}) for value in ["a\nb", "c", 42, "d"]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert "holds a number in column text, line 3" in refusal(tmp_path / "a.jsonl")
    assert texts(tmp_path / "a.jsonl", 2) == ["a\nb", "c"], "no more is read than was asked for"


def test_rows_without_a_text_are_empty_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{}\n\n{"text": null}\n{"text": "x", "id": 1}\n{"id": 2}\n')
    assert texts(tmp_path / "a.jsonl") == ["", "", "", "x", ""]
    (tmp_path / "b.jsonl").write_text('{"content": "x"}\n{}\n{"content": null}\n{"content": "y", "text": "z"}\n')
    assert texts(tmp_path / "b.jsonl", 3) == ["x", "", ""]
    assert "has the columns content, text in line 4, and only content before it" in refusal(tmp_path / "b.jsonl")
    (tmp_path / "c.csv").write_text('text\nx\n\n"a, b"\n')
    assert texts(tmp_path / "c.csv") == ["x", "", "a, b"]
    (tmp_path / "d.csv").write_text("id,text\n1,x\n\n2,y\n")
    assert texts(tmp_path / "d.csv") == ["x", "y"]


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    content = {"a.txt": b"one two", "a.csv": b"text\none two\n"}.get(name, as_jsonl(["one two"]))
    for packer, pack in PACKERS.items():
        (tmp_path / f"{name}{packer}").write_bytes(pack(b"\xef\xbb\xbf" + content))
        assert texts(tmp_path / f"{name}{packer}") == ["one two"]
    (tmp_path / "later.txt").write_bytes("one\n\n\ufefftwo".encode())
    assert texts(tmp_path / "later.txt") == ["one", "\ufefftwo"], "elsewhere it is a character"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "one.csv", "a.jsonl", "a.json"])
def test_another_encoding_is_refused_with_reason_and_line(tmp_path: Path, name: str, encoding: str) -> None:
    content = {
        "a.txt": "tea\ncafé\n",
        "a.csv": "id,text\n1,café\n",
        "one.csv": "text\ncafé\n",
        "a.json": '[\n{"text": "café"}]',
    }
    (tmp_path / name).write_bytes(content.get(name, '{"text": "tea"}\n{"text": "café"}\n').encode(encoding))
    message = refusal(tmp_path / name)
    # Without a mark, UTF-16 of plain English is UTF-8 with NUL characters.
    if encoding == "latin-1":
        assert "is not UTF-8 text (invalid continuation byte in line 2); convert it" in message
    else:
        assert "line 1" in message and ("not UTF-8" in message or "Expecting" in message)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
@pytest.mark.parametrize("packer", [".gz", ".zst", ".xz"])
def test_a_damaged_archive_is_refused(tmp_path: Path, name: str, packer: str) -> None:
    rng = random.Random(0)
    values = [" ".join(str(rng.random()) for _ in range(30)) for _ in range(60)]
    plain = {"a.txt": "\n\n".join(values).encode(), "a.csv": as_csv(values), "a.json": as_array(values)}.get(
        name, as_jsonl(values)
    )
    content = PACKERS[packer](plain)
    path = tmp_path / f"{name}{packer}"
    cut = [content[: len(content) // 2], content[:3], b"\0" + content[1:]]
    if packer != ".zst":  # which has no checksum unless it is asked for
        cut.append(content[:200] + bytes(40) + content[240:])
    for damaged in cut:
        path.write_bytes(damaged)
        refusal(path)


def test_what_cannot_be_parsed_is_refused_in_a_line(tmp_path: Path) -> None:
    cases = {
        "cut.json": ('[{"text": "x"}', "the list does not end"),
        "comma.json": ('[{"text": "x"} {"text": "y"}]', "Expecting a comma"),
        "double.json": ('[{"text": "x"},,{"text": "y"}]', "Expecting value"),
        "deep.jsonl": ('{"text": "x", "more": ' + "[" * 100_000, "nested too deep"),
        "string.jsonl": ('"just a string"\n', "a string; expected objects with a text column"),
        "list.json": ("[[1], [2]]", "Expecting|a list"),
        "half.jsonl": ('{"text": "\\ud83d"}\n', "half of a surrogate pair in document 0"),
        "digits.jsonl": ('{"text": ' + "9" * 9999 + "}\n", "holds a number in column text"),
        "many.csv": ("text\nhello, world\n", "has 2 fields in line 2; expected 1"),
        "few.csv": ("id,text\n1\n", "has 1 fields in line 2; expected 2"),
        "quote.csv": ('id,text\n1,"x\n2,y\n', "cannot be read as csv"),
        "nothing.csv": ("", "has the columns none"),
        "two.csv": ("text,text\na,b\n", "has the columns text, text"),
        "escape\x1b.csv": ("a\x1b[2J,b\n1,2\n", r"has the columns a\?\[2J, b"),
        "pointer.jsonl": (POINTER, "Git LFS pointer.*git lfs pull"),
        "pointer.txt": (POINTER, "Git LFS pointer.*git lfs pull"),
    }  # fmt: skip
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataInvalid, match=message) as error:
            texts(tmp_path / name)
        assert "\n" not in str(error.value)


def test_long_digits_in_another_column_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "id": ' + "9" * 9999 + ', "n": NaN}\n')
    assert texts(tmp_path / "a.jsonl") == ["x"]


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json", "a.parquet"])
def test_a_text_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(text, "LONGEST", 5000)
    write = {"a.csv": as_csv, "a.json": as_array, "a.parquet": as_parquet}.get(name, as_jsonl)
    for long in ("x" * 20_000, "x\n" * 10_000):
        (tmp_path / name).write_bytes(("short\n\n" + long).encode() if name == "a.txt" else write(["short", long]))
        assert texts(tmp_path / name, 1) == ["short"]
        with pytest.raises(DataInvalid, match=r"more than 5,000 characters|no complete value in 5,000 characters"):
            texts(tmp_path / name)


def test_a_large_file_of_many_lines_takes_time_in_proportion(tmp_path: Path) -> None:
    """A value over many lines is not read again with every line: 200,000 of them would take minutes."""
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x", "ids": list(range(200_000))}, {"text": "y"}], indent=1))
    assert texts(tmp_path / "a.json") == ["x", "y"]


def test_folders_and_devices_are_no_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    assert "is not a file" in refusal(tmp_path / "a.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    assert "is not a file" in refusal(tmp_path / "zero.txt")


SEEDS = [as_jsonl(VALUES), as_array(VALUES), as_csv(VALUES), as_parquet(VALUES), gzip.compress(as_jsonl(VALUES))]


@settings(max_examples=250, deadline=None)
@given(
    st.one_of(st.binary(max_size=200), st.sampled_from(SEEDS)),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3), st.integers(0, 5)), max_size=4),
    st.sampled_from(["a.txt", "a.csv", "a.jsonl", "a.json", "a.parquet", "a.txt.gz", "a.jsonl.zst", "a.csv.xz"]),
)
@example(b'{"text": [', [], "a.json")
def test_any_bytes_are_texts_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, changes: list[tuple[float, bytes, int]], name: str
) -> None:
    for where, inserted, removed in changes:
        place = int(where * len(content))
        content = content[:place] + inserted + content[place + removed :]
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(content)
    try:
        assert all(isinstance(found, str) for found in texts(path))
    except QuambaseError as error:
        assert str(error).isprintable()
