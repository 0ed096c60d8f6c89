"""Reads a database: finds its runs, verifies their files, answers SQL, returns distributions."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from quambase.schema.errors import DatabaseInvalid, QuambaseError, QueryInvalid, UnknownName
from quambase.schema.files import local_folder
from quambase.schema.groups import GRANULARITIES, TENSOR, united_groups
from quambase.schema.scale_table import read_scales
from quambase.schema.sites import site_order
from quambase.schema.sql.answer import Answer
from quambase.schema.sql.limits import Limits, Watch, out_of_memory
from quambase.schema.sql.queries import named_queries, sql_file
from quambase.schema.sql.views import VIEWS, comments
from quambase.schema.stored.manifest import Manifest
from quambase.schema.stored.results import EVALUATION, read_results
from quambase.schema.stored.runs import runs_table, select_runs
from quambase.schema.tables import DOCUMENT_QUANTILES, LATER_COLUMNS, RESULTS, RUN_TABLES, SCALES, WORDS
from quambase.schema.values.arrays import Float32, Int32
from quambase.schema.values.distribution import BlockCounts, Distribution, Sensitivity
from quambase.schema.values.number_format import INT8

VERIFY_LIMIT_BYTES = 256 << 20
"""Opening a run compares every file's checksum, those of `activations` only up to this size in all; `doctor` compares
every one.
"""

_COUNTS_PROGRESS = (
    "SET enable_progress_bar = true",
    "SET enable_progress_bar_print = false",
    "SET progress_bar_time = 0",
)
"""Without a bar DuckDB does not count how much of a query is done."""


_LOCKDOWN = (
    "SET temp_directory = ''",
    "SET python_enable_replacements = false",
    # allowed_directories would also grant writing: COPY, EXPORT and ATTACH would succeed there.
    "SET enable_external_access = false",
    "SET lock_configuration = true",
)


@dataclass(frozen=True)
class DocumentSeries:
    """One (layer, site, group) in each document, in the order of the file.

    documents  (D,) int32 document numbers, ascending
    amax       (D,) float32
    quantiles  name of tables.DOCUMENT_QUANTILES to (D,) float32; empty where they are not known
    """

    documents: Int32
    amax: Float32
    quantiles: dict[str, Float32]

    @classmethod
    def united(cls, parts: Sequence[Self]) -> Self:
        """Several groups of one site as one: the largest amax of each document. Their quantiles do not combine."""
        return cls(parts[0].documents, np.max([part.amax for part in parts], axis=0), {})


TOLD_AFTER, WATCHED_EVERY = 2.0, 0.05
"""Seconds until the progress of a query is reported, and between two looks at the query."""


STOPPED_WITHIN = 0.25
"""Seconds within which an interrupted query must end; then it is abandoned."""


def _in_a_thread(function: Callable[[], Answer]) -> Future[Answer]:
    """Call ``function`` in a thread that does not keep the process alive."""
    found: Future[Answer] = Future()

    def run() -> None:
        try:
            found.set_result(function())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found


class StatsDB:
    """A database folder, read-only.

    path    the folder that holds ``runs/``
    run     which run the views show: None for the newest complete one, a run id (or its unambiguous
            beginning), or ``"all"``
    unsafe  let SQL read and write other files
    trace   called with the text of every query before it runs, its parameters in a comment
    scales  scale table for the view `scales`; None takes ``<path>/scales.parquet``, then
            ``./scales.parquet``, and leaves the view empty where there is none or it belongs to other runs
    limits  what a query may take; None: `Limits`'s own

    DatabaseInvalid: no folder, no complete run, a file missing or not as written, a newer format.
    UnknownName: no such run.

    `notes` names the opened run and the damaged ones that are left out, a line each. `scales_notes` and `results_notes`
    say why these views lack rows.
    """

    def __init__(
        self,
        path: str | Path,
        run: str | None = None,
        unsafe: bool = False,
        scales: Path | None = None,
        trace: Callable[[str], None] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.path = local_folder(path)
        self.limits = limits or Limits()
        self.left_behind = False  # a query that could not be stopped
        self._trace = trace
        self.runs, self.notes = select_runs(self.path, run)
        self.scales_notes: list[str] = []
        self.results_notes: list[str] | None = None  # until a query asks for the view
        self._commented = False
        for manifest in self.runs:
            manifest.verify(self.folder(manifest.run), self._checked(manifest))
        self._connection = duckdb.connect(
            config={"autoinstall_known_extensions": False, "autoload_known_extensions": False}
        )
        for name in RUN_TABLES:
            self._connection.register(f"_{name}", self._dataset(name))
        self._connection.register("_runs", runs_table(self.runs))
        self._connection.register("_scales", self._scales(scales))
        self._connection.register("_results", RESULTS.empty_table())
        self._connection.register("_number_format", pa.table({"qmin": [INT8.qmin], "qmax": [INT8.qmax]}))
        self._connection.execute(sql_file("views.sql"))
        with suppress(duckdb.Error):  # a notebook without ipywidgets has no bar, and no share is told
            for statement in _COUNTS_PROGRESS:
                self._connection.execute(statement)
        self._connection.execute(f"SET memory_limit = '{self.limits.memory // 1024} KiB'")
        for statement in () if unsafe else _LOCKDOWN:
            self._connection.execute(statement)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and the files."""
        if not self.left_behind:  # closing would wait for the query
            self._connection.close()

    def folder(self, run: str) -> Path:
        """The folder of a run."""
        return self.path / "runs" / run

    def __repr__(self) -> str:
        return f"StatsDB({str(self.path)!r}): {self.notes[0]}"

    def sql(
        self,
        query: str,
        params: Mapping[str, object] | None = None,
        watch: Callable[[float], None] | None = None,
        most: int | None = None,
    ) -> Answer:
        """Answer ``query`` (named parameters as ``$name``); a statement that returns no rows gives no columns.

        watch  called after TOLD_AFTER seconds and often from then on with the share that is done, from 0 to 1
        most   only so many rows are kept; `Answer.rows` counts all

        QueryInvalid: whatever DuckDB refuses, in one line; for an unknown view or column it names the nearest ones.
        Also a query that takes more than `limits`.

        >>> db.sql("select count(*) as sites from site_stats where layer = $layer and group_name = 'all'", {"layer": 1})
        sites
        -----
           10
        """
        if self._trace:
            self._trace("".join([query, *(f"\n-- ${name} = {value!r}" for name, value in (params or {}).items())]))
        try:
            self._prepare(query)
            return self._interruptible(query, params, watch, most)
        except (duckdb.OutOfMemoryException, MemoryError):
            raise out_of_memory(self.limits) from None
        except duckdb.Error as error:
            raise QueryInvalid(self._explain(str(error))) from None
        except (pa.ArrowException, OSError) as error:
            raise DatabaseInvalid(f"a table could not be read ({str(error).splitlines()[0]}); try `doctor`") from None

    def _interruptible(
        self,
        query: str,
        params: Mapping[str, object] | None,
        watch: Callable[[float], None] | None,
        most: int | None,
    ) -> Answer:
        """Run ``query`` in another thread, so that Ctrl-C reaches this one and stops the query at once."""

        def answer() -> Answer:
            relation = self._connection.sql(query, params=dict(params) if params else None)
            if relation is None:
                return Answer(pa.table({}))
            table, rows = _to_arrow(relation, most)
            return Answer(_plain_integers(table), rows)

        taken = Watch(self.limits)
        answered = _in_a_thread(answer)
        try:
            while wait([answered], WATCHED_EVERY).not_done:
                taken.check()
                if watch and taken.seconds > TOLD_AFTER:
                    # DuckDB gives percents, or -1 where it cannot tell.
                    watch(min(1.0, max(0.0, self._connection.query_progress() / 100)))
            return answered.result()
        except (KeyboardInterrupt, QueryInvalid):
            # A query that has not begun yet ignores an interrupt, so it is repeated until the query ends. Some
            # functions of DuckDB cannot be interrupted; their thread is abandoned.
            stopped = time.monotonic()
            while not answered.done() and time.monotonic() - stopped < STOPPED_WITHIN:
                self._connection.interrupt()
                wait([answered], WATCHED_EVERY)
            self.left_behind = not answered.done()
            raise

    def query(self, name: str, params: Mapping[str, object] | None = None) -> Answer:
        """Answer a named query of queries.sql."""
        return self.sql(named_queries()[name], params)

    def describe(self) -> Answer:
        """Every view and table macro and its columns: ``view, column, type, comment``, the view's own row first."""
        return self.query("schema")

    def stats(self, site: str | None = None, layer: int | None = None, limit: int | None = 20) -> Answer:
        """The summary of each site and group, largest outlier ratio (amax / q9995) first.

        UnknownName: a site or layer that the opened runs do not hold.
        """
        for kind, wanted in (("site", site), ("layer", layer)):
            if wanted is None:
                continue
            known = [str(row[kind]) for row in self.query(f"{kind}s").to_pylist()]
            if str(wanted) not in known:
                raise UnknownName.of(kind, str(wanted), known, where=self._run_names())
        return self.query("sites_by_outliers", {"site": site, "layer": layer, "limit": limit})

    def _run_names(self) -> str:
        return f"run {self.runs[0].run}" if len(self.runs) == 1 else f"{len(self.runs)} runs"

    def manifest(self, run: str) -> Manifest:
        """The manifest of an opened run; UnknownName otherwise."""
        found = {manifest.run: manifest for manifest in self.runs}
        if run not in found:
            raise UnknownName.of("run", run, found)
        return found[run]

    def layers(self, run: str) -> dict[int, int]:
        """The layers of ``run`` in model order, the head (-1) last, and how many rows of `counts` each has."""
        found = Counter[int]()
        for path in self._paths(self.manifest(run), "counts"):
            values = pq.read_table(path, columns=["layer"], partitioning=None)["layer"].value_counts()
            found.update({entry["values"]: entry["counts"] for entry in values.to_pylist()})
        return dict(sorted(found.items(), key=lambda entry: (entry[0] < 0, entry[0])))

    def distributions(
        self, run: str, granularity: str = TENSOR, layer: int | None = None
    ) -> Iterator[tuple[int, str, str, Distribution]]:
        """(layer, site, group_name, distribution) of every scale group of ``run``, in model order, head last; of one
        ``layer``, where it is given.

        ``tensor``: the whole of each site (``all``). ``ssd_group``, ``head_group``, ``group``: that, then, up to this
        granularity and coarse to fine, the groups that a site is divided into.
        """
        if granularity not in GRANULARITIES:
            raise UnknownName.of("granularity", granularity, GRANULARITIES)
        table = self._read(run, "counts", layer)
        for place, site, name, (values, counts) in _scale_groups(table, ("value", "count"), granularity):
            yield place, site, name, Distribution.of_rows(values, counts)

    def sensitivity_tokens(self, run: str) -> int:
        """How many tokens the sensitivities of ``run`` are from; 0 for a run without."""
        return int(self.manifest(run).identity.get("sensitivity", {}).get("tokens", 0))

    def sensitivities(
        self, run: str, granularity: str = TENSOR, layer: int | None = None
    ) -> dict[tuple[int, str, str], Sensitivity]:
        """The scale groups of which ``run`` has sensitivities, as `distributions` names them; none of most runs."""
        tokens = self.sensitivity_tokens(run)
        table = self._read(run, "sensitivities", layer) if tokens else RUN_TABLES["sensitivities"].empty_table()
        return {
            (place, site, name): Sensitivity.of_rows(values, squares, tokens)
            for place, site, name, (values, squares) in _scale_groups(table, ("value", "gradient_sq"), granularity)
        }

    def block_counts(
        self, run: str, layer: int, blocks: int, granularity: str = TENSOR
    ) -> dict[tuple[str, str], BlockCounts]:
        """The counts of each of the ``blocks`` blocks of ``run`` in one layer, by (site, group_name) of the scale
        groups as `distributions` names them; empty unless the run was collected with ``by_block``.
        """
        table = self._read(run, "block_counts", layer)
        columns = "value", "count", "block"
        return {
            (site, name): BlockCounts.of_rows(values, counts, numbers, blocks)
            for _, site, name, (values, counts, numbers) in _scale_groups(table, columns, granularity)
        }

    def documents(self, run: str) -> dict[tuple[int, str, str], DocumentSeries]:
        """The `documents` table of ``run``, by (layer, site, group_name): each site's whole and its smallest groups.

        Larger groups (`quambase.schema.groups.united_groups`) follow by `DocumentSeries.united`.
        """
        table = self._read(run, "documents").combine_chunks()
        columns = {name: table[name].to_numpy() for name in ("document", "amax", *DOCUMENT_QUANTILES)}
        series = {}
        for key, slices in _places(table).items():
            mine = {name: np.concatenate([column[s] for s in slices]) for name, column in columns.items()}
            order = np.argsort(mine["document"], kind="stable")
            series[key] = DocumentSeries(
                mine["document"][order],
                mine["amax"][order],
                {name: mine[name][order] for name in DOCUMENT_QUANTILES},
            )
        return series

    def channel_amax(self, run: str, site: str) -> dict[tuple[int, str], Float32]:
        """(layer, group_name) to the largest absolute value of each channel (of a state: of each state index) (m,)."""
        rows = self.query("channel_amax", {"run": run, "site": site})
        return {(r["layer"], r["group_name"]): np.array(r["amax"], np.float32) for r in rows.to_pylist()}

    def _read(self, run: str, name: str, layer: int | None = None) -> pa.Table:
        """The rows of a run's table, of one layer or of all, in their order."""
        paths = self._paths(self.manifest(run), name)
        if not paths:
            return RUN_TABLES[name].empty_table()
        return _dataset(paths, RUN_TABLES[name]).to_table(filter=None if layer is None else pc.field("layer") == layer)

    def _paths(self, manifest: Manifest, name: str) -> list[Path]:
        """The files of a run's table."""
        return [self.folder(manifest.run) / file for file in manifest.files_of(name)]

    def _checked(self, manifest: Manifest) -> list[str]:
        """The files whose checksum is compared when a run is opened."""
        raw = manifest.files_of("activations")
        size = sum(path.stat().st_size for path in self._paths(manifest, "activations") if path.exists())
        return [file for file in manifest.tables if size <= VERIFY_LIMIT_BYTES or file not in raw]

    def _dataset(self, name: str) -> Any:
        present = [path for manifest in self.runs for path in self._paths(manifest, name)]
        for path in present:
            found = pq.read_schema(path).names
            later = LATER_COLUMNS.get(name, {})
            if found not in (RUN_TABLES[name].names, [n for n in RUN_TABLES[name].names if n not in later]):
                raise DatabaseInvalid(
                    f"{path} has the columns {', '.join(found)}; expected {', '.join(RUN_TABLES[name].names)}"
                )
        return _dataset(present, RUN_TABLES[name])

    def _scales(self, given: Path | None) -> pa.Table:
        found = [path for path in (self.path / "scales.parquet", Path("scales.parquet")) if path.is_file()]
        if given is None and not found:
            return SCALES.empty_table()
        path = given or found[0]
        try:
            table = read_scales(path).table
        except QuambaseError as error:
            if given:
                raise
            self.scales_notes.append(f"the view `scales` is empty: {error}")
            return SCALES.empty_table()
        mine = table.filter(pc.is_in(table["run"], pa.array([m.run for m in self.runs], pa.string())))
        if table.num_rows and not mine.num_rows:
            self.scales_notes.append(f"the view `scales` is empty: {path} was made from another run; run `analyze`")
        return mine

    def _prepare(self, query: str) -> None:
        """Do what takes time and only some queries need: read evaluations, write the comments on views and columns."""
        asked = query.lower()
        if self.results_notes is None and "results" in asked:
            self._read_results()
        if not self._commented and any(word in asked for word in ("duckdb_", "information_schema")):
            # By another connection, so that they outlive a transaction that the user takes back.
            self._connection.cursor().execute("\n".join(comments()))
            self._commented = True

    def _read_results(self) -> None:
        """Fill the view `results`. Other queries do not need its files, so a damaged one does not stop them."""
        self.results_notes = []
        sound = [RESULTS.empty_table()]
        for path in sorted(self.path.glob(f"results/*/{EVALUATION}")):
            try:
                sound.append(read_results(path.parent))
            except DatabaseInvalid as error:
                self.results_notes.append(f"the view `results` leaves out evaluation {path.parent.name}: {error}")
        self._connection.register("_results", pa.concat_tables(sound))

    def _explain(self, message: str) -> str:
        """DuckDB's message as one line that says what to do."""
        if found := re.search(r"Table with name (\S+) does not exist", message):
            return str(UnknownName.of("view", found[1], VIEWS))
        if found := re.search(r'Referenced column "(.+?)" not found', message):
            columns = {column for view in VIEWS.values() for column in view.columns}
            hint = re.search(r"Candidate bindings: (.+)", message)
            nearest = re.findall(r'"([^"]+)"', hint[1]) if hint else []
            return str(UnknownName.of("column", found[1], nearest or columns))
        if "disabled by configuration" in message or "has been locked" in message:
            found = re.search(r"(Cannot .+?|Loading .+?)(?: -|$)", message.splitlines()[0])
            what = found[1] if found else "this"
            return f"a query may read the database's views and nothing else ({what}); --unsafe lifts that"
        lines = [line.strip() for line in message.splitlines() if line.strip() and line.strip() != "^"]
        return " ".join(lines) + "; see the views and columns with `quambase sql --schema`"


