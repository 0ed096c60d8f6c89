"""Statistics as rows of the tables of `quambase.schema.tables`, sorted by layer, site and group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from quambase.collector.kernels import SIGN, present_counts, present_sizes, repeat, summarize
from quambase.collector.statistics import Encoding, SiteLayout, SiteStatistics
from quambase.schema.sites import WHOLE
from quambase.schema.tables import CHANNELS, COUNTS, GROUPS, OUTLIERS, QUANTILES, SITE_STATS, Piece, as_made

Key = tuple[int, str]
"""(layer, site)."""

Statistics = Mapping[Key, SiteStatistics]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
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
    sizes = np.asarray(rows, np.int64)
    layer, *indices = np.empty((4, int(sizes.sum())), np.int32)
    repeat(np.array([layer for (layer, _), _ in keys], np.int32), sizes, layer)
    columns: dict[str, object] = {"layer": layer}
    words = {
        "run": [run] * len(keys),
        "site": [site for (_, site), _ in keys],
        "group_name": [name for _, name in keys],
    }
    for (column, of_keys), index in zip(words.items(), indices, strict=True):
        # The dictionary holds every word once, as Parquet's must.
        numbers = {word: number for number, word in enumerate(dict.fromkeys(of_keys))}
        repeat(np.array([numbers[word] for word in of_keys], np.int32), sizes, index)
        columns[column] = pa.DictionaryArray.from_arrays(index, pa.array(list(numbers), pa.string()), safe=False)
    return columns


def table_of(columns: dict[str, object], schema: pa.Schema) -> pa.Table:
    """A table of ``schema`` with the key's strings as dictionaries; ``columns`` in any order."""
    made = as_made(schema)
    arrays = [
        column if isinstance(column, (pa.Array, pa.ChunkedArray)) else pa.array(column, made.field(name).type)
        for name, column in ((name, columns[name]) for name in made.names)
    ]
    return pa.Table.from_arrays(arrays, schema=made)


PIECE_ROWS = 3 << 17
"""Rows of a table that are made and written together, about: a row group of a useful size. Arrays of as many numbers,
three of them as one, are large enough for NumPy to ask for huge pages, of which a fraction as many must be got.
"""


SHARE = 8
"""Sites that are one task of a pool: what takes a fraction of a millisecond is not worth one of its own."""


def _shares(keys: Sequence[Key]) -> list[Sequence[Key]]:
    return [keys[start : start + SHARE] for start in range(0, len(keys), SHARE)]


def counts_pieces(run: str, statistics: Statistics, encoding: Encoding, pool: Executor) -> list[Piece]:
    """The table `counts`, several groups a piece: it has by far the most rows, so they are made in ``pool``.

    Values ascend from -inf to inf, then NaN; -0 joins 0, all NaN join one.
    """
    infinity, magnitudes = encoding.infinity, encoding.values()[:SIGN]
    keys = sorted(statistics)

    def sizes(of: Sequence[Key]) -> list[int]:
        found: list[int] = []
        for key in of:
            stats = statistics[key]
            mine = np.empty(len(stats.counts), np.int64)
            present_sizes(stats.counts, infinity, mine)
            found += [int(mine[g]) for _, g in stats.layout.ordered_groups]
        return found

    def piece(groups: Sequence[tuple[Key, str, int]], rows: Sequence[int]) -> pa.Table:
        block = np.empty((3, sum(rows)), np.int32)
        counts, values = block[:2].reshape(-1).view(np.int64), block[2].view(np.float32)
        start = 0
        for (key, _, g), size in zip(groups, rows, strict=True):
            present_counts(statistics[key].counts[g], infinity, magnitudes, values[start:], counts[start:])
            start += size
        columns: dict[str, object] = {"value": values, "count": counts}
        return many_keyed_rows(run, [(key, name) for key, name, _ in groups], rows, columns, COUNTS)

    groups = [(key, name, g) for key in keys for name, g in statistics[key].layout.ordered_groups]
    rows = [size for found in pool.map(sizes, _shares(keys)) for size in found]
    pieces: list[Piece] = []
    first = held = 0
    for number, size in enumerate(rows, 1):
        held += size
        if held >= PIECE_ROWS or number == len(groups):
            pieces.append(partial(piece, groups[first:number], rows[first:number]))
            first, held = number, 0
    return pieces


CHANNELS_ROWS = 1 << 16
"""Rows of a piece of `channels`, about: they are wide."""


def channels_pieces(run: str, statistics: Statistics) -> Iterator[Piece]:
    """The table `channels`, several sites a piece."""

    def piece(sites: Sequence[Key]) -> pa.Table:
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
        return many_keyed_rows(run, keys, [mine.size for mine in places], columns, CHANNELS)

    for sites in _runs_of_sites(statistics, CHANNELS_ROWS, lambda stats: stats.layout.moments):
        yield partial(piece, sites)


