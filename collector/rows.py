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

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

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
    return table_of(key_columns(run, keys, rows) | columns, schema)


def key_columns(run: str, keys: Sequence[tuple[Key, str]], rows: Sequence[int]) -> dict[str, object]:
    """The key columns of ``rows[i]`` rows of each ``keys[i]``."""

    def words(of_keys: Sequence[str]) -> pa.DictionaryArray:
        """Each row's; the dictionary holds every word once, as Parquet's must."""
        numbers = {word: number for number, word in enumerate(dict.fromkeys(of_keys))}
        indices = np.array([numbers[word] for word in of_keys], np.int32)
        return pa.DictionaryArray.from_arrays(np.repeat(indices, rows), pa.array(list(numbers), pa.string()))

    return {
        "run": words([run] * len(keys)),
        "layer": np.repeat(np.array([layer for (layer, _), _ in keys], np.int32), rows),
        "site": words([site for (_, site), _ in keys]),
        "group_name": words([name for _, name in keys]),
    }


def table_of(columns: dict[str, object], schema: pa.Schema) -> pa.Table:
    """A table of ``schema`` with the key's strings as dictionaries; ``columns`` in any order."""
    made = as_made(schema)
    arrays = [
        column if isinstance(column, (pa.Array, pa.ChunkedArray)) else pa.array(column, made.field(name).type)
        for name, column in ((name, columns[name]) for name in made.names)
    ]
    return pa.Table.from_arrays(arrays, schema=made)


class PatternOrder:
    """The order of `counts`: values ascending from -inf to inf, then NaN; -0 joins 0, all NaN join one.

    values  (m,) float32: every value there is, in that order
    """

    def __init__(self, encoding: Encoding) -> None:
        infinity = encoding.infinity
        patterns = np.concatenate([np.arange(SIGN + infinity, SIGN, -1), np.arange(0, infinity + 1)])
        self.values = np.append(encoding.values()[patterns], np.float32("nan")).astype(np.float32)
        self._infinity = infinity

    def fold(self, counts: Int64, out: Int64 | None = None) -> Int64:
        """(PATTERNS,) counts by pattern to (m,) counts in this order.

        ``out``: written and returned, if given; fresh memory of that size takes longer to get than to write.
        """
        infinity = self._infinity
        folded = np.empty(self.values.size, np.int64) if out is None else out
        folded[:infinity] = counts[SIGN + infinity : SIGN : -1]
        folded[infinity:-1] = counts[: infinity + 1]
        folded[infinity] += counts[SIGN]
        folded[-1] = counts[infinity + 1 : SIGN].sum() + counts[SIGN + infinity + 1 :].sum()
        return folded

    def distribution(self, folded: Int64) -> Distribution:
        """Of (m,) counts in this order."""
        nonfinite = int(folded[0] + folded[-2] + folded[-1])
        return Distribution.of_symmetric(self.values[1:-2], folded[1:-2], nonfinite)


PIECE_ROWS = 1 << 18
"""Rows of a table that are made and written together, about: a row group of a useful size."""


def counts_rows(run: str, statistics: Statistics, order: PatternOrder) -> Iterator[pa.Table]:
    """The table `counts`, several groups a piece: it has by far the most rows."""
    keys: list[tuple[Key, str]] = []
    values: list[Float32] = []
    counts: list[Int64] = []
    folded = np.empty(order.values.size, np.int64)

    def piece() -> pa.Table:
        columns: dict[str, object] = {"value": np.concatenate(values), "count": np.concatenate(counts)}
        return many_keyed_rows(run, keys, [part.size for part in values], columns, COUNTS)

    held = 0
    for key in sorted(statistics):
        stats = statistics[key]
        for name, g in stats.layout.ordered_groups:
            present = np.flatnonzero(order.fold(stats.counts[g], folded) != 0)
            keys.append((key, name))
            values.append(order.values[present])
            counts.append(folded[present])
            held += present.size
            if held >= PIECE_ROWS:
                yield piece()
                keys, values, counts, held = [], [], [], 0
    if keys:
        yield piece()


def channels_rows(run: str, statistics: Statistics) -> Iterator[pa.Table]:
    """The table `channels`, several sites a piece."""
    for sites in _pieces(statistics, lambda stats: stats.layout.moments):
        keys: list[tuple[Key, str]] = []
        places: list[Int64] = []
        channels: list[Int64] = []
        before = 0
        for key in sites:
            layout = statistics[key].layout
            for name, g in layout.ordered_groups:
                keys.append((key, name))
                mine = layout.moment_rows(g)
                places.append(mine + before)
                channels.append(np.arange(mine.size) if layout.d_state else mine)
            before += layout.moments
        order = np.concatenate(places)
        # Adding 0 turns -0 into 0: which of the two is the lower depends on the order they were met in.
        columns: dict[str, object] = {
            column: np.concatenate([getattr(statistics[key].moments, field) for key in sites])[order] + 0
            for column, field in _MOMENT_COLUMNS.items()
        }
        columns["channel"] = np.concatenate(channels)
        yield many_keyed_rows(run, keys, [mine.size for mine in places], columns, CHANNELS)


