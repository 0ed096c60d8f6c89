"""Makes rows of the tables of `quambase.schema.tables` from statistics, sorted by layer, site and group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from quambase.collector.host.kernels import SIGN
from quambase.collector.statistics import TOP_FIELDS, Encoding, RunStatistics, SiteIndex, SiteLayout
from quambase.collector.tables.table_kernels import present_counts, present_sizes, repeat, summarize_sums
from quambase.schema.sites import WHOLE, SiteKey
from quambase.schema.tables import (
    BLOCK_COUNTS,
    CHANNELS,
    COUNTS,
    GROUPS,
    OUTLIERS,
    POSITION_CHANNELS,
    POSITION_COUNTS,
    POSITION_STATS,
    QUANTILES,
    SITE_STATS,
    as_made,
)
from quambase.schema.values.arrays import Float32, Float64, Int32, Int64
from quambase.schema.values.positions import bounds_of

_NOTHING = np.empty(0, np.int64)
"""Concatenated with lists of arrays that may be empty."""

_MOMENT_COLUMNS = {"lowest": "min", "highest": "max", "total": "sum", "squares": "sum_sq"}
"""The columns of `channels` that have other names than in `Moments`."""


def many_keyed_rows(
    run: str,
    keys: Sequence[tuple[SiteKey, str]],
    rows: Sequence[int] | Int64,
    columns: dict[str, object],
    schema: pa.Schema,
) -> pa.Table:
    """A table of ``schema``: ``rows[i]`` rows of each (key, group) ``keys[i]``, in order, and the other ``columns``."""
    return table_of(Keys.of(run, keys).columns(rows) | columns, schema)


@dataclass(frozen=True)
class Keys:
    """The key columns of some (key, group) of a run: ``numbers`` (4, keys) int32 are the layers and, for the string
    columns, indices into ``words``, the columns' dictionaries without duplicates, as Parquet requires.
    """

    numbers: Int32
    words: dict[str, pa.StringArray]

    @classmethod
    def of(cls, run: str, keys: Sequence[tuple[SiteKey, str]]) -> Keys:
        """The key columns of ``keys``."""
        of_columns = {
            "run": [run] * len(keys),
            "site": [site for (_, site), _ in keys],
            "group_name": [name for _, name in keys],
        }
        numbers, words = [[layer for (layer, _), _ in keys]], {}
        for column, of_keys in of_columns.items():
            numbered = {word: number for number, word in enumerate(dict.fromkeys(of_keys))}
            numbers.append([numbered[word] for word in of_keys])
            words[column] = pa.array(list(numbered), pa.string())
        return cls(np.array(numbers, np.int32), words)

    def columns(self, rows: Sequence[int] | Int64) -> dict[str, object]:
        """The key columns repeated: ``rows[i]`` rows of the i-th key."""
        sizes = np.asarray(rows, np.int64)
        repeated = np.empty((4, int(sizes.sum())), np.int32)
        repeat(self.numbers, sizes, repeated)
        columns: dict[str, object] = {"layer": repeated[0]}
        for (column, words), indices in zip(self.words.items(), repeated[1:], strict=True):
            columns[column] = pa.DictionaryArray.from_arrays(indices, words, safe=False)
        return columns


@lru_cache(4)
def known_keys(run: str, keys: tuple[tuple[SiteKey, str], ...]) -> Keys:
    """`Keys.of`, cached: every block has the same keys."""
    return Keys.of(run, keys)


def table_of(columns: dict[str, object], schema: pa.Schema) -> pa.Table:
    """A table of ``schema`` with the key's strings as dictionaries; ``columns`` in any order."""
    made = as_made(schema)
    arrays = [
        column if isinstance(column, (pa.Array, pa.ChunkedArray)) else pa.array(column, made.field(name).type)
        for name, column in ((name, columns[name]) for name in made.names)
    ]
    return pa.Table.from_arrays(arrays, schema=made)


def with_whole(layout: SiteLayout) -> list[tuple[str, int]]:
    """`SiteLayout.ordered_groups`, and a divided site's whole, numbered after its groups."""
    whole = [] if layout.names == (WHOLE,) else [(WHOLE, len(layout.names))]
    return sorted([*layout.ordered_groups, *whole])


