"""A wrong label, site or granularity is reported before torch is imported, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from quambase.apply.scale_choice import ALL, check_choice
from quambase.schema.errors import ScalesInvalid, UnknownName
from quambase.schema.scale_table import read_scales, write_scales
from quambase.schema.tables import SCALES

PROVENANCE = {
    "format_version": 1,
    "quambase": "0.1.0",
    "granularity": "tensor",
    "runs": {"r1": {"model": {"name": "tiny", "family": "mamba1"}, "identity": {"weights_sha256": "ab"}, "data": {}}},
}

SCRIPT = """
import sys
from quambase.cli.main import quambase
try:
    quambase()
finally:
    print("torch" in sys.modules)
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A scale table of two strategies at one site."""
    row = {"run": "r1", "layer": 0, "site": "x_proj:input", "group_name": "all", "params": "{}", "needs_decode": False}
    rows = [
        row | {"strategy": name, "label": name, "scale": scale, "selected": name == "mse"}
        for name, scale in (("absmax", 0.5), ("mse", 0.25))
    ]
    path = tmp_path / "scales.parquet"
    write_scales(path, pa.Table.from_pylist([dict.fromkeys(SCALES.names) | row for row in rows], SCALES), PROVENANCE)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["apply", "--strategy", "msee"], "unknown strategy 'msee'; did you mean mse"),
        (["apply", "--strategy", "msee", "--export", "a.pt"], "unknown strategy 'msee'; did you mean mse"),
        (["apply", "--strategy", "msee", "--backend", "quamba", "--out", "a"], "unknown strategy 'msee'; did you mean"),
        (["apply", "--at", "x_prj:input"], "unknown site 'x_prj:input'; did you mean x_proj:input"),
        (["apply", "--at", "x_proj:input", "--otherwise", "absmx"], "unknown strategy 'absmx'; did you mean absmax"),
        (["apply", "--granularity", "group"], "the scale table has no scales by group (it has tensor)"),
        (["evaluate", "--strategy", "msee"], "unknown strategy 'msee'; did you mean mse"),
        (["evaluate", "--strategy", "mse", "--strategy", "absmx"], "unknown strategy 'absmx'; did you mean absmax"),
        (["evaluate", "--strategy", "msee", "--one-at-a-time"], "unknown strategy 'msee'; did you mean mse"),
        (["evaluate", "--granularity", "group"], "the scale table has no scales by group (it has tensor)"),
    ],
)
def test_a_wrong_name_is_reported_without_torch(table: Path, arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments, "--scales", str(table)],
        capture_output=True, text=True, check=False, cwd=table.parent,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert done.stdout == "False\n"


def test_the_script_would_notice_torch(table: Path) -> None:
    """A right label: the command goes on to load the model, which needs torch."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "apply", "--strategy", "mse", "--scales", str(table)],
        capture_output=True, text=True, check=False, cwd=table.parent,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == "True\n"


def test_right_names_are_accepted(table: Path) -> None:
    found = read_scales(table)
    check_choice(found, ["absmax", "mse", "selected", ALL], ["tensor", ALL])
    with pytest.raises(UnknownName, match="unknown strategy 'ema'"):
        check_choice(found, ["mse", "ema"])
    with pytest.raises(UnknownName, match="unknown granularity 'tensr'; did you mean tensor"):
        check_choice(found, ["mse"], ["tensr"])
    with pytest.raises(ScalesInvalid, match="has no scales by ssd_group"):
        check_choice(found, ["mse"], [ALL, "ssd_group"])
