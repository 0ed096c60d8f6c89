"""The cookbook: every query runs and says in docs/cookbook.md what it is; the answers of some against slow twins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fabricate import half, make_run, random_activations

from quambase.analyzer.analyze import analyze
from quambase.schema.errors import QueryInvalid, UnknownName
from quambase.schema.sql.database import StatsDB
from quambase.schema.sql.queries import cookbook, recipe, sql_file
from quambase.schema.values.number_format import INT8

PAGE = (Path(__file__).parents[2] / "docs" / "cookbook.md").read_text(encoding="utf-8")
SITE = "x_proj:input"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cookbook")
    make_run(root / "db", sensitive=True)
    analyze(root / "db", out=root / "scales.parquet")
    make_run(root / "two", "run-a")
    make_run(root / "two", "run-b", random_activations(1), number=2)
    return root


def ask(world: Path, name: str, *settings: str, two: bool = False) -> list[dict[str, Any]]:
    found = recipe(name)
    arguments: dict[str, Any] = {"run": "all"} if two else {"scales": world / "scales.parquet"}
    with StatsDB(world / ("two" if two else "db"), **arguments) as database:
        return database.sql(found.sql, found.with_values(settings)).to_pylist()


def values_of(site: str, layer: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """What a run counts of a site, every group."""
    groups = random_activations(seed)[layer, site]
    return half(np.concatenate([d.ravel() for documents in groups.values() for d in documents]))


@pytest.mark.parametrize("name", cookbook())
def test_every_query_runs_and_is_in_the_page_with_its_question(world: Path, name: str) -> None:
    two = name in ("drift", "safe-for-both")
    layer = ["layer=1"] if "layer" in recipe(name).parameters else []
    rows = ask(world, name, *layer, two=two)
    # The hand-made run has no largest values, no Mamba-2, no evaluations, and documents of a few tokens.
    assert rows or name in ("outlier-tokens", "outlier-positions", "other-groups", "evaluations")
    block = f"**{recipe(name).question}**\n\n```console\n$ quambase sql @{name}"
    assert PAGE.count(block) == 1 and f"```sql\n{recipe(name).sql}\n```" in PAGE


def test_the_page_has_no_other_and_enough() -> None:
    assert sorted(re.findall(r"\$ quambase sql @([\w-]+)", PAGE)) == sorted(cookbook()) and len(cookbook()) >= 15
    assert len(cookbook()) == sql_file("cookbook.sql").count("\n-- name: ")


def test_clipped_is_what_the_number_format_clips(world: Path) -> None:
    values = values_of(SITE, 1).astype(np.float64)
    scale = float(np.abs(values).max()) / 127 / 20
    codes = np.rint(values.astype(np.float32) / np.float32(scale))
    decoded = np.clip(codes, INT8.qmin, INT8.qmax) * scale
    out = (codes < INT8.qmin) | (codes > INT8.qmax)
    assert 0 < out.sum() < out.size
    (found,) = ask(world, "clipped", "layer=1", f"scale={scale!r}")
    # float64 sums in another order
    assert found["clipped_share"] == pytest.approx(out.mean(), rel=1e-12)
    assert found["energy_of_clipped"] == pytest.approx((values**2)[out].sum() / (values**2).sum(), rel=1e-12)
    errors = (values - decoded) ** 2
    assert found["of_squared_error"] == pytest.approx(errors[out].sum() / errors.sum(), rel=1e-9)


def test_document_order_is_the_moving_average_step_by_step(world: Path) -> None:
    with StatsDB(world / "db") as database:
        rows = database.sql(
            f"select document, sha256, q9995 from documents where site = '{SITE}' and layer = 1 and group_name = 'all'"
        ).to_pylist()
    orders = {
        "forwards": sorted(rows, key=lambda row: row["document"]),
        "backwards": sorted(rows, key=lambda row: -row["document"]),
        "shuffled": sorted(rows, key=lambda row: row["sha256"]),
        "rising": sorted(rows, key=lambda row: row["q9995"]),
    }
    found = next(row for row in ask(world, "document-order", "sigma=0.3") if row["layer"] == 1)
    for name, ordered in orders.items():
        mean = ordered[0]["q9995"]
        for row in ordered[1:]:
            mean = 0.7 * mean + 0.3 * row["q9995"]
        assert found[name] == pytest.approx(mean, rel=1e-12), name  # some float64 roundings
    assert len({found[name] for name in orders}) > 2


def test_outlier_energy_is_that_of_the_sorted_values(world: Path) -> None:
    for row in ask(world, "outlier-energy", "limit=1000"):
        values = np.abs(values_of(row["site"], row["layer"]).astype(np.float64))
        if not values.any():
            assert row["beyond_q99"] is None or np.isnan(row["beyond_q99"])
            continue
        beyond = values[values > np.quantile(values, 0.99)]
        assert row["beyond_q99"] == pytest.approx((beyond**2).sum() / (values**2).sum(), rel=1e-12)


def test_convergence_counts_documents_one_by_one(world: Path) -> None:
    activations = random_activations()
    for row in ask(world, "convergence", "limit=1000"):
        groups = activations[row["layer"], row["site"]].values()
        largest = [max(float(np.abs(d).max()) for d in same) for same in zip(*groups, strict=True)]
        last = max(largest)
        running = [max(largest[: n + 1]) for n in range(len(largest))]
        # documents holds float32.
        near = next(n + 1 for n, value in enumerate(running) if np.float32(value) >= 0.9 * np.float32(last))
        assert (row["documents"], row["within_a_tenth"]) == (len(largest), near)
        assert row["at_the_maximum"] == 1 + running.index(last)


def test_safe_for_both_clips_nothing_and_says_what_the_other_scale_clips(world: Path) -> None:
    for row in ask(world, "safe-for-both", "limit=1000", two=True):
        one, other = (np.abs(values_of(row["site"], row["layer"], seed)) for seed in (0, 1))
        short, long = sorted((one, other), key=lambda values: float(values.max()))
        # The run's amax is that before its rounding to float16.
        assert row["safe_scale"] == pytest.approx(float(long.max()) / 127, rel=1e-3)
        share = (long > float(short.max()) / 127 * 127.5).mean()
        assert row["clipped_there"] is None or row["clipped_there"] == pytest.approx(share, abs=2 / long.size)


def test_parameters() -> None:
    found = recipe("clipped")
    assert found.with_values(["scale=2", "site=z"]) == {"layer": 3, "site": "z", "scale": 2}
    for given, error in [("scale", QueryInvalid), ("scale=a", QueryInvalid), ("site=3", QueryInvalid)]:
        with pytest.raises(error, match="--set"):
            found.with_values([given])
    with pytest.raises(UnknownName, match="unknown parameter of @clipped 'scal'; did you mean scale"):
        found.with_values(["scal=1"])
    with pytest.raises(UnknownName, match="did you mean outlier-channels"):
        recipe("outlier-channel")