class TableGroup(NamedTuple):
    """A group of a site: its number ``g`` there, and its ``row`` among all groups of the run."""

    key: SiteKey
    name: str
    layout: SiteLayout
    g: int
    row: int


def table_groups(index: SiteIndex) -> list[TableGroup]:
    """Every group in the order of the tables."""
    return [
        TableGroup(key, name, layout, g, index.groups[key].start + g)
        for key, layout in index.layouts.items()
        for name, g in layout.ordered_groups
    ]


def _names(groups: Sequence[TableGroup]) -> list[tuple[SiteKey, str]]:
    return [(group.key, group.name) for group in groups]


COUNTED = 20
"""Groups per file of `counts`: some 650,000 rows for a float16 model."""


def counts_parts(run: str, statistics: RunStatistics, encoding: Encoding) -> list[Callable[[], pa.Table]]:
    """Functions that make the rows of `counts`, each for some groups; their results in order are the table.

    Values ascend from -inf to inf, then NaN; -0 joins 0, all NaN join one.
    """
    counts = statistics.counts.numpy()

    def part(groups: Sequence[TableGroup]) -> pa.Table:
        rows, values, found = _present(counts, groups, encoding)
        columns: dict[str, object] = {"value": values, "count": found}
        return many_keyed_rows(run, _names(groups), rows, columns, COUNTS)

    groups = table_groups(statistics.index)
    return [partial(part, groups[start : start + COUNTED]) for start in range(0, len(groups), COUNTED)]


def _present(counts: Int64, groups: Sequence[TableGroup], encoding: Encoding) -> tuple[Int64, Float32, Int64]:
    """How many values occur in each of ``groups``; the values, group by group; how often each occurs in ``counts``
    (groups of the run, PATTERNS).
    """
    infinity, magnitudes = encoding.infinity, encoding.values()[:SIGN]
    places, rows = np.array([group.row for group in groups]), np.empty(len(groups), np.int64)
    present_sizes(counts, places, infinity, rows)
    block = np.empty((3, int(rows.sum())), np.int32)
    found, values = block[:2].reshape(-1).view(np.int64), block[2].view(np.float32)
    present_counts(counts, places, infinity, magnitudes, values, found)
    return rows, values, found


class BlockCounter:
    """Makes the rows of `block_counts` of one block after another, from the run's counts before and after each.

    ``counts``: (groups, PATTERNS) int64, those of the blocks before; copied.

    A run is counted in one array, so a block's own counts are a difference. It needs that array twice, and on a device
    a copy to the host and a wait after each block.
    """

    def __init__(self, run: str, counts: Int64, encoding: Encoding) -> None:
        self._run, self._before, self._encoding = run, counts.copy(), encoding

    def rows(self, block: int, statistics: RunStatistics) -> pa.Table:
        """The rows of the block number ``block``, the last of those in ``statistics``, which are on the host."""
        counts, groups = statistics.counts.numpy(), table_groups(statistics.index)
        np.subtract(counts, self._before, out=self._before)
        rows, values, found = _present(self._before, groups, self._encoding)
        self._before[:] = counts
        columns: dict[str, object] = {"block": np.full(values.size, block, np.int32), "value": values, "count": found}
        return many_keyed_rows(self._run, _names(groups), rows, columns, BLOCK_COUNTS)


def channels_rows(run: str, statistics: RunStatistics) -> pa.Table:
    """The table `channels`."""
    groups = table_groups(statistics.index)
    rows = [layout.moment_rows(g) for _, _, layout, g, _ in groups]
    channels = [
        np.arange(mine.size) if group.layout.d_state else mine for mine, group in zip(rows, groups, strict=True)
    ]
    starts = [statistics.index.channels[group.key].start for group in groups]
    places = np.concatenate([_NOTHING, *(start + mine for start, mine in zip(starts, rows, strict=True))])
    columns: dict[str, object] = {"channel": np.concatenate([_NOTHING, *channels])}
    for name, values in statistics.moments.named().items():
        # -0 becomes 0: which of the two is the lowest would depend on the order of the values.
        columns[_MOMENT_COLUMNS.get(name, name)] = values.numpy().take(places) + 0
    return many_keyed_rows(run, _names(groups), [mine.size for mine in rows], columns, CHANNELS)


