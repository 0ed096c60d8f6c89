"""Strategies of users: functions, files, entry points of other packages; and what of theirs is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fabricate import make_run

from quambase.analyzer import own_strategies
from quambase.analyzer.analyze import analyze
from quambase.analyzer.scale_groups import ScaleGroup
from quambase.analyzer.strategies import STRATEGIES, parse_labels, strategy
from quambase.cli.main import load_command
from quambase.schema.errors import DataInvalid, UnknownName
from quambase.schema.scale_table import read_scales

FILE = '''
def half_absmax(group, share=0.5):
    """share of max a / 127."""
    return share * group.distribution.amax / 127
'''


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Nothing stays registered."""
    before = dict(STRATEGIES)
    yield
    STRATEGIES.clear()
    STRATEGIES.update(before)
    own_strategies.installed.cache_clear()


def scales_of(table: Any, label: str) -> list[float]:
    return [row["scale"] for row in table.to_pylist() if row["label"] == label]


def test_a_function_is_a_strategy(tmp_path: Path) -> None:
    make_run(tmp_path / "db")

    def double(group: ScaleGroup) -> float:
        """Twice max a / 127."""
        return 2 * group.distribution.amax / 127

    found = analyze(tmp_path / "db", strategies=[double, "absmax", double], out=tmp_path / "s.parquet")
    pairs = zip(scales_of(found.table, "double"), scales_of(found.table, "absmax"), strict=True)
    # float32 of twice a number is twice its float32, but for dead sites, which have the floor.
    assert all(twice == 2 * once or twice == once < 2e-6 for twice, once in pairs)
    assert read_scales(tmp_path / "s.parquet").labels() == ["double", "absmax"]
    assert STRATEGIES["double"].definition == "Twice max a / 127." and STRATEGIES["double"].own


def test_a_cell_may_run_again_and_quambases_names_are_its_own() -> None:
    for factor in (1.0, 3.0):

        @strategy
        def mine(group: ScaleGroup, share: float = factor) -> float:
            return share

    assert STRATEGIES["mine"].parameters == {"share": 3.0}
    with pytest.raises(DataInvalid, match="quambase has a strategy absmax; give yours another name"):
        strategy(named("absmax", lambda group: 1.0))
    with pytest.raises(DataInvalid, match="parameter share of strategy mine has no number as its default"):
        strategy(named("mine", lambda group, share="a": 1.0))


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    function.__name__ = name
    return function


def test_a_file_by_its_name(tmp_path: Path) -> None:
    make_run(tmp_path / "db")
    (tmp_path / "my own.py").write_text(FILE)
    label = f"{tmp_path}/my own.py:half_absmax"
    arguments = ["--db", tmp_path / "db", "--out", tmp_path / "s.parquet", "--strategy", label]
    more = ["--strategy", f"{label}:0.25", "--strategy", "absmax"]
    done = CliRunner().invoke(load_command("analyze"), [str(a) for a in [*arguments, *more]])
    assert done.exit_code == 0, done.output
    table = read_scales(tmp_path / "s.parquet")
    assert table.labels() == ["half_absmax", "half_absmax:0.25", "absmax"]
    half, quarter, whole = (scales_of(table.table, label) for label in table.labels())
    for a, b, c in zip(half, quarter, whole, strict=True):
        assert (2 * a, 4 * b) == (c, c) or a == b == c < 4e-6
    done = CliRunner().invoke(
        load_command("compare"), ["--db", str(tmp_path / "db"), "--strategy", label, "--no-picture"]
    )
    assert done.exit_code == 0 and "half_absmax" in done.stdout


@pytest.mark.parametrize(
    ("text", "name", "error", "message"),
    [
        (None, "f", DataInvalid, "there is no file .*own.py; expected Python"),
        ("x = (", "f", DataInvalid, "own.py fails: SyntaxError: "),
        ("1 / 0", "f", DataInvalid, "own.py fails: ZeroDivisionError: division by zero"),
        (FILE, "half_abs", UnknownName, "unknown function 'half_abs' in .*own.py; did you mean half_absmax?"),
    ],
)
def test_files_that_are_refused(
    tmp_path: Path, text: str | None, name: str, error: type[Exception], message: str
) -> None:
    if text is not None:
        (tmp_path / "own.py").write_text(text)
    with pytest.raises(error, match=message):
        parse_labels([f"{tmp_path}/own.py:{name}"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda group: 1 / 0, "strategy own fails: ZeroDivisionError: division by zero; mend its function"),
        (lambda group: float("nan"), "strategy own returns nan; expected a scale: a finite number, not below zero"),
        (lambda group: -1.0, "strategy own returns -1.0"),
        (lambda group: None, "strategy own returns None"),
        (lambda group: (1.0, float("inf")), "strategy own returns"),
    ],
)
def test_what_is_no_scale_is_one_line(tmp_path: Path, function: Callable[..., Any], message: str) -> None:
    make_run(tmp_path / "db")
    with pytest.raises(DataInvalid, match=message):
        analyze(tmp_path / "db", strategies=[named("own", function)], out=None)


def test_another_package_brings_strategies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real distribution on the path: its metadata and its module."""
    (tmp_path / "their_scales.py").write_text(FILE.replace("half_absmax", "their_half") + "\nwrong = 3\n")
    folder = tmp_path / "their_scales-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: their-scales\nVersion: 1.0\n")
    entries = ["their_half = their_scales:their_half", "wrong = their_scales:wrong", "gone = their_scales:gone"]
    (folder / "entry_points.txt").write_text("[quambase.strategies]\n" + "\n".join(entries) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    own_strategies.installed.cache_clear()
    make_run(tmp_path / "db")
    found = analyze(tmp_path / "db", strategies=["their_half:0.25", "absmax"], out=None)
    assert len(scales_of(found.table, "their_half:0.25")) == len(scales_of(found.table, "absmax")) > 0
    with pytest.raises(DataInvalid, match="entry point their_scales:wrong is no function"):
        parse_labels(["wrong"])
    with pytest.raises(DataInvalid, match="strategy gone of package their-scales fails: AttributeError"):
        parse_labels(["gone"])
    with pytest.raises(UnknownName, match="did you mean their_half"):
        parse_labels(["their_hal"])
    sys.modules.pop("their_scales", None)