def _pieces(statistics: Statistics, rows: Callable[[SiteStatistics], int]) -> Iterator[list[Key]]:
    """The sites in order, as many at a time as have about PIECE_ROWS rows."""
    sites: list[Key] = []
    held = 0
    for key in sorted(statistics):
        sites.append(key)
        held += rows(statistics[key])
        if held >= PIECE_ROWS:
            yield sites
            sites, held = [], 0
    if sites:
        yield sites


def groups_rows(run: str, layouts: Mapping[Key, SiteLayout]) -> Iterator[pa.Table]:
    """The table `groups`, in one piece: it is little more than the channels' numbers."""
    found = [(key, layouts[key], name, g) for key in sorted(layouts) for name, g in layouts[key].ordered_groups]
    if not found:
        return
    members = [layout.members(g) for _, layout, _, g in found]
    ends = np.cumsum([0, *(part.size for part in members)])
    sorted_groups = [layout.sorted_groups[g] if layout.sorted_groups else (None, None) for _, layout, _, g in found]
    columns: dict[str, object] = {
        "channels": pa.ListArray.from_arrays(ends.astype(np.int32), np.concatenate(members).astype(np.int32)),
        "ssd_group": [layout.ssd_groups[g] if layout.ssd_groups else None for _, layout, _, g in found],
        "head_group": [head for head, _ in sorted_groups],
        "channel_group": [channel for _, channel in sorted_groups],
    }
    yield many_keyed_rows(run, [(key, name) for key, _, name, _ in found], [1] * len(found), columns, GROUPS)


Locate = Callable[[SiteLayout, int, int, int], tuple[int, int | None, str | None, int]]
"""(layout, document, row in it, channel) to position, token id, token and channel as `outliers` has them."""


def outliers_rows(run: str, statistics: Statistics, encoding: Encoding, locate: Locate) -> Iterator[pa.Table]:
    """The table `outliers`, several sites a piece."""
    values = encoding.values()
    for sites in _pieces(statistics, lambda stats: stats.most * len(stats.layout.names)):
        keys: list[tuple[Key, str]] = []
        tops: list[Int64] = []
        found: list[tuple[int, int | None, str | None, int]] = []
        for key in sites:
            stats = statistics[key]
            for name, g in stats.layout.ordered_groups:
                top = stats.top[g]
                keys.append((key, name))
                tops.append(top)
                channels = stats.layout.members(g)[top[:, 4]]
                places = zip(top[:, 2].tolist(), top[:, 3].tolist(), channels.tolist(), strict=True)
                found += [locate(stats.layout, *place) for place in places]
        joined = np.concatenate(tops)
        columns: dict[str, object] = {
            "document": joined[:, 2],
            "position": [f[0] for f in found],
            "token_id": [f[1] for f in found],
            "token": [f[2] for f in found],
            "channel": [f[3] for f in found],
            "value": values[joined[:, 1]],
        }
        yield many_keyed_rows(run, keys, [len(top) for top in tops], columns, OUTLIERS)


def site_stats_rows(run: str, statistics: Statistics, order: PatternOrder) -> Iterator[pa.Table]:
    """The table `site_stats`: a row for each site and for each group of a divided one."""
    places: list[tuple[Key, str]] = []
    found: list[dict[str, float | int]] = []
    folded = np.empty(order.values.size, np.int64)
    for key in sorted(statistics):
        stats = statistics[key]
        layout = stats.layout
        parts = [(name, stats.counts[g], layout.moment_rows(g)) for name, g in layout.ordered_groups]
        if layout.names != (WHOLE,):
            parts.append((WHOLE, stats.counts.sum(axis=0), np.arange(layout.moments)))
        for name, counts, rows in sorted(parts, key=lambda part: part[0]):
            row = order.distribution(order.fold(counts, folded)).summary()
            row["overflow"] = int(stats.moments.overflow[rows].sum())
            places.append((key, name))
            found.append(row)
    if found:
        columns: dict[str, object] = {name: [row[name] for row in found] for name in found[0]}
        yield many_keyed_rows(run, places, [1] * len(found), columns, SITE_STATS)
