"""`analyze --sweep`: which values, what each costs, which is best, and the picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fabricate import make_run

from quambase.analyzer.analyze import analyze
from quambase.analyzer.summary import summarize
from quambase.analyzer.sweep import Sweep, spaced, sweep
from quambase.cli.main import load_command
from quambase.schema.errors import DataInvalid, UnknownName
from quambase.schema.scale_table import read_scales


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    make_run(folder, sensitive=True)
    return folder


def test_values() -> None:
    assert spaced(1, 3, 5, falling=False) == [1, 1.5, 2, 2.5, 3]
    assert spaced(1, 1000, 4, falling=False) == [1, 10, 100, 1000]
    found = spaced(0.9, 0.9999, 7, falling=True)
    assert (found[0], found[-1]) == (0.9, 0.9999) and found == sorted(found)
    steps = np.diff(np.log10(1 - np.array(found)))
    assert np.allclose(steps, -0.5, atol=1e-3)  # four digits of each distance


@pytest.mark.parametrize(
    ("text", "parameter", "labels"),
    [
        ("percentile:0.9..0.99/2", "alpha", ["percentile:0.9", "percentile:0.99"]),
        ("sigma:2..4/3", "k", ["sigma:2", "sigma:3", "sigma:4"]),
        ("sigma:1e-1..1e1/3", "k", ["sigma:0.1", "sigma:1", "sigma:10"]),
        ("outlier_aware:0.95,100..120/2", "levels", ["outlier_aware:0.95,100", "outlier_aware:0.95,120"]),
    ],
)
def test_what_is_read(text: str, parameter: str, labels: list[str]) -> None:
    found = Sweep.parse(text)
    assert found.parameter == parameter and [choice.label for choice in found.choices] == labels


NO_SWEEPS = """percentile percentile:0.9/3 percentile:0.9..0.99 sigma:3..2/4 sigma:a..4/4 sigma:2..4/1 sigma:2..4/x
sigma:0..4/3 outlier_aware:0.9..0.99,100..120/4 sigma:2..nan/3 sigma:2..4/1000"""


@pytest.mark.parametrize("text", NO_SWEEPS.split())
def test_what_is_no_sweep_is_one_line(text: str) -> None:
    with pytest.raises(DataInvalid, match=r"the sweep is '.*'; expected"):
        Sweep.parse(text)


def test_names_and_bounds_are_those_of_labels() -> None:
    with pytest.raises(UnknownName, match="did you mean percentile"):
        Sweep.parse("percentil:0.9..0.99/3")
    with pytest.raises(UnknownName, match=r"expected 0 < alpha <= 1"):
        Sweep.parse("percentile:0.9..3/3")


def test_each_value_is_what_analyze_says(db: Path, tmp_path: Path) -> None:
    found = sweep("percentile:0.9..0.999/5", db, out=tmp_path / "s.parquet", picture=tmp_path / "s.svg")
    rows = found.table.to_pylist()
    assert [row["alpha"] for row in rows] == spaced(0.9, 0.999, 5, falling=True)
    for row in rows:
        (alone,) = summarize(analyze(db, strategies=[row["strategy"]], out=None).table).to_pylist()
        assert all(row[name] == alone[name] for name in row if name != "alpha")
    least = min(rows, key=lambda row: row["predicted_kl"])
    assert found.best == least and f"least predicted loss at alpha = {least['alpha']:.6g}" in found.summary[0]
    assert read_scales(tmp_path / "s.parquet").labels() == [row["strategy"] for row in rows]
    svg = (tmp_path / "s.svg").read_text()
    assert "1 - alpha" in svg and "predicted KL" in svg and "percentile: alpha from 0.9 to 0.999" in svg


def test_without_sensitivities_the_error_decides(tmp_path: Path) -> None:
    make_run(tmp_path / "db")
    found = sweep("sigma:1..20/4", tmp_path / "db")
    rows = found.table.to_pylist()
    assert found.best == max(rows, key=lambda row: row["sqnr_db_median"]) and found.picture is None
    assert len(found.summary) == 1 and "least error of the median scale" in found.summary[0]


def test_the_command(db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(load_command("analyze"), ["--db", str(db), "--sweep", "sigma:1..20/4", "--json"])
    assert done.exit_code == 0 and [row["strategy"] for row in json.loads(done.stdout)][-1] == "sigma:20"
    assert (tmp_path / "sweep.png").exists() and not (tmp_path / "scales.parquet").exists()
    assert "next: quambase analyze --strategy sigma:" in done.stderr
    for more, message in [(["--strategy", "mse"], "leave out --strategy"), (["--keep", "16bit=1"], "leave out")]:
        done = CliRunner().invoke(load_command("analyze"), ["--db", str(db), "--sweep", "sigma:1..20/4", *more])
        assert done.exit_code == 2 and message in done.output
    done = CliRunner().invoke(load_command("analyze"), ["--db", str(db), "--picture", "a.png"])
    assert done.exit_code == 2 and "--picture goes with --sweep" in done.output


@pytest.mark.parametrize("command", ["analyze", "runs", "stats"])
def test_json_is_format_json(db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--db", str(db), *(["--list"] if command == "analyze" else [])]
    answers = [
        CliRunner().invoke(load_command(command), [*arguments, *more]) for more in (["--json"], ["--format", "json"])
    ]
    assert answers[0].exit_code == 0 and json.loads(answers[0].stdout) and answers[0].stdout == answers[1].stdout
