"""Queries from files, and parameters of the cookbook's: hostile ones, and what reads them.

A reader answers a query as `quambase sql` does, in the folder of its file, and asserts that no file there or in the
database was read or changed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pyarrow as pa
from fuzz_bytes import change_bytes

from quambase.cli.sql import _read, ask
from quambase.cli.terminal.formats import emit
from quambase.schema.errors import QuambaseError, QueryInvalid
from quambase.schema.sql.database import StatsDB
from quambase.schema.sql.limits import Limits

CANARY = "canary-61c7"
"""What stands in each file that lies about; it must not be in an answer."""

LYING_ABOUT = {
    "secret.csv": f"a\n{CANARY}\n",
    "other.sql": f"select '{CANARY}' as a\n",
    "s.json": f'{{"a": "{CANARY}"}}',
}
"""Files beside the queries."""

QUERIES = {
    "rows.sql": "-- sites\nselect layer, site, amax from site_stats where group_name = 'all' order by all limit 9\n",
    "sums.sql": "select run, count(*) as n, sum(count) as c from counts group by run;\nselect 1 as one, 'é' as two;\n",
    "macro.sql": "with a as (from quantile(0.99)) select site, max(quantile) from a group by site order by 1\n",
}
PARAMETERS = {"outlier-channels.set": "layer=1\nlimit=4", "outlier-layers.set": "site=x_proj:input"}
"""Each NAME=VALUE in a line; the file has the name of the query."""

HOSTILE = """
select * from 'secret.csv'
select * from read_csv('secret.csv')
select * from read_text('*')
select * from glob('*')
select * from read_blob('secret.csv')
select * from read_json('s.json')
select * from sniff_csv('secret.csv')
copy (select 1 as a) to 'out.csv'
copy counts to 'out.parquet'
export database 'out'
import database '.'
attach 'out.db' as o
attach 'out.db'; create table o.t as select 1
install httpfs
load 'secret.csv'
.read other.sql
.output out.txt
\\i other.sql
.shell touch out
create secret s (type s3)
set enable_external_access = true
reset enable_external_access
set lock_configuration = false
set temp_directory = '.'
set file_search_path = '.'
set log_query_path = 'out.log'
pragma log_query_path='o'
set allowed_directories = ['.']
set extension_directory = '.'
set home_directory = '.'
checkpoint
pragma enable_profiling='json'; pragma profiling_output='out.json'
set python_enable_replacements = true
drop view counts
create or replace view counts as select * from 'secret.csv'
delete from counts
create table t as select * from counts
insert into runs values (1)
update scales set scale = 0
begin
create macro m() as table select * from 'secret.csv'; from m()
prepare p as select 1; execute p
vacuum
select query('select 1')
from query_table('secret.csv')
call pragma_version()
explain analyze select 1
select getenv('HOME')
select * from duckdb_settings()
select * from duckdb_secrets()
select pg_typeof(1)
select 1::bit, interval 1 day, map {1: 2}, {'a': [1]}, 1::varint
select union_value(a := 1)
select null
select 'x'::blob, '\\xff'::blob
select 1e308 * 10, 0 / 0, 'nan'::float
select '2020-01-01'::timestamptz
select $layer
select ?
select 1 as a, 2 as a
select 1 as ""
select 'a' as "\x1b[31m"
values (1), ('a')
select repeat('x', 1000000)
select * from range(100000)
select unnest(range(3))
select uuid()
;;
select
""".strip().split("\n")
"""Statements that no file needs, some of which must be refused."""


def change_query(random: Random, data: bytes) -> bytes:
    """A query with other statements before, behind or inside, very long, or with bytes that are no text."""
    kind = random.randrange(8)
    hostile = "; ".join(random.choice(HOSTILE) for _ in range(random.choice((1, 1, 2, 5)))).encode()
    if kind <= 1:
        return hostile
    if kind == 2:
        return hostile + b";\n" + data
    if kind == 3:
        return data + b"\n;" + hostile
    if kind == 4:
        return b"select * from (" * random.choice((1, 10, 5000)) + hostile + b")"
    if kind == 5:
        return data * random.choice((2, 300))
    if kind == 6:
        place = random.randrange(len(data))
        junk = random.choice((b"\x00", b"\xff", b"\xed\xa0\x80", b"/*", b"--", b"'", b'"', b"$$", b"\xef\xbb\xbf"))
        return data[:place] + junk * random.choice((1, 1, 9000)) + data[place:]
    return b"select " + random.choice((b"1+", b"(", b"-", b"[", b"not ", b"case when ")) * 20_000 + b"1"


def change_parameters(random: Random, data: bytes) -> bytes:
    """Parameters with other names and values."""
    lines = data.split(b"\n")
    values = (
        "",
        "0",
        "-1",
        "1e999",
        "NaN",
        "true",
        "null",
        "[1]",
        '"x"',
        "9" * 4000,
        "1; drop view counts",
        "' or 1 --",
    )
    value = random.choice((*values, "secret.csv", "$limit", "é\x1b[31m", "x" * 100_000, "1.5", "99999999999999999999"))
    name = random.choice(("limit", "layer", "site", "", "x", "é"))
    lines[random.randrange(len(lines))] = f"{name}{random.choice(('=', '==', ''))}{value}".encode()
    return b"\n".join(lines) if random.random() < 0.8 else change_bytes(random, data)


@contextlib.contextmanager
def _nothing_touched(folder: Path, db: Path) -> Iterator[list[str]]:
    """Work in ``folder``; yields a list for what was answered. AssertionError: a file was read or changed."""

    def state() -> list[tuple[str, int, int]]:
        found = [path for place in (folder, db) for path in place.rglob("*")]
        return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.is_file())

    before, told = state(), list[str]()
    try:
        with contextlib.chdir(folder):
            yield told
    finally:
        assert state() == before, "a file was written"
        assert not any(CANARY in text for text in told), "a file was read"


def answer(folder: Path, db: Path, text: str, settings: tuple[str, ...] = ()) -> pa.Table:
    """The answer, also printed in one of the formats. QueryInvalid."""
    refused = ""
    with _nothing_touched(folder, db) as told:
        try:
            with StatsDB(db, limits=Limits(memory=200 << 20, seconds=3.0)) as database:
                found, _ = ask(database, text, settings, most=1000)
            printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
            style = ("table", "json", "csv", "markdown")[len(text) % 4]
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
                emit(found.table, style, rows=found.rows)
            printed.flush()
            told.append(printed.buffer.getvalue().decode())  # type: ignore[attr-defined]
        except QueryInvalid as error:
            refused = str(error)
            if CANARY not in text:
                told.append(refused)
    if refused:
        raise QueryInvalid(refused)  # outside of what it was raised for: a query may need too much memory
    return found.table


def read_query(path: Path, db: Path) -> object:
    """`quambase sql -f FILE`."""
    with path.open(encoding="utf-8") as file:
        return answer(path.parent, db, _read(file))


def read_parameters(path: Path, db: Path) -> object:
    """`quambase sql @NAME --set ...`; the shell hands on bytes that are not UTF-8, and no NUL."""
    lines = path.read_bytes().replace(b"\0", b"").decode("utf-8", "surrogateescape").split("\n")
    try:
        return answer(path.parent, db, f"@{path.stem}", tuple(lines))
    except QueryInvalid:
        raise
    except QuambaseError as error:  # no such parameter
        raise QueryInvalid(str(error)) from None