def _words(schema: pa.Schema) -> list[str]:
    """The columns that are read as dictionaries, which scan three times faster than plain strings."""
    return [field.name for field in schema if pa.types.is_string(field.type)]


def _dataset(paths: list[Path], schema: pa.Schema) -> Any:
    if not paths:
        return schema.empty_table()
    words = _words(schema)
    options = ds.ParquetReadOptions(dictionary_columns=words)
    # Columns that a file of an earlier version lacks are null.
    read = pa.schema([field.with_type(WORDS) if field.name in words else field for field in schema])
    return ds.dataset([str(p) for p in paths], schema=read, format=ds.ParquetFileFormat(read_options=options))


def _places(table: pa.Table) -> dict[tuple[int, str, str], list[slice]]:
    """(layer, site, group_name) to the stretches of rows with this key, in their order."""
    found: dict[tuple[int, str, str], list[slice]] = {}
    if not table.num_rows:
        return found
    layers = table["layer"].to_numpy()
    sites: Any
    groups: Any
    sites, groups = (pc.dictionary_encode(table[name]).combine_chunks() for name in ("site", "group_name"))
    codes = [layers, sites.indices.to_numpy(), groups.indices.to_numpy()]
    changed = np.zeros(table.num_rows - 1, bool)
    for code in codes:
        changed |= code[1:] != code[:-1]
    starts = np.concatenate([[0], np.flatnonzero(changed) + 1])
    names = sites.dictionary.to_pylist(), groups.dictionary.to_pylist()
    for a, b in itertools.pairwise([*starts.tolist(), table.num_rows]):
        key = int(layers[a]), names[0][codes[1][a]], names[1][codes[2][a]]
        found.setdefault(key, []).append(slice(a, b))
    return found


