"""A run's tables as written: files in the order of blocks and parts, complete or refused, with plain strings."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from activations_twin import activations_twin
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_runs import bytes_of, table_files

from quambase.collector.documents import TokenizedDocument
from quambase.collector.statistics import ENCODINGS, SUMMARY_COLUMNS, RunStatistics, SiteLayout, SiteStatistics
from quambase.collector.tables import block_rows, run_folder
from quambase.collector.tables import table_rows as rows
from quambase.collector.tables.block_rows import KeptRows, activations_rows, documents_rows
from quambase.collector.tables.run_folder import BlockFiles, every_table, finish_run, in_order, write_statistics
from quambase.collector.tables.table_rows import Places, many_keyed_rows
from quambase.schema.checksums import file_sha256
from quambase.schema.errors import DatabaseInvalid
from quambase.schema.stored.manifest import Manifest, TableFile, table_of
from quambase.schema.stored.model_info import ModelInfo, TextInfo
from quambase.schema.tables import ACTIVATIONS, CHANNELS, COUNTS, DOCUMENTS, RUN_TABLES, as_made, read_table
from quambase.schema.values.arrays import Int64
from quambase.schema.values.distribution import Distribution

FLOAT16 = ENCODINGS["float16"]
LAYOUT = SiteLayout(("b", "a"), (0, 2, 5))


SITES = [(layer, site) for layer in (0, 1) for site in ("w", "x")]


def statistics() -> RunStatistics:
    """Of every site counts of some hundred patterns in each of two groups, zeros and infinities of both signs among
    them, and moments with zeros of both signs.
    """
    made = RunStatistics.empty(dict.fromkeys(SITES, LAYOUT), 4)
    for number, key in enumerate(SITES):
        generator, site = np.random.default_rng(number), made.site(key)
        for counts in site.counts.numpy():
            counts[generator.integers(0, 65536, 300)] = generator.integers(1, 1 << 40, 300)
            counts[[0, 0x8000, 0x3C00, 0x7C00, 0xFC00]] = 3, 4, 1, 1, 2
        for values in site.moments.named().values():
            values.numpy()[:] = generator.integers(-99, 99, 5)
            if values.is_floating_point():
                values[int(generator.integers(0, 5))] = -0.0
    return made


STATISTICS = statistics()
NO_SITE = RunStatistics.empty({}, 4)


def rows_of_block(block: int) -> tuple[pa.Table, pa.Table]:
    """Two documents at a site, a raw row of each of ``block`` + 1 sites: dictionaries differ from block to block."""
    documents: dict[str, object] = {name: np.zeros(2, np.float32) for name in DOCUMENTS.names[7:]}
    documents |= {"document": [2 * block, 2 * block + 1], "tokens": [3, 4], "sha256": [f"{block}", "x"]}
    raw = [
        many_keyed_rows(
            "run",
            [((0, f"site {i}"), "all")],
            [1],
            {"document": [block], "position": [i], "values": [[1.0, i]]},
            ACTIVATIONS,
        )
        for i in reversed(range(block + 1))
    ]
    return many_keyed_rows("run", [((0, "x"), "a")], [2], documents, DOCUMENTS), pa.concat_tables(raw)


def nowhere(layout: SiteLayout, documents: Int64, rows: Int64, channels: Int64) -> Places:
    """Places of values of no tokens."""
    texts = [""] * rows.size
    return Places(rows, [0] * rows.size, texts, texts, texts, channels)


Files = dict[str, TableFile]


def write_blocks(folder: Path, blocks: Sequence[int], there: Files | None = None) -> Files:
    """Write the rows of blocks, in the order in which they come."""
    with BlockFiles(folder, there) as files:
        for block in blocks:
            files.add(block, *rows_of_block(block))
        return files.written()


def written(folder: Path, blocks: Sequence[int]) -> dict[str, pa.Table]:
    """The tables of a run of these blocks, read again; what is said of its files is so."""
    files = write_blocks(folder, blocks)
    made = write_statistics(folder, "run", STATISTICS, FLOAT16, nowhere)
    files = every_table(folder, dict(reversed(list({**made, **files}.items()))))
    assert list(dict.fromkeys(map(table_of, files))) == list(RUN_TABLES)
    found = {}
    for name, schema in RUN_TABLES.items():
        mine = [file for file in files if table_of(file) == name]
        parts = [read_table(folder / file, schema) for file in mine]
        assert [files[file] for file in mine] == [
            TableFile(part.num_rows, file_sha256(folder / file)) for file, part in zip(mine, parts, strict=True)
        ]
        assert mine == [path.relative_to(folder).as_posix() for path in table_files(folder, name)]
        found[name] = pa.concat_tables(parts)
    return found


@pytest.mark.parametrize("documents", [1, 3])
def test_rows_of_documents_are_sorted_by_site_and_group(documents: int) -> None:
    """Sites in another order, twice, since what blocks share is kept."""
    layouts = {(1, "b"): LAYOUT, (0, "w"): SiteLayout(("all",), (0, 3)), (1, "a"): SiteLayout(("y", "c"), (0, 1, 2))}
    layouts[2, "c"] = layouts[1, "a"]
    for first in (5, 40):
        block = [TokenizedDocument(first + 2 * i, f"sha {i}", np.zeros(i + 7, np.int32)) for i in range(documents)]
        generator = np.random.default_rng(first)
        summaries = {
            key: generator.random((documents, len(layout.names) + 1, len(SUMMARY_COLUMNS)), "f4")
            for key, layout in layouts.items()
        }
        summaries[2, "c"] = summaries[1, "a"]
        wanted = []
        for key in sorted(layouts):
            names = layouts[key].names
            groups = {"all": len(names)} | {name: g for g, name in enumerate(names)}
            for name in sorted(groups):
                for i, document in enumerate(block):
                    values = dict(zip(SUMMARY_COLUMNS, summaries[key][i, groups[name]].tolist(), strict=True))
                    place = {"run": "run", "layer": key[0], "site": key[1], "group_name": name}
                    wanted.append(place | {"document": document.index, "tokens": i + 7, "sha256": f"sha {i}"} | values)
        # They lie in another order still, and one of them is of two sites.
        flat = np.concatenate([summaries[1, "a"], summaries[1, "b"], summaries[0, "w"]], axis=None)
        starts = [summaries[1, "a"].size, summaries[1, "a"].size + summaries[1, "b"].size, 0, 0]
        assert documents_rows("run", block, layouts, flat, starts).to_pylist() == [
            {column: row[column] for column in DOCUMENTS.names} for row in wanted
        ]


KINDS = [
    (SiteLayout(("all",), (0, 3)), 3),
    (SiteLayout(("z", "x", "y"), (0, 2, 2, 5)), 5),
    (SiteLayout(("b", "a"), (0, 2, 4), order=(1, 3, 0, 2)), 4),
    (SiteLayout(("all",), (0, 2), state=True), 6),
    (SiteLayout(("b", "a"), (0, 1, 3), state=True, order=(2, 0, 1), d_state=2), 6),
]
"""Layouts and how many values a place has: undivided and divided, a group of no channel, sorted channels, states."""


@settings(deadline=None, max_examples=100)
@given(st.data(), st.sampled_from([1 << 24, 20, 1]))
def test_rows_of_activations_are_their_twins(data: st.DataObject, piece: int) -> None:
    """Of sites in any order, some in several parts or of no place, their values in one tensor or several."""
    keys = data.draw(st.lists(st.tuples(st.integers(-1, 2), st.sampled_from("abc")), unique=True, max_size=6))
    spans = [[(5, 1), (5, 3), (9, 0)], [(1, 2)], []]
    parts: list[tuple[tuple[int, str], int]] = []  # of sites, perhaps by turns, and of spans
    for key in keys:
        parts += [(key, span) for span in data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))]
    layouts, kept, same = {}, [], {}
    wanted: dict[tuple[int, str], list[tuple[tuple[int, int], np.ndarray]]] = {}
    tensors = [[np.empty(0, np.float32)]]
    for number, (key, span) in enumerate(data.draw(st.permutations(parts))):
        if key not in layouts:
            layouts[key] = data.draw(st.sampled_from(KINDS))
        width = layouts[key][1]
        kept.append(KeptRows(key, span, width))
        values = np.arange(len(spans[span]) * width, dtype=np.float32).reshape(-1, width) + 100 * number
        if data.draw(st.booleans()) and tensors[-1][-1].size:
            tensors.append([])
        tensors[-1].append(values.reshape(-1))
        wanted.setdefault(key, []).extend(zip(spans[span], values, strict=True))
    for key in data.draw(st.lists(st.sampled_from(keys), unique=True)) if keys else []:
        same[key[0], f"{key[1]} again"] = key
    of_sites = {key: layout for key, (layout, _) in layouts.items()}
    of_sites |= {key: of_sites[source] for key, source in same.items()}
    wanted |= {key: wanted[source] for key, source in same.items()}
    places = [np.array(of_span, np.int64).reshape(-1, 2) for of_span in spans]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_rows, "PIECE", piece)
        flat = [np.concatenate(tensor) for tensor in tensors]
        found = activations_rows("run", of_sites, kept, same, places, [values for values in flat if values.size])
    assert found.cast(ACTIVATIONS).equals(activations_twin("run", of_sites, wanted))
    for column in ("site", "group_name"):  # no word that no row has
        for chunk in found[column].chunks:
            assert set(chunk.dictionary.to_pylist()) == set(chunk.to_pylist())


def test_pieces_of_activations_end_with_the_group_that_fills_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has more than PIECE values, but the last; a group is in one piece."""
    monkeypatch.setattr(block_rows, "PIECE", 10)
    layouts = {(0, site): SiteLayout(("all",), (0, 4)) for site in "abcde"}
    kept = [KeptRows(key, 0, 4) for key in layouts]
    places = [np.array([(7, i) for i in range(2)])]
    found = activations_rows("run", layouts, kept, {}, places, [np.arange(40, dtype=np.float32)])
    assert [len(chunk) for chunk in found["values"].chunks] == [4, 4, 2]


