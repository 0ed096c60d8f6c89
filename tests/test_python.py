"""`import quambase`: the commands as functions, strings and paths alike, results that print as small tables."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pytest
from tiny_model import write_texts, write_tiny_model

import quambase
from quambase.schema.sql.answer import SHOWN, Answer, html_table, text_table


def test_the_names() -> None:
    assert quambase.__version__ == version("quambase")
    assert {"collect", "analyze", "apply", "evaluate", "StatsDB", "__version__"} <= set(dir(quambase))
    assert all(callable(getattr(quambase, name)) for name in ("collect", "analyze", "apply", "evaluate", "StatsDB"))
    with pytest.raises(AttributeError, match="no attribute 'colect'"):
        quambase.colect  # noqa: B018
    importlib.import_module("quambase.apply.apply")
    assert callable(quambase.apply) and quambase.apply.apply.apply.__doc__, "the package stays one"


def test_what_needs_no_torch_imports_none() -> None:
    script = (
        "import sys, quambase; quambase.StatsDB; quambase.analyze; quambase.plot; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    done = subprocess.run([sys.executable, "-m", "quambase", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"quambase, version {version('quambase')}"


@pytest.mark.parametrize("kind", [str, Path])
def test_strings_and_paths_are_taken_alike(tmp_path: Path, kind: type) -> None:
    write_tiny_model(tmp_path / "tiny")
    write_texts(tmp_path / "t.jsonl")
    db, text, model = kind(tmp_path / "db"), kind(tmp_path / "t.jsonl"), kind(tmp_path / "tiny")
    scales, out = kind(tmp_path / "s.parquet"), kind(tmp_path / "m")
    run = quambase.collect(model, data=text, db=db, progress=False)
    assert run.manifest.run in repr(run) and "<table>" in run._repr_html_()
    found = quambase.analyze(db, strategies=["mse", "quamba"], out=scales)
    assert "mse" in repr(found) and "sqnr" in found._repr_html_()
    applied = quambase.apply(scales, strategy="mse", db=db, out=out, model=model)
    assert applied.folder == tmp_path / "m"
    for data in (text, [text]):
        result = quambase.evaluate(out, data=data, task="perplexity", db=db, model=model)
        assert repr(result).splitlines()[0].split()[:3] == ["data", "task", "strategy"]
        assert {"float", "mse", "quamba"} <= set(repr(result).split())
    with quambase.StatsDB(db) as stats:
        assert repr(stats).endswith(f": run {run.manifest.run}")
        answer = stats.sql("select layer, site, amax from site_stats order by layer, site limit 3")
        assert len(answer) == answer.num_rows == 3 and answer["amax"].to_pylist()[0] > 0
        assert len(repr(answer).splitlines()) == 5
        assert pa.table(answer).equals(answer.table), "other libraries take it by Arrow's interface"


def test_a_long_table_shows_its_ends() -> None:
    table = pa.table({"i": list(range(1000)), "x": [i / 3 for i in range(1000)]})
    lines = text_table(table).splitlines()
    assert len(lines) == SHOWN + 4 and lines[2].split() == ["0", "0"] and lines[-2].split() == ["999", "333"]
    assert lines[-1] == "(1,000 rows, 980 of them not shown)"
    assert html_table(table).count("<tr>") == SHOWN + 2


def test_what_files_hold_is_escaped() -> None:
    table = pa.table({"<b>": ["<script>alert(1)</script>", "\x1b[31m", None]})
    shown = html_table(table)
    assert "<script>" not in shown and "<b>" not in shown and "&lt;script&gt;" in shown
    assert "\x1b" not in text_table(table) and repr(Answer(table)) == text_table(table)
