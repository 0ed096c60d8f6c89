# mypy: disable-error-code="return-value"
"""No argument ends in a traceback: absurd numbers, addresses, names that are no text."""

from __future__ import annotations

import os
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_model import write_texts, write_tiny_model

from quambase.cli.main import COMMANDS, load_command
from quambase.schema.errors import DatabaseInvalid
from quambase.schema.files import local_folder

ABSURD = ("1e20", "-9", "9" * 30, "0", "²", "nan", "")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    write_tiny_model(root / "tiny")
    write_texts(root / "t.jsonl")
    (root / "log.jsonl").write_text('{"doc_id": 1, "doc": {}, "acc": 1}')
    np.save(root / "x.npy", np.ones((3, 4), np.float32))
    collect = ["--model", root / "tiny", "--data", root / "t.jsonl", "--db", root / "db"]
    assert invoke("collect", *collect).exit_code == 0
    assert invoke("analyze", "--db", root / "db", "--strategy", "mse", "--out", root / "s.parquet").exit_code == 0
    return root


def invoke(name: str, *arguments: str | Path) -> Result:
    return CliRunner().invoke(load_command(name), [str(a) for a in arguments])


def base(name: str, world: Path, db: Path) -> list[str | Path]:
    """Arguments with which a command does something small, all it writes in ``db``."""
    text = ["--data", world / "t.jsonl"]
    return {
        "collect": ["--model", world / "tiny", *text, "--db", db],
        "import": [world / "x.npy", "--site", "s", "--db", db],
        "evaluate": ["--float", "--model", world / "tiny", *text, "--db", db],
        "analyze": ["--db", world / "db", "--out", db / "s.parquet", "--strategy", "absmax"],
        "compare": ["--db", world / "db", "--no-picture", "--strategy", "absmax"],
        "groups": ["--db", world / "db", "--no-picture"],
        "plot": ["channels", "--db", world / "db", "--out", db / "channels.svg"],
        "converge": ["--db", world / "db", "--no-picture", "--strategy", "absmax"],
        "stats": ["--db", world / "db"],
        "sql": ["select 1", "--db", world / "db"],
        "generate": ["--model", world / "tiny", "--out", db, "--tokens", "3"],
        "results": ["--db", world / "db"],
        "diff": [world / "log.jsonl", world / "log.jsonl"],
        "demo": ["--out", db / "demo"],
    }[name]


NUMBERS = [
    (name, parameter.opts[0])
    for name in COMMANDS
    for parameter in load_command(name).params
    if isinstance(parameter, click.Option)
    and (isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType))
]


def test_the_numbers_are_found() -> None:
    assert {("collect", "--samples"), ("import", "--layer"), ("evaluate", "--bootstrap")} <= set(NUMBERS)


@pytest.mark.parametrize(("name", "option"), [*NUMBERS, ("collect", "--keep-tokens"), ("collect", "--shard")])
def test_an_absurd_number_is_taken_or_refused_in_words(world: Path, tmp_path: Path, name: str, option: str) -> None:
    for value in ABSURD:
        done = invoke(name, *base(name, world, tmp_path), option, value)
        assert done.exit_code in (0, 1, 2), (value, done.exception)
        assert done.exception is None or isinstance(done.exception, SystemExit), (value, done.exception)
        if done.exit_code == 1:
            assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("address", ["s3://bucket/db", "hdfs:/x", "gs://b", "file:///srv/x", b"d\xffb"])
def test_a_database_elsewhere_is_refused_before_any_work(world: Path, tmp_path: Path, address: str | bytes) -> None:
    db = os.fsdecode(address)
    with pytest.raises(DatabaseInvalid):
        local_folder(db)
    os.chdir(tmp_path)
    for name, *arguments in (
        ("collect", "--model", world / "tiny", "--data", world / "t.jsonl"),
        ("import", world / "x.npy", "--site", "s"),
        ("merge",),
        ("sql", "select 1"),
        ("stats",),
        ("analyze",),
        ("compare",),
        ("plot", "channels"),
        ("apply", "--scales", world / "s.parquet"),
        ("evaluate", "--float", "--model", world / "tiny", "--data", world / "t.jsonl"),
    ):
        done = invoke(name, *arguments, "--db", db)
        assert done.exit_code == 1 and done.stderr.count("\n") == 1, (name, done.output)
        assert "expected a database folder" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_site_without_a_name(world: Path, tmp_path: Path) -> None:
    done = invoke("import", world / "x.npy", "--site", " ", "--db", tmp_path)
    assert done.exit_code == 1 and "the site's name is empty" in done.stderr