def groups_rows(run: str, index: SiteIndex) -> pa.Table:
    """The table `groups`."""
    groups = table_groups(index)
    members = [layout.members(g) for _, _, layout, g, _ in groups]
    ends = np.cumsum([0, *(part.size for part in members)])
    channels = np.concatenate([_NOTHING, *members]).astype(np.int32)
    sorted_groups = [layout.sorted_groups[g] if layout.sorted_groups else (None, None) for _, _, layout, g, _ in groups]
    columns: dict[str, object] = {
        "channels": pa.ListArray.from_arrays(ends.astype(np.int32), channels),
        "ssd_group": [layout.ssd_groups[g] if layout.ssd_groups else None for _, _, layout, g, _ in groups],
        "head_group": [head for head, _ in sorted_groups],
        "channel_group": [channel for _, channel in sorted_groups],
    }
    return many_keyed_rows(run, _names(groups), [1] * len(groups), columns, GROUPS)


def position_counts_parts(run: str, statistics: RunStatistics, encoding: Encoding) -> list[Callable[[], pa.Table]]:
    """As `counts_parts`, of the table `position_counts`; none without buckets of positions."""
    buckets = [bucket.counts.numpy() for bucket in statistics.buckets]

    def part(groups: Sequence[TableGroup]) -> pa.Table:
        places = [(group, bucket) for group in groups for bucket in range(len(buckets))]
        found = [_present(buckets[bucket], [group], encoding) for group, bucket in places]
        rows = [int(sizes[0]) for sizes, _, _ in found]
        columns: dict[str, object] = {
            **_position_columns([bucket for _, bucket in places], rows),
            "value": np.concatenate([values for _, values, _ in found]),
            "count": np.concatenate([counts for _, _, counts in found]),
        }
        return many_keyed_rows(run, _names([group for group, _ in places]), rows, columns, POSITION_COUNTS)

    groups = table_groups(statistics.index) if buckets else []
    return [partial(part, groups[start : start + COUNTED]) for start in range(0, len(groups), COUNTED)]


def _position_columns(buckets: Sequence[int], rows: Sequence[int]) -> dict[str, object]:
    """The columns of positions: ``rows[i]`` rows of ``buckets[i]``."""
    bounds = np.array([bounds_of(bucket) for bucket in buckets], np.int32).reshape(-1, 2)
    return dict(zip(("tokens_from", "tokens_to"), np.repeat(bounds, rows, axis=0).T, strict=True))


def position_channels_rows(run: str, statistics: RunStatistics) -> pa.Table:
    """The table `position_channels`."""
    return _of_buckets([channels_rows(run, bucket) for bucket in statistics.buckets], POSITION_CHANNELS)


def position_stats_maker(
    run: str, statistics: RunStatistics, encoding: Encoding, pool: Executor
) -> Callable[[], pa.Table]:
    """As `site_stats_maker`, of the table `position_stats`."""
    coming = [site_stats_maker(run, bucket, encoding, pool) for bucket in statistics.buckets]
    return lambda: _of_buckets([rows() for rows in coming], POSITION_STATS)


