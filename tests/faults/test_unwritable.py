"""Folders that may be read only: a database, a place for an output, the package's own and the user's home."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bound_by_modes import needs_modes, run_bound, unwritable
from faults.attempts import tree
from faults.commands import APPLY, COLLECT, EVALUATE, GROUPED, MAMBA1
from faults.started import start

import quambase

REFUSED = {
    "quambase-db/runs": (*COLLECT, "--model", "grouped"),
    "locked/runs": (*MAMBA1, "--db", "locked"),
    "locked/db": (*MAMBA1, "--db", "locked/db"),
    "shards/runs/": ("merge", "--db", "shards"),
    "locked/runs ": ("import", "tensor.npy", "--site", "x_proj:input", "--db", "locked"),
    "locked/s.parquet": ("analyze", "--strategy", "absmax", "--out", "locked/s.parquet"),
    "locked/new": ("analyze", "--strategy", "absmax", "--out", "locked/new/s.parquet"),
    "quambase-db/models/": ("apply", "--strategy", "quamba"),
    "locked/model": (*APPLY, "--out", "locked/model"),
    "locked/act_scales.pt": ("apply", "--strategy", "absmax", "--export", "locked/act_scales.pt"),
    "quambase-db/results/": (*EVALUATE, "--strategy", "absmax"),
    "locked/report.html": ("report", "--out", "locked/report.html"),
    "locked/heatmap.pdf": ("plot", "heatmap", "--out", "locked/heatmap.pdf"),
    "locked/answer.csv": ("sql", "select 1", "--out", "locked/answer.csv"),
    "locked/answer.parquet": ("sql", "select 1", "--out", "locked/answer.parquet"),
}
"""Commands that write, each under the path that its error names."""

READING = (
    (),
    MAMBA1,
    ("sql", "select count(*) as n from counts"),
    ("stats",),
    ("runs",),
    ("doctor",),
    ("compare", "--no-picture"),
    ("results",),
    ("analyze", "--strategy", "absmax", "--out", "free/scales.parquet"),
    ("apply", "--strategy", "mse", "--out", "free/model"),
    ("report", "--out", "free/report.html"),
    ("plot", "heatmap", "--out", "free/heatmap.pdf"),
)
"""Commands that read a database, or find there what they would write."""


@pytest.fixture
def locked(made: Path, tmp_path: Path) -> Path:
    """A copy of the chain's folder, with a new folder, and a database of shards that are not merged yet."""
    needs_modes(tmp_path)
    folder = shutil.copytree(made, tmp_path / "copy")
    done = start(folder, "", *GROUPED, "--shard", "0/1", "--db", "shards")
    assert done.returncode == 0, done.stderr
    (folder / "locked").mkdir()
    return folder


def test_what_may_not_be_written_is_refused_in_a_line(locked: Path) -> None:
    before = tree(locked)
    with unwritable(locked, deep=True):
        ended = run_bound([(locked, words) for words in REFUSED.values()])
    assert tree(locked) == before
    for (path, words), each in zip(REFUSED.items(), ended, strict=True):
        assert each.error.startswith(f"error: Permission denied: {path.strip()}"), (words, each.error)
        assert each.error.endswith("; name another place, or change its permissions"), (words, each.error)


def test_what_only_reads_works(locked: Path) -> None:
    before = tree(locked)
    (locked / "free").mkdir()
    with unwritable(locked, deep=True):
        (locked / "free").chmod(0o755)
        ended = run_bound([(locked, words) for words in READING])
    for words, each in zip(READING, ended, strict=True):
        assert each.code == 0, (words, each.stderr)
    after = {path: content for path, content in tree(locked).items() if not path.startswith("free")}
    assert after == before
    assert (locked / "free" / "model" / "config.json").exists()


HOMES = {
    "none can be written": {"HOME": "home"},
    "no absolute path": {"XDG_CACHE_HOME": ""},
    "NUMBA_CACHE_DIR can be written": {"HOME": "home", "NUMBA_CACHE_DIR": "cache"},
}


@pytest.mark.parametrize("home", HOMES)
def test_kernels_without_a_folder_to_keep_them_in(
    fabricated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    """They are compiled anew, and it is said how to keep them; nothing lies in the folder where the command ran."""
    needs_modes(tmp_path)
    package = tmp_path / "package" / "quambase"
    shutil.copytree(Path(quambase.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for stage in ("schema", "model", "collector", "analyzer", "apply", "report", "cli"):
        (source,) = __import__(f"quambase.{stage}").__dict__[stage].__path__
        ignored = shutil.ignore_patterns("__pycache__", "bundled")
        shutil.copytree(source, package / stage, ignore=ignored, dirs_exist_ok=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    asked = ("analyze", "--db", str(fabricated_database), "--strategy", "absmax", "--out", "scales.parquet")
    places = {name: str(tmp_path / path) if path else "" for name, path in HOMES[home].items()}
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    with unwritable(package, tmp_path / "home", deep=True):
        (ended,) = run_bound([(tmp_path / "work", asked)], PYTHONPATH=str(package.parent), **places)
    assert ended.code == 0, ended.stderr
    told = [line for line in ended.stderr.splitlines() if "set NUMBA_CACHE_DIR" in line]
    kept = "NUMBA_CACHE_DIR" in places
    assert len(told) == (0 if kept else 1), ended.stderr
    assert (tmp_path / "cache").exists() == kept
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["scales.parquet"]
    assert not list(package.rglob("*.nbi"))
