"""`quambase merge`: combines the shards of a run into the same bytes as if one process had collected it.

The files of blocks' rows are linked or copied unchanged. Counts, extrema and largest values do not depend on the order.
The float64 sums do: every shard stores them per block, and a merge adds them from 0 in block order, as in a run that
was not divided.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quambase.collector.checkpoint import load_checkpoint, position_buckets
from quambase.collector.collect import CollectedRun, existing_run
from quambase.collector.documents import run_id
from quambase.collector.layouts import site_layouts
from quambase.collector.shards import (
    SHARD,
    Shard,
    ShardManifest,
    load_shard,
    read_sums,
    shard_of,
    stored_locator,
    verify_shard,
)
from quambase.collector.statistics import ENCODINGS, RunStatistics, SiteLayout
from quambase.collector.tables.run_folder import every_table, finish_run, tables_of_parts, versions, write_statistics
from quambase.schema.errors import DatabaseInvalid, QuambaseError, RunBusy, UnknownName
from quambase.schema.files import link_or_copy, local_folder, locked
from quambase.schema.progress import Progress, Shown
from quambase.schema.sites import SiteKey
from quambase.schema.stored.manifest import MANIFEST, SHARDS, Manifest, TableFile
from quambase.schema.stored.runs import list_runs, sound_manifests

Found = Mapping[Shard, ShardManifest]
Folders = Mapping[Shard, Path]
Copies = dict[Shard, list[Path]]
"""The folders that hold each shard of a run, in whatever state."""


def merge(
    db: str | Path, sources: Sequence[Path] = (), run: str | None = None, *, progress: Shown = False
) -> CollectedRun:
    """Make the complete run in ``db`` from its shards in ``db`` and in ``sources``.

    sources  databases, run folders or shard folders, in any order; they are not changed, but ``db``'s own shards are
             removed when the run is complete
    run      its id or the beginning of it, if there are shards of several runs

    A run that is already complete is returned unchanged (``existed``).
    DatabaseInvalid: there are no shards, or of several runs; a shard is missing, unfinished, damaged or of other
    settings. UnknownName: no shards of ``run``. RunBusy: another process is merging.
    """
    started = time.monotonic()
    db = local_folder(db)
    found_shards = _find([db, *sources])
    if already := _complete_run(found_shards, run, db):
        return existing_run(already)
    name, candidates = _choose_run(found_shards, run, db)
    folder = db / "runs" / name
    folders = _every_shard(name, candidates)
    found = {shard: load_shard(folders[shard]) for shard in sorted(folders)}
    manifest = _agreed(name, found, folders)
    with Progress(progress) as shown:
        shown.start("verify", len(found), len(found), unit="shards")
        for shard in found:
            with shown.piece(1, 1):
                verify_shard(folders[shard], found[shard])
    with locked(folder):
        if (folder / MANIFEST).exists():  # another process has merged it since
            return existing_run(folder)
        sizes = found[min(found)].config
        every = int(manifest.identity.get("state_every", 0))
        layouts = site_layouts(sizes, manifest.identity["sites"], manifest.model.layer_groups, every)
        statistics = _fold(name, found, folders, layouts, progress)
        blocks: dict[str, TableFile] = {}
        for shard, each in found.items():
            for file in each.manifest.tables:
                link_or_copy(folders[shard] / file, folder / file)
            blocks |= each.manifest.tables
        encoding = ENCODINGS[manifest.identity["activation_dtype"]]
        locate = stored_locator(list(folders.values()))
        made = tables_of_parts(
            name,
            manifest.identity,
            manifest.model.family,
            layouts,
            lambda part: folders[Shard(part % len(folders), len(folders))],
        )
        tables = every_table(folder, blocks | write_statistics(folder, name, statistics, encoding, locate, made))
        created = {
            "started": min(str(each.manifest.created["started"]) for each in found.values()),
            "shard_seconds": [each.manifest.created["observe_seconds"] for each in found.values()],
            "merge_seconds": round(time.monotonic() - started, 3),
            **versions(),
        }
        complete = finish_run(folder, replace(manifest, tables=tables, created=created))
    return CollectedRun(folder, complete, existed=False)


def merge_if_last(db: Path, run: str, *, progress: Shown = False) -> CollectedRun | None:
    """`merge` for processes that each finish one shard of ``run`` in ``db``, whichever is the last.

    None while shards are missing or another process merges; no process waits. A process calls this after its shard is
    complete, so at least the last one finds all of them.
    """
    folder = db / "runs" / run
    try:
        if not (folder / MANIFEST).exists():
            folders = [path for path in (folder / SHARDS).glob("*-of-*") if (path / SHARD).exists()]
            if not any(len(folders) >= shard.count for shard in map(shard_of, folders) if shard):
                return None
            return merge(db, run=run, progress=progress)
    except RunBusy:
        return None
    except (QuambaseError, OSError):
        # Another process that merges removes the shards, but only after it has written run.json.
        if not (folder / MANIFEST).exists():
            raise
    return existing_run(folder)


def _find(sources: Iterable[Path]) -> dict[str, Copies]:
    """Every shard folder in databases, run folders and shard folders, by run id; each once."""
    found: dict[str, Copies] = {}
    for number, source in enumerate(sources):
        inside = (f"runs/*/{SHARDS}/*-of-*", f"{SHARDS}/*-of-*", "*-of-*")
        paths = [source, *(path for pattern in inside for path in source.glob(pattern))]
        mine = {path.resolve(): shard for path in paths if (shard := shard_of(path)) and path.is_dir()}
        if number and not mine:  # the first is --db, which may not exist yet
            raise DatabaseInvalid(
                f"{source} {'holds no shards' if source.is_dir() else 'is no folder'}; expected a database, run or "
                "shard folder that `collect --shard i/N` wrote"
            )
        for path, shard in mine.items():
            run = load_shard(path).manifest.run if (path / SHARD).exists() else path.parent.parent.name
            known = found.setdefault(run, {}).setdefault(shard, [])
            if path not in known:
                known.append(path)
    return found


def _choose_run(found: dict[str, Copies], run: str | None, db: Path) -> tuple[str, Copies]:
    if run is not None:
        chosen = [name for name in found if name == run] or [name for name in found if name.startswith(run)]
        if not chosen:
            raise UnknownName.of("run in shards", run, found)
    else:
        chosen = sorted(found)
    if not chosen:
        raise DatabaseInvalid(f"{db} holds no shards to merge; collect them with `collect --shard i/N`")
    if len(chosen) > 1:
        raise DatabaseInvalid(
            f"shards of {len(chosen)} runs were found, {', '.join(chosen)}{_differences(found, chosen)}; expected one: "
            "name it with --run, or collect the shards with the same settings"
        )
    return chosen[0], found[chosen[0]]


def _differences(found: dict[str, Copies], names: list[str]) -> str:
    """The settings in which the first two runs differ, known if each has a complete shard."""
    identities: list[dict[str, Any]] = []
    for name in names[:2]:
        complete = [path for paths in found[name].values() for path in paths if (path / SHARD).exists()]
        if not complete:
            return ""
        identities.append(load_shard(complete[0]).manifest.identity)
    one, other = identities
    keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
    return f", which differ in {', '.join(sorted(keys))}" if keys else ""


def _complete_run(found: dict[str, Copies], run: str | None, db: Path) -> Path | None:
    """The folder of the requested run if it is already complete; None if there is something to merge.

    Without ``run`` and without shards that is the run that was merged last.
    """
    complete = {path.name: path for path in list_runs(db)[0]} if (db / "runs").is_dir() else {}
    if run is None and not found:
        merged = [m.run for m in sound_manifests(complete.values())[0] if "shard_seconds" in m.created]
        return complete[merged[0]] if merged else None
    if run in complete:
        return complete[run]
    wanted = [name for name in {*found, *complete} if (name in found if run is None else name.startswith(run))]
    return complete.get(wanted[0]) if len(wanted) == 1 else None


def _every_shard(run: str, candidates: Copies) -> dict[Shard, Path]:
    """A folder for each shard of a division whose shards are all complete. DatabaseInvalid: there is none."""
    problems = []
    for count in sorted({shard.count for shard in candidates}):
        wanted = [Shard(index, count) for index in range(count)]
        missing = [shard for shard in wanted if shard not in candidates]
        complete = {s: [p for p in candidates.get(s, ()) if (p / SHARD).exists()] for s in wanted}
        unfinished = [s for s in wanted if s in candidates and not complete[s]]
        if not missing and not unfinished:
            return {shard: _only_copy(shard, paths) for shard, paths in complete.items()}
        busy = [s for s in unfinished if any(map(_held, candidates[s]))]
        stopped = [s for s in unfinished if s not in busy]
        if missing:
            problems.append(f"lacks shard {_list(missing)} (collect with --shard {missing[0]})")
        if busy:
            problems.append(f"has shard {_list(busy)} still being written (wait for it)")
        if stopped:
            problems.append(f"has shard {_list(stopped)} unfinished (run its collect command again to resume it)")
    raise DatabaseInvalid(f"run {run} {'; '.join(problems)}")


def _list(shards: list[Shard]) -> str:
    return ", ".join(map(str, shards[:8])) + (f" and {len(shards) - 8} more" if len(shards) > 8 else "")


def _held(folder: Path) -> bool:
    """Whether a process of this machine is writing the shard."""
    try:
        with (folder / ".lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _only_copy(shard: Shard, paths: list[Path]) -> Path:
    """The first of several equal copies of a shard. DatabaseInvalid: they differ."""
    for path in paths[1:]:
        if load_shard(path).files != load_shard(paths[0]).files:
            raise DatabaseInvalid(f"shard {shard} was found twice and the two differ: {paths[0]} and {path}; keep one")
    return paths[0]


def _agreed(run: str, found: Found, folders: Folders) -> Manifest:
    """The manifest that all shards agree on. DatabaseInvalid: one is of another run, or they disagree."""
    first, promised = min(found), found[min(found)]
    for shard, each in found.items():
        manifest = each.manifest
        if each.shard != shard or run_id(manifest.model.name, manifest.identity) != run:
            raise DatabaseInvalid(
                f"{folders[shard] / SHARD} was altered: it describes shard {each.shard} of another run or count, not "
                f"{shard} of {run}; copy it again"
            )
        if manifest.model.groups != promised.manifest.model.groups:
            raise DatabaseInvalid(
                f"shards {first} and {shard} of run {run} found different groups of heads and channels, as different "
                "kinds of machine can; collect them with --groups-from RUN"
            )
        if (each.blocks, manifest.sites) != (promised.blocks, promised.manifest.sites):
            raise DatabaseInvalid(f"shards {first} and {shard} of run {run} disagree; collect {shard} again")
    return promised.manifest


def _fold(
    run: str, found: Found, folders: Folders, layouts: Mapping[SiteKey, SiteLayout], progress: Shown
) -> RunStatistics:
    """The statistics of all blocks. DatabaseInvalid: the shards disagree on which sites have the same tensor."""
    count, promised = len(found), found[min(found)]
    identity = promised.manifest.identity
    statistics: RunStatistics | None = None
    with Progress(progress) as shown:
        shown.start("merge", len(found), len(found), unit="shards")
        for shard in found:
            with shown.piece(1, 1):
                blocks, part, _ = load_checkpoint(
                    folders[shard], layouts, identity["outliers"], position_buckets(identity)
                )
                if statistics is None:
                    statistics = part
                elif blocks:  # a shard without blocks has seen no site
                    if part.index.shared != statistics.index.shared:
                        raise DatabaseInvalid(
                            f"shards {min(found)} and {shard} of run {run} disagree; collect {shard} again"
                        )
                    statistics.add(part)
    assert statistics is not None
    statistics.moments.sums[:2] = 0
    for block in range(promised.blocks):
        statistics.moments.sums[:2] += torch.from_numpy(read_sums(folders[Shard(block % count, count)], block))
    return statistics
