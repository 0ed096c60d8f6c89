import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from quambase.model.inputs.sample import last_word_passages
from quambase.model.inputs.text import read_documents
from quambase.schema.errors import DataInvalid

TEXTS = ["one two", "", "drei\nvier “fünf”", 'a, "quoted" text', "last"]


def texts(data: Path | str, limit: int | None = None) -> list[str]:
    return [document.text for document in read_documents(str(data), limit)]


def jsonl() -> bytes:
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)).encode()


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstd)], ids=["plain", "gz", "zst"]
)
def test_tables_of_text_in_file_order(tmp_path: Path, suffix: str, pack: object) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(jsonl()))
    assert texts(tmp_path / f"a.jsonl{suffix}") == TEXTS
    assert texts(tmp_path / f"a.jsonl{suffix}", 3) == TEXTS[:3]
    sink = pa.BufferOutputStream()
    pyarrow.csv.write_csv(pa.table({"id": range(5), "text": TEXTS}), sink)
    (tmp_path / f"a.csv{suffix}").write_bytes(pack(sink.getvalue().to_pybytes()))
    assert texts(tmp_path / f"a.csv{suffix}") == TEXTS


def test_parquet_with_a_null_and_a_differently_named_single_column(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"content": ["x", None, "z"]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["x", "", "z"]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".zst", zstd), (".xz", lzma.compress)],
    ids=["plain", "gz", "zst", "xz"],
)
def test_plain_text_is_split_at_blank_lines(tmp_path: Path, suffix: str, pack: object) -> None:
    content = "\n\nfirst line\nsecond line\n \n\nnext ü\r\n\r\nlast"
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(content.encode()))
    assert texts(tmp_path / f"a.txt{suffix}") == ["first line\nsecond line", "next ü", "last"]


def test_documents_carry_their_number_and_hash(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    found = list(read_documents(str(tmp_path / "a.jsonl")))
    assert [d.index for d in found] == [0, 1, 2, 3, 4]
    # The hash of the empty text is SHA-256's well-known value for no input.
    assert found[1].sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "cannot be read as JSON .*line 3"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "has the columns body, id; expected one called text"),
        ("a.parquet", b"PAR1 nothing", "cannot be read as parquet"),
        ("a.txt", b"ok\n\xff\xfe\n", "not UTF-8"),
        ("a.txt.gz", gzip.compress(b"x" * 100000)[:60], "may be cut short"),
        ("a.pdf", b"x", "unknown kind"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataInvalid, match=message) as error:
        texts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_unknown_names_and_missing_files() -> None:
    with pytest.raises(DataInvalid, match=r"no file sample:calibratoin here.*did you mean sample:calibration"):
        texts("sample:calibratoin")
    with pytest.raises(DataInvalid, match="form hf:REPOSITORY:FILE"):
        texts("hf:nothing")


def test_bundled_parts_are_disjoint_and_hold_what_they_promise() -> None:
    calibration, evaluation = texts("sample:calibration"), texts("sample:evaluation")
    assert calibration.count("") == 2 and "" not in evaluation
    assert not set(calibration) & set(evaluation)
    assert any(0 < len(t) < 60 for t in calibration)
    written = " ".join(evaluation).split()
    for passage in texts("sample:last-word"):
        context, _, word = passage.rpartition(" ")
        assert word in passage.split()[-1] and word.isalpha() and word in context
    assert len(written) > 50_000


def test_real_text_is_there_without_a_download_and_its_halves_are_disjoint() -> None:
    first, second = texts("python-docs:calibration"), texts("python-docs:evaluation")
    assert not set(first) & set(second)
    assert "assert" in first[0] and len(first) > 50 and len(second) > 50
    assert all(0 < len(text) for text in first + second)
    assert max(map(len, first + second)) < 10_000, "a topic was not cut"


def test_last_word_passages_end_in_a_word_seen_before() -> None:
    text = (
        "The cat sat on a mat in the sun all day long and was glad. " + "It then ran and ran to see the old grey cat!"
    )
    assert last_word_passages(text) == [text[:-1]]
    assert last_word_passages("Too short. A short.") == []
    assert last_word_passages(text.replace("grey cat", "grey dog")) == []
