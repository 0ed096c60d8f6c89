"""read_scales accepts what write_scales wrote and refuses everything else in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quambase.schema.errors import ScalesInvalid, UnknownName
from quambase.schema.scale_table import METADATA_KEY, read_scales, write_scales
from quambase.schema.stored.model_info import ModelInfo
from quambase.schema.tables import SCALES

PROVENANCE = {
    "format_version": 1,
    "quambase": "0.1.0",
    "granularity": "tensor",
    "runs": {"r1": {"model": {"name": "tiny", "family": "mamba1"}, "identity": {"weights_sha256": "ab"}, "data": {}}},
}


def rows(**changes: Any) -> pa.Table:
    """Two strategies at two sites, and one two-segment row; ``changes`` replace whole columns."""
    base: dict[str, list[Any]] = {name: [None] * 5 for name in SCALES.names}
    base |= {
        "run": ["r1"] * 5,
        "layer": [0, 0, 1, 1, 0],
        "site": ["x_proj:input"] * 5,
        "group_name": ["all"] * 5,
        "strategy": ["absmax", "mse", "absmax", "mse", "outlier_piecewise"],
        "params": ["{}"] * 5,
        "label": ["absmax", "mse", "absmax", "mse", "outlier_piecewise"],
        "scale": [0.5, 0.25, 0.125, 2.0, 0.75],
        "needs_decode": [False] * 4 + [True],
        "selected": [True, False, False, True, False],
    }
    return pa.table({f.name: pa.array((base | changes)[f.name], f.type) for f in SCALES}, schema=SCALES)


def test_round_trip_and_lookup(tmp_path: Path) -> None:
    path = tmp_path / "scales.parquet"
    write_scales(path, rows(), PROVENANCE)
    table = read_scales(path)
    assert table.table.equals(rows())
    assert table.provenance == PROVENANCE
    assert table.labels() == ["absmax", "mse", "outlier_piecewise"]
    assert table.run == "r1"
    assert table.model == ModelInfo("tiny", "mamba1")
    assert table.weights_sha256 == "ab"
    assert table.scales_for("absmax") == {(0, "x_proj:input"): 0.5, (1, "x_proj:input"): 0.125}
    assert table.scales_for("selected") == {(0, "x_proj:input"): 0.5, (1, "x_proj:input"): 2.0}
    assert table.scales_for("outlier_piecewise") == {}
    with pytest.raises(UnknownName, match="unknown strategy 'absmx'; did you mean absmax"):
        table.scales_for("absmx")


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    write_scales(tmp_path / "a.parquet", rows(), PROVENANCE)
    write_scales(tmp_path / "b.parquet", rows(), dict(reversed(PROVENANCE.items())))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_groups_of_a_divided_site_are_not_the_site(tmp_path: Path) -> None:
    path = tmp_path / "scales.parquet"
    write_scales(path, rows(group_name=["all", "all", "x", "all", "all"]), PROVENANCE)
    assert read_scales(path).scales_for("absmax") == {(0, "x_proj:input"): 0.5}


def test_several_runs_have_no_single_model(tmp_path: Path) -> None:
    two = PROVENANCE | {"runs": dict.fromkeys(("r1", "r2"), PROVENANCE["runs"]["r1"])}
    path = tmp_path / "scales.parquet"
    write_scales(path, rows(run=["r1", "r1", "r2", "r2", "r1"]), two)
    table = read_scales(path)
    with pytest.raises(ScalesInvalid, match=r"holds 2 runs \(r1, r2\), expected one"):
        table.scales_for("absmax")


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), None])
def test_refuses_a_scale_that_is_not_positive_and_finite(tmp_path: Path, bad: float | None) -> None:
    path = tmp_path / "scales.parquet"
    write_scales(path, rows(scale=[0.5, bad, 0.1, 2.0, 1.0]), PROVENANCE)
    with pytest.raises(ScalesInvalid, match=r"layer 0 x_proj:input \(all, mse\) is not positive and finite"):
        read_scales(path)


def test_refuses_what_is_no_scale_table(tmp_path: Path) -> None:
    path = tmp_path / "scales.parquet"
    with pytest.raises(ScalesInvalid, match="does not exist; run `analyze`"):
        read_scales(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(ScalesInvalid, match="not a readable Parquet file"):
        read_scales(path)
    pq.write_table(rows(), path)
    with pytest.raises(
        ScalesInvalid, match=r"names no origin, .*; if you edited it, `quambase adopt .*scales.parquet`"
    ):
        read_scales(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ScalesInvalid, match="is not a scale table: it lacks the columns run, layer"):
        read_scales(path)
    pq.write_table(rows().replace_schema_metadata({METADATA_KEY: b"{"}), path)
    with pytest.raises(ScalesInvalid, match=r"provenance of .* is damaged"):
        read_scales(path)
    newer = json.dumps(PROVENANCE | {"format_version": 3}).encode()
    pq.write_table(rows().replace_schema_metadata({METADATA_KEY: newer}), path)
    with pytest.raises(ScalesInvalid, match="format version 3; this quambase reads up to 2"):
        read_scales(path)
    known = json.dumps(PROVENANCE).encode()
    pq.write_table(rows().drop_columns(["mse", "label"]).replace_schema_metadata({METADATA_KEY: known}), path)
    with pytest.raises(ScalesInvalid, match="lacks the columns label, mse"):
        read_scales(path)
    write_scales(path, rows(run=["r1"] * 4 + ["zz"]), PROVENANCE)
    with pytest.raises(ScalesInvalid, match="run zz, unknown to its provenance"):
        read_scales(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scales.parquet"
    write_scales(path, rows(), PROVENANCE)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ScalesInvalid, match="was altered or cut short"):
        read_scales(path)
