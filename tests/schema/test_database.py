"""StatsDB: which runs it opens, what its views say, and what its SQL may not do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fabricate import NUMBERS, half, make_run, random_activations
from stored_runs import stored_table

from quambase.schema.checksums import file_sha256
from quambase.schema.errors import DatabaseInvalid, QueryInvalid, UnknownName
from quambase.schema.scale_table import write_scales
from quambase.schema.sql import database
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.manifest import Manifest, TableFile
from quambase.schema.stored.runs import list_runs
from quambase.schema.tables import OUTLIERS, QUANTILES, RESULTS, RUN_TABLES, SCALES
from quambase.schema.values.distribution import Distribution


@pytest.fixture(scope="module")
def db(fabricated_database: Path) -> StatsDB:
    """The hand-made run, opened once."""
    return StatsDB(fabricated_database)


def whole_values(site: str, layer: int) -> np.ndarray[Any, Any]:
    """Every float16-rounded value of a site, all groups together."""
    groups = random_activations()[layer, site]
    return half(np.concatenate([d.ravel() for documents in groups.values() for d in documents]))


# Views --------------------------------------------------------------------------------------------


def test_every_table_is_a_view_with_its_columns_commented(db: StatsDB) -> None:
    described = db.describe().to_pylist()
    for name, schema in (RUN_TABLES | {"scales": SCALES, "results": RESULTS}).items():
        columns = [column for column in schema.names if column != "positions"]  # results_by_position has them as rows
        assert [r["column"] for r in described if r["view"] == name and r["column"]] == columns
    views = db.sql("select view_name as v from duckdb_views() where not internal and view_name[1] <> '_'")
    assert set(views["v"].to_pylist()) <= {r["view"] for r in described}
    uncommented = db.sql(
        "select table_name || '.' || column_name as c from duckdb_columns() "
        "where not internal and table_name[1] <> '_' and comment is null"
    )
    assert uncommented["c"].to_pylist() == []
    macros = {"quantile(p)", "clipping(scale)", "regrouped(head_groups, channel_groups)"}
    assert {r["view"] for r in described if r["type"] == "macro"} == macros


def test_views_hold_the_rows_of_the_files(db: StatsDB, fabricated_database: Path) -> None:
    for name in RUN_TABLES:
        stored = stored_table(fabricated_database / "runs" / "run-a", name)
        rows = [{k: None if v != v else v for k, v in row.items()} for row in stored.to_pylist()]
        assert db.sql(f"select * from {name}").to_pylist() == rows


def test_columns_that_came_later_are_null(fabricated_database: Path, tmp_path: Path) -> None:
    shutil.copytree(fabricated_database, tmp_path / "db")
    (path,) = tmp_path.glob("db/runs/*/outliers.parquet")
    whole = OUTLIERS.empty_table().drop_columns(["before", "after"])
    row = {"run": "run-a", "layer": 0, "site": "s", "group_name": "all", "document": 1, "position": 2}
    earlier = pa.Table.from_pylist([row | {"token_id": 3, "token": "a", "channel": 4, "value": 5.0}], whole.schema)
    pq.write_table(earlier, path)
    stated = Manifest.load(path.parent)
    stated.tables[path.name] = TableFile(1, file_sha256(path))
    stated.save(path.parent)
    with StatsDB(tmp_path / "db") as db:
        found = db.sql("select * exclude (before, after) from outliers")
        assert found.to_pylist() == earlier.to_pylist()
        assert db.sql("select distinct before, after from outliers").to_pylist() == [{"before": None, "after": None}]


def test_site_stats_is_what_sql_computes_from_counts(db: StatsDB) -> None:
    """A twin in SQL for every column but the quantiles (below) and overflow (not in counts)."""
    computed = db.sql(
        """
        WITH every AS (
            SELECT layer, site, group_name, value::DOUBLE AS v, count AS n FROM counts WHERE isfinite(value)
            UNION ALL
            SELECT layer, site, 'all', value, count FROM counts WHERE isfinite(value) AND group_name <> 'all'
        ), centred AS (
            SELECT *, sum(v * n) OVER w / sum(n) OVER w AS mean FROM every
            WINDOW w AS (PARTITION BY layer, site, group_name)
        ), spread AS (
            SELECT *, sqrt(sum((v - mean) ** 2 * n) OVER w / sum(n) OVER w) AS std FROM centred
            WINDOW w AS (PARTITION BY layer, site, group_name)
        )
        SELECT layer, site, group_name, sum(n) AS count, max(abs(v)) AS amax, min(v) AS min, max(v) AS max,
            any_value(mean) AS mean, any_value(std) AS std,
            sum((v - mean) ** 4 * n) / sum(n) / nullif(any_value(std), 0) ** 4 AS kurtosis,
            coalesce(sum(n) FILTER (abs(v - mean) > 3 * std), 0) / sum(n) AS beyond_3_sigma,
            coalesce(sum(n) FILTER (abs(v - mean) > 5 * std), 0) / sum(n) AS beyond_5_sigma,
            coalesce(sum(n) FILTER (v = 0), 0) / sum(n) AS zeros
        FROM spread GROUP BY ALL ORDER BY ALL
        """
    )
    stored = db.sql(f"select {', '.join(computed.column_names)} from site_stats order by all")
    assert computed.num_rows == stored.num_rows == 2 * 15 + 2
    for name in computed.column_names:
        found, expected = computed[name].to_pylist(), stored[name].to_pylist()
        if name in ("layer", "site", "group_name", "count", "amax", "min", "max"):
            assert found == expected, name
            continue
        # Sums of at most 192 float64 terms in another order: each differs by at most 192 ulp of the sum of
        # magnitudes; kurtosis divides two such, and cancellation in the mean adds a factor below 10^2.
        for a, b in zip(found, expected, strict=True):
            assert a is b is None or a == pytest.approx(b, rel=1e-10, abs=1e-12), name


def test_site_stats_is_what_numpy_computes_from_the_values(db: StatsDB) -> None:
    for row in db.sql("select * from site_stats where group_name = 'all'").to_pylist():
        values = whole_values(row["site"], row["layer"]).astype(np.float64)
        assert row["count"] == values.size
        assert row["amax"] == np.abs(values).max()
        assert [row[name] for name in QUANTILES] == [np.quantile(np.abs(values), p) for p in QUANTILES.values()]
        assert row["std"] == pytest.approx(values.std(), rel=1e-12, abs=0)  # 192 additions, each half an ulp


@pytest.mark.parametrize("p", [0.0, 0.5, 0.9, 0.9995, 1.0])
def test_macro_quantile_is_numpys(db: StatsDB, p: float) -> None:
    rows = db.sql("select * from quantile($p)", {"p": p}).to_pylist()
    stored = db.sql("select layer, site, group_name from site_stats order by all").to_pylist()
    assert sorted((r["layer"], r["site"], r["group_name"]) for r in rows) == [tuple(r.values()) for r in stored]
    for row in rows:
        if row["group_name"] == "all":
            values = np.abs(whole_values(row["site"], row["layer"]).astype(np.float64))
            assert row["quantile"] == np.quantile(values, p)


@pytest.mark.parametrize("scale", [1e-3, 0.05, 0.25, 10.0])
def test_macro_clipping_counts_the_codes_beyond(db: StatsDB, scale: float) -> None:
    for row in db.sql("select * from clipping($s)", {"s": scale}).to_pylist():
        if row["group_name"] == "all":
            codes = np.rint(whole_values(row["site"], row["layer"]) / np.float32(scale))
            clipped = int(((codes < -128) | (codes > 127)).sum())
            assert (row["clipped"], row["count"]) == (clipped, codes.size)
            assert row["share"] == clipped / codes.size


def test_channel_stats(db: StatsDB) -> None:
    groups = random_activations()[1, "x_proj:output"]
    columns = np.concatenate([np.concatenate(documents) for documents in groups.values()], axis=1)
    rows = db.sql("select * from channel_stats where layer = 1 and site = 'x_proj:output' order by channel").to_pylist()
    amax = np.abs(columns).max(0).astype(np.float64)
    assert [r["amax"] for r in rows] == amax.tolist()
    assert [r["ratio"] for r in rows] == (amax / np.median(amax)).tolist()
    # std from sum_sq - mean^2 loses at most (mean/std)^2 ulp beside numpy's centred one; |mean| < std here.
    np.testing.assert_allclose([r["std"] for r in rows], columns.astype(np.float64).std(0), rtol=1e-12)
    beyond = db.sql("select channel from outlier_channels where layer = 1 and site = 'x_proj:output'")
    assert sorted(beyond["channel"].to_pylist()) == np.flatnonzero(amax / np.median(amax) >= 5).tolist()


def test_runs_view(db: StatsDB) -> None:
    row = db.sql("select run, model, family, documents, empty, identity from runs").to_pylist()[0]
    assert (row["run"], row["model"], row["family"], row["documents"], row["empty"]) == (
        "run-a",
        "fabricated",
        "mamba1",
        6,
        1,
    )
    assert "weights_sha256" in row["identity"]


def test_sums_of_integers_are_int64(db: StatsDB) -> None:
    assert db.sql("select sum(count) as n from counts").schema.field("n").type == pa.int64()


# Distributions ------------------------------------------------------------------------------------


def test_distributions_are_the_values_of_the_sites(db: StatsDB) -> None:
    seen = []
    for layer, site, group_name, found in db.distributions("run-a"):
        assert group_name == "all"
        expected = Distribution.of_values(whole_values(site, layer))
        assert np.array_equal(found.values, expected.values)
        assert np.array_equal(found.counts, expected.counts)
        seen.append((layer, site))
    assert seen == list(random_activations())


def test_distributions_by_group(db: StatsDB) -> None:
    groups = {(la, s, g): d for la, s, g, d in db.distributions("run-a", "group")}
    assert [g for la, s, g in groups if (la, s) == (0, "x_proj:output")] == ["all", "dt", "B", "C"]
    for name, documents in random_activations()[0, "x_proj:output"].items():
        expected = Distribution.of_values(np.concatenate([d.ravel() for d in documents]))
        found = groups[0, "x_proj:output", name]
        assert found.values.tolist() == expected.values.tolist()
        assert found.counts.tolist() == expected.counts.tolist()
    with pytest.raises(UnknownName, match="unknown granularity 'chanel'"):
        next(db.distributions("run-a", "chanel"))


def test_layers_one_at_a_time_are_all_of_them(db: StatsDB) -> None:
    rows = db.sql("SELECT layer, count(*) AS n FROM counts WHERE run = 'run-a' GROUP BY ALL").to_pylist()
    layers = db.layers("run-a")
    assert layers == {row["layer"]: row["n"] for row in rows} and list(layers)[-1] == -1
    together = list(db.distributions("run-a", "group"))
    apart = [found for layer in layers for found in db.distributions("run-a", "group", layer)]
    assert [key[:3] for key in apart] == [key[:3] for key in together]
    for (*_, one), (*_, other) in zip(apart, together, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_array_equal(one.counts, other.counts)
    assert not list(db.distributions("run-a", "group", 77))


def test_documents_come_in_file_order(db: StatsDB) -> None:
    series = db.documents("run-a")[1, "in_proj:output", "all"]
    assert series.documents.tolist() == list(NUMBERS)
    groups = random_activations()[1, "in_proj:output"]
    expected = [max(float(np.abs(d[i]).max()) for d in groups.values()) for i in range(len(NUMBERS))]
    assert series.amax.tolist() == expected


# Which run ----------------------------------------------------------------------------------------


def test_newest_complete_run_is_taken_and_the_others_can_be_named(tmp_path: Path) -> None:
    small = {(0, "in_proj:input"): random_activations()[0, "in_proj:input"]}
    for number, run in enumerate(["zz-oldest", "ab-older", "aa-newest"]):
        folder = make_run(tmp_path, run, small, number=number)
        os.utime(folder / "run.json", (1e9 - number, 1e9 - number))  # the time of a file decides nothing
    (tmp_path / "runs" / "unfinished").mkdir()
    assert [m.run for m in StatsDB(tmp_path).runs] == ["aa-newest"]
    assert [m.run for m in StatsDB(tmp_path, "all").runs] == ["aa-newest", "ab-older", "zz-oldest"]
    assert [m.run for m in StatsDB(tmp_path, "z").runs] == ["zz-oldest"]
    assert StatsDB(tmp_path, "all").sql("select count(distinct run) as n from counts")["n"].to_pylist() == [3]
    assert [p.name for p in list_runs(tmp_path)[1]] == ["unfinished"]
    with pytest.raises(UnknownName, match="'a' begins 2 run ids: aa-newest, ab-older"):
        StatsDB(tmp_path, "a")
    with pytest.raises(UnknownName, match="unknown run 'aa-newset'; did you mean aa-newest"):
        StatsDB(tmp_path, "aa-newset")
    with pytest.raises(DatabaseInvalid, match="run unfinished is unfinished"):
        StatsDB(tmp_path, "unfinished")


def test_no_database_and_no_complete_run(tmp_path: Path) -> None:
    with pytest.raises(DatabaseInvalid, match=r"there is no database at .*nowhere"):
        StatsDB(tmp_path / "nowhere")
    (tmp_path / "runs" / "half").mkdir(parents=True)
    with pytest.raises(DatabaseInvalid, match=r"holds no complete run \(1 unfinished: half\)"):
        StatsDB(tmp_path)


@pytest.mark.parametrize("harm", ["cut", "alter", "remove", "newer"])
def test_a_harmed_run_is_refused(tmp_path: Path, harm: str) -> None:
    small = {(0, "in_proj:input"): random_activations()[0, "in_proj:input"]}
    folder = make_run(tmp_path, "r", small)
    path = folder / "counts" / "part-001.parquet"
    data = path.read_bytes()
    if harm == "cut":
        path.write_bytes(data[:-100])
    elif harm == "alter":
        changed = bytearray(data)
        changed[len(data) // 3] ^= 1
        path.write_bytes(changed)
        os.utime(path, (1e9, 1e9))
    elif harm == "remove":
        path.unlink()
    else:
        manifest = (folder / "run.json").read_text()
        (folder / "run.json").write_text(manifest.replace('"format_version": 2', '"format_version": 3'))
    message = {"remove": "is missing", "newer": "format version 3; this quambase reads up to 2: upgrade quambase"}
    with pytest.raises(DatabaseInvalid, match=message.get(harm, "was altered or cut short")):
        StatsDB(tmp_path)


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_large_activations_are_not_hashed_when_a_run_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """All files of the table together, or none."""
    monkeypatch.setattr(database, "VERIFY_LIMIT_BYTES", limit)
    folder = make_run(tmp_path, "r", {(0, "in_proj:input"): random_activations()[0, "in_proj:input"]})
    path = folder / "activations" / "block-00000.parquet"
    path.write_bytes(b"X" + path.read_bytes()[1:])  # which readers do not look at
    if limit:
        with pytest.raises(DatabaseInvalid, match=r"activations/block-00000\.parquet was altered or cut short"):
            StatsDB(tmp_path)
    else:
        StatsDB(tmp_path).close()
    with pytest.raises(DatabaseInvalid, match=r"activations/block-00000\.parquet was altered or cut short"):
        Manifest.load(folder).verify(folder)
    (folder / "groups.parquet").unlink()
    with pytest.raises(DatabaseInvalid, match="groups.parquet is missing" if limit == 0 else "altered"):
        StatsDB(tmp_path)


def test_another_table_under_a_tables_name_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "r", {(0, "in_proj:input"): random_activations()[0, "in_proj:input"]})
    pq.write_table(pa.table({"a": [1]}), folder / "groups.parquet")
    manifest = Manifest.load(folder)
    del manifest.tables["groups.parquet"]  # as if never listed: an absent table is an empty view
    manifest.save(folder)
    assert StatsDB(tmp_path).sql("select * from groups").num_rows == 0


# The views of other files -------------------------------------------------------------------------


def scale_rows(run: str) -> pa.Table:
    row = {name: None for name in SCALES.names} | {
        "run": run,
        "layer": 0,
        "site": "s",
        "group_name": "all",
        "label": "absmax",
        "scale": 0.5,
    }
    return pa.Table.from_pylist([row], schema=SCALES)


def test_scales_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path, "r", {(0, "in_proj:input"): random_activations()[0, "in_proj:input"]})
    assert StatsDB(tmp_path).sql("select * from scales").num_rows == 0
    provenance = {"format_version": 1, "runs": {key: {"model": {}, "identity": {}} for key in ("r", "other")}}
    write_scales(Path("scales.parquet"), pa.concat_tables([scale_rows("r"), scale_rows("other")]), provenance)
    assert StatsDB(tmp_path).sql("select run, scale from scales").to_pylist() == [{"run": "r", "scale": 0.5}]
    write_scales(Path("scales.parquet"), scale_rows("other"), provenance)
    db = StatsDB(tmp_path)
    assert db.sql("select * from scales").num_rows == 0
    assert "was made from another run" in db.scales_notes[0]


def test_results_view(tmp_path: Path) -> None:
    make_run(tmp_path, "r", {(0, "in_proj:input"): random_activations()[0, "in_proj:input"]})
    for evaluation in ("e1", "e2"):
        folder = tmp_path / "results" / evaluation
        folder.mkdir(parents=True)
        row = {name: None for name in RESULTS.names} | {"evaluation": evaluation, "nll": 1.5}
        pq.write_table(pa.Table.from_pylist([row], schema=RESULTS), folder / "results.parquet")
        about = {
            "format_version": 1,
            "evaluation": evaluation,
            "model": "m",
            "scales": "",
            "strategies": [],
            "tasks": [],
        }
        (folder / "evaluation.json").write_text(json.dumps(about | {"notes": []}))
    (tmp_path / "results" / "e3").mkdir()  # unfinished
    pq.write_table(pa.Table.from_pylist([row], schema=RESULTS), tmp_path / "results" / "e3" / "results.parquet")
    db = StatsDB(tmp_path)
    assert db.sql("select sum(nll) as s from results").to_pylist() == [{"s": 3.0}] and db.results_notes == []


# Errors and safety --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("select * from site_stat", "unknown view 'site_stat'; did you mean site_stats"),
        ("select amx from site_stats", "unknown column 'amx'; did you mean amax"),
        ("select q99 from counts", "unknown column 'q99'; known: "),
        ("selec 1", "Parser Error: syntax error at or near"),
        ("select 1/'x'", "Conversion Error: Could not convert string 'x'"),
        ("", None),
    ],
)
def test_bad_sql_is_one_line(db: StatsDB, query: str, message: str | None) -> None:
    if message is None:
        assert db.sql(query).num_columns == 0
        return
    with pytest.raises(QueryInvalid) as error:
        db.sql(query)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


ESCAPES = [
    "copy counts to '{dir}/stolen.csv'",
    "copy (select 1) to '{dir}/stolen.parquet'",
    "export database '{dir}/exported'",
    "attach '{dir}/new.db'",
    "select * from read_csv('/etc/passwd')",
    "select * from read_text('/etc/passwd')",
    "select * from read_parquet('{db}/runs/run-a/counts/part-000.parquet')",
    "select * from '/etc/passwd'",
    "select * from glob('/*')",
    "select * from sniff_csv('/etc/passwd')",
    "install httpfs",
    "load httpfs",
    "set enable_external_access = true",
    "reset enable_external_access",
    "set lock_configuration = false",
    "set temp_directory = '{dir}'",
    "pragma temp_directory = '{dir}'",
    "pragma enable_profiling = 'json'",
    "set profiling_output = '{dir}/profile'",
    "call enable_logging(storage = 'file', storage_config = {{'path': '{dir}/log'}})",
    "select * from a_python_variable",
]


@pytest.mark.parametrize("query", ESCAPES)
def test_sql_cannot_leave_the_database(db: StatsDB, fabricated_database: Path, tmp_path: Path, query: str) -> None:
    a_python_variable = pa.table({"secret": [1]})
    assert a_python_variable.num_rows == 1
    with pytest.raises(QueryInvalid) as error:
        db.sql(query.format(dir=tmp_path, db=fabricated_database))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_unsafe_lifts_it(fabricated_database: Path, tmp_path: Path) -> None:
    with StatsDB(fabricated_database, unsafe=True) as db:
        db.sql(f"copy (select 7 as a) to '{tmp_path}/out.csv'")
        assert db.sql(f"select a from read_csv('{tmp_path}/out.csv')").to_pylist() == [{"a": 7}]


def test_works_without_torch(fabricated_database: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from quambase.schema.sql.database import StatsDB\n"
        f"db = StatsDB(Path({str(fabricated_database)!r}))\n"
        "print(db.sql('select count(*) as n from site_stats').to_pylist(), 'click' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[{'n': 32}] False"


def test_macro_clipping_rounds_ties_to_even(tmp_path: Path) -> None:
    values = np.array([127.4375, 127.5, -128.5, -129.0, 1.0, 0.0], np.float32)
    make_run(tmp_path, "r", {(0, "in_proj:input"): {"all": [values[None]] * len(NUMBERS)}})
    rows = StatsDB(tmp_path).sql("select clipped, count from clipping(1)").to_pylist()
    # 127.5 rounds to 128 and -129 lies beyond; -128.5 rounds to -128, which is a code.
    assert rows == [{"clipped": 2 * len(NUMBERS), "count": 6 * len(NUMBERS)}]


def test_names_are_known_while_a_transaction_is_aborted(fabricated_database: Path) -> None:
    """DuckDB refuses every query of an aborted transaction, also ours for the names that a message lists."""
    with StatsDB(fabricated_database) as db:
        db.sql("BEGIN")
        for query, message in (
            ("SELECT error('stop')", "stop"),
            ("SELECT * FROM nothing_here", "unknown view 'nothing_here'"),
            ("SELECT 1", "aborted"),
            ("SELECT comment FROM duckdb_views()", "aborted"),
        ):
            with pytest.raises(QueryInvalid, match=message):
                db.sql(query)
        with pytest.raises(QueryInvalid, match="aborted"):
            db.stats(site="conv1d:input")
        db.sql("ROLLBACK")
        commented = "SELECT count(comment) AS n FROM duckdb_views() WHERE NOT internal"
        assert db.sql(commented).to_pylist()[0]["n"] > 10, "comments outlive the transaction"


def test_stats_are_sorted_by_outlier_ratio(db: StatsDB) -> None:
    ratios = db.stats(limit=None)["outlier_ratio"].to_pylist()
    assert len(ratios) == 32
    assert ratios[-1] is None  # the dead site
    assert ratios[:-1] == sorted(ratios[:-1], reverse=True)
    rows = db.stats(site="x_proj:output", layer=1).to_pylist()
    assert sorted(r["group_name"] for r in rows) == ["B", "C", "all", "dt"]
    assert db.stats(limit=3).num_rows == 3
    with pytest.raises(
        UnknownName, match="unknown site 'x_proj' in run run-a; did you mean x_proj:input or x_proj:output"
    ):
        db.stats(site="x_proj")
    with pytest.raises(UnknownName, match="unknown layer '7' in run run-a; known: -1, 0, 1"):
        db.stats(layer=7)


def test_a_long_query_tells_how_much_is_done(fabricated_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "TOLD_AFTER", 0.05)
    monkeypatch.setattr(database, "WATCHED_EVERY", 0.02)
    told: list[float] = []
    query = "select count(*) as n from range(60000) as a, range(20000) as b where (a.range * b.range) % 7 = 3"
    with StatsDB(fabricated_database) as db:
        assert db.sql(query, watch=told.append)["n"].to_pylist() == [_products(60000, 20000)]
        quick: list[float] = []
        db.sql("select 1", watch=quick.append)
    assert len(told) > 1 and told == sorted(told) and 0 <= told[0] and max(told) <= 1 and not quick


def _products(first: int, second: int) -> int:
    """How many pairs below ``first`` and ``second`` have a product that is 3 modulo 7."""
    ones = [len(range(r, first, 7)) for r in range(7)]
    others = [len(range(r, second, 7)) for r in range(7)]
    return sum(ones[a] * others[b] for a in range(7) for b in range(7) if a * b % 7 == 3)
