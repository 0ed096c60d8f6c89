"""A run's tables as written: in the order of blocks, whatever pieces they are made in, and with plain strings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quambase.collector import rows, writer
from quambase.collector.plan import PlannedDocument
from quambase.collector.recorder import documents_rows
from quambase.collector.rows import PatternOrder, keyed_rows
from quambase.collector.statistics import ENCODINGS, SUMMARY_COLUMNS, SiteLayout, SiteStatistics
from quambase.collector.writer import part_folder, write_part, write_run
from quambase.schema.distribution import Distribution
from quambase.schema.tables import ACTIVATIONS, COUNTS, DOCUMENTS, RUN_TABLES

FLOAT16 = ENCODINGS["float16"]
LAYOUT = SiteLayout(("b", "a"), (0, 2, 5))


def statistics(seed: int) -> SiteStatistics:
    """Counts of some hundred patterns in each of two groups, zeros and infinities of both signs among them."""
    generator = np.random.default_rng(seed)
    stats = SiteStatistics.empty(LAYOUT, 4)
    for g in range(2):
        stats.counts[g, generator.integers(0, 65536, 300)] = generator.integers(1, 1 << 40, 300)
        stats.counts[g, [0, 0x8000, 0x3C00, 0x7C00, 0xFC00]] = 3, 4, 1, 1, 2
    return stats


STATISTICS = {(layer, site): statistics(layer) for layer in (1, 0) for site in ("x", "w")}


def part(block: int) -> tuple[pa.Table, pa.Table]:
    """Two documents at a site, a raw row of each of ``block`` + 1 sites: dictionaries differ from part to part."""
    documents: dict[str, object] = {name: np.zeros(2, np.float32) for name in DOCUMENTS.names[7:]}
    documents |= {"document": [2 * block, 2 * block + 1], "tokens": [3, 4], "sha256": [f"{block}", "x"]}
    raw = [
        keyed_rows(
            "run", (0, f"site {i}"), "all", 1, {"document": [block], "position": [i], "values": [[1.0, i]]}, ACTIVATIONS
        )
        for i in reversed(range(block + 1))
    ]
    return keyed_rows("run", (0, "x"), "a", 2, documents, DOCUMENTS), pa.concat_tables(raw)


def written(folder: Path, blocks: list[int]) -> dict[str, pa.Table]:
    """The tables of a run of these blocks' parts, read again."""
    for block in blocks:
        write_part(folder, block, *part(block))
    parts = [part_folder(folder, block) for block in blocks]
    tables = write_run(folder, "run", STATISTICS, FLOAT16, lambda _, __, row, channel: (row, 0, "", channel), parts)
    found = {name: pq.read_table(folder / f"{name}.parquet", partitioning=None) for name in RUN_TABLES}
    assert {name: table.num_rows for name, table in found.items()} == {
        name: tables[f"{name}.parquet"].rows for name in RUN_TABLES
    }
    return found


@pytest.mark.parametrize("documents", [1, 3])
def test_rows_of_documents_are_sorted_by_site_and_group(documents: int) -> None:
    """Sites in another order, twice, since what blocks share is kept."""
    layouts = {(1, "b"): LAYOUT, (0, "w"): SiteLayout(("all",), (0, 3)), (1, "a"): SiteLayout(("y", "c"), (0, 1, 2))}
    for first in (5, 40):
        block = [PlannedDocument(first + 2 * i, f"sha {i}", np.zeros(i + 7, np.int32)) for i in range(documents)]
        summaries = {
            key: np.random.default_rng(first).random((documents, len(layout.names) + 1, len(SUMMARY_COLUMNS)), "f4")
            for key, layout in layouts.items()
        }
        wanted = []
        for key in sorted(layouts):
            names = layouts[key].names
            groups = {"all": len(names)} | {name: g for g, name in enumerate(names)}
            for name in sorted(groups):
                for i, document in enumerate(block):
                    values = dict(zip(SUMMARY_COLUMNS, summaries[key][i, groups[name]].tolist(), strict=True))
                    place = {"run": "run", "layer": key[0], "site": key[1], "group_name": name}
                    wanted.append(place | {"document": document.index, "tokens": i + 7, "sha256": f"sha {i}"} | values)
        assert documents_rows("run", block, layouts, summaries).to_pylist() == [
            {column: row[column] for column in DOCUMENTS.names} for row in wanted
        ]


