# mypy: disable-error-code="misc"
"""Runs of format version 1, whose tables are single files, answer every command as those of version 2 do."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from fabricate import make_run, random_activations
from stored_runs import stored_table, table_files

from quambase.cli.main import quambase
from quambase.schema import RUN_FORMAT_VERSION
from quambase.schema.errors import DatabaseInvalid, ScalesInvalid
from quambase.schema.files import check_format_version
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.manifest import Manifest, TableFile, table_of
from quambase.schema.stored.runs import read_run_table
from quambase.schema.tables import RUN_TABLES


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same run in version 1 and in version 2."""
    found = []
    for version in (1, RUN_FORMAT_VERSION):
        database = tmp_path_factory.mktemp(f"version{version}")
        make_run(database, format_version=version)
        found.append(database)
    return found


def test_the_versions_differ_in_their_files_only(databases: list[Path]) -> None:
    first, second = (database / "runs" / "run-a" for database in databases)
    assert sorted(path.name for path in first.iterdir()) == sorted([*(f"{t}.parquet" for t in RUN_TABLES), "run.json"])
    assert [len(table_files(second, name)) for name in ("counts", "documents", "groups")] == [3, 2, 1]
    assert [json.loads((folder / "run.json").read_text())["format_version"] for folder in (first, second)] == [1, 2]


def in_one_order(table: pa.Table) -> list[str]:
    """Its rows; the views have NULL for NaN."""
    return sorted(repr({k: None if v != v else v for k, v in row.items()}) for row in table.to_pylist())


@pytest.mark.parametrize("name", RUN_TABLES)
def test_every_table_has_the_same_rows(databases: list[Path], name: str) -> None:
    found = []
    for database in databases:
        folder = database / "runs" / "run-a"
        table = read_run_table(folder, Manifest.load(folder), name)
        assert repr(table.to_pylist()) == repr(stored_table(folder, name).to_pylist())
        with StatsDB(database) as db:
            assert in_one_order(db.sql(f"select * from {name}").table) == in_one_order(table)
        found.append(in_one_order(table))
    assert found[0] == found[1]


def test_distributions_and_documents_are_the_same(databases: list[Path]) -> None:
    first, second = (StatsDB(database) for database in databases)
    for (*key, mine), (*other, theirs) in zip(
        first.distributions("run-a", "group"), second.distributions("run-a", "group"), strict=True
    ):
        assert key == other and mine.values.tolist() == theirs.values.tolist()
        assert mine.counts.tolist() == theirs.counts.tolist()
    one, two = first.documents("run-a"), second.documents("run-a")
    assert one.keys() == two.keys()
    for place, series in one.items():
        assert series.documents.tolist() == two[place].documents.tolist()
        assert series.amax.tolist() == two[place].amax.tolist()


@pytest.mark.parametrize(
    "command",
    [
        ["sql", "select count(*), sum(count), sum(value * count) from counts"],
        ["sql", "select * from quantile(0.99) order by all"],
        ["stats", "--format", "json"],
        ["analyze", "--strategy", "all", "--granularity", "group", "--out", "OUT", "--format", "json"],
        ["compare", "--site", "x_proj:input", "--layer", "1", "--table", "strategies", "--format", "json"],
        ["doctor", "--format", "json"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_every_command_answers_the_same(
    databases: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    answers = []
    for number, database in enumerate(databases):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        words = [str(folder / "scales.parquet") if word == "OUT" else word for word in command]
        done = CliRunner().invoke(quambase, [*words, "--db", str(database)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        answers.append(done.stdout.replace(f"version{1 if number == 0 else 2}", "version"))
        if (folder / "scales.parquet").exists():
            answers[-1] += str((folder / "scales.parquet").read_bytes())
    if command[0] == "doctor":  # sizes differ
        answers = [[(r["subject"], r["status"]) for r in json.loads(answer)] for answer in answers]
    assert answers[0] and answers[0] == answers[1]


def test_a_newer_version_is_refused_in_one_line() -> None:
    assert check_format_version(Path("x"), 1, 2) == 1 and check_format_version(Path("x"), 2, 2) == 2
    for found in (3, None, "1", 1.0):
        with pytest.raises(ScalesInvalid, match=f"^x has format version {found}; this quambase reads up to 2: upgrade"):
            check_format_version(Path("x"), found, 2, ScalesInvalid)


@pytest.mark.parametrize(
    ("file", "table"),
    [("counts.parquet", "counts"), ("counts/part-000.parquet", "counts"), ("site_stats.parquet", "site_stats")],
)
def test_the_table_of_a_file(file: str, table: str) -> None:
    assert table_of(file) == table


@pytest.mark.parametrize(
    "name",
    ["/etc/x.parquet", "../x.parquet", "counts/../../x.parquet", "a.parquet/../../x.parquet", "a/b/c.parquet", "x"],
)
def test_a_file_out_of_the_run_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path, "r", {(0, "in_proj:input"): random_activations()[0, "in_proj:input"]})
    manifest = Manifest.load(folder)
    manifest.tables[name] = TableFile(1, "0" * 64)
    manifest.save(folder)
    with pytest.raises(DatabaseInvalid, match=r"run.json is damaged \(Expected `str` matching .* in `\$\.tables`\)"):
        Manifest.load(folder)
