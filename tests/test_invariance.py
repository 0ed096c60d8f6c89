"""What a command writes hangs on its input alone: not on threads, locale, time zone, hash seed, umask, where it was
started or how a path was typed, whether it was killed, or divided.

Every way is one chain of commands in processes of their own; all files of the chain are compared, byte by byte. What
may differ is TIMES in run.json: when a run was collected, how long parts took, and a shard's or a merge's times; the
machine and the versions there are the same here. And report.html shows the scale table and the database in its commands
as they were typed.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.schema.checksums import CHECKSUM

PARTS = ("group", "prepare", "observe", "sensitivity", "write", "shard", "merge")
TIMES = ("started", *(f"{part}_seconds" for part in PARTS))

CHAIN = """
import sys
from pathlib import Path
import quambase.collector.collect as collect
from quambase.collector.tables.run_folder import BlockFiles
from quambase.cli.main import quambase

killed, model, text, db, out = int(sys.argv[1]), *sys.argv[2:6]
if killed:
    import os, signal
    collect.CHECKPOINT_SECONDS, add, calls = -1.0, BlockFiles.add, []
    def dying(*arguments):
        calls.append(add(*arguments))
        if len(calls) == killed:
            os.kill(os.getpid(), signal.SIGKILL)
    BlockFiles.add = dying
base = ["collect", "--model", model, "--data", text, "--db", db]
base += ["--samples", "9", "--batch-size", "2", "--keep-tokens", "4"]
shards = [int(shard) for shard in sys.argv[6].split(",") if shard]
commands = [[*base, "--shard", f"{shard}/{len(shards)}"] for shard in shards] or [base]
commands += [["merge", "--db", db]] if shards else []
if len(sys.argv) == 7:
    scales = f"{out}/scales.parquet"
    given = ["--scales", scales, "--db", db]
    commands += [
        ["analyze", "--db", db, "--strategy", "absmax", "--strategy", "mse", "--strategy", "quamba", "--out", scales],
        ["apply", *given, "--strategy", "mse"],
        ["apply", *given, "--strategy", "absmax", "--export", f"{out}/act_scales.pt"],
        ["evaluate", *given, "--strategy", "mse", "--data", text, "--samples", "5", "--bootstrap", "100",
         "--format", "json", "--out", f"{out}/answer.json"],
        ["report", *given, "--out", f"{out}/report.html"],
        ["plot", "heatmap", "--db", db, "--out", f"{out}/heatmap.svg"],
    ]
for words in commands:
    try:
        quambase(words)
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"{words}: {ended.code}")
"""


@dataclass
class Way:
    """A way to run the chain: other environment variables, a umask, shards, a kill, how paths are typed and from where.

    shards  the numbers of the shards in the order in which they are collected
    killed  the process is killed after this block, and started again
    """

    environment: dict[str, str] = field(default_factory=dict)
    umask: int = 0o022
    shards: tuple[int, ...] = ()
    killed: int = 0
    typed: str = "absolute"

    def run(self, root: Path) -> dict[str, bytes]:
        """Run the chain in ``root``; returns every file that it wrote, by its path."""
        for name in ("db", "out", "link"):
            path = root / name
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
        (root / "out").mkdir()
        arguments = [self.spelled(root, name) for name in ("model", "text.jsonl", "db", "out")]
        arguments.append(",".join(map(str, self.shards)))
        variables = {**os.environ, "COLUMNS": "100", **self.environment}
        here = root / "model" if self.typed == "elsewhere" else root
        if self.killed:
            done = self.start(here, variables, [str(self.killed), *arguments])
            assert done.returncode == -9, done.stderr
        done = self.start(here, variables, ["0", *arguments])
        assert done.returncode == 0, done.stderr
        paths = sorted(path for name in ("db", "out") for path in (root / name).rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix(): self.content(root, path) for path in paths}

    def start(self, here: Path, variables: dict[str, str], words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", CHAIN, *words],
            cwd=here,
            env=variables,
            umask=self.umask,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )

    def spelled(self, root: Path, name: str) -> str:
        """The path of an input or output as it is typed."""
        if self.typed == "link":
            if not (root / "link").exists():
                (root / "link").symlink_to(root)
            return str(root / "link" / name)
        folder = name != "text.jsonl"
        return {
            "absolute": str(root / name),
            "relative": name,
            "slash": f"./{name}/" if folder else f"./model/../{name}",
            "elsewhere": f"../{name}",
        }[self.typed]

    def content(self, root: Path, path: Path) -> bytes:
        """A file's bytes: run.json without TIMES, report.html without the paths in the commands that it shows."""
        if path.name == "report.html":
            text = re.sub('(?<=id="data">)[^<]+', lambda found: unpacked(found[0]), path.read_text())
            for names in ((str(root / "out"), str(root / "db")), (self.spelled(root, "out"), self.spelled(root, "db"))):
                out, db = map(Path, names)
                text = text.replace(f"{out}/scales.parquet", "SCALES").replace(f"--db {db}<", "--db DB<")
            return text.encode()
        if path.name != "run.json":
            return path.read_bytes()
        content = json.loads(path.read_text())
        del content[CHECKSUM]  # of the times, too
        content["created"] = {name: value for name, value in content["created"].items() if name not in TIMES}
        return json.dumps(content).encode()


