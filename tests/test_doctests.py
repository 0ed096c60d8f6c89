"""The examples in docstrings run, and print what they show."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
from fabricate import make_run

import quambase
from quambase.analyzer.strategies import STRATEGIES

ROOT = Path(__file__).parent.parent
STAGES = ("schema", "model", "collector", "analyzer", "apply", "cli")

MODULES = sorted(
    "quambase." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for stage in STAGES
    for path in (ROOT / stage).rglob("*.py")
    if re.search(r"^ *>>> ", path.read_text(encoding="utf-8"), re.M)
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "quambase-db", sensitive=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quambase.analyzer.strategies.STRATEGIES", dict(STRATEGIES))
    with quambase.open() as db:
        module = importlib.import_module(name)
        found = doctest.testmod(module, extraglobs={"quambase": quambase, "db": db})
    assert found.attempted > 0 and found.failed == 0


def test_some_modules_have_examples() -> None:
    assert {"quambase.analyzer.opened", "quambase.analyzer.strategies"} <= set(MODULES)
