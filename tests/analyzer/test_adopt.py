"""Edited scale tables: what is taken, what is computed anew, what is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from quambase.analyzer.adopt import adopt
from quambase.analyzer.analyze import analyze
from quambase.cli.main import quambase
from quambase.schema.errors import OutputRefused, ScalesInvalid, UnknownName
from quambase.schema.scale_table import read_scales


@pytest.fixture
def table(fabricated_database: Path, tmp_path: Path) -> Path:
    analyze(fabricated_database, strategies=["mse", "absmax", "outlier_piecewise"], out=tmp_path / "scales.parquet")
    return tmp_path / "scales.parquet"


def edited(path: Path, to: Path, **changes: Any) -> Path:
    """The rows in a file of another tool: without metadata; a function in ``changes`` makes a column from the row."""
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row |= {name: change(row) for name, change in changes.items()}
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path).remove_metadata()), to)
    return to


def test_a_table_that_was_not_changed_is_the_same_table(table: Path, fabricated_database: Path, tmp_path: Path) -> None:
    """The figures are computed anew by the analyzer's own arithmetic."""
    found = adopt(edited(table, tmp_path / "e.parquet"), fabricated_database)
    assert found.path == tmp_path / "e.parquet" and found.changed == 0
    assert str(read_scales(found.path).table.to_pylist()) == str(read_scales(table).table.to_pylist())
    assert read_scales(found.path).notes == ["the scale table was edited: adopted from e.parquet"]


def test_the_errors_of_changed_scales_are_computed_anew(table: Path, fabricated_database: Path, tmp_path: Path) -> None:
    def doubled(row: dict[str, Any]) -> float:
        return row["scale"] * (2 if (row["layer"], row["label"]) == (1, "mse") else 1)

    before = read_scales(table).table.to_pylist()
    found = adopt(edited(table, tmp_path / "e.parquet", scale=doubled), fabricated_database)
    after = read_scales(found.path).table.to_pylist()
    changed = [i for i, row in enumerate(before) if (row["layer"], row["label"]) == (1, "mse")]
    assert found.changed == len(changed) > 0
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        assert (new["mse"] > old["mse"]) == (i in changed) and new["amax"] == old["amax"]
        assert new["selected"] == old["selected"]  # as the editor left it


def test_a_csv_of_three_columns(table: Path, fabricated_database: Path, tmp_path: Path) -> None:
    rows = [row for row in pq.read_table(table).to_pylist() if row["label"] == "mse" and row["group_name"] == "all"]
    three = pa.Table.from_pylist(rows).select(["layer", "site", "scale"])
    pyarrow.csv.write_csv(three, tmp_path / "mine.csv")
    found = adopt(tmp_path / "mine.csv", fabricated_database)
    assert found.path == tmp_path / "mine.parquet"
    mine = read_scales(found.path)
    assert mine.labels() == ["edited"] and mine.scales_for("edited") == mine.scales_for("selected")
    assert [row["mse"] for row in mine.table.to_pylist()] == [row["mse"] for row in rows]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"scale": lambda row: 0.0},
            ScalesInvalid,
            r"scale 0.0 at layer 0 .* is not positive and finite; .*; and \d+ ",
        ),
        ({"scale": lambda row: float("nan")}, ScalesInvalid, "scale nan at layer 0"),
        ({"scale": lambda row: None}, ScalesInvalid, "scale None at layer 0"),
        ({"label": lambda row: "one"}, ScalesInvalid, "it has 2 rows of one for one scale|it has 3 rows of one"),
        ({"selected": lambda row: True}, ScalesInvalid, "selected rows for one scale"),
        ({"zero_point": lambda row: 5}, ScalesInvalid, "zero point 5 at layer 0 .*, expected 0, since no INT8 model"),
        ({"layer": lambda row: 77}, UnknownName, "unknown layer '77'"),
        (
            {"site": lambda row: "in_proj:inputs"},
            UnknownName,
            "unknown site 'in_proj:inputs' .* did you mean in_proj",
        ),
        ({"group_name": lambda row: "q"}, UnknownName, "unknown group 'q'"),
        ({"run": lambda row: "elsewhere"}, UnknownName, "unknown run 'elsewhere'"),
        (
            {"component_scales": lambda row: [-1.0, 1.0]},
            ScalesInvalid,
            "component scales .* is not positive and fini",
        ),
    ],
)
def test_what_is_odd_is_named(
    table: Path, fabricated_database: Path, tmp_path: Path, changes: Any, error: type[Exception], message: str
) -> None:
    path = edited(table, tmp_path / "e.parquet", **changes)
    content = path.read_bytes()
    with pytest.raises(error, match=message):
        adopt(path, fabricated_database)
    assert path.read_bytes() == content


def test_what_is_no_table(fabricated_database: Path, tmp_path: Path) -> None:
    with pytest.raises(ScalesInvalid, match=r"does not exist; expected a .parquet or .csv file with the columns layer"):
        adopt(tmp_path / "none.parquet", fabricated_database)
    for name, content in {"a.parquet": b"PAR1", "b.csv": b"", "c.csv": b"layer,site\n1,2\n"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ScalesInvalid, match=r"expected a .parquet or .csv file with the columns layer, site, scale"
        ):
            adopt(tmp_path / name, fabricated_database)
    (tmp_path / "d.csv").write_text("layer,site,scale\nx,in_proj:input,0.5\n")
    with pytest.raises(ScalesInvalid, match="has no column layer of type int32"):
        adopt(tmp_path / "d.csv", fabricated_database)


def test_strategies_that_lack_scales_are_named(table: Path, fabricated_database: Path, tmp_path: Path) -> None:
    rows = pq.read_table(table)
    fewer = rows.filter((pa.compute.field("label") != "absmax") | (pa.compute.field("layer") != 0))
    pq.write_table(fewer.replace_schema_metadata(None), tmp_path / "e.parquet")
    (line,) = [line for line in adopt(tmp_path / "e.parquet", fabricated_database).notes if "absmax" in line]
    assert "absmax has " in line and "scales that the INT8 model reads and the table has" in line


def test_another_file_is_not_replaced(table: Path, fabricated_database: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputRefused, match="is no scale table that quambase wrote"):
        adopt(table, fabricated_database, out=tmp_path / "notes.txt")


def test_the_command(table: Path, fabricated_database: Path, tmp_path: Path) -> None:
    path = edited(table, tmp_path / "e.parquet", scale=lambda row: row["scale"] * 1.5)
    done = CliRunner().invoke(quambase, ["adopt", str(path), "--db", str(fabricated_database)])
    assert done.exit_code == 0 and "scales had the errors of others: computed anew" in done.stderr, done.output
    assert f"next: quambase evaluate --scales {path}" in done.stderr and "mse" in done.stdout
