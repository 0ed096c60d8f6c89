"""A query ends when it is told to, and takes no more than it may."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from heavy_queries import QUERIES, ask

from quambase.cli.main import quambase
from quambase.schema.errors import QueryInvalid
from quambase.schema.sql.database import StatsDB
from quambase.schema.sql.limits import Limits, machine_memory, resident_bytes


@pytest.mark.parametrize("name", ["count of 10^12", "a list of 10^8"])
def test_ctrl_c_ends_a_query(fabricated_database: Path, name: str) -> None:
    """Also one inside a function that DuckDB does not interrupt. The long wait is for a machine that is busy."""
    ended = ask(fabricated_database, QUERIES[name], interrupt_after=4, most=60)
    assert ended.code == 1 and ended.seconds < 20
    lines = ended.stderr.strip().splitlines()
    assert lines[-1].startswith("error: interrupted") and "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", ["a list of 10^8", "one list"])
def test_memory_is_limited(fabricated_database: Path, name: str) -> None:
    ended = ask(fabricated_database, QUERIES[name], "--memory", "500MB")
    assert ended.code == 1 and "needs more than 0.5 GB of memory and was stopped" in ended.stderr
    # The process's own quarter of a gigabyte, and what is allocated between two looks.
    assert ended.peak < 3e9 and "Traceback" not in ended.stderr


def test_time_is_limited(fabricated_database: Path) -> None:
    with StatsDB(fabricated_database, limits=Limits(seconds=0.3)) as db:
        began = time.monotonic()
        with pytest.raises(QueryInvalid, match=r"took longer than 0\.3 s and was stopped; .* --timeout"):
            db.sql(QUERIES["count of 10^12"])
        assert time.monotonic() - began < 20
        assert db.sql("select 1 as one").to_pylist() == [{"one": 1}]  # the database is usable


def test_few_rows_are_kept_and_all_are_counted(fabricated_database: Path) -> None:
    with StatsDB(fabricated_database) as db:
        found = db.sql("select a, a as a from range(5000000) t(a) order by 1 desc", most=3)
        assert found.rows == 5_000_000 and found["a"].to_pylist() == [4_999_999, 4_999_998, 4_999_997]
        for rows in (0, 2, 3):
            whole = db.sql(f"select * from range({rows})", most=3)
            assert whole.rows == whole.num_rows == rows
        assert db.sql("select date 'infinity' as d from range(5)", most=2).rows == 5


def test_the_terminal_shows_the_first_rows(fabricated_database: Path) -> None:
    done = CliRunner().invoke(quambase, ["sql", "--db", str(fabricated_database), "select * from range(1234567)"])
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 1002
    assert "… 1,233,567 more rows: --wide shows all" in done.stderr


@pytest.mark.parametrize("size", ["4", "x GB", "1MB", "-1GB", "4TB"])
def test_sizes_that_are_none(fabricated_database: Path, size: str) -> None:
    done = CliRunner().invoke(quambase, ["sql", "--db", str(fabricated_database), f"--memory={size}", "select 1"])
    assert done.exit_code == 2 and "expected at least 10 MB, such as 500MB or 4GB" in " ".join(done.stderr.split())


def test_what_the_machine_has() -> None:
    assert 10**8 < machine_memory() < 2**50 and 10**7 < resident_bytes() < machine_memory()
