"""Shards of a run, merged: the same bytes as the run in one piece, whatever the number, the order and the place."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from device_models import plain_model
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_runs import bytes_of
from test_collect import run_tiny
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

import quambase.collector.collect as run_module
from quambase.cli.main import quambase
from quambase.collector.block_runners import CudaBlockRunner, take_local_device
from quambase.collector.collect import CollectedRun
from quambase.collector.merge import merge, merge_if_last
from quambase.collector.shards import SHARD, Shard, parse_shard, read_sums, torchrun_shard
from quambase.collector.statistics import RunStatistics, SiteLayout
from quambase.collector.tables.table_rows import channels_rows
from quambase.schema.checksums import file_sha256
from quambase.schema.errors import DatabaseInvalid, DataInvalid, RunBusy, UnknownName
from quambase.schema.json_files import write_json
from quambase.schema.stored.doctor import examine
from quambase.schema.tables import CHANNELS, as_made

COUNTS = (1, 2, 3, 7)
"""Numbers of shards tried. The texts make five blocks, so that two of seven shards are empty."""


SETTINGS: dict[str, object] = {
    "batch_size": 2,
    "keep_tokens": 8,
    "sensitivity": 9,
    "by_block": True,
    "by_position": True,
    "state_every": 4,
}


class World:
    """A model, its texts, the unsharded run, and each shard of each count collected once, in a database of its own."""

    def __init__(self, root: Path, model: Path, **options: object) -> None:
        self.root, self.model, self.options = root, model, SETTINGS | options
        self.data = write_texts(root / "texts.jsonl")
        self.whole = self.collect(root / "whole")
        self.expected = bytes_of(self.whole.folder)

    def collect(self, db: Path, **options: object) -> CollectedRun:
        return run_tiny(self.model, self.data, db, **(self.options | options))

    @cache  # noqa: B019  of a module's life
    def shard(self, index: int, count: int) -> Path:
        db = self.root / f"shard-{index}-of-{count}"
        found = self.collect(db, shard=Shard(index, count))
        assert found.manifest.run == self.whole.manifest.run and not found.existed
        return db

    def shards(self, count: int) -> list[Path]:
        return [self.shard(index, count) for index in range(count)]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("mamba1")
    return World(root, write_tiny_model(root / "tiny"))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("mamba2")
    # A site whose groups are sorted, one with a state for each of them, one of channels side by side.
    sites = ["x_conv_out:input", "ssm_state_act:input", "in_proj:output"]
    return World(root, write_tiny_mamba2(root / "tiny2"), sites=sites)


@settings(deadline=None, max_examples=10)
@given(data=st.data())
@pytest.mark.parametrize("family", ["first", "second"])
def test_any_shards_in_any_order_give_the_whole_runs_bytes(
    family: str, data: st.DataObject, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    world: World = request.getfixturevalue(family)
    count = data.draw(st.sampled_from(COUNTS))
    order = data.draw(st.permutations(world.shards(count)))
    merged = merge(tmp_path_factory.mktemp("merged"), order)
    assert merged.folder.name == world.whole.folder.name
    assert bytes_of(merged.folder) == world.expected
    assert merged.manifest.tables == world.whole.manifest.tables
    assert merged.manifest.model == world.whole.manifest.model and merged.manifest.data == world.whole.manifest.data
    merged.manifest.verify(merged.folder)
    assert all((db / "runs").exists() for db in order), "the sources stay"


@pytest.mark.parametrize("links", [True, False])
def test_blocks_files_are_moved_not_written_again(
    first: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Linked where the file system can, copied elsewhere; the sources stay as they are, whatever lies there already."""

    def refuse(*_: object) -> None:
        raise OSError("this file system has no links")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    sources = [shutil.copytree(first.shard(index, 2), tmp_path / str(index)) for index in range(2)]
    before = {path: (path.read_bytes(), path.stat().st_mode) for db in sources for path in db.rglob("*.parquet")}
    target = tmp_path / "db" / "runs" / first.whole.folder.name / "documents" / "block-00003.parquet"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"what a killed merge left")
    merged = merge(tmp_path / "db", sources)
    assert bytes_of(merged.folder) == first.expected
    assert {path: (path.read_bytes(), path.stat().st_mode) for path in before} == before
    for path in before:
        if path.parent.name in ("documents", "activations"):
            assert path.samefile(merged.folder / path.parent.name / path.name) == links


