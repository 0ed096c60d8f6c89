"""The book, topic or file that a text is a part of, as files of every kind name it."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quambase.model.inputs.text import CLUSTER_COLUMNS, read_documents


def clusters(path: Path | str) -> list[str | None]:
    return [document.cluster for document in read_documents(str(path))]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", CLUSTER_COLUMNS)
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    texts, books = ["one", "two", "three"], ["Emma", "", "Persuasion"]
    rows = [{"id": i, "text": t, name: b} for i, (t, b) in enumerate(zip(texts, books, strict=True))]
    write_jsonl(tmp_path / "t.jsonl", rows)
    (tmp_path / "t.json").write_text(json.dumps(rows))
    (tmp_path / "t.csv").write_text(f"{name},text\n" + "".join(f"{b},{t}\n" for t, b in zip(texts, books, strict=True)))
    pq.write_table(pa.table({"text": texts, name: pa.array(books).dictionary_encode()}), tmp_path / "t.parquet")
    for kind in ("jsonl", "json", "csv", "parquet"):
        found = list(read_documents(str(tmp_path / f"t.{kind}")))
        assert [d.cluster for d in found] == ["Emma", None, "Persuasion"], kind
        assert [d.text for d in found] == texts


def test_the_first_column_that_has_a_value_counts(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "file": "f", "book": "b", "cluster": "c"},
        {"text": "a", "file": "f", "book": "b", "cluster": None},
        {"text": "a", "file": "f", "book": ["no", "name"]},
        {"text": "a", "file": True},
        {"text": "a", "other": "x"},
        {"text": "a", "topic": 7},
        {"text": "a", "topic": 7.5},
        {"text": "a", "topic": "  "},
        {"text": "a", "topic": "\ud800"},
    ]
    assert clusters(write_jsonl(tmp_path / "t.jsonl", rows)) == ["c", "b", "f", None, None, "7", "7.5", None, "\\ud800"]


def test_numbers_and_what_is_missing_in_parquet(tmp_path: Path) -> None:
    texts = ["a"] * 4
    pq.write_table(pa.table({"text": texts, "book": [3, None, 3, 4], "source": [[1]] * 4}), tmp_path / "i.parquet")
    assert clusters(tmp_path / "i.parquet") == ["3", None, "3", "4"]
    floats = pa.array([3.0, float("nan"), float("nan"), None])  # as pandas writes missing numbers
    pq.write_table(pa.table({"text": texts, "book": floats}), tmp_path / "f.parquet")
    assert clusters(tmp_path / "f.parquet") == ["3", None, None, None]


def test_a_column_that_is_the_text_names_no_cluster(tmp_path: Path) -> None:
    assert clusters(write_jsonl(tmp_path / "t.jsonl", [{"source": "a b"}, {"source": "c d"}])) == [None, None]
    (tmp_path / "t.csv").write_text("source\nx y\nz\n")
    assert clusters(tmp_path / "t.csv") == [None, None]
    pq.write_table(pa.table({"file": ["x", "y"]}), tmp_path / "t.parquet")
    assert clusters(tmp_path / "t.parquet") == [None, None]
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    assert clusters(tmp_path / "t.txt") == [None, None]


def test_a_long_name_goes_by_its_hash(tmp_path: Path) -> None:
    long = "é" * 101
    rows = [{"text": "a", "source": long}, {"text": "b", "source": "é" * 100}]
    assert clusters(write_jsonl(tmp_path / "t.jsonl", rows)) == [
        hashlib.sha256(long.encode()).hexdigest(),
        "é" * 100,
    ]


@pytest.mark.parametrize("data", ["python-docs:calibration", "python-docs:evaluation"])
def test_a_passage_of_the_language_reference_is_of_its_topic(data: str) -> None:
    by_topic = defaultdict(list)
    for document in read_documents(data):
        assert document.cluster is not None and document.text in topics[document.cluster]
        by_topic[document.cluster].append(document.text)
    assert len(by_topic) > 30 and max(map(len, by_topic.values())) > 10


def test_the_bundled_sample_has_none() -> None:
    assert set(clusters("sample:evaluation")) == {None}