def test_rows_of_blocks_follow_one_another(tmp_path: Path) -> None:
    """In the order of blocks, whatever the order in which they come."""
    for number, blocks in enumerate(([0, 1, 2], [2, 0, 1])):
        found = written(tmp_path / str(number), blocks)
        assert found["documents"]["document"].to_pylist() == [0, 1, 2, 3, 4, 5]
        raw = [(row["document"], row["site"], row["values"]) for row in found["activations"].to_pylist()]
        assert raw == [(block, f"site {i}", [1.0, i]) for block in range(3) for i in reversed(range(block + 1))]
    assert bytes_of(tmp_path / "0") == bytes_of(tmp_path / "1")


def test_files_with_more_digits_come_last(tmp_path: Path) -> None:
    names = ["counts/part-1000.parquet", "counts/part-999.parquet", "documents/block-100000.parquet",
             "documents/block-99999.parquet", "counts/part-000.parquet", "groups.parquet"]  # fmt: skip
    assert list(in_order({name: TableFile(0, "") for name in names})) == [
        names[4], names[1], names[0], names[3], names[2], names[5]
    ]  # fmt: skip


@pytest.mark.parametrize("bytes_waiting", [0, 1 << 28])
def test_blocks_are_written_beside_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_waiting: int
) -> None:
    """Where nothing may wait, a block is on the disk once it was added."""
    monkeypatch.setattr(run_folder, "UNWRITTEN_BYTES", bytes_waiting)
    write, slow = run_folder.write_file, threading.Event()

    def writing(folder: Path, file: str, rows: pa.Table) -> TableFile:
        slow.wait(0.3)
        return write(folder, file, rows)

    monkeypatch.setattr(run_folder, "write_file", writing)
    with BlockFiles(tmp_path) as files:
        files.add(7, *rows_of_block(7))
        assert len(list(tmp_path.rglob("*.parquet"))) == (2 if bytes_waiting == 0 else 0)
        assert set(files.written()) == {"documents/block-00007.parquet", "activations/block-00007.parquet"}