def test_shards_of_one_database_are_removed_with_the_merge(first: World, tmp_path: Path) -> None:
    for index in (2, 0, 1):
        found = first.collect(tmp_path, shard=Shard(index, 3))
        assert found.folder.parent.name == "shards" and not (found.folder.parent.parent / "run.json").exists()
    detail = next(row["detail"] for row in examine(tmp_path).to_pylist() if row["check"] == "run")
    assert "shards begun: 0/3, 1/3, 2/3; `quambase merge` joins them" in detail
    assert first.collect(tmp_path, shard=Shard(1, 3)).existed
    merged = merge(tmp_path)
    assert bytes_of(merged.folder) == first.expected
    assert sorted(p.name for p in merged.folder.iterdir()) == sorted(p.name for p in first.whole.folder.iterdir())
    again = first.collect(tmp_path, shard=Shard(1, 3))
    assert again.existed and again.shard is None, "the run is there, no shard of it is needed"


def test_a_shard_that_is_empty(first: World) -> None:
    folder = next((first.shard(6, 7) / "runs").glob("*/shards/*"))
    about = json.loads((folder / SHARD).read_text())
    assert about["blocks"] == 5 and sorted(about["files"]) == ["checkpoint.npz", "places.parquet"]
    assert about["manifest"]["tables"] == {}


def test_a_shard_keeps_the_sums_of_each_block_by_itself(first: World) -> None:
    """The reason they are kept: added in another order, some of the same blocks' sums differ in the last bit."""
    (folder,) = (first.shard(0, 1) / "runs").glob("*/shards/*")
    sums = [read_sums(folder, block) for block in range(5)]
    forwards, backwards = sum(sums[1:], sums[0]), sum(sums[-2::-1], sums[-1])
    assert not np.array_equal(forwards, backwards) and np.allclose(forwards, backwards)


def test_the_lower_of_zero_and_minus_zero_is_stored_as_zero() -> None:
    """Which of them a minimum meets first depends on the order of the blocks."""
    stored = []
    for values in ([-0.0, 0.0], [0.0, -0.0]):
        layouts = {(0, "site"): SiteLayout(("all",), (0, 2))}
        stats = RunStatistics.empty(layouts, 1)
        for value in values:
            block = RunStatistics.empty(layouts, 1)
            block.moments.extrema[:] = value
            stats.add(block)
        table = channels_rows("run", stats)
        assert table.schema == as_made(CHANNELS)
        stored.append([np.signbit(table[name].to_numpy()).any() for name in ("min", "max")])
    assert stored == [[False, False]] * 2