def _of_buckets(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    """The rows of every bucket's table that has any value, with the columns of positions."""
    made, parts = as_made(schema), list[pa.Table]()
    for bucket, table in enumerate(tables):
        seen = table.filter(pc.greater(pc.add(table["count"], table["nonfinite"]), 0))
        for name, values in _position_columns([bucket], [seen.num_rows]).items():
            seen = seen.append_column(made.field(name), [values])
        parts.append(seen.select(made.names).cast(made))
    return pa.concat_tables(parts).unify_dictionaries() if parts else made.empty_table()


class Places(NamedTuple):
    """Where values are, as columns of `outliers`, (n,) each."""

    positions: Int64
    token_ids: Sequence[int | None]
    tokens: Sequence[str | None]
    before: Sequence[str | None]
    after: Sequence[str | None]
    channels: Int64


Locate = Callable[[SiteLayout, Int64, Int64, Int64], Places]
"""Receives a layout, and documents, rows in them and channels, (n,) each."""


def outliers_rows(run: str, statistics: RunStatistics, encoding: Encoding, locate: Locate) -> pa.Table:
    """The table `outliers`."""
    groups = table_groups(statistics.index)
    tops = [statistics.outliers(group.row) for group in groups]
    places = [
        locate(layout, top[:, 2], top[:, 3], layout.members(g)[top[:, 4]])
        for (_, _, layout, g, _), top in zip(groups, tops, strict=True)
    ]
    joined = np.concatenate([np.empty((0, len(TOP_FIELDS)), np.int64), *tops])
    columns: dict[str, object] = {
        "document": joined[:, 2],
        "position": np.concatenate([_NOTHING, *(of.positions for of in places)]),
        "token_id": [token_id for of in places for token_id in of.token_ids],
        "token": [token for of in places for token in of.tokens],
        "before": [text for of in places for text in of.before],
        "after": [text for of in places for text in of.after],
        "channel": np.concatenate([_NOTHING, *(of.channels for of in places)]),
        "value": encoding.values()[joined[:, 1]],
    }
    return many_keyed_rows(run, _names(groups), [len(top) for top in tops], columns, OUTLIERS)


SHARE = 8
"""Sites per task of the pool: one site takes only a fraction of a millisecond."""


def site_stats_maker(run: str, statistics: RunStatistics, encoding: Encoding, pool: Executor) -> Callable[[], pa.Table]:
    """The function that makes the table `site_stats`: a row for each site and each group of a divided one.

    The computation starts at once in ``pool``; the returned function waits for it.
    """
    index, counts = statistics.index, statistics.counts.numpy()
    given = encoding.infinity, encoding.values()[:SIGN], np.array(list(QUANTILES.values()))
    keys = list(index.layouts)

    def summaries(of: Sequence[SiteKey]) -> tuple[Int64, Float64]:
        members: list[Int64] = []
        for key in of:
            places = np.arange(index.groups[key].start, index.groups[key].stop)
            members += [places[g : g + 1] if g < len(places) else places for _, g in with_whole(index.layouts[key])]
        firsts = np.cumsum([0, *map(len, members)])
        integers, floats = np.empty((len(members), 5), np.int64), np.empty((len(members), 6 + len(QUANTILES)))
        summarize_sums(counts, np.concatenate(members), firsts, *given, integers, floats)
        return integers, floats

    coming = [pool.submit(summaries, keys[start : start + SHARE]) for start in range(0, len(keys), SHARE)]

    def rows() -> pa.Table:
        named: list[tuple[SiteKey, str]] = []
        overflow: list[int] = []
        of_channels = statistics.moments.named()["overflow"].numpy()
        for key, layout in index.layouts.items():
            of_site = of_channels[index.channels[key]]
            for name, g in with_whole(layout):
                named.append((key, name))
                overflow.append(int((of_site[layout.moment_rows(g)] if g < len(layout.names) else of_site).sum()))
        integers = np.concatenate([np.empty((0, 5), np.int64), *(share.result()[0] for share in coming)]).T
        nothing = np.empty((0, 6 + len(QUANTILES)))
        floats = np.concatenate([nothing, *(share.result()[1] for share in coming)]).T
        columns: dict[str, object] = dict(zip(("amax", "min", "max"), floats[:3].astype(np.float32), strict=True))
        columns |= dict(zip(("mean", "std", "kurtosis"), floats[3:6], strict=True))
        columns |= dict(zip(QUANTILES, floats[6:], strict=True))
        with np.errstate(invalid="ignore", divide="ignore"):
            for name, quantile in (("outlier_ratio", "q9995"), ("outlier_ratio_q99", "q99")):
                below = np.asarray(columns[quantile])
                columns[name] = np.where(below > 0, floats[0] / below, np.nan)
            for name, row in (("zeros", 2), ("beyond_3_sigma", 3), ("beyond_5_sigma", 4)):
                columns[name] = integers[row] / integers[0]  # NaN of no values
        columns |= {"count": integers[0], "nonfinite": integers[1], "overflow": overflow}
        return many_keyed_rows(run, named, [1] * len(named), columns, SITE_STATS)

    return rows
