"""Statistics as rows of the tables of `quambase.schema.tables`, sorted by layer, site and group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from quambase.collector.kernels import SIGN
from quambase.collector.statistics import Encoding, SiteLayout, SiteStatistics
from quambase.schema.distribution import Distribution
from quambase.schema.sites import WHOLE
from quambase.schema.tables import CHANNELS, COUNTS, GROUPS, OUTLIERS, SITE_STATS, as_made

Key = tuple[int, str]
"""(layer, site)."""

Statistics = Mapping[Key, SiteStatistics]

_MOMENT_COLUMNS = {
    "count": "count",
    "min": "lowest",
    "max": "highest",
    "sum": "total",
    "sum_sq": "squares",
    "mean_abs_max": "mean_abs_max",
    "nonfinite": "nonfinite",
    "overflow": "overflow",
}


def keyed_rows(run: str, key: Key, group: str, rows: int, columns: dict[str, object], schema: pa.Schema) -> pa.Table:
    """A table of ``schema`` whose key columns are constant and whose other columns are ``columns``."""
    return many_keyed_rows(run, [(key, group)], [rows], columns, schema)


def many_keyed_rows(
    run: str, keys: Sequence[tuple[Key, str]], rows: Sequence[int], columns: dict[str, object], schema: pa.Schema
) -> pa.Table:
    """`keyed_rows` of several (key, group) at once: ``rows[i]`` rows are of ``keys[i]``, one after the other."""

    def words(of_keys: Sequence[str]) -> pa.DictionaryArray:
        """Each row's; the dictionary holds every word once, as Parquet's must."""
        numbers = {word: number for number, word in enumerate(dict.fromkeys(of_keys))}
        indices = np.array([numbers[word] for word in of_keys], np.int32)
        return pa.DictionaryArray.from_arrays(np.repeat(indices, rows), pa.array(list(numbers), pa.string()))

    columns = {
        "run": words([run] * len(keys)),
        "layer": np.repeat(np.array([layer for (layer, _), _ in keys], np.int32), rows),
        "site": words([site for (_, site), _ in keys]),
        "group_name": words([name for _, name in keys]),
        **columns,
    }
    made = as_made(schema)
    arrays = [
        column if isinstance(column, (pa.Array, pa.ChunkedArray)) else pa.array(column, made.field(name).type)
        for name, column in ((name, columns[name]) for name in made.names)
    ]
    return pa.Table.from_arrays(arrays, schema=made)


def ordered_groups(layout: SiteLayout) -> list[tuple[str, int]]:
    """Group names in the order of the tables, with their numbers."""
    return sorted((name, g) for g, name in enumerate(layout.names))


class PatternOrder:
    """The order of `counts`: values ascending from -inf to inf, then NaN; -0 joins 0, all NaN join one."""

    def __init__(self, encoding: Encoding) -> None:
        infinity = encoding.infinity
        patterns = np.concatenate([np.arange(SIGN + infinity, SIGN, -1), np.arange(0, infinity + 1)])
        self.values = np.append(encoding.values()[patterns], np.float32("nan")).astype(np.float32)
        self._patterns = patterns
        self._infinity = infinity

    def fold(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(PATTERNS,) counts by pattern to (values,) counts in this order."""
        folded = np.empty(self.values.size, np.int64)
        np.take(counts, self._patterns, out=folded[:-1])
        folded[self._infinity] += counts[SIGN]
        folded[-1] = counts[self._infinity + 1 : SIGN].sum() + counts[SIGN + self._infinity + 1 :].sum()
        return folded


PIECE_ROWS = 1 << 18
"""Rows of a table that are made and written together, about: a row group of a useful size."""


def counts_rows(run: str, statistics: Statistics, order: PatternOrder) -> Iterator[pa.Table]:
    """The table `counts`, several groups a piece: it has by far the most rows."""
    keys: list[tuple[Key, str]] = []
    values: list[npt.NDArray[np.float32]] = []
    counts: list[npt.NDArray[np.int64]] = []

    def piece() -> pa.Table:
        columns: dict[str, object] = {"value": np.concatenate(values), "count": np.concatenate(counts)}
        return many_keyed_rows(run, keys, [part.size for part in values], columns, COUNTS)

    for key in sorted(statistics):
        stats = statistics[key]
        for name, g in ordered_groups(stats.layout):
            folded = order.fold(stats.counts[g])
            present = np.flatnonzero(folded)
            keys.append((key, name))
            values.append(order.values[present])
            counts.append(folded[present])
            if sum(part.size for part in values) >= PIECE_ROWS:
                yield piece()
                keys, values, counts = [], [], []
    if keys:
        yield piece()