@pytest.mark.parametrize("family", ["first", "second"])
def test_shards_of_a_device_give_its_whole_runs_bytes(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is the CPU in plain PyTorch, whose bytes are its own; its statistics never are on the host."""
    world: World = request.getfixturevalue(family)

    def on_device(weights: Any, where: object, *arguments: Any) -> CudaBlockRunner:
        return CudaBlockRunner(plain_model(weights, torch.float32, rotated=True), *arguments)

    monkeypatch.setattr(run_module, "new_block_runner", on_device)
    whole = world.collect(tmp_path / "whole")
    for index in range(3):
        world.collect(tmp_path / "shards", shard=Shard(index, 3))
    assert bytes_of(merge(tmp_path / "shards").folder) == bytes_of(whole.folder)


def test_a_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for rank in ("0", "3", "5"):
        take_local_device({"LOCAL_RANK": rank})
    assert taken == [0, 3, 1]


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
def test_an_interrupted_shard_resumes(
    first: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_seconds: float
) -> None:
    monkeypatch.setattr(run_module, "CHECKPOINT_SECONDS", checkpoint_seconds)
    written, calls = run_module.write_sums, []

    def stop(*args: object) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(written(*args))

    monkeypatch.setattr(run_module, "write_sums", stop)
    with pytest.raises(KeyboardInterrupt):
        first.collect(tmp_path, shard=Shard(0, 2))
    with pytest.raises(
        DatabaseInvalid, match=r"lacks shard 1/2 .*; has shard 0/2 unfinished \(run its collect command"
    ):
        merge(tmp_path)
    monkeypatch.setattr(run_module, "write_sums", written)
    first.collect(tmp_path, shard=Shard(0, 2))
    assert bytes_of(merge(tmp_path, [first.shard(1, 2)]).folder) == first.expected


def test_missing_shards_are_named(first: World, tmp_path: Path) -> None:
    with pytest.raises(DatabaseInvalid, match=r"lacks shard 1/3, 2/3 \(collect with --shard 1/3\)$"):
        merge(tmp_path, [first.shard(0, 3)])
    with pytest.raises(DatabaseInvalid, match=r"lacks shard 1/2 .*; lacks shard 0/3, 2/3 "):
        merge(tmp_path, [first.shard(0, 2), first.shard(1, 3)])
    assert not list(tmp_path.iterdir()), "nothing is written"
    # Another count beside a complete one is no obstacle.
    assert bytes_of(merge(tmp_path, [*first.shards(2), first.shard(1, 3)]).folder) == first.expected


def test_nothing_to_merge(first: World, tmp_path: Path) -> None:
    with pytest.raises(DatabaseInvalid, match="holds no shards to merge; collect them with `collect --shard i/N`"):
        merge(tmp_path)
    with pytest.raises(DatabaseInvalid, match="holds no shards; expected a database, run or shard folder"):
        merge(tmp_path, [first.whole.folder])
    with pytest.raises(DatabaseInvalid, match="nowhere is no folder"):
        merge(tmp_path, [tmp_path / "nowhere"])
    with pytest.raises(UnknownName, match="unknown run in shards 'other'"):
        merge(tmp_path, first.shards(2), run="other")


def test_shards_of_two_runs(first: World, tmp_path: Path) -> None:
    first.collect(tmp_path, seed=1, shard=Shard(1, 2))
    with pytest.raises(DatabaseInvalid, match=r"shards of 2 runs were found, .*, which differ in seed; expected one"):
        merge(tmp_path, [first.shard(0, 2)])
    merged = merge(tmp_path, first.shards(2), run=first.whole.manifest.run[:-2])
    assert bytes_of(merged.folder) == first.expected


def test_a_complete_run_is_not_merged_again(first: World, tmp_path: Path) -> None:
    """The same command succeeds once more, with or without the shards, and clears what a killed one left."""
    merged = merge(tmp_path, first.shards(2))
    for sources in (first.shards(2), []):
        for options in ({}, {"run": first.whole.manifest.run}, {"run": first.whole.manifest.run[:-3]}):
            (merged.folder / "shards" / "0-of-2").mkdir(parents=True)
            (merged.folder / "checkpoint.npz").write_bytes(b"left over")
            again = merge(tmp_path, sources, **options)
            assert again.existed and again.manifest == merged.manifest and bytes_of(again.folder) == first.expected
            assert sorted(p.suffix for p in merged.folder.iterdir()) == 7 * [""] + [".json"] + 6 * [".parquet"]


def test_a_shard_being_written(first: World, tmp_path: Path) -> None:
    folder = first.collect(tmp_path, shard=Shard(0, 2)).folder
    (folder / SHARD).unlink()
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DatabaseInvalid, match=r"has shard 0/2 still being written \(wait for it\)$"):
            merge(tmp_path, [first.shard(1, 2)])
        with pytest.raises(RunBusy, match="another process is writing shard 0/2 of run tiny-"):
            first.collect(tmp_path, shard=Shard(0, 2))


def test_what_a_killed_process_left_in_a_complete_shard_is_removed(first: World, tmp_path: Path) -> None:
    folder = first.collect(tmp_path, shard=Shard(0, 2)).folder
    expected = bytes_of(folder)
    (folder / ".lock").touch()
    (folder / "documents" / ".block-00000.parquet.x.tmp").mkdir()
    assert first.collect(tmp_path, shard=Shard(0, 2)).existed and bytes_of(folder) == expected
    assert not [*folder.rglob(".*")]


def test_the_whole_run_is_not_collected_beside_shards_of_it(first: World, tmp_path: Path) -> None:
    first.collect(tmp_path, shard=Shard(0, 2))
    with pytest.raises(
        DatabaseInvalid, match=r"was begun in shards \(0/2\); continue with --shard and `quambase merge`"
    ):
        first.collect(tmp_path)


def copied(world: World, index: int, count: int, to: Path) -> Path:
    """A copy of a shard's folder alone, to be damaged."""
    (source,) = (world.shard(index, count) / "runs").glob("*/shards/*")
    return Path(shutil.copytree(source, to / source.name))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: next(f.glob("sums/*.npy")).unlink(), r"sums/block-.*.npy is missing; copy shard 1/2 again"),
        (lambda f: next(f.glob("documents/*")).unlink(), r"documents/.*.parquet is missing; copy shard 1/2 again"),
        (
            lambda f: (f / "activations" / "block-00001.parquet").write_bytes(b"PAR1"),
            r"activations/block-00001.parquet was altered or cut short .*; copy shard 1/2 again",
        ),
        (lambda f: (f / "checkpoint.npz").write_bytes(b"PK"), r"checkpoint.npz was altered or cut short .*; copy"),
        (
            lambda f: (f / SHARD).write_text("{"),
            r"shard.json is not valid JSON .*; delete .* and collect the shard again",
        ),
        (
            lambda f: (f / SHARD).write_text((f / SHARD).read_text().replace('"blocks": ', '"blocks": 1')),
            r"shard.json was altered .*; delete .* and collect the shard again",
        ),
        (lambda f: change(f, lambda m: m["shard"].update(index=0)), r"was altered: it describes shard 0/2 of another"),
        (
            lambda f: change(f, lambda m: m["manifest"]["identity"].update(seed=9)),
            "was altered: it describes shard 1/2",
        ),
        (
            lambda f: change(f, lambda m: m["manifest"].update(format_version=99)),
            "has format version 99; this quambase reads up to 2: upgrade quambase",
        ),
        (
            lambda f: change(f, lambda m: m["manifest"].update(format_version=1)),
            "has format version 1, of an earlier quambase, .* collect the shard again",
        ),
        (
            lambda f: change(f, lambda m: m["manifest"]["tables"].update({"../x.parquet": {"rows": 1, "sha256": ""}})),
            r"shard.json is damaged \(Expected `str` matching .* in `\$\.tables`\)",
        ),
        (lambda f: change(f, lambda m: m.update(blocks=7)), "shards 0/2 and 1/2 of run .* disagree"),
        (
            lambda f: change(f, lambda m: m["manifest"]["model"].update(groups={"variant": "fixed", "layers": []})),
            "found different groups of heads and channels.*collect them with --groups-from RUN",
        ),
    ],
)
def test_a_damaged_shard_is_named(first: World, tmp_path: Path, damage: object, message: str) -> None:
    folder = copied(first, 1, 2, tmp_path)
    damage(folder)
    with pytest.raises(DatabaseInvalid, match=message):
        merge(tmp_path / "db", [first.shard(0, 2), folder])
    assert not (tmp_path / "db").exists()