def test_what_a_file_failed_with_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a later block, or when the files are waited for."""
    calls: list[str] = []

    def full(folder: Path, file: str, rows: pa.Table) -> TableFile:
        calls.append(file)
        raise OSError("no space left")

    monkeypatch.setattr(run_folder, "write_file", full)
    with BlockFiles(tmp_path) as files:
        with suppress(OSError):
            files.add(0, *rows_of_block(0))
        with pytest.raises(OSError, match="no space left"):
            files.written()
        with pytest.raises(OSError, match="no space left"):
            for block in range(1, 100):
                files.add(block, *rows_of_block(block))
                time.sleep(0.01)
    assert not list(tmp_path.iterdir())  # nothing half written


@pytest.mark.parametrize("name", ["documents", "activations"])
def test_files_of_a_checkpoint_are_checked(tmp_path: Path, name: str) -> None:
    there = write_blocks(tmp_path, [0, 1])
    later = write_blocks(tmp_path, [2], there)
    assert later.items() > there.items() and len(later) == 6
    path = tmp_path / name / "block-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-5] + b"other")
    with pytest.raises(DatabaseInvalid, match=f"{name}/block-00001.parquet was altered .* remove {tmp_path} and coll"):
        BlockFiles(tmp_path, there)
    path.unlink()
    with pytest.raises(DatabaseInvalid, match=f"{name}/block-00001.parquet is missing"):
        BlockFiles(tmp_path, there)


def test_a_block_without_rows_has_no_file_and_a_table_has_one(tmp_path: Path) -> None:
    documents, activations = rows_of_block(4)
    with BlockFiles(tmp_path) as files:
        files.add(4, documents, as_made(ACTIVATIONS).empty_table())
        found = files.written()
    assert list(found) == ["documents/block-00004.parquet"]
    whole = every_table(tmp_path, found)
    assert list(whole) == [
        "counts/part-000.parquet",
        *found,
        "activations/block-00000.parquet",
        "sensitivities/part-000.parquet",
        "second_moments/part-000.parquet",
        "block_counts/block-00000.parquet",
        "position_counts/part-000.parquet",
    ]
    with BlockFiles(tmp_path / "all") as files:
        files.add(0, documents, activations)
        found = files.written()
    made = every_table(tmp_path / "all", found)
    empty = ("counts", "sensitivities", "second_moments", "block_counts", "position_counts")
    assert [file for file in made if table_of(file) not in empty] == list(in_order(found))


def test_tables_of_no_site_are_there_and_empty(tmp_path: Path) -> None:
    tables = every_table(tmp_path, write_statistics(tmp_path, "run", NO_SITE, FLOAT16, nowhere))
    assert list(map(table_of, tables)) == list(RUN_TABLES)
    for file, entry in tables.items():
        found = pq.read_table(tmp_path / file, partitioning=None)
        assert found.schema.equals(RUN_TABLES[table_of(file)]) and found.num_rows == entry.rows == 0, file


def test_a_site_that_is_another_has_its_rows(tmp_path: Path) -> None:
    """In every table that is made of statistics; its own place in the arrays is empty."""
    made = RunStatistics.empty(dict.fromkeys([*SITES, (0, "v")], LAYOUT), 4)
    made.index.share((0, "v"), (0, "x"))
    for key in SITES:
        for into, values in zip(arrays(made.site(key)), arrays(STATISTICS.site(key)), strict=True):
            into.copy_(values)
    made.site((0, "x")).top[:] = torch.tensor([9, 0x3C00, 1, 2, 0])
    files = write_statistics(tmp_path, "run", made, FLOAT16, nowhere)
    for name in ("counts", "site_stats", "channels", "outliers", "groups"):
        rows = [row for file in files if table_of(file) == name for row in pq.read_table(tmp_path / file).to_pylist()]
        mine, others = ([row for row in rows if (row["layer"], row["site"]) == (0, site)] for site in ("v", "x"))
        assert mine and repr(mine) == repr([row | {"site": "v"} for row in others]), name


def arrays(site: SiteStatistics) -> list[torch.Tensor]:
    return [site.counts, site.top, *site.moments.named().values()]


def test_a_finished_run_has_no_other_files(tmp_path: Path) -> None:
    """Whoever reads a folder as one table finds nothing of a process that was killed."""
    folder = tmp_path / "runs" / "r"
    files = every_table(folder, write_statistics(folder, "r", STATISTICS, FLOAT16, nowhere))
    (folder / "counts" / "part-999.parquet").write_bytes(b"PAR1")
    (folder / "documents" / ".block-00000.parquet.x.tmp").mkdir()
    finish_run(folder, Manifest("r", {}, ModelInfo("m", "mamba1"), TextInfo("t", 1, 1), files, []))
    assert set(bytes_of(folder)) == set(files)
    assert not list(folder.rglob("*.tmp"))


def test_raw_values_are_stored_byte_by_byte(tmp_path: Path) -> None:
    """Of a column that has no such name Parquet's writer would say nothing."""
    written(tmp_path, [0])
    group = pq.read_metadata(tmp_path / "activations" / "block-00000.parquet").row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    (encodings,) = [column.encodings for column in columns if column.path_in_schema.startswith("values.")]
    assert "BYTE_STREAM_SPLIT" in encodings


