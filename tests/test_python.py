"""`import quambase`: the commands as functions, strings and paths alike, results that print as small tables."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fabricate import half, make_run, random_activations
from tiny_model import write_texts, write_tiny_model

import quambase
from quambase.analyzer.opened import Site
from quambase.schema.errors import DataInvalid, UnknownName
from quambase.schema.sql.answer import SHOWN, Answer, html_table, text_table
from quambase.schema.sql.database import DocumentSeries


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
        assert answer.df()["amax"].tolist() == answer["amax"].to_pylist()
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


def test_another_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(DataInvalid, match="polars is not installed; pip install polars"):
        Answer(pa.table({"a": [1]})).pl()


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("opened")
    make_run(folder, sensitive=True)
    with quambase.open(folder) as database:
        yield database


def test_a_site_says_what_its_values_say(db: Any) -> None:
    parts = random_activations()[1, "x_proj:output"]
    for group, documents in [("B", parts["B"]), ("all", [d for part in parts.values() for d in part])]:
        values = half(np.concatenate([d.ravel() for d in documents])).astype(np.float64)
        site = db.site(1, "x_proj:output", group)
        assert site.amax == np.abs(values).max() and site.quantile(0.3) == np.quantile(np.abs(values), 0.3)
        scale = np.float32(site.amax / 200)
        codes = np.clip(np.rint(values.astype(np.float32) / scale), -128, 127)
        found = site.error(float(scale))
        errors = values - codes.astype(np.float64) * float(scale)
        assert found.mse == pytest.approx((errors**2).mean(), rel=1e-12)  # float64 sums
        assert found.clipped_share == (np.abs(np.rint(values.astype(np.float32) / scale) + 0.5) > 128).mean()
        assert found.predicted_kl > 0 and "mse" in found._repr_html_()
        assert repr(site).startswith(
            "layer 1 x_proj:output" + (", group B of run-a: " if group == "B" else " of run-a: ")
        )
        assert f"{values.size:,} values" in repr(site) and "<table>" in site._repr_html_()
        channels = site.channels()["channel"].to_pylist()
        assert sorted(channels) == (list(range(6, 12)) if group == "B" else list(range(18)))


def test_a_sites_strategies_are_those_of_analyze(db: Any) -> None:
    site = db.site(1, "x_proj:input")
    rows = site.strategies().to_pylist()
    table = quambase.analyze(db.path, out=None).table.to_pylist()
    wanted = {row["label"]: row for row in table if (row["layer"], row["site"]) == (1, "x_proj:input")}
    assert {row["strategy"] for row in rows} == set(wanted)
    for row in rows:
        assert all(
            row[name] == wanted[row["strategy"]][name] for name in ("scale", "zero_point", "mse", "predicted_kl")
        )
    assert [row["mse"] for row in rows] == sorted(row["mse"] for row in rows)
    picture = site.plot()
    assert picture.kind == "distribution" and "layer 1 x_proj:input" in picture.summary[0]
    assert 'src="data:image/png;base64,' in picture._repr_html_()


def test_what_is_not_there_is_named(db: Any) -> None:
    for arguments, message in [
        ((9, "x_proj:input"), "unknown layer .9. in run run-a; known: -1, 0, 1"),
        ((1, "x_proj:input", "B"), "unknown group of x_proj:input 'B'"),
    ]:
        with pytest.raises(UnknownName, match=message):
            db.site(*arguments)
    with pytest.raises(UnknownName, match="unknown strategy 'ms'; did you mean mse"):
        db.site(1, "x_proj:input").error("ms")


def test_a_strategy_that_needs_more_than_is_stored_says_so(db: Any) -> None:
    """Of a group made of smaller ones no quantiles of documents are known."""
    whole = db.site(1, "x_proj:input")
    united = replace(whole.values, documents=DocumentSeries.united([whole.values.documents]))
    site = Site(db, united)
    for ask in (site.scale, site.error):
        with pytest.raises(
            DataInvalid, match="ema_percentile needs quantiles of each document, which no run stores of"
        ):
            ask("ema_percentile")
    assert site.strategies(["ema_percentile", "absmax"])["strategy"].to_pylist() == ["absmax"]
    assert whole.strategies(["ema_percentile", "absmax"]).num_rows == 2
    assert site.scale("ema_percentile:1") == whole.scale("ema_percentile:1")  # of largest values alone