def channels_rows(run: str, statistics: Statistics) -> Iterator[pa.Table]:
    """The table `channels`, a piece per group."""
    for key in sorted(statistics):
        stats = statistics[key]
        for name, g in ordered_groups(stats.layout):
            places = stats.layout.moment_rows(g)
            # Adding 0 turns -0 into 0: which of the two is the lower depends on the order they were met in.
            columns: dict[str, object] = {
                column: getattr(stats.moments, field)[places] + 0 for column, field in _MOMENT_COLUMNS.items()
            }
            columns["channel"] = np.arange(places.size) if stats.layout.d_state else places
            yield keyed_rows(run, key, name, places.size, columns, CHANNELS)


def groups_rows(run: str, layouts: Mapping[Key, SiteLayout]) -> Iterator[pa.Table]:
    """The table `groups`, a piece per group."""
    for key in sorted(layouts):
        layout = layouts[key]
        for name, g in ordered_groups(layout):
            nothing = pa.nulls(1, pa.int32())
            columns: dict[str, object] = {
                "channels": [layout.members(g).tolist()],
                "ssd_group": [layout.ssd_groups[g]] if layout.ssd_groups else nothing,
                "head_group": [layout.sorted_groups[g][0]] if layout.sorted_groups else nothing,
                "channel_group": [layout.sorted_groups[g][1]] if layout.sorted_groups else nothing,
            }
            yield keyed_rows(run, key, name, 1, columns, GROUPS)


Locate = Callable[[SiteLayout, int, int, int], tuple[int, int | None, str | None, int]]
"""(layout, document, row in it, channel) to position, token id, token and channel as `outliers` has them."""


def outliers_rows(run: str, statistics: Statistics, encoding: Encoding, locate: Locate) -> Iterator[pa.Table]:
    """The table `outliers`, a piece per group."""
    values = encoding.values()
    for key in sorted(statistics):
        stats = statistics[key]
        for name, g in ordered_groups(stats.layout):
            top = stats.top[g]
            members = stats.layout.members(g)
            found = [locate(stats.layout, int(d), int(r), int(members[c])) for _, _, d, r, c in top]
            columns: dict[str, object] = {
                "document": top[:, 2],
                "position": [f[0] for f in found],
                "token_id": [f[1] for f in found],
                "token": [f[2] for f in found],
                "channel": [f[3] for f in found],
                "value": values[top[:, 1]],
            }
            yield keyed_rows(run, key, name, len(top), columns, OUTLIERS)


def site_stats_rows(run: str, statistics: Statistics, order: PatternOrder) -> Iterator[pa.Table]:
    """The table `site_stats`: a row for each site and for each group of a divided one."""
    places: list[tuple[Key, str]] = []
    found: list[dict[str, object]] = []
    for key in sorted(statistics):
        stats = statistics[key]
        layout = stats.layout
        parts = [(name, stats.counts[g], layout.moment_rows(g)) for name, g in ordered_groups(layout)]
        if layout.names != (WHOLE,):
            parts.append((WHOLE, stats.counts.sum(axis=0), np.arange(layout.moments)))
        for name, counts, rows in sorted(parts, key=lambda part: part[0]):
            folded = order.fold(counts)
            present = np.flatnonzero(folded)
            distribution = Distribution.of_rows(order.values[present], folded[present])
            row: dict[str, object] = dict(distribution.summary())
            row["overflow"] = int(stats.moments.overflow[rows].sum())
            places.append((key, name))
            found.append(row)
    if found:
        columns: dict[str, object] = {name: [row[name] for row in found] for name in found[0]}
        yield many_keyed_rows(run, places, [1] * len(found), columns, SITE_STATS)