def test_strings_are_read_as_strings(tmp_path: Path) -> None:
    for name, table in written(tmp_path, [0]).items():
        assert table.schema.equals(RUN_TABLES[name]), name


@pytest.mark.parametrize("groups", [1, 3, 100])
def test_counts_are_those_of_every_group_in_order(groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "COUNTED", groups)
    values = FLOAT16.values()
    wanted: list[tuple[int, str, str, dict[float, int]]] = []
    for layer, site in SITES:
        for name, g in (("a", 1), ("b", 0)):
            counts = STATISTICS.site((layer, site)).counts[g].numpy()
            held: dict[float, int] = {}
            for pattern in np.flatnonzero(counts):
                value = "nan" if np.isnan(values[pattern]) else float(values[pattern])
                held[value] = held.get(value, 0) + int(counts[pattern])
            wanted.append((layer, site, name, held))
    found: dict[tuple[int, str, str], dict[float, int]] = {}
    table = written(tmp_path, [0])["counts"]
    assert len(table_files(tmp_path, "counts")) == -(-len(wanted) // groups)
    for row in table.to_pylist():
        value = "nan" if np.isnan(row["value"]) else row["value"]
        found.setdefault((row["layer"], row["site"], row["group_name"]), {})[value] = row["count"]
    for held in found.values():
        assert list(held) == sorted(held, key=lambda value: np.inf if value == "nan" else value) and "nan" in held
    assert list(found) == [(layer, site, name) for layer, site, name, _ in wanted]
    assert list(found.values()) == [held for *_, held in wanted]
    assert COUNTS.names[-2:] == ["value", "count"]


def test_channels_are_every_groups_in_order(tmp_path: Path) -> None:
    names = {"count": "count", "nonfinite": "nonfinite", "overflow": "overflow", "mean_abs_max": "mean_abs_max"}
    names |= {"min": "lowest", "max": "highest", "sum": "total", "sum_sq": "squares"}
    wanted = []
    for layer, site in SITES:
        moments = STATISTICS.site((layer, site)).moments.named()
        for name, channels in (("a", (2, 3, 4)), ("b", (0, 1))):
            for channel in channels:
                row = {column: moments[field][channel].item() + 0 for column, field in names.items()}
                wanted.append(
                    {"run": "run", "layer": layer, "site": site, "group_name": name, "channel": channel} | row
                )
    found = written(tmp_path, [0])["channels"].to_pylist()
    assert found == [{column: row[column] for column in CHANNELS.names} for row in wanted]
    assert not any(str(value) == "-0.0" for row in found for value in row.values())


def test_site_stats_are_of_all_rows(tmp_path: Path) -> None:
    found = written(tmp_path, [0])["site_stats"].to_pylist()
    assert [(row["layer"], row["site"], row["group_name"]) for row in found] == [
        (layer, site, name) for layer, site in SITES for name in ("a", "all", "b")
    ]
    for row in found:
        site = STATISTICS.site((row["layer"], row["site"]))
        counts = site.counts.numpy()
        mine = {"a": counts[1], "b": counts[0], "all": counts.sum(axis=0)}[row["group_name"]]
        summary = Distribution.of_rows(FLOAT16.values(), mine).summary()
        assert summary["nonfinite"] > 0 and summary["zeros"] > 0
        overflow = site.moments.named()["overflow"].numpy()
        assert row["overflow"] == {"a": overflow[2:], "b": overflow[:2], "all": overflow}[row["group_name"]].sum()
        for column, value in summary.items():
            if column in ("mean", "std", "kurtosis"):
                # Some hundred terms added in pairs there, with what is lost here: a dozen roundings, and those of the
                # mean are relative to the values.
                assert row[column] == pytest.approx(value, rel=1e-14, abs=1e-14 * summary["std"]), column
            else:
                assert row[column] == (np.float32(value) if column in ("amax", "min", "max") else value), column