def unpacked(data: str) -> str:
    """The JSON that the page holds as gzip in base64."""
    return gzip.decompress(base64.b64decode(data)).decode()


THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "ARROW_IO_THREADS")

WAYS = {
    "one thread, locale C, hash seed, zone": Way(
        {**{name: "1" for name in THREADS}, "LC_ALL": "C", "PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu"}
    ),
    "relative, from elsewhere": Way(typed="elsewhere"),
    "seven shards, backwards": Way(shards=(6, 5, 4, 3, 2, 1, 0)),
    "killed at block 1": Way(killed=1),
}

MORE_WAYS = {
    "four threads, locale C.UTF-8, umask": Way(
        {**{name: "4" for name in THREADS}, "LC_ALL": "C.UTF-8", "PYTHONUTF8": "0", "PYTHONHASHSEED": "random"}, 0o077
    ),
    "relative": Way(typed="relative"),
    "slash": Way(typed="slash"),
    "link": Way(typed="link"),
    "one shard": Way(shards=(0,)),
    "two shards": Way(shards=(0, 1)),
    "three shards, two threads": Way({name: "2" for name in THREADS}, shards=(2, 0, 1)),
    "seven shards": Way(shards=(0, 1, 2, 3, 4, 5, 6)),
    "killed at block 4": Way(killed=4),
}
"""Those that take minutes together."""

FAMILIES = {"mamba1": write_tiny_model, "grouped mamba2": write_tiny_mamba2}


@pytest.fixture(scope="module", params=FAMILIES)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder with a model and a text, and the files of the chain as it is run without anything special."""
    root = tmp_path_factory.mktemp("invariance").resolve()
    FAMILIES[request.param](root / "model")
    write_texts(root / "text.jsonl")
    return root, Way({"PYTHONHASHSEED": "0"}).run(root)


def test_the_chain_writes_everything(chain: tuple[Path, dict[str, bytes]]) -> None:
    names = {Path(path).name for path in chain[1]}
    assert {"run.json", "evaluation.json", "config.json", "report.html", "scales.parquet", "act_scales.pt"} <= names


@pytest.mark.parametrize("way", [*WAYS, *(pytest.param(way, marks=pytest.mark.slow) for way in MORE_WAYS)])
def test_the_same_bytes(chain: tuple[Path, dict[str, bytes]], way: str) -> None:
    root, expected = chain
    found = (WAYS | MORE_WAYS)[way].run(root)
    assert sorted(found) == sorted(expected)
    assert [path for path in expected if found[path] != expected[path]] == []
