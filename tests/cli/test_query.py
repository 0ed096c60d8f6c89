"""`sql`, `stats`, `doctor`, `analyze` and `compare` as a user types them."""

from __future__ import annotations

import csv
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from fabricate import make_run, random_activations

from quambase.analyzer.converge import converge
from quambase.analyzer.pictures.plot import plot
from quambase.analyzer.site.compare import compare
from quambase.cli.main import load_command
from quambase.schema.scale_table import read_scales

SMALL = {(0, "in_proj:input"): random_activations()[0, "in_proj:input"]}


def run(name: str, *arguments: str | Path) -> Result:
    return CliRunner().invoke(load_command(name), [str(a) for a in arguments])


@pytest.mark.parametrize("name", ["sql", "stats", "doctor", "analyze", "compare"])
def test_help_ends_with_an_example_that_runs(name: str) -> None:
    command = load_command(name)
    lines = [line for line in (command.help or "").replace("\b", "").splitlines() if line.strip()]
    assert lines[-1].strip().startswith(f"quambase {name}")
    assert command.get_short_help_str()


def test_sql(fabricated_database: Path) -> None:
    done = run("sql", "--db", fabricated_database, "select run, count(*) as n from site_stats group by run")
    assert (done.exit_code, done.stderr) == (0, "run run-a\n")
    assert done.stdout.split() == ["run", "n", "-----", "--", "run-a", "32"]
    done = run("sql", "--db", fabricated_database, "--format", "json", "select 1 as a")
    assert json.loads(done.stdout) == [{"a": 1}]


def test_sql_from_a_file(fabricated_database: Path, tmp_path: Path) -> None:
    (tmp_path / "q.sql").write_text("-- the run\nselect run from runs;\n")
    done = run("sql", "--db", fabricated_database, "-f", tmp_path / "q.sql", "--format", "csv")
    assert list(csv.reader(done.stdout.splitlines())) == [["run"], ["run-a"]]


def test_sql_lists_views_and_columns(fabricated_database: Path) -> None:
    done = run("sql", "--db", fabricated_database, "--schema", "--format", "json")
    rows = json.loads(done.stdout)
    assert {"site_stats", "counts", "scales", "quantile(p)"} <= {r["view"] for r in rows}
    assert all(r["comment"] for r in rows)


def test_show_sql_prints_what_runs(fabricated_database: Path) -> None:
    query = "select count(*) as n from outlier_channels"
    done = run("sql", "--db", fabricated_database, "--show-sql", "--format", "csv", query)
    assert done.stdout.splitlines()[0] == '"n"'
    lines = done.stderr.splitlines()
    assert "CREATE VIEW outlier_channels AS" in lines and "CREATE VIEW channel_stats AS" in lines and query in lines
    done = run("stats", "--db", fabricated_database, "--show-sql", "--limit", "1", "--format", "csv")
    assert "-- $limit = 1" in done.stderr.splitlines() and len(done.stdout.splitlines()) == 2


def test_sql_errors_are_one_line(fabricated_database: Path, tmp_path: Path) -> None:
    done = run("sql", "--db", fabricated_database, "select * from site_stat")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: unknown view 'site_stat'; did you mean site_stats or") and done.stdout == ""
    assert done.stderr.count("\n") == 1
    done = run("sql", "--db", fabricated_database, f"copy counts to '{tmp_path}/x.csv'")
    assert done.exit_code == 1 and "--unsafe lifts that" in done.stderr and list(tmp_path.iterdir()) == []
    done = run("sql", "--db", fabricated_database, "--unsafe", f"copy (select 1) to '{tmp_path}/x.csv'")
    assert done.exit_code == 0 and (tmp_path / "x.csv").exists()
    assert run("sql", "--db", fabricated_database).exit_code == 2
    assert run("sql", "--db", fabricated_database, "--schema", "select 1").exit_code == 2
    done = run("sql", "--db", tmp_path / "none", "select 1")
    assert done.exit_code == 1 and "there is no database at" in done.stderr


def test_stats(fabricated_database: Path) -> None:
    done = run("stats", "--db", fabricated_database, "--site", "x_proj:input", "--limit", "1", "--format", "json")
    rows = json.loads(done.stdout)
    assert len(rows) == 1 and rows[0]["site"] == "x_proj:input"
    done = run("stats", "--db", fabricated_database, "--layer", "5")
    assert done.exit_code == 1 and "unknown layer '5'" in done.stderr


def test_doctor(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "good", SMALL)
    (tmp_path / "runs" / "half").mkdir()
    done = run("doctor", "--db", tmp_path, "--format", "json")
    report = {(r["check"], r["subject"]): r["status"] for r in json.loads(done.stdout)}
    assert done.exit_code == 0
    assert (report["run", "good"], report["run", "half"], report["values", "good"]) == ("ok", "note", "ok")
    path = folder / "counts" / "part-002.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    done = run("doctor", "--db", tmp_path)
    assert done.exit_code == 1 and "altered or cut short" in " ".join(done.stdout.split())
    assert "1 of " in done.stderr and "checks are bad, first: run good" in " ".join(done.stderr.split())