def test_shards_to_which_other_sites_were_one_are_refused(first: World, tmp_path: Path) -> None:
    """Or values would be counted at neither."""
    folder = copied(first, 1, 2, tmp_path)
    path = folder / "checkpoint.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    assert json.loads(str(arrays["shared"]))
    np.savez(path, **(arrays | {"shared": np.array("[]")}))
    change(folder, lambda m: m["files"].update({path.name: file_sha256(path)}))
    with pytest.raises(DatabaseInvalid, match=r"shards 0/2 and 1/2 of run .* disagree; collect 1/2 again"):
        merge(tmp_path / "db", [first.shard(0, 2), folder])


def change(folder: Path, edit: object) -> None:
    """Write `shard.json` anew, with a right checksum, as a faulty program of ours would."""
    about = json.loads((folder / SHARD).read_text())
    edit(about)
    write_json(folder / SHARD, about)


def test_two_copies_of_a_shard(first: World, tmp_path: Path) -> None:
    folder = copied(first, 1, 2, tmp_path)
    assert bytes_of(merge(tmp_path / "a", [*first.shards(2), folder]).folder) == first.expected
    change(folder, lambda m: m["files"].update({"places.parquet": "0" * 64}))
    with pytest.raises(DatabaseInvalid, match="shard 1/2 was found twice and the two differ"):
        merge(tmp_path / "b", [*first.shards(2), folder])