def test_rows_of_parts_follow_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (writer.PART_ROWS, 1, 3):
        monkeypatch.setattr(writer, "PART_ROWS", size)
        monkeypatch.setattr(writer, "PIECE_ROWS", size)
        found = written(tmp_path / str(size), [0, 1, 2])
        assert found["documents"]["document"].to_pylist() == [0, 1, 2, 3, 4, 5]
        raw = [(row["document"], row["site"], row["values"]) for row in found["activations"].to_pylist()]
        assert raw == [(block, f"site {i}", [1.0, i]) for block in range(3) for i in reversed(range(block + 1))]


def test_only_small_parts_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, groups in ((1 << 22, 1), (1, 3)):
        monkeypatch.setattr(writer, "PIECE_BYTES", size)
        written(tmp_path / str(size), [0, 1, 2])
        for name in ("documents", "activations"):
            assert pq.read_metadata(tmp_path / str(size) / f"{name}.parquet").num_row_groups == groups, name


def test_raw_values_are_stored_byte_by_byte(tmp_path: Path) -> None:
    """Of a column that has no such name Parquet's writer would say nothing."""
    written(tmp_path, [0])
    group = pq.read_metadata(tmp_path / "activations.parquet").row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    (encodings,) = [column.encodings for column in columns if column.path_in_schema.startswith("values.")]
    assert "BYTE_STREAM_SPLIT" in encodings


def test_strings_are_read_as_strings(tmp_path: Path) -> None:
    for name, table in written(tmp_path, [0]).items():
        assert table.schema.equals(RUN_TABLES[name]), name


@pytest.mark.parametrize("size", [1, 700, 1 << 18])
def test_counts_are_those_of_every_group_in_order(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PIECE_ROWS", size)
    monkeypatch.setattr(writer, "PIECE_ROWS", size)
    values = FLOAT16.values()
    wanted: list[tuple[int, str, str, dict[float, int]]] = []
    for layer, site in sorted(STATISTICS):
        for name, g in (("a", 1), ("b", 0)):
            counts = STATISTICS[layer, site].counts[g]
            held: dict[float, int] = {}
            for pattern in np.flatnonzero(counts):
                value = "nan" if np.isnan(values[pattern]) else float(values[pattern])
                held[value] = held.get(value, 0) + int(counts[pattern])
            wanted.append((layer, site, name, held))
    found: dict[tuple[int, str, str], dict[float, int]] = {}
    for row in written(tmp_path, [])["counts"].to_pylist():
        value = "nan" if np.isnan(row["value"]) else row["value"]
        found.setdefault((row["layer"], row["site"], row["group_name"]), {})[value] = row["count"]
    for held in found.values():
        assert list(held) == sorted(held, key=lambda value: np.inf if value == "nan" else value) and "nan" in held
    assert list(found) == [(layer, site, name) for layer, site, name, _ in wanted]
    assert list(found.values()) == [held for *_, held in wanted]
    assert COUNTS.names[-2:] == ["value", "count"]


def test_site_stats_are_of_all_rows(tmp_path: Path) -> None:
    order = PatternOrder(FLOAT16)
    found = written(tmp_path, [])["site_stats"].to_pylist()
    assert [(row["layer"], row["site"], row["group_name"]) for row in found] == [
        (layer, site, name) for layer, site in sorted(STATISTICS) for name in ("a", "all", "b")
    ]
    for row in found:
        counts = STATISTICS[row["layer"], row["site"]].counts
        mine = {"a": counts[1], "b": counts[0], "all": counts.sum(axis=0)}[row["group_name"]]
        summary = Distribution.of_rows(order.values, order.fold(mine)).summary()
        assert summary["nonfinite"] > 0 and summary["zeros"] > 0
        for column, value in summary.items():
            assert row[column] == (np.float32(value) if column in ("amax", "min", "max") else value), column
