"""The comparison at one site, against quantizing the values themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fabricate import half, make_run, random_activations

from quambase.analyzer.site.compare import MAGNITUDES, compare, reconstruct
from quambase.schema.errors import QuambaseError, UnknownName

SITE = "x_proj:output"


def site_values(layer: int = 1, group: str | None = None) -> np.ndarray:
    groups = random_activations()[layer, SITE]
    return half(np.concatenate([d.ravel() for name, ds in groups.items() if group in (None, name) for d in ds]))


@pytest.mark.parametrize("group", ["all", "B"])
def test_strategies_table(fabricated_database: Path, group: str) -> None:
    values = site_values(group=None if group == "all" else group)
    found = compare(fabricated_database, SITE, 1, group, strategies=["percentile:0.9", "mse", "absmax"])
    errors = {}
    for row in found.strategies.to_pylist():
        quotient = np.rint(values / np.float32(row["scale"]))
        codes = np.clip(quotient, -128, 127)
        errors[row["strategy"]] = ((values.astype(np.float64) - codes.astype(np.float64) * row["scale"]) ** 2).mean()
        assert row["mse"] == pytest.approx(errors[row["strategy"]], rel=1e-12)  # 192 additions in another order
        assert (row["overflow"], row["overflow_share"]) == ((quotient != codes).sum(), (quotient != codes).mean())
        assert row["outlier_range"] == (np.abs(codes) > 120).sum()
        assert row["normal_range"] == (np.abs(codes) <= 120).sum()
        assert row["outlier_codes"] == np.unique(codes[np.abs(codes) > 120]).size
        change = 100 * (errors[row["strategy"]] / (np.abs(values).max() and error_of_absmax(values)) - 1)
        assert row["mse_change_percent"] == pytest.approx(change, abs=1e-9)
        assert row["worth"] == (change < -10)
    order = found.strategies["strategy"].to_pylist()
    assert order == sorted(errors, key=errors.__getitem__)
    assert found.summary[0].startswith(f"least MSE: {order[0]} (MSE ")


def error_of_absmax(values: np.ndarray) -> float:
    scale = np.float32(np.abs(values).max() / np.float64(127))
    codes = np.clip(np.rint(values / scale), -128, 127)
    return float(((values.astype(np.float64) - codes.astype(np.float64) * np.float64(scale)) ** 2).mean())


def test_statistics_table(fabricated_database: Path) -> None:
    values = site_values().astype(np.float64)
    row = compare(fabricated_database, SITE, 1, strategies=["absmax"]).statistics.to_pylist()[0]
    assert row["shape"] == "32 x 18"
    assert (row["count"], row["min"], row["max"]) == (values.size, values.min(), values.max())
    assert row["mean"] == pytest.approx(values.mean(), rel=1e-10)
    assert row["std"] == pytest.approx(values.std(), rel=1e-12)
    for k in (3, 5):
        assert row[f"beyond_{k}_sigma"] == (np.abs(values - values.mean()) > k * values.std()).mean()


def test_values_table(fabricated_database: Path) -> None:
    found = compare(fabricated_database, SITE, 1, strategies=["absmax", "outlier_piecewise"])
    rows = found.values.to_pylist()
    assert [r["value"] for r in rows] == [*MAGNITUDES, *MAGNITUDES]
    scale = found.scales["absmax"]
    for row in rows[: len(MAGNITUDES)]:
        assert row["code"] == min(round(row["value"] / scale), 127)  # type: ignore[operator]
        assert row["reconstruction"] == row["code"] * scale
        assert row["error"] == row["value"] - row["reconstruction"]
    inner, outer = found.scales["outlier_piecewise"]  # type: ignore[misc]
    for row in rows[len(MAGNITUDES) :]:
        if row["code"] > 120:
            assert row["reconstruction"] == pytest.approx(120 * inner + (row["code"] - 120) * outer, rel=1e-15)
    assert reconstruct(np.array([-2.0], np.float32), scale) == -reconstruct(np.array([2.0], np.float32), scale)


def test_a_decoder_is_not_passed_off_as_one_scale(tmp_path: Path) -> None:
    # Nearly every value small, two huge ones: two segments beat every single scale.
    values = np.concatenate([np.linspace(-1, 1, 500), [1000.0, 999.0]]).astype(np.float32)
    make_run(tmp_path, "r", {(0, "t"): {"all": [values[None]] * 5}}, family="tensor")
    summary = compare(tmp_path, strategies=["absmax", "percentile", "outlier_piecewise"]).summary
    assert summary[0].startswith("least MSE: outlier_piecewise")
    assert summary[1].startswith("least MSE with one INT8 scale: ")


def test_without_a_site_the_worst_is_taken(fabricated_database: Path) -> None:
    from quambase.schema.sql.database import StatsDB

    with StatsDB(fabricated_database) as database:
        worst = database.stats(limit=1).to_pylist()[0]
    title = compare(fabricated_database, strategies=["absmax"]).title
    assert title == f"layer {worst['layer']} {worst['site']} of run run-a"


def test_synthetic_needs_no_database_and_is_seeded(tmp_path: Path) -> None:
    first = compare(tmp_path, synthetic=True, strategies=["mse", "absmax"])
    again = compare(tmp_path, synthetic=True, strategies=["mse", "absmax"])
    other = compare(tmp_path, synthetic=True, seed=1, strategies=["mse", "absmax"])
    assert first.strategies.equals(again.strategies)
    assert not first.strategies.equals(other.strategies)
    assert first.statistics["shape"].to_pylist() == ["512 x 1536"]
    assert first.summary[0].startswith("least MSE: mse")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture(fabricated_database: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"c.{suffix}"
    found = compare(fabricated_database, SITE, 1, picture=path)
    assert found.picture == path
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    with pytest.raises(QuambaseError, match=r"cannot be saved as 'c\.xyz'; expected one of"):
        compare(fabricated_database, SITE, 1, picture=tmp_path / "c.xyz")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_dead_site_can_be_compared(fabricated_database: Path, tmp_path: Path) -> None:
    found = compare(fabricated_database, "dt_proj:input", 0, picture=tmp_path / "dead.png")
    assert set(found.strategies["mse"].to_pylist()) == {0.0}
    assert found.strategies["mse_change_percent"].null_count == found.strategies.num_rows


def test_unknown_names(fabricated_database: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="unknown site 'x_proj:inputt' in run run-a; did you mean x_proj:input"):
        compare(fabricated_database, "x_proj:inputt")
    with pytest.raises(UnknownName, match="unknown layer '9'"):
        compare(fabricated_database, "x_proj:input", 9)
    with pytest.raises(UnknownName, match="holds no site 'lm_head:input' in layer 0"):
        compare(fabricated_database, "lm_head:input", 0)
    with pytest.raises(UnknownName, match="unknown group of x_proj:output 'D' in run run-a; known: B, C, all, dt"):
        compare(fabricated_database, SITE, 1, "D")
    make_run(tmp_path, "a", {(0, "t"): random_activations()[1, "x_proj:input"]})
    make_run(tmp_path, "b", {(0, "t"): random_activations()[1, "x_proj:input"]})
    with pytest.raises(UnknownName, match="2 runs were chosen; compare looks at one"):
        compare(tmp_path, run="all")