def _scale_groups(
    table: pa.Table, columns: Sequence[str], granularity: str
) -> Iterator[tuple[int, str, str, list[npt.NDArray[Any]]]]:
    """(layer, site, group_name, its rows of ``columns``) of each scale group, in model order, coarse to fine."""
    table = table.combine_chunks()
    arrays = [table[name].to_numpy() for name in columns]
    by_site: dict[tuple[int, str], dict[str, list[slice]]] = {}
    for (layer, site, group_name), slices in _places(table).items():
        by_site.setdefault((layer, site), {})[group_name] = slices

    def order(of_site: tuple[tuple[int, str], Any]) -> tuple[Any, ...]:
        (layer, site), _ = of_site
        return layer < 0, layer, *site_order(site)

    for (layer, site), groups in sorted(by_site.items(), key=order):
        for level in GRANULARITIES[: GRANULARITIES.index(granularity) + 1]:
            for name, members in united_groups(groups, level).items():
                places = [place for member in members for place in groups[member]]
                if len(places) == 1:  # a view: most groups are one stretch, and copies of large tables take time
                    yield layer, site, name, [array[places[0]] for array in arrays]
                else:
                    yield layer, site, name, [np.concatenate([array[s] for s in places]) for array in arrays]


_AS_TEXT = re.compile(r"DATE|TIME|INTERVAL|UNION|BIT|BLOB|BIGNUM|UHUGEINT|GEOMETRY|VARIANT|(STRUCT|TUPLE)(?!\()")
"""Types with values that Arrow, Python, CSV or Parquet cannot hold (infinite dates, intervals, integers beyond 2^127,
a struct of nothing): they are answered as text.
"""