def test_a_link_to_a_shard_may_lead_to_a_folder_of_another_name(first: World, tmp_path: Path) -> None:
    kept = copied(first, 1, 2, tmp_path / "copy").rename(tmp_path / "kept")
    (tmp_path / "1-of-2").symlink_to(kept)
    merged = merge(tmp_path / "db", [first.shard(0, 2), tmp_path / "1-of-2"])
    assert bytes_of(merged.folder) == first.expected


def test_the_last_shard_merges_and_nobody_waits(first: World, tmp_path: Path) -> None:
    run = first.whole.manifest.run
    assert merge_if_last(tmp_path, run) is None
    for index in (1, 2, 0):
        assert merge_if_last(tmp_path, run) is None
        first.collect(tmp_path, shard=Shard(index, 3))
    folder = tmp_path / "runs" / run
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert merge_if_last(tmp_path, run) is None, "another process merges"
    merged = merge_if_last(tmp_path, run)
    assert merged is not None and not merged.existed and bytes_of(merged.folder) == first.expected
    again = merge_if_last(tmp_path, run)
    assert again is not None and again.existed


@pytest.mark.parametrize("text", ["0", "3/3", "4/3", "-1/3", "a/b", "1/0", "1/2/3"])
def test_a_shard_is_refused(text: str) -> None:
    with pytest.raises(DataInvalid, match=r"expected i/N with i from 0 to N - 1"):
        parse_shard(text)


def test_the_launchers_environment() -> None:
    three = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    assert torchrun_shard(three) == Shard(2, 3) == parse_shard("2/3")
    assert torchrun_shard(three | {"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert torchrun_shard({"RANK": "2", "WORLD_SIZE": "3"}) is None and torchrun_shard({}) is None


def command(world: World, db: Path) -> list[str]:
    return ["--model", str(world.model), "--data", str(world.data), "--samples", "9", "--seq-len", "32",
            "--batch-size", "2", "--keep-tokens", "8", "--sensitivity", "9", "--by-block", "--by-position",
            "--state-every", "4", "--db", str(db)]  # fmt: skip


def test_the_commands(first: World, tmp_path: Path) -> None:
    for index in range(2):
        done = CliRunner().invoke(
            quambase, ["collect", *command(first, tmp_path / str(index)), "--shard", f"{index}/2"]
        )
        assert done.exit_code == 0, done.output
        assert f"shard {index}/2 of run {first.whole.manifest.run}" in done.stderr
        assert "when all 2 shards are complete: quambase merge" in done.stderr
    refused = CliRunner().invoke(quambase, ["merge", "--db", str(tmp_path / "0")])
    assert refused.exit_code == 1 and "lacks shard 1/2" in refused.stderr and refused.stderr.count("\n") == 1
    done = CliRunner().invoke(quambase, ["merge", "--db", str(tmp_path / "0"), str(tmp_path / "1")])
    assert done.exit_code == 0, done.output
    assert "written" in done.stderr and "outliers: " in done.stderr
    assert bytes_of(tmp_path / "0" / "runs" / first.whole.manifest.run) == first.expected


def test_processes_under_torchrun_share_the_run(first: World, tmp_path: Path) -> None:
    """Three processes as torchrun starts them, in one database; the run is there once they are gone."""
    run = [sys.executable, "-c", "from quambase.cli.main import collect; collect()", *command(first, tmp_path)]
    ranks = [os.environ | {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
             for i in range(3)]  # fmt: skip
    started = [subprocess.Popen(run, env=rank, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in ranks]
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    assert any(b"outliers: " in err for _, err in outputs), "the last one tells of the whole run"
    folder = tmp_path / "runs" / first.whole.manifest.run
    assert bytes_of(folder) == first.expected
    assert not (folder / "shards").exists()
