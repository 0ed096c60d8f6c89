"""The numbers of pictures, against slow twins written from their definitions."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fabricate import half, make_run, random_activations
from hypothesis import given
from hypothesis import strategies as st

from quambase.analyzer.analyze import analyze
from quambase.analyzer.pictures.numbers.channels import channels_by_reach
from quambase.analyzer.pictures.numbers.error_curve import error_curve
from quambase.analyzer.pictures.numbers.evaluation import evaluated_texts
from quambase.analyzer.pictures.numbers.histogram import histogram
from quambase.analyzer.pictures.numbers.largest_tokens import largest_tokens
from quambase.analyzer.pictures.numbers.marks import marks, marks_of_group
from quambase.analyzer.pictures.numbers.site_grid import QUANTITIES, site_grid
from quambase.analyzer.pictures.numbers.strategies import strategies_over_sites
from quambase.analyzer.scale_groups import ScaleGroup, group_of_values, scale_groups
from quambase.analyzer.strategies import parse_labels
from quambase.schema.errors import UnknownName
from quambase.schema.sql.database import StatsDB
from quambase.schema.tables import OUTLIERS, SCALES
from quambase.schema.values.distribution import Distribution, Sensitivity

SITE = "x_proj:output"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> StatsDB:
    folder = tmp_path_factory.mktemp("sensitive")
    make_run(folder, sensitive=True)
    return StatsDB(folder)


@pytest.fixture(scope="module")
def scales(database: StatsDB) -> pa.Table:
    return analyze(database.path, strategies=["absmax", "mse", "quamba", "effect", "outlier_piecewise"], out=None).table


def bin_of(value: float, parts: int) -> int:
    """The k with 2^(k / parts) <= value < 2^((k + 1) / parts): floor(log2(value^parts)), in whole numbers."""
    power = Fraction(value) ** parts
    k = power.numerator.bit_length() - power.denominator.bit_length()
    return k if Fraction(2) ** k <= power else k - 1


@given(
    st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), max_size=40),
    st.sampled_from([1, 3, 4, 8]),
)
def test_a_histogram_counts_every_value_in_its_bin(values: list[float], parts: int) -> None:
    found = histogram(Distribution.of_values(np.array(values, np.float32)), parts)
    expected: dict[int, int] = {}
    for value in values:
        if value:
            expected[bin_of(abs(value), parts)] = expected.get(bin_of(abs(value), parts), 0) + 1
    counted = {found.first + i: n for i, n in enumerate(found.counts.tolist()) if n}
    assert counted == expected
    assert found.zeros == sum(value == 0 for value in values) and found.total == len(values)
    assert found.counts.dtype == np.int64 and found.edges.size == found.counts.size + 1


def test_a_power_of_two_begins_its_bin_and_edges_are_those_said() -> None:
    powers = 2.0 ** np.arange(-24, 16)
    below = np.nextafter(powers.astype(np.float16), np.float16(0)).astype(np.float32)
    found = histogram(Distribution.of_values(np.concatenate([powers, -below[1:]])))
    assert found.first == 8 * -24
    ends = np.cumsum(found.counts)[8 * np.arange(1, 40) - 1]
    assert ends.tolist() == [2 * i for i in range(1, 40)], "up to each power: it and its neighbour below are apart"
    # 2^(k/8) of the library is within a few ulp.
    assert found.edges == pytest.approx(2.0 ** (np.arange(found.first, found.first + found.edges.size) / 8), rel=1e-15)
    assert set(powers) <= set(found.edges.tolist())


def test_a_histogram_of_a_large_count_stays_exact() -> None:
    many = Distribution(np.array([1.0, 1.01], np.float32), np.array([2**53 + 1, 2**53 + 1], np.int64))
    assert histogram(many).counts.tolist() == [2**54 + 2], "float64 does not hold the odd ones"


def sensitive_group() -> ScaleGroup:
    random = np.random.default_rng(3)
    group = group_of_values(random.standard_t(3, 4000).astype(np.float32))
    # Only small values matter to the output: the scale of least effect is then smaller than that of least error.
    small = np.abs(group.distribution.values) < 2
    gradients = random.random(group.distribution.values.size) * group.distribution.counts * small
    return dataclasses.replace(group, sensitivity=Sensitivity(group.distribution.values, gradients, 7))


def test_an_error_curve_is_what_rounding_every_value_loses() -> None:
    group = sensitive_group()
    assert group.sensitivity is not None
    found = error_curve(group, [0.9, 1e-3], points=12)
    assert found.predicted_kl is not None and found.least_kl_scale is not None
    values = group.distribution.values
    for scale, mse, kl in zip(found.scales, found.mse, found.predicted_kl, strict=True):
        assert scale == np.float32(scale)
        codes = np.clip(np.rint(values / np.float32(scale)), -128, 127)
        lost = (values.astype(np.float64) - codes.astype(np.float64) * scale) ** 2
        # A few thousand additions in another order: below 4000 ulp.
        assert mse == pytest.approx((lost * group.distribution.counts).sum() / 4000, rel=1e-12)
        assert kl == pytest.approx((lost * group.sensitivity.gradient_sq).sum() / 2 / 7, rel=1e-12)
    assert found.scales[0] < 1e-3 and found.scales[-1] > 0.9 and (np.diff(found.scales) > 0).all()
    for best, losses in ((found.least_mse_scale, found.mse), (found.least_kl_scale, found.predicted_kl)):
        assert found.scales[losses.argmin()] == best
    assert found.least_kl_scale < found.least_mse_scale / 2
    plain = error_curve(dataclasses.replace(group, sensitivity=None))
    assert plain.predicted_kl is None and plain.least_kl_scale is None
    assert plain.scales[0] < group.distribution.amax / 127 < plain.scales[-1], "absmax is shown"


@pytest.mark.parametrize("values", [[], [0.0, 0.0]])
def test_an_error_curve_without_values(values: list[float]) -> None:
    found = error_curve(group_of_values(np.array(values, np.float32)))
    assert (np.isnan(found.mse) if not values else found.mse == 0).all() and (found.scales > 0).all()


def test_marks_say_where_a_strategy_clips(database: StatsDB, scales: pa.Table) -> None:
    group = next(g for g in scale_groups(database, "run-a") if (g.layer, g.site) == (1, "x_proj:input"))
    choices = parse_labels(["absmax", "effect_affine", "outlier_piecewise", "mse", "percentile"])
    found = {mark.label: mark for mark in marks_of_group(group, choices)}
    amax = group.distribution.amax
    # A scale is rounded to float32: 2^-24 relative, and two of them are added in two segments.
    assert found["absmax"].clips_at == pytest.approx(amax, rel=1e-7)
    assert found["outlier_piecewise"].clips_at == pytest.approx(amax, rel=2e-7)
    for mark in found.values():
        if not mark.needs_decode:
            top = np.float32(mark.clips_at)
            code = np.rint(top / np.float32(mark.scale)) + mark.zero_point
            assert code == 127, "that value has the last code, and what is larger gets it, too"
    assert found["effect_affine"].zero_point != 0
    errors = [mark.mse for mark in marks_of_group(group, choices)]
    assert errors == sorted(errors)
    stored = [r for r in scales.to_pylist() if (r["layer"], r["site"], r["label"]) == (1, "x_proj:input", "mse")]
    (mine,) = marks(stored)
    assert dataclasses.replace(mine, selected=False) == dataclasses.replace(found["mse"], selected=False)
    unsensitive = dataclasses.replace(group, sensitivity=None)
    assert "effect_affine" not in {mark.label for mark in marks_of_group(unsensitive, choices)}


def test_channels_by_reach(database: StatsDB) -> None:
    groups = random_activations()[1, SITE]
    columns = {}
    for name, documents in groups.items():
        for values in np.concatenate(documents).T:
            columns[len(columns)] = name, values
    reach = {channel: float(np.abs(values).max()) for channel, (_, values) in columns.items()}
    found = channels_by_reach(database, "run-a", 1, SITE)
    assert [c.channel for c in found] == sorted(reach, key=lambda channel: -reach[channel])
    for c in found:
        name, values = columns[c.channel]
        assert (c.amax, c.group_name) == (reach[c.channel], name)
        assert c.mean == pytest.approx(values.astype(np.float64).mean(), rel=1e-9, abs=1e-12)  # 32 additions
        assert c.ratio == pytest.approx(reach[c.channel] / np.median(list(reach.values())), rel=1e-15)
    said = database.sql(f"select channel from outlier_channels where layer = 1 and site = '{SITE}'")
    assert {c.channel for c in found if c.outlier} == set(said["channel"].to_pylist())
    dead = channels_by_reach(database, "run-a", 0, "dt_proj:input")
    assert len(dead) == 6 and all(c.ratio is None and not c.outlier for c in dead)
    assert channels_by_reach(database, "run-a", 9, SITE) == []


def test_an_outlier_channel_is_one(tmp_path: Path) -> None:
    values = np.ones((8, 5), np.float32)
    values[3, 2] = -5
    make_run(tmp_path, "r", {(0, "t"): {"all": [values] * 5}}, family="tensor")
    found = channels_by_reach(StatsDB(tmp_path), "r", 0, "t")
    assert [(c.channel, c.amax, c.ratio, c.outlier) for c in found[:2]] == [(2, 5, 5, True), (0, 1, 1, False)]


def test_the_largest_tokens_come_first(tmp_path: Path) -> None:
    key = {"run": "run-a", "layer": 1, "site": SITE}
    values = [1.0, -9.0, 3.0, 9.0]
    rows = [
        {**key, "group_name": "B", "document": 4 - i, "position": i, "token_id": i, "token": f"t{i}", "channel": 2}
        | {"value": value, "before": None if i == 2 else f"b{i}", "after": f"a{i}"}
        for i, value in enumerate(values)
    ]
    database = StatsDB(make_run(tmp_path).parent.parent, unsafe=True)
    database._connection.register("_outliers", pa.Table.from_pylist(rows, OUTLIERS))
    found = largest_tokens(database, "run-a", 1, SITE)
    assert [(t.value, t.token, t.document) for t in found] == [(9, "t3", 1), (-9, "t1", 3), (3, "t2", 2), (1, "t0", 4)]
    assert [t.context for t in found] == ["b3t3a3", "b1t1a1", None, "b0t0a0"]
    assert largest_tokens(database, "run-a", 1, SITE, 2) == found[:2]
    assert largest_tokens(database, "run-a", 0, SITE) == []


def test_the_grid_is_what_quantizing_each_site_loses(database: StatsDB, scales: pa.Table) -> None:
    grid = site_grid(database, "run-a", scales, "mse")
    assert grid.layers == (0, 1, -1) and grid.sites[0] == "in_proj:input" and grid.sites[-1] == "lm_head:output"
    rows = {(r["layer"], r["site"]): r for r in scales.to_pylist() if r["label"] == "mse"}
    for (layer, site), groups in random_activations().items():
        place = grid.layers.index(layer), grid.sites.index(site)
        values = half(np.concatenate([d.ravel() for documents in groups.values() for d in documents]))
        magnitude = np.abs(values.astype(np.float64))
        expected = magnitude.max() / np.quantile(magnitude, 0.9995) if magnitude.any() else np.nan
        assert grid.outlier_ratio[place] == pytest.approx(expected, rel=1e-6, nan_ok=True)  # amax is stored as float32
        row = rows[layer, site]
        quotient = np.rint(values / np.float32(row["scale"]))
        rounded = np.clip(quotient, -128, 127) * np.float64(row["scale"])
        assert grid.clipped_share[place] == (np.abs(quotient - 0) != np.abs(np.clip(quotient, -128, 127))).mean()
        if magnitude.any():
            ratio = (values.astype(np.float64) ** 2).sum() / ((values - rounded) ** 2).sum()
            assert grid.sqnr_db[place] == pytest.approx(10 * math.log10(ratio), abs=1e-9)
        assert grid.predicted_kl[place] == row["predicted_kl"]
    absent = grid.layers.index(-1), grid.sites.index("in_proj:input")
    assert all(math.isnan(grid.values(name)[absent]) for name in QUANTITIES)
    with pytest.raises(UnknownName, match="did you mean absmax"):
        site_grid(database, "run-a", scales, "absmx")
    with pytest.raises(UnknownName, match="quantity"):
        grid.values("mse")
    bare = site_grid(database, "run-a")
    assert bare.label is None and np.isnan(bare.sqnr_db).all() and (bare.outlier_ratio[0] > 1).any()


def test_a_sites_groups_count_together(database: StatsDB, scales: pa.Table) -> None:
    """A site whose groups have scales of their own loses what all its values lose."""
    by_group = analyze(database.path, strategies=["absmax"], granularity="group", out=None).table
    rows = [r for r in by_group.to_pylist() if (r["layer"], r["site"]) == (1, SITE) and r["group_name"] != "all"]
    table = pa.Table.from_pylist([row | {"consumed": True} for row in rows], SCALES)
    grid = site_grid(database, "run-a", table, "absmax")
    lost = kept = 0.0
    for row in rows:
        values = half(np.concatenate([d.ravel() for d in random_activations()[1, SITE][row["group_name"]]]))
        codes = np.clip(np.rint(values / np.float32(row["scale"])), -128, 127)
        lost += ((values.astype(np.float64) - codes * np.float64(row["scale"])) ** 2).sum()
        kept += (values.astype(np.float64) ** 2).sum()
    place = grid.layers.index(1), grid.sites.index(SITE)
    assert grid.sqnr_db[place] == pytest.approx(10 * math.log10(kept / lost), abs=1e-9)
    assert grid.predicted_kl[place] == pytest.approx(sum(row["predicted_kl"] for row in rows), rel=1e-14)


def test_strategies_over_all_sites(database: StatsDB, scales: pa.Table) -> None:
    found = strategies_over_sites(database, "run-a", scales)
    assert found[0].label == "effect" and found[-1].label == "outlier_piecewise"
    kls = [s.predicted_kl for s in found[:-1]]
    assert None not in kls and kls == sorted(kls)  # type: ignore[type-var]
    for each in found:
        mine = [r for r in scales.to_pylist() if r["label"] == each.label and r["layer"] >= 0]
        mine = [r for r in mine if r["consumed"] and not r["decode_only"]]
        assert {(r["layer"], r["site"]) for r in mine} == set(each.sites)
        for row in mine:
            loss = each.sites[row["layer"], row["site"]]
            assert (loss.clipped_share, loss.predicted_kl) == (row["clipped_share"], row["predicted_kl"])
            assert loss.sqnr_db == pytest.approx(row["sqnr_db"], abs=1e-9, nan_ok=True)
        assert each.predicted_kl == pytest.approx(sum(r["predicted_kl"] for r in mine), rel=1e-14)
    assert strategies_over_sites(database, "run-a", SCALES.empty_table()) == []


def test_the_selected_rows_name_their_strategy(database: StatsDB, scales: pa.Table) -> None:
    grid = site_grid(database, "run-a", scales)
    assert grid.label == "selected"
    best = np.fmin.reduce([site_grid(database, "run-a", scales, x).predicted_kl for x in ("mse", "absmax", "effect")])
    assert np.array_equal(grid.predicted_kl, np.fmin(best, grid.predicted_kl), equal_nan=True)


def test_evaluated_texts() -> None:
    def row(strategy: str, kl: float | None, accuracy: float | None = None, **rest: object) -> dict[str, object]:
        names = ("kl", "perplexity", "flips", "accuracy", "kl_vs_quamba")
        empty = {f"{name}{end}": None for name in names for end in ("", "_low", "_high")}
        sizes = {"data": "d", "task": "t", "documents": 9, "clusters": 3, "tokens": 50, "kl_vs_quamba_verdict": None}
        return empty | sizes | {"strategy": strategy, "kl": kl, "accuracy": accuracy} | rest

    rows = [row("b", 0.2, kl_low=0.1, kl_high=0.4, kl_vs_quamba_verdict="worse"), row("n", math.nan), row("a", 0.1)]
    rows += [row("float", 0.0), row("x", None, 0.4, data="e"), row("y", None, 0.5, data="e")]
    rows += [row("float", None, 0.3, data="e")]
    first, second = evaluated_texts(pa.Table.from_pylist(rows))
    assert (first.task, first.data, first.documents, first.clusters, first.tokens) == ("t", "d", 9, 3, 50)
    assert [s.strategy for s in first.strategies] == ["float", "a", "b", "n"]
    assert [s.strategy for s in second.strategies] == ["float", "y", "x"] and second.strategies[0].kl is None
    b = first.strategies[2]
    assert b.kl is not None and (b.kl.value, b.kl.low, b.kl.high, b.verdict) == (0.2, 0.1, 0.4, "worse")
    assert b.accuracy is None and b.kl_difference is None


def test_the_numbers_need_no_matplotlib() -> None:
    names = [
        f"quambase.analyzer.pictures.numbers.{name}"
        for name in ("channels", "error_curve", "evaluation", "histogram", "largest_tokens", "marks", "strategies")
    ]
    script = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    script += "assert not {'matplotlib', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
