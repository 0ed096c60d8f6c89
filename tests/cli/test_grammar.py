"""What holds for every command: -h, --debug, completion, names checked at once; also `quambase` alone, `runs`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fabricate import make_run

from quambase.cli.main import COMMANDS, quambase
from quambase.schema.scale_table import read_scales


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(quambase, [str(a) for a in arguments])


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_command_has_both_helps(name: str) -> None:
    words = [name] if name else []
    short, long = invoke(*words, "-h"), invoke(*words, "--help")
    assert short.exit_code == 0 and short.stdout == long.stdout and "Example:" in short.stdout
    assert "--debug" in short.stdout


@pytest.mark.parametrize("arguments", [["--debug", "sql", "nope"], ["sql", "--debug", "nope"], ["sql", "nope"]])
def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "quambase", *arguments, "--db", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == ("--debug" in arguments)
    assert "there is no database at" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collect", "--model", "mamba-5n"], "did you mean mamba-5m"),
        (["collect", "--model", "mamba-5m", "--site", "x_proj:inptu"], "did you mean x_proj:input"),
        (["collect", "--model", "mamba-5m", "--data", "sample:calibratoin"], "did you mean sample:calibration"),
        (["colect"], "did you mean collect"),
        (["--help"], None),
        (["collect", "--help"], None),
        (["evaluate", "--help"], None),
        (["apply", "--help"], None),
    ],
)
def test_names_are_checked_before_torch_is_imported(arguments: list[str], message: str | None) -> None:
    script = (
        "import sys\n"
        "from quambase.cli.main import quambase\n"
        "try: quambase(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert message is None or message in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("quambase co", {"collect", "compare"}),
        ("quambase collect --model mamba-5", {"mamba-5m"}),
        ("quambase collect --data sample:e", {"sample:evaluation"}),
        ("quambase collect --site x_proj:i", {"x_proj:input"}),
        ("quambase analyze --strategy perc", {"percentile", "percentile:0.999", "percentile:0.9999"}),
        ("quambase stats --run run", {"run-a"}),
        ("quambase plot h", {"heatmap"}),
        ("quambase evaluate --strategy ms", {"mse"}),
    ],
)
def test_completion_knows_names(tmp_path: Path, words: str, expected: set[str]) -> None:
    make_run(tmp_path / "quambase-db")
    script = "from quambase.cli.main import quambase; quambase(prog_name='quambase')"
    count = len(words.split()) - 1
    environment = os.environ | {"_QUAMBASE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert expected <= {line.split(",", 1)[1] for line in done.stdout.splitlines() if "," in line}, done.stdout


def test_quambase_alone_says_what_comes_next(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        assert "next:  quambase collect --model mamba-5m" in invoke().stdout
        make_run(tmp_path / "quambase-db", number=1)
        (tmp_path / "quambase-db" / "runs" / "half").mkdir()
        done = invoke()
        assert (
            "run-a" in done.stdout and "unfinished: half" in done.stdout and "next:  quambase analyze " in done.stdout
        )
        assert invoke("analyze", "--strategy", "mse").exit_code == 0
        assert "scales.parquet: 1 strategies of run run-a" in invoke().stdout
        assert "next:  quambase evaluate --strategy all" in invoke().stdout
        make_run(tmp_path / "quambase-db", "run-b", number=2)
        assert "next:  quambase analyze --out newest.parquet" in invoke().stdout
        (tmp_path / "scales.parquet").write_text("damaged")
        done = invoke()
        assert done.exit_code == 0 and "not a readable Parquet file" in done.stdout


def test_runs_lists_them_newest_first(tmp_path: Path) -> None:
    for number, name in ((2, "a"), (3, "b"), (1, "c")):
        make_run(tmp_path, name, number=number)
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text("{")
    (tmp_path / "runs" / "half").mkdir()
    done = invoke("runs", "--db", tmp_path, "--format", "json")
    assert [row["run"] for row in json.loads(done.stdout)] == ["b", "a", "c"]
    assert "run broken is left out" in done.stderr and "unfinished: half" in done.stderr
    assert "a, the newest" not in invoke("stats", "--db", tmp_path, "--limit", "1").stderr
    assert "run b, the newest of 3; --run takes another" in invoke("stats", "--db", tmp_path, "--limit", "1").stderr


def test_a_scale_table_is_not_replaced_by_one_with_fewer_strategies(fabricated_database: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.parquet"
    at = ("analyze", "--db", fabricated_database, "--out", out)
    assert invoke(*at, "--strategy", "mse", "--strategy", "absmax").exit_code == 0
    done = invoke(*at, "--strategy", "mse", "--strategy", "quamba")
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert "s.parquet holds 2 strategies, of which the new table would lack absmax; name another file" in done.stderr
    assert set(read_scales(out).labels()) == {"mse", "absmax"}
    assert invoke(*at).exit_code == 0, "more strategies take the place of fewer"
    assert invoke(*at, "--strategy", "mse", "--force").exit_code == 0 and read_scales(out).labels() == ["mse"]