def test_doctor_names_values_that_are_not_finite(tmp_path: Path) -> None:
    activations = {(0, "in_proj:input"): {"all": [a.copy() for a in SMALL[0, "in_proj:input"]["all"]]}}
    activations[0, "in_proj:input"]["all"][0][0, 0] = float("nan")
    make_run(tmp_path, "r", activations)
    done = run("doctor", "--db", tmp_path)
    assert done.exit_code == 1 and "1 NaN or infinite" in done.stdout


def test_analyze(fabricated_database: Path, tmp_path: Path) -> None:
    out = tmp_path / "scales.parquet"
    done = run("analyze", "--db", fabricated_database, "--out", out, "--strategy", "mse", "--strategy", "absmax")
    assert done.exit_code == 0, done.stderr
    table, columns = done.stdout.splitlines(), ["*", "mse", "absmax"]
    assert [word for line in table[2:] for word in line.split() if word in columns] == columns  # best first, starred
    assert f"written: {out}" in done.stderr and "replaced" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"next: quambase evaluate --scales {out} --db {fabricated_database}"
    assert read_scales(out).labels() == ["mse", "absmax"]
    done = run("analyze", "--db", fabricated_database, "--out", out, "--strategy", "msse")
    assert done.exit_code == 1 and "unknown strategy 'msse'; did you mean mse" in done.stderr


def test_analyze_lists_definitions() -> None:
    rows = json.loads(run("analyze", "--list", "--format", "json").stdout)
    assert {"mse", "quamba", "percentile", "outlier_piecewise"} <= {r["strategy"] for r in rows}
    assert all(r["definition"] for r in rows)


def test_compare(fabricated_database: Path, tmp_path: Path) -> None:
    picture = tmp_path / "c.png"
    arguments = ["--db", fabricated_database, "--site", "x_proj:input", "--layer", "1", "--picture", picture]
    done = run("compare", *arguments, "--value", "1", "--value", "-2.5")
    assert done.exit_code == 0, done.stderr
    assert picture.exists() and f"written: {picture}" in done.stderr
    assert done.stdout.startswith("layer 1 x_proj:input of run run-a\n")
    assert re.search(r"least MSE with one INT8 scale: mse(_affine)? \(MSE ", done.stderr) and "least" not in done.stdout
    done = run("compare", *arguments, "--no-picture", "--table", "values", "--value", "3", "--format", "json")
    assert {r["value"] for r in json.loads(done.stdout)} == {3.0}
    assert run("compare", *arguments, "--value", "a").exit_code == 2


def test_compare_to_a_file(fabricated_database: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    done = run("compare", "--db", fabricated_database, "--no-picture", "--format", "parquet", "--out", path)
    assert done.exit_code == 0, done.stderr
    assert "mse_change_percent" in pq.read_table(path).column_names


def test_none_of_them_needs_torch(fabricated_database: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from quambase.cli.main import load_command\n"
        "load_command(sys.argv[1])(sys.argv[2:])"
    )
    for command in (["sql", "select 1"], ["stats"], ["doctor"], ["analyze", "--out", "s"], ["compare", "--no-picture"]):
        line = [sys.executable, "-c", program, *command, "--db", str(fabricated_database)]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def parameters(name: str) -> tuple[set[str], set[str]]:
    """The options and arguments of a command, and the parameters of its function that have a name."""
    command = load_command(name)
    callback = command.callback
    assert callback is not None
    while hasattr(callback, "__wrapped__"):
        callback = callback.__wrapped__
    names = {str(p.name) for p in command.params if isinstance(p, click.Parameter) and p.expose_value}
    return names, set(callback.__code__.co_varnames[: callback.__code__.co_argcount])


def test_every_parameter_reaches_its_function() -> None:
    # click passes parameters by name: a command whose options and arguments differ fails only when it is run.
    for name in ("sql", "stats", "doctor", "analyze"):
        names, taken = parameters(name)
        # The output options use up --force themselves, where a command has no use for it.
        assert names - {"force"} == taken - {"force"}


@pytest.mark.parametrize(("name", "function"), [("compare", compare), ("converge", converge), ("plot", plot)])
def test_what_a_command_hands_on_its_function_takes(name: str, function: Callable[..., object]) -> None:
    names, taken = parameters(name)
    assert taken <= names
    handed_on = names - taken
    assert handed_on and handed_on <= inspect.signature(function).parameters.keys()


def test_a_reader_that_stops_reading_is_no_error(fabricated_database: Path) -> None:
    """As of `quambase stats | head -0`: nothing on stderr but what a whole reading has there, too."""
    script = "from quambase.cli.main import quambase; quambase()"
    line = [sys.executable, "-c", script, "stats", "--db", str(fabricated_database)]
    whole = subprocess.run(line, capture_output=True, text=True, check=True)
    assert whole.stdout
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() in ("", whole.stderr)
