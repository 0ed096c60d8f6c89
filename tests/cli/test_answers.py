"""What people see: tables that fit, numbers of three digits, and words that answer."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from fabricate import make_run

from quambase.cli.main import load_command
from quambase.cli.terminal.console import PAGE
from quambase.cli.terminal.formats import ROWS, emit, format_cell

LONG = "a-model-with-a-name-that-somebody-made-of-everything-it-was-trained-on-" * 2


def run(name: str, *arguments: str | Path) -> Result:
    return CliRunner().invoke(load_command(name), [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (34.3812, "34.4"),
        (0.000065058, "6.51e-05"),
        (999.4, "999"),
        (999.6, "1,000"),
        (17332998.0, "17,332,998"),
        (-1234.5, "-1,234"),
        (2e15, "2e+15"),
        (9999, "9999"),
        (122880, "122,880"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
        (None, "-"),
        (True, "yes"),
    ],
)
def test_numbers_for_people(value: object, shown: str) -> None:
    assert format_cell(value) == shown


def test_shares_are_percents_or_millionths() -> None:
    shown = [format_cell(value, share=True) for value in (6.5058e-05, 0.00099, 0.001, 0.25, 1.0, 0.0, 40.0)]
    assert shown == ["65.1 ppm", "990 ppm", "0.1 %", "25 %", "100 %", "0 %", "40"]  # 40 is no share of one


def test_which_columns_are_shares(capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        "clipped_share_mean",
        "overflow_share",
        "beyond_3_sigma",
        "accuracy_low",
        "flips_high",
        "shared",
        "vs_float",
    ]
    table = pa.table({name: [0.25] for name in names})
    emit(table)
    assert capsys.readouterr().out.splitlines()[-1].split("  ")[-1].strip() == "0.25"
    emit(table, "json")
    assert json.loads(capsys.readouterr().out) == [dict.fromkeys(names, 0.25)]
    emit(table, "markdown")
    assert capsys.readouterr().out.count("25 %") == 5


def test_texts_are_shortened_first_then_columns_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    emit(pa.table({"text": ["x" * 200], "n": [1]}))
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) == PAGE and "x…  1" in out and "some texts are shortened" in err
    emit(pa.table({"text": ["x" * 200], **{f"column_{i}": [1.0] for i in range(9)}}))
    out, err = capsys.readouterr()
    # 16 columns of text are kept, and 8 columns of 8 and 2 blanks fit in the 84 that are left.
    assert max(map(len, out.splitlines())) <= PAGE and "column_7" in out and "column_8" not in out
    assert err == "… 1 more column (column_8): --wide shows all\n"
    emit(pa.table({f"a_long_name_of_a_column_{i}": [1.0] for i in range(30)}))
    out, err = capsys.readouterr()
    assert len(err.splitlines()[0]) <= PAGE and err.startswith("… 27 more columns (a_long") and "…)" in err


def test_a_table_of_many_rows_is_cut_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    table = pa.table({"n": range(ROWS + 1)})
    emit(table)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == ROWS + 2 and err.startswith("… 1 more rows: --wide shows all")
    emit(table.slice(0, ROWS))
    assert capsys.readouterr().err == ""
    for format_ in ("json", "csv", "markdown"):
        emit(table, format_)
        out, err = capsys.readouterr()
        assert str(ROWS) in out and err == ""


def test_wide_shows_all(fabricated_database: Path) -> None:
    query = f"select repeat('x', 300) as text, range as n from range({ROWS + 5})"
    done = run("sql", "--db", fabricated_database, "--wide", query)
    assert len(done.stdout.splitlines()) == ROWS + 7 and "x" * 300 in done.stdout and "…" not in done.output
    assert "…" in run("sql", "--db", fabricated_database, query).stdout, "--wide is of one command"


@pytest.fixture(scope="module", params=["mamba-5m", LONG], ids=["bundled", "long"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database whose path is short where it is printed, of a model called so."""
    folder = tmp_path_factory.mktemp("db")
    make_run(folder, name=request.param)
    return folder


@pytest.mark.parametrize(
    ("command", "last"),
    [
        (["stats"], "head (read where it is quantized): "),
        (["doctor"], "all is well"),
        (["runs"], "1 complete; without --run, commands take run-a, the newest"),
        (["compare", "--no-picture"], "least MSE"),
        (["plot", "channels", "--out", "c.svg"], "written: c.svg"),
        (["analyze", "--out", "s.parquet"], "next: quambase evaluate --scales s.parquet --db db"),
        (["analyze", "--list"], ""),
        (["sql", "--schema"], ""),
        (["sql", "select * from site_stats join runs using (run)"], ""),
    ],
)
def test_every_line_fits_and_the_last_one_answers(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], last: str
) -> None:
    (tmp_path / "db").symlink_to(database)
    monkeypatch.chdir(tmp_path)
    done = run(*command, *([] if "--list" in command else ["--db", "db"]))
    assert done.exit_code == 0, done.stderr
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    assert max(map(len, lines)) <= PAGE, max(lines, key=len)
    answers = [line for line in done.stderr.splitlines() if not line.startswith(" ")]
    assert not last or answers[-1].startswith(last), done.stderr


def test_analyze_says_what_is_selected_and_what_it_replaced(
    fabricated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--db", fabricated_database, "--strategy", "mse", "--strategy", "quamba"]
    words = " ".join(run("analyze", *arguments).stderr.split())
    assert "selected takes mse at " in words and "against upstream's quamba: +" in words and "replaced" not in words
    assert "it replaced 2 strategies of run run-a" in run("analyze", *arguments).stderr
