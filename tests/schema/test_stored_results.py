"""Stored evaluations are read whatever version wrote them, and damaged ones are told."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fabricate import make_run

from quambase.schema.errors import DatabaseInvalid
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.results import read_results
from quambase.schema.tables import RESULTS

ABOUT = {"format_version": 1, "model": "m", "scales": "", "strategies": [], "tasks": [], "notes": []}


def store(database: Path, name: str, table: pa.Table) -> Path:
    folder = database / "results" / name
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "results.parquet")
    (folder / "evaluation.json").write_text(json.dumps(ABOUT | {"evaluation": name}))
    return folder


def rows(count: int, **more: object) -> pa.Table:
    return pa.Table.from_pylist([dict.fromkeys(RESULTS.names) | {"document": i} | more for i in range(count)], RESULTS)


def test_an_evaluation_from_before_clusters_has_none(tmp_path: Path) -> None:
    old = store(tmp_path, "old", rows(3, nll=1.5, evaluation="old").drop_columns("cluster"))
    new = store(tmp_path, "new", rows(2, nll=2.0, cluster="Emma", evaluation="new"))
    found = read_results(old)
    assert found.schema.equals(RESULTS) and found["cluster"].to_pylist() == [None] * 3
    assert found["nll"].to_pylist() == [1.5] * 3
    assert read_results(new)["cluster"].to_pylist() == ["Emma"] * 2
    make_run(tmp_path, "r")
    with StatsDB(tmp_path) as db:
        asked = db.sql("select evaluation, cluster, count(*) as n from results group by all order by n")
        assert [tuple(row.values()) for row in asked.to_pylist()] == [("new", "Emma", 2), ("old", None, 3)]


def test_another_table_in_its_place_is_told(tmp_path: Path) -> None:
    folder = store(tmp_path, "x", rows(1).drop_columns("nll"))
    with pytest.raises(DatabaseInvalid, match=r"has the columns evaluation, .*; expected evaluation, .*cluster"):
        read_results(folder)
    (folder / "results.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatabaseInvalid, match="is not a readable Parquet file"):
        read_results(folder)
    (folder / "results.parquet").unlink()
    with pytest.raises(DatabaseInvalid, match="is missing"):
        read_results(folder)