def _runs_of_sites(statistics: Statistics, most: int, rows: Callable[[SiteStatistics], int]) -> Iterator[list[Key]]:
    """The sites in order, as many at a time as have about ``most`` rows."""
    sites: list[Key] = []
    held = 0
    for key in sorted(statistics):
        sites.append(key)
        held += rows(statistics[key])
        if held >= most:
            yield sites
            sites, held = [], 0
    if sites:
        yield sites


def groups_pieces(run: str, layouts: Mapping[Key, SiteLayout]) -> Iterator[Piece]:
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
    table = many_keyed_rows(run, [(key, name) for key, _, name, _ in found], [1] * len(found), columns, GROUPS)
    yield lambda: table


class Places(NamedTuple):
    """Where values are, as `outliers` has it: positions (n,), token ids, tokens, channels (n,)."""

    positions: Int64
    token_ids: Sequence[int | None]
    tokens: Sequence[str | None]
    channels: Int64


Locate = Callable[[SiteLayout, Int64, Int64, Int64], Places]
"""Takes documents, rows in them and channels, (n,) each."""


def outliers_pieces(run: str, statistics: Statistics, encoding: Encoding, locate: Locate) -> Iterator[Piece]:
    """The table `outliers`, several sites a piece."""
    values = encoding.values()

    def piece(sites: Sequence[Key]) -> pa.Table:
        keys: list[tuple[Key, str]] = []
        tops: list[Int64] = []
        places: list[Places] = []
        for key in sites:
            layout = statistics[key].layout
            for name, g in layout.ordered_groups:
                top = statistics[key].top[g]
                keys.append((key, name))
                tops.append(top)
                places.append(locate(layout, top[:, 2], top[:, 3], layout.members(g)[top[:, 4]]))
        joined = np.concatenate(tops)
        columns: dict[str, object] = {
            "document": joined[:, 2],
            "position": np.concatenate([of.positions for of in places]),
            "token_id": [token_id for of in places for token_id in of.token_ids],
            "token": [token for of in places for token in of.tokens],
            "channel": np.concatenate([of.channels for of in places]),
            "value": values[joined[:, 1]],
        }
        return many_keyed_rows(run, keys, [len(top) for top in tops], columns, OUTLIERS)

    for sites in _runs_of_sites(statistics, PIECE_ROWS, lambda stats: stats.most * len(stats.layout.names)):
        yield partial(piece, sites)


def site_stats_pieces(run: str, statistics: Statistics, encoding: Encoding, pool: Executor) -> Iterator[Piece]:
    """The table `site_stats`, in one piece, made in ``pool``: a row for each site and each group of a divided one."""
    magnitudes = encoding.values()[:SIGN]
    probabilities = np.array(list(QUANTILES.values()))

    def summaries(of: Sequence[Key]) -> tuple[list[tuple[Key, str]], Int64, Float64, list[int]]:
        parts: list[tuple[Key, str, Int64, Int64]] = []
        for key in of:
            stats = statistics[key]
            layout = stats.layout
            mine = [(key, name, stats.counts[g], layout.moment_rows(g)) for name, g in layout.ordered_groups]
            if layout.names != (WHOLE,):
                mine.append((key, WHOLE, stats.counts.sum(axis=0), np.arange(layout.moments)))
            parts += sorted(mine, key=itemgetter(1))
        integers, floats = np.empty((len(parts), 5), np.int64), np.empty((len(parts), 6 + probabilities.size))
        for row, (_, _, counts, _) in enumerate(parts):
            summarize(counts, encoding.infinity, magnitudes, probabilities, integers[row], floats[row])
        overflow = [int(statistics[key].moments.overflow[rows].sum()) for key, _, _, rows in parts]
        return [(key, name) for key, name, _, _ in parts], integers, floats, overflow

    found = list(pool.map(summaries, _shares(sorted(statistics))))
    if not found:
        return
    keys = [key for of_share, _, _, _ in found for key in of_share]
    integers = np.concatenate([of_share for _, of_share, _, _ in found]).T
    floats = np.concatenate([of_share for _, _, of_share, _ in found]).T
    columns: dict[str, object] = dict(zip(("amax", "min", "max"), floats[:3].astype(np.float32), strict=True))
    columns |= dict(zip(("mean", "std", "kurtosis"), floats[3:6], strict=True))
    columns |= dict(zip(QUANTILES, floats[6:], strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        for name, quantile in (("outlier_ratio", "q9995"), ("outlier_ratio_q99", "q99")):
            below = np.asarray(columns[quantile])
            columns[name] = np.where(below > 0, floats[0] / below, np.nan)
        for name, row in (("zeros", 2), ("beyond_3_sigma", 3), ("beyond_5_sigma", 4)):
            columns[name] = integers[row] / integers[0]  # NaN of no values
    columns |= {"count": integers[0], "nonfinite": integers[1]}
    columns["overflow"] = [overflow for _, _, _, of_share in found for overflow in of_share]
    table = many_keyed_rows(run, keys, [1] * len(keys), columns, SITE_STATS)
    yield lambda: table
