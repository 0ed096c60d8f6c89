"""Divides a run among several processes: shard i of N has every N-th block, from block i on.

A shard is a folder inside the unfinished run: the files of its blocks' rows, as in a run folder; the statistics of its
blocks as a checkpoint; and, since float64 sums depend on their order, each block's own sums. `shard.json` is written
last; `quambase.collector.merge.merge` needs nothing else, no model and no text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa

from quambase.collector.checkpoint import CHECKPOINT
from quambase.collector.second_moments import moment_parts_of, moments_file
from quambase.collector.sensitivity import sensitivity_file, sensitivity_parts_of
from quambase.collector.statistics import RunStatistics, SiteLayout
from quambase.collector.tables.table_rows import Locate, Places, table_groups
from quambase.model.block import ModelConfig
from quambase.model.block_kinds import KINDS
from quambase.model.inputs.array_files import array_of
from quambase.schema import RUN_FORMAT_VERSION
from quambase.schema.checksums import ALTERED, CHECKSUM, PLACEHOLDER, add_checksum, check_own, file_damage, file_sha256
from quambase.schema.errors import DatabaseInvalid, DataInvalid, first_line
from quambase.schema.files import read_regular, replacing
from quambase.schema.json_files import Sha256, Size, as_type, read_json, write_json
from quambase.schema.stored.manifest import SHARDS, Manifest
from quambase.schema.tables import read_table, write_table
from quambase.schema.values.arrays import Float64, Int64

SHARD = "shard.json"
PLACES = "places.parquet"

_PLACES = pa.schema(
    [
        pa.field("rows", pa.string()),
        *(pa.field(name, pa.int32()) for name in ("document", "row", "channel", "position", "token_id")),
        *(pa.field(name, pa.string()) for name in ("token", "before", "after")),
        pa.field("column", pa.int32()),
    ]
)
"""Arguments and results of `quambase.collector.tables.table_rows.Locate` for the shard's largest values."""


@dataclass(frozen=True, order=True)
class Shard:
    """Number ``index`` (from 0) of ``count`` shards."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def folder_name(self) -> str:
        """Its folder's name inside the run's."""
        return f"{self.index}-of-{self.count}"

    def blocks(self, blocks: int) -> range:
        """The numbers of its blocks in a run of ``blocks`` blocks; none if there are too many shards."""
        return range(self.index, blocks, self.count)


MOST_SHARDS = 100_000


def parse_shard(text: str) -> Shard:
    """``--shard``: ``i/N`` with i from 0 to N - 1; DataInvalid otherwise."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]) or int(found[2]) > MOST_SHARDS:
        raise DataInvalid(f"--shard is '{text}'; expected i/N with i from 0 to N - 1, such as 0/4 to 3/4")
    return Shard(int(found[1]), int(found[2]))


def torchrun_shard(environment: Mapping[str, str]) -> Shard | None:
    """The shard of this process if torchrun started several; otherwise None."""
    rank, world = environment.get("RANK", ""), environment.get("WORLD_SIZE", "")
    # torchrun sets LOCAL_RANK too; other launchers use RANK and WORLD_SIZE for purposes of their own.
    if not (rank.isdigit() and world.isdigit() and "LOCAL_RANK" in environment) or int(world) < 2:
        return None
    return Shard(int(rank), int(world))


def shard_folder(run_folder: Path, shard: Shard) -> Path:
    """The folder of a shard of the run."""
    return run_folder / SHARDS / shard.folder_name


def shard_of(folder: Path) -> Shard | None:
    """The shard that a folder called ``0-of-4`` holds; None for another folder."""
    found = re.fullmatch(r"(\d+)-of-(\d+)", folder.name)
    return Shard(int(found[1]), int(found[2])) if found and int(found[1]) < int(found[2]) else None


def refuse_beside_shards(run_folder: Path) -> None:
    """DatabaseInvalid if shards of the run were begun: collecting the whole run would discard their work."""
    begun = sorted(p.name.replace("-of-", "/") for p in (run_folder / SHARDS).glob("*-of-*"))
    if begun:
        raise DatabaseInvalid(
            f"run {run_folder.name} was begun in shards ({', '.join(begun)}); continue with --shard and "
            f"`quambase merge`, or delete {run_folder / SHARDS}"
        )


LARGEST_SUMS = 1 << 30
"""Largest accepted file of sums, in bytes: two numbers for each channel of each site."""


def sums_file(block: int) -> str:
    """The file of a block's sums, as a path in the shard's folder."""
    return f"sums/block-{block:05d}.npy"


def write_sums(folder: Path, block: int, sums: Float64) -> None:
    """Store one block's `quambase.collector.statistics.BlockStatistics.sums`, (2, channels of all sites), followed by
    the file's checksum.
    """
    with replacing(folder / sums_file(block)) as temporary:
        with temporary.open("wb") as file:
            np.save(file, sums, allow_pickle=False)
            file.write(PLACEHOLDER.encode())
        add_checksum(temporary)


def read_sums(folder: Path, block: int) -> Float64:
    """Read what `write_sums` wrote. DatabaseInvalid: it is missing or was altered."""
    path, advice = folder / sums_file(block), f"delete {folder} and collect the shard again"
    try:
        content = read_regular(path, DatabaseInvalid, advice, LARGEST_SUMS)
        if check_own(content) != "right":
            raise DatabaseInvalid(f"{path} {ALTERED}; {advice}")
        found = array_of(content[: content.rfind(CHECKSUM.encode())])
        if found.dtype != np.float64 or found.ndim != 2:
            raise ValueError(f"an array of {found.dtype} in {found.ndim} dimensions")
    except FileNotFoundError:
        raise DatabaseInvalid(f"{path} is missing; {advice}") from None
    except ValueError as error:
        raise DatabaseInvalid(f"{path} is damaged ({first_line(error)}); {advice}") from None
    return found