def _to_arrow(relation: duckdb.DuckDBPyRelation, most: int | None) -> tuple[pa.Table, int]:
    """The rows as Arrow, ``most`` at most, and how many there are. Repeated column names become ``name_1``, ``name_2``,
    as in DuckDB's own tables.
    """
    names: list[str] = []
    for name in relation.columns:
        others = (f"{name}_{i}" for i in itertools.count(1))
        names.append(name if name not in names else next(n for n in others if n not in {*names, *relation.columns}))
    places = [f"c{i}" for i in range(len(names))]
    texts = [bool(_AS_TEXT.search(str(kind))) for kind in relation.types]
    asked: Any = relation
    if any(texts):
        chosen = ", ".join(f"{p}::VARCHAR" if text else p for p, text in zip(places, texts, strict=True))
        asked = relation.query("asked", f"SELECT {chosen} FROM asked AS t({', '.join(places)})")
    if most is None:
        whole = asked.to_arrow_table()
        return whole.rename_columns(names), whole.num_rows
    found = asked.limit(most + 1).to_arrow_table().rename_columns(names)
    if found.num_rows <= most:
        return found, found.num_rows
    counted: Any = relation.aggregate("count(*) AS n")
    return found.slice(0, most), counted.to_arrow_table()["n"][0].as_py()


def _plain_integers(table: pa.Table) -> pa.Table:
    """Turn DuckDB's 128-bit sums of integers into int64 where they fit, since few libraries read 128 bits."""
    for place, field in enumerate(table.schema):
        if pa.types.is_decimal(field.type) and field.type.scale == 0:
            try:
                table = table.set_column(place, field.name, table[place].cast(pa.int64()))
            except pa.ArrowInvalid:
                continue
    return table
