"""Every format prints whatever a query answers; a query stops at Ctrl-C."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from quambase.cli.main import load_command
from quambase.cli.terminal.console import FORMATS
from quambase.cli.terminal.formats import emit
from quambase.schema.errors import QueryInvalid
from quambase.schema.sql.database import StatsDB


def sql(database: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(load_command("sql"), ["--db", str(database), *map(str, arguments)])


AWKWARD = [
    "select * from activations",
    "select * from groups",
    "select * from site_stats join channel_stats using (run, layer, site) limit 2",
    "select 1 as a, 2 as a, 3 as a_1",
    "select [1.5, 'nan'::float, 'infinity'::double] as l, {'a': 1, 'b': ['nan'::float]} as s, map {'k': 1} as m",
    "select date 'infinity' as d, timestamp '-infinity' as t, interval 3 days as i, time '10:00' as u",
    "select [date 'infinity'] as l, timestamptz '2020-01-01 00:00+00' as z, timestamp_ns '2020-01-01' as n",
    "select union_value(a := 1) as u, '101'::bit as b, uuid() as v, 'x'::blob as o, null as e",
    "select 'a\\b|c' as c, 123456789012345678901234567890::hugeint as h, 1.25::decimal(10, 2) as x",
    "select 1::bignum as n, [2::bignum] as l, 'POINT (1 2)'::geometry as g, {'a': 1}::variant as v",
    "select null::struct as s, row(1, 2) as r, 'a'::enum('a', 'b') as e",
    "select * from counts where false",
]


@pytest.mark.parametrize("query", AWKWARD)
@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_prints_every_answer(fabricated_database: Path, query: str, format_: str) -> None:
    done = sql(fabricated_database, "--format", format_, query)
    assert done.exit_code == 0, done.stderr
    with StatsDB(fabricated_database) as db:
        rows, columns = db.sql(query).shape
    if format_ == "parquet":
        table = pq.read_table(io.BytesIO(done.stdout_bytes))
        assert table.shape == (rows, columns) and len(set(table.schema.names)) == columns
    elif format_ == "csv":
        lines = list(csv.reader(io.StringIO(done.stdout)))
        assert len(lines) == rows + 1 and all(len(line) == columns for line in lines)
    elif format_ == "json":
        found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert [len(row) for row in found] == [columns] * rows
    else:
        assert len(done.stdout.splitlines()) == rows + 2


def test_values_that_few_formats_have(fabricated_database: Path) -> None:
    query = "select date 'infinity' as d, interval 3 days as i, [1.5, 'nan'::float] as l, 1 as a, 2 as a"
    assert json.loads(sql(fabricated_database, "--format", "json", query).stdout) == [
        {"d": "infinity", "i": "3 days", "l": [1.5, None], "a": 1, "a_1": 2}
    ]
    lines = sql(fabricated_database, "--format", "csv", query).stdout.splitlines()
    assert lines == ['"d","i","l","a","a_1"', '"infinity","3 days","[1.5, null]",1,2']


def test_every_type_of_duckdb_is_printed(fabricated_database: Path) -> None:
    """Null of each type, by itself and within others: in every format something is printed."""
    types = {name for (name,) in duckdb.sql("select distinct type_name from duckdb_types()").fetchall()}
    printed = set()
    with StatsDB(fabricated_database) as db:
        for name in sorted(types):
            for value in (f'null::"{name}"', f'[null::"{name}"]', f"{{'a': null::\"{name}\"}}"):
                try:
                    table = db.sql(f"select {value} as a").table
                except QueryInvalid:  # a list, an enum and others are no types by themselves
                    continue
                for format_ in FORMATS:
                    emit(table, format_)
                printed.add(name)
    assert len(printed) > 60, types - printed


def test_the_largest_integers(fabricated_database: Path) -> None:
    """None of them comes out as another number: JSON holds the digits, as a number or as text."""
    bits = {"tinyint": 7, "smallint": 15, "integer": 31, "bigint": 63, "hugeint": 127}
    ranges = {name: (-(2**n), 2**n - 1) for name, n in bits.items()}
    ranges |= {f"u{name}": (0, 2 ** (n + 1) - 1) for name, n in bits.items()}
    ranges["decimal(38, 0)"], ranges["bignum"] = (1 - 10**38, 10**38 - 1), (-(2**200), 2**200)
    for name, extremes in ranges.items():
        query = f"select unnest(['{extremes[0]}'::{name}, '{extremes[1]}'::{name}]) as a"
        found = json.loads(sql(fabricated_database, "--format", "json", query).stdout)
        assert [int(row["a"]) for row in found] == list(extremes), name
        lines = sql(fabricated_database, "--format", "csv", query).stdout.splitlines()
        assert [int(line.strip('"')) for line in lines[1:]] == list(extremes), name


def test_nothing_of_a_file_reaches_the_terminal_as_a_command(fabricated_database: Path) -> None:
    done = sql(fabricated_database, 'select * from "a\x1b[31m"')
    assert done.exit_code == 1 and "\x1b" not in done.stderr
    assert "\x1b" not in sql(fabricated_database, "select chr(27) || '[31m' as c").stdout


def test_an_output_file_is_whole_and_not_another_ones(fabricated_database: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    assert sql(fabricated_database, "--format", "csv", "--out", path, "select 1 as a").exit_code == 0
    done = sql(fabricated_database, "--format", "csv", "--out", path, "select 2 as a")
    assert (
        done.exit_code == 1 and "out.csv exists already; name another file, or replace it with --force" in done.stderr
    )
    assert path.read_text() == '"a"\n1\n'
    assert sql(fabricated_database, "--format", "csv", "--out", path, "--force", "select 2 as a").exit_code == 0
    assert path.read_text() == '"a"\n2\n' and list(tmp_path.iterdir()) == [path]


def test_a_query_file_of_another_encoding_is_one_line(fabricated_database: Path, tmp_path: Path) -> None:
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "q.sql").write_text("select 'é'", encoding=encoding)
        done = sql(fabricated_database, "-f", tmp_path / "q.sql")
        assert done.exit_code == 1 and done.stderr.count("\n") == 1
        assert "q.sql is not UTF-8 text" in done.stderr and "save the query as UTF-8" in done.stderr
    assert sql(fabricated_database, " ").exit_code == 2


@pytest.mark.parametrize(
    "query",
    [
        "select count(*) from range(1000000000000)",
        "select sum(a.range * b.range) from range(1000000) a, range(1000000) b",
        "select median(random()) from range(100000000000)",
    ],
)
def test_ctrl_c_stops_a_query_at_once(fabricated_database: Path, query: str) -> None:
    script = "from quambase.cli.main import load_command; load_command('sql')()"
    command = [sys.executable, "-c", script, "--db", str(fabricated_database), query]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background is started deaf to it
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        time.sleep(4)  # long enough to be at the query; were it not, the command would still have to stop
        assert process.poll() is None
        pressed = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 1
        assert error.splitlines()[-1].startswith("error: interrupted") and "Traceback" not in error
        # One second is promised; a busy machine may take some to end the process.
        assert time.monotonic() - pressed < 10


def test_a_query_in_another_thread_can_be_stopped_too(fabricated_database: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with StatsDB(fabricated_database) as db:
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            db.sql("select count(*) from range(1000000000000)")
        assert db.sql("select 1 as a")["a"].to_pylist() == [1], "the database goes on"
    signal.signal(signal.SIGINT, before)