def _rows_of(layout: SiteLayout) -> str:
    """What the rows of a site are: its layouts with equal rows have the same `Locate`."""
    if not layout.state:
        return "tokens"
    return f"{'indices' if layout.rows_are_indices else 'channels'} of the state every {layout.every}"


def write_places(folder: Path, statistics: RunStatistics, locate: Locate) -> None:
    """Store where each of the shard's largest values is: `outliers` of the whole run are among them."""
    found: dict[tuple[str, int, int, int], tuple[Any, ...]] = {}
    for _, _, layout, g, row in table_groups(statistics.index):
        top = statistics.outliers(row)
        asked = top[:, 2], top[:, 3], layout.members(g)[top[:, 4]]
        places = locate(layout, *asked)
        texts = places.tokens, places.before, places.after
        answers = zip(places.positions.tolist(), places.token_ids, *texts, places.channels.tolist(), strict=True)
        for place, answer in zip(zip(*(part.tolist() for part in asked), strict=True), answers, strict=True):
            found.setdefault((_rows_of(layout), *place), answer)
    rows = [dict(zip(_PLACES.names, (*key, *answer), strict=True)) for key, answer in found.items()]
    write_table(folder / PLACES, "places", pa.Table.from_pylist(rows, schema=_PLACES), _PLACES)


def stored_locator(folders: Sequence[Path]) -> Locate:
    """A `Locate` of what `write_places` stored in these shards; KeyError for any other place."""
    found: dict[tuple[str, int, int, int], list[Any]] = {}
    for folder in folders:
        for row in read_table(folder / PLACES, _PLACES).to_pylist():
            kind, document, line, channel, *answer = row.values()
            found[kind, document, line, channel] = answer

    def locate(layout: SiteLayout, documents: Int64, rows: Int64, channels: Int64) -> Places:
        asked = zip(documents.tolist(), rows.tolist(), channels.tolist(), strict=True)
        answers = [found[_rows_of(layout), document, row, channel] for document, row, channel in asked]
        positions, columns = (np.array([answer[i] for answer in answers], np.int64) for i in (0, -1))
        token_ids, tokens, before, after = ([answer[i] for answer in answers] for i in range(1, 5))
        return Places(positions, token_ids, tokens, before, after, columns)

    return locate


@dataclass(frozen=True)
class ShardManifest:
    """What `shard.json` says.

    manifest  the run's, as in the later `run.json`, except ``tables`` and ``created``, which are this shard's
    config    the model's sizes
    blocks    how many blocks the whole run has
    files     every other file of the shard and its SHA-256
    """

    shard: Shard
    manifest: Manifest
    config: ModelConfig
    blocks: Size
    files: dict[str, Sha256]


def finish_shard(folder: Path, shard: Shard, manifest: Manifest, config: ModelConfig, blocks: int) -> None:
    """Write `shard.json`, which makes the shard complete. DatabaseInvalid: a block's sums were altered."""
    parts, moment_parts = (shard.blocks(of(manifest.identity)) for of in (sensitivity_parts_of, moment_parts_of))
    for block in shard.blocks(blocks):
        read_sums(folder, block)  # whose checksums below are those of the files as they are now
    names = [CHECKPOINT, PLACES, *map(sums_file, shard.blocks(blocks))]
    names += [*map(sensitivity_file, parts), *map(moments_file, moment_parts)]
    files = {name: file_sha256(folder / name) for name in names}
    content = {
        "shard": asdict(shard),
        "manifest": manifest.to_json(),
        "config": asdict(config),
        "blocks": blocks,
        "files": files,
    }
    write_json(folder / SHARD, content)


class _Stored(msgspec.Struct):
    """The entries of `shard.json`."""

    shard: Shard
    manifest: dict[str, Any]
    config: dict[str, Any]
    blocks: Size
    files: dict[Annotated[str, msgspec.Meta(pattern=r"^[\w-]+(/[\w-]+)?\.\w+\Z")], Sha256]


def load_shard(folder: Path) -> ShardManifest:
    """Read ``folder/shard.json``. DatabaseInvalid: missing (the shard is unfinished), damaged, altered, another
    format.
    """
    path, advice = folder / SHARD, f"delete {folder} and collect the shard again"
    try:
        raw = as_type(read_json(path, DatabaseInvalid, advice), _Stored, path, DatabaseInvalid, advice)
    except FileNotFoundError:
        raise DatabaseInvalid(
            f"{folder} is unfinished (no {SHARD}); run its collect command again to resume it"
        ) from None
    manifest = Manifest.from_json(raw.manifest, path, advice)
    if manifest.format_version < RUN_FORMAT_VERSION:
        raise DatabaseInvalid(
            f"{path} has format version {manifest.format_version}, of an earlier quambase, and shards of version "
            f"{RUN_FORMAT_VERSION} can be merged; delete {folder} and collect the shard again"
        )
    config = KINDS.get(manifest.model.family)
    if config is None:
        raise DatabaseInvalid(f"{path} tells of a model of kind {manifest.model.family}; {advice}")
    sizes = as_type(raw.config, config.config, path, DatabaseInvalid, advice)
    return ShardManifest(raw.shard, manifest, sizes, raw.blocks, raw.files)


def verify_shard(folder: Path, found: ShardManifest) -> None:
    """DatabaseInvalid names the first file that is missing, truncated or altered."""
    tables = {file: entry.sha256 for file, entry in found.manifest.tables.items()}
    for file, sha256 in (found.files | tables).items():
        if damage := file_damage(folder / file, sha256):
            raise DatabaseInvalid(f"{folder / file} {damage}; copy shard {found.shard} again, or collect it again")
