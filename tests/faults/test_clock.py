"""A clock that is set back while a command works or between commands: the newest is what was finished last."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from faults.attempts import tree
from faults.commands import make_inputs
from interrupting import interrupted

import quambase
from quambase.collector.collect import CollectedRun, collect
from quambase.collector.merge import merge
from quambase.collector.shards import Shard
from quambase.schema.stored.results import finished_evaluations
from quambase.schema.stored.runs import list_runs, select_runs, sound_manifests

NOW, HOUR = 1.8e9, 3600.0


@pytest.fixture(params=[NOW, 1000 * HOUR], ids=["today", "1970"])
def backwards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question for the time is answered with an hour before the last answer."""
    answers = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: request.param - HOUR * next(answers))


def collected(folder: Path, name: str = "mamba1", samples: int = 6, shard: Shard | None = None) -> CollectedRun:
    options = {"batch_size": 2, "keep_tokens": 4, "db": folder / "db", "progress": False, "shard": shard}
    return collect(folder / name, samples, data=folder / "texts.jsonl", **options)


def assert_no_time_is_negative(found: CollectedRun) -> None:
    created = found.manifest.created
    seconds = [value for name, value in created.items() if name.endswith("_seconds")]
    flat = [each for value in seconds for each in (value if isinstance(value, list) else [value])]
    assert flat and all(0 <= each < 600 for each in flat), created


def test_the_newest_run_is_the_last_one(tmp_path: Path, backwards: None) -> None:
    make_inputs(tmp_path)
    first, second = collected(tmp_path), collected(tmp_path, samples=4)
    third = collected(tmp_path, samples=3)
    begun = [run.manifest.created["started"] for run in (first, second, third)]
    assert sorted(begun, reverse=True) == begun and len(set(begun)) == 3, "the clock does not go back"
    for run in (first, second, third):
        assert_no_time_is_negative(run)
    found, _ = sound_manifests(list_runs(tmp_path / "db")[0])
    assert [each.run for each in found] == [run.manifest.run for run in (third, second, first)]
    assert select_runs(tmp_path / "db", None)[0][0].run == third.manifest.run


def test_an_interrupted_run_goes_on(tmp_path: Path, backwards: None) -> None:
    """Also if its checkpoint says a later time than it is; the same tables as without a break."""
    make_inputs(tmp_path)
    with interrupted(2):
        collected(tmp_path)
    kept = sorted((tmp_path / "db").rglob("checkpoint.npz"))
    done: dict[str, list[int]] = {"db": [], "fresh": []}
    options = {"batch_size": 2, "keep_tokens": 4, "data": tmp_path / "texts.jsonl"}

    def run_again(db: str) -> Any:
        def told(number: int, of: int) -> None:
            done[db].append(number)

        return collect(tmp_path / "mamba1", 6, db=tmp_path / db, progress=told, **options)

    found, fresh = map(run_again, done)
    assert kept and done["db"][0] > done["fresh"][0] and done["db"] == sorted(done["db"]), "it begins anew"
    assert_no_time_is_negative(found)
    same, other = ({p: c for p, c in tree(run.folder).items() if p != "run.json"} for run in (found, fresh))
    assert same == other


def test_shards_are_merged(tmp_path: Path, backwards: None) -> None:
    make_inputs(tmp_path)
    for number in (1, 0):
        collected(tmp_path, shard=Shard(number, 2))
    assert_no_time_is_negative(merge(tmp_path / "db"))


def test_the_newest_evaluation_is_the_last_one(tmp_path: Path, backwards: None) -> None:
    make_inputs(tmp_path)
    collected(tmp_path)
    scales, db = tmp_path / "scales.parquet", tmp_path / "db"
    quambase.analyze(strategies=["absmax", "mse"], db=db, out=scales)
    order = [
        quambase.evaluate(scales=scales, strategies=[label], data=tmp_path / "texts.jsonl", samples=3, db=db)
        for label in ("mse", "absmax")
    ]
    found, _ = finished_evaluations(db)
    assert [each["evaluation"] for each in found] == [each.folder.name for each in order]
    answered = quambase.open(db).sql("select count(*) as n from results")
    assert answered["n"].type == pa.int64() and answered.to_pylist()[0]["n"] > 0
