"""Scales by their effect on the output: the predicted KL, its least scale, and what is selected."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from fabricate import TOKENS, make_run
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.analyzer import kernels, least_squares
from quambase.analyzer.analyze import analyze
from quambase.analyzer.quantization_error import figures, predicted_kl
from quambase.analyzer.scale_groups import ScaleGroup, group_of_values, one_document, scale_groups
from quambase.analyzer.strategies import parse_label
from quambase.analyzer.summary import predicted_decoding_loss, predicted_loss, selection, summarize
from quambase.cli.main import quambase
from quambase.schema.errors import DatabaseInvalid, ScalesInvalid, UnknownName
from quambase.schema.scale_table import METADATA_KEY, read_scales, write_scales
from quambase.schema.sql.database import StatsDB
from quambase.schema.values.distribution import Distribution, Sensitivity
from quambase.schema.values.number_format import Affine

RUN = "run-s"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sensitive")
    make_run(folder, RUN, sensitive=True)
    return folder


def by_definition(values: np.ndarray, squares: np.ndarray, scale: float, tokens: int) -> float:
    """Half of the sum of g^2 e^2 over the tokens, value by value."""
    total = 0.0
    for value, square in zip(values.tolist(), squares.tolist(), strict=True):
        code = min(max(float(np.rint(np.float32(value) / np.float32(scale))), -128.0), 127.0)
        total += square * (value - code * float(np.float32(scale))) ** 2
    return total / 2 / tokens


def made(seed: int, size: int = 40) -> Sensitivity:
    random = np.random.default_rng(seed)
    values = np.unique(random.standard_t(3, size).astype(np.float16).astype(np.float32))
    return Sensitivity(values, random.random(values.size) ** 4 * 10.0 ** random.integers(-8, 3), 7)


def group_with(sensitivity: Sensitivity, counts: np.ndarray | None = None) -> ScaleGroup:
    once = np.ones(sensitivity.values.size, np.int64)
    distribution = Distribution(sensitivity.values, once if counts is None else counts)
    return ScaleGroup(0, "x_proj:input", "all", distribution, one_document(distribution), sensitivity=sensitivity)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-4, 1.0))
def test_the_predicted_kl_is_its_definition(seed: int, scale: float) -> None:
    found = made(seed)
    wanted = by_definition(found.values, found.gradient_sq, scale, found.tokens)
    assert predicted_kl(found, scale) == pytest.approx(wanted, rel=1e-12)  # 40 terms in the same order


def test_two_segments_are_predicted_too() -> None:
    found = made(1)
    inner, outer = 0.01, 0.5
    edge, total = 120 * inner, 0.0
    for value, square in zip(found.values.tolist(), found.gradient_sq.tolist(), strict=True):
        a = abs(value)
        rebuilt = min(round(a / inner), 120) * inner if a <= edge else edge + min(round((a - edge) / outer), 7) * outer
        total += square * (a - rebuilt) ** 2
    assert predicted_kl(found, (inner, outer)) == pytest.approx(total / 2 / found.tokens, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_effect_is_the_least_of_all_scales(seed: int) -> None:
    found = made(seed)
    scale = parse_label("effect").scale(group_with(found))
    assert isinstance(scale, float)
    least = min(predicted_kl(found, s) for s in np.geomspace(1e-4, 2 * np.abs(found.values).max(), 20_000))
    # The stored scale is a float32, 2^-24 off; weights are rounded by 2^-51 of their sum.
    assert predicted_kl(found, scale) <= least * (1 + 1e-6)
    plain = parse_label("mse").scale(group_with(found))
    assert isinstance(plain, float) and predicted_kl(found, plain) >= predicted_kl(found, scale)


def test_with_equal_gradients_effect_is_mse() -> None:
    random = np.random.default_rng(0)
    group = group_of_values(random.standard_t(4, 5000).astype(np.float32))
    distribution = group.distribution
    sensitivity = Sensitivity(distribution.values, distribution.counts / 8.0, 3)
    mine = group_with(sensitivity, distribution.counts)
    assert parse_label("effect").scale(mine) == pytest.approx(parse_label("mse").scale(group), rel=1e-6)
    assert parse_label("effect").scale(group) == parse_label("mse").scale(group), "a site without sensitivities"
    silent = Sensitivity(distribution.values, np.zeros(distribution.values.size), 3)
    assert parse_label("effect").scale(group_with(silent)) == pytest.approx(1e-6), "no effect: the floor"


def test_groups_add_up_to_their_site(database: Path) -> None:
    with StatsDB(database) as opened:
        whole, groups = opened.sensitivities(RUN), opened.sensitivities(RUN, "group")
        listed = scale_groups(opened, RUN, "group")
    assert set(whole) < set(groups) and all(found.tokens == sum(TOKENS) for found in groups.values())
    key = 0, "x_proj:output"
    parts = [found for (*place, name), found in groups.items() if tuple(place) == key and name != "all"]
    assert len(parts) == 3
    summed: dict[float, float] = {}
    for part in parts:
        for value, square in zip(part.values.tolist(), part.gradient_sq.tolist(), strict=True):
            summed[value] = summed.get(value, 0.0) + square
    assert sorted(summed) == whole[*key, "all"].values.tolist()
    assert [summed[v] for v in sorted(summed)] == pytest.approx(whole[*key, "all"].gradient_sq.tolist(), rel=1e-15)
    assert all(group.sensitivity is not None for group in listed)


def test_selected_has_the_least_predicted_kl(database: Path) -> None:
    found = analyze(database, out=None)
    assert found.provenance["select"] == "effect"
    rows = found.table.to_pylist()
    for key in {(r["layer"], r["site"]) for r in rows}:
        mine = [r for r in rows if (r["layer"], r["site"]) == key and not r["needs_decode"]]
        (chosen,) = [r for r in mine if r["selected"]]
        assert chosen["predicted_kl"] == min(r["predicted_kl"] for r in mine)
    by_mse = analyze(database, out=None, select="mse")
    assert by_mse.provenance["select"] == "mse"
    for row in by_mse.table.to_pylist():
        mine = [r for r in by_mse.table.to_pylist() if (r["layer"], r["site"]) == (row["layer"], row["site"])]
        if row["selected"]:
            assert row["mse"] == min(r["mse"] for r in mine if not r["needs_decode"])
    with pytest.raises(UnknownName, match="selection 'kl'"):
        analyze(database, out=None, select="kl")


def test_the_summary_adds_the_layers_up(database: Path) -> None:
    table = analyze(database, out=None).table
    rows = [r for r in table.to_pylist() if r["consumed"] and not r["decode_only"] and r["layer"] >= 0]
    found = summarize(table).to_pylist()
    for summary in found:
        mine = [r["predicted_kl"] for r in rows if r["label"] == summary["strategy"]]
        assert summary["predicted_kl"] == pytest.approx(sum(mine), rel=1e-12)
    plain = [row["predicted_kl"] for row in found if not row["needs_decode"]]
    assert found[0]["strategy"] == "effect_affine" and plain == sorted(plain)
    lines = selection(table)
    loss = sum(r["predicted_kl"] for r in rows if r["selected"])
    assert lines[1].startswith(f"predicted loss of the activations: {loss:.2g} nats a token; ")
    other = predicted_loss(r for r in table.to_pylist() if r["label"] == "quamba")
    assert other and f"{100 * (loss / other - 1):+.0f} % against upstream's quamba, {other:.2g}" in lines[1]
    (head,) = [r["predicted_kl"] for r in table.to_pylist() if r["selected"] and r["layer"] == -1 and r["consumed"]]
    assert head > 0 and lines[1].endswith(f"; a quantized head would add {head:.2g}")
    shares = {}
    for r in rows:
        if r["selected"]:
            shares[r["site"]] = shares.get(r["site"], 0.0) + r["predicted_kl"] / loss
    worst = max(shares, key=lambda site: shares[site])
    assert lines[2].startswith(f"most of it at {worst} {100 * shares[worst]:.0f} %")


def test_what_decoding_adds_is_a_sentence_of_its_own(database: Path) -> None:
    table = analyze(database, out=None).table
    state = [r for r in table.to_pylist() if r["decode_only"] and r["consumed"]]
    loss = sum(r["predicted_kl"] for r in state if r["selected"])
    other = sum(r["predicted_kl"] for r in state if r["label"] == "quamba")
    assert 0 < loss < other and {r["site"] for r in state} == {"ssm_state_act:input"}
    (line,) = [line for line in selection(table) if line.startswith("decoding")]
    assert line.startswith(f"decoding is predicted to lose {loss:.2g} nats a token more, at the state; ")
    assert line.endswith(f"{100 * (loss / other - 1):+.0f} % against upstream's quamba, {other:.2g}")
    rows = [r | ({"predicted_kl": None} if r["decode_only"] else {}) for r in table.to_pylist()]
    whole = predicted_decoding_loss(table.to_pylist())
    assert whole == math.fsum(r["predicted_kl"] for r in state), "and nothing of other sites"
    assert predicted_decoding_loss([*table.to_pylist(), *rows]) is None, "a part is not the sum"
    assert predicted_decoding_loss(r for r in table.to_pylist() if r["site"] == "x_proj:input") is None
    unknown = pa.Table.from_pylist(rows)
    (line,) = [line for line in selection(unknown) if "decoding" in line]
    assert line == "the state's scales have the least squared error; collect --state-every chooses them for decoding"
    assert not any(
        "decoding" in line for line in selection(analyze(database, out=None, select="mse").table.slice(0, 0))
    )


def test_a_run_without_sensitivities(fabricated_database: Path, tmp_path: Path) -> None:
    for options in ({"strategies": ["effect"]}, {"select": "effect"}):
        with pytest.raises(DatabaseInvalid, match="run run-a has no sensitivities"):
            analyze(fabricated_database, out=None, **options)
    table = analyze(fabricated_database, strategies=["all"], out=None).table
    assert "effect" not in table["label"].to_pylist() and table["predicted_kl"].null_count == table.num_rows
    assert "predicted_kl" in table.schema.names and not any("predicted" in line for line in selection(table))
    out = ["--out", str(tmp_path / "scales.parquet")]
    done = CliRunner().invoke(quambase, ["analyze", "--db", str(fabricated_database), "--select", "effect", *out])
    assert (
        done.exit_code == 1 and "collect it again with --sensitivity" in done.stderr and "Traceback" not in done.output
    )


def test_a_scale_table_of_an_earlier_version_is_read(fabricated_database: Path, tmp_path: Path) -> None:
    path = tmp_path / "scales.parquet"
    made_table = analyze(fabricated_database, strategies=["mse"], out=path).table
    stored = pq.read_table(path)
    earlier = stored.drop_columns(["predicted_kl", "zero_point"])
    about = json.loads(stored.schema.metadata[METADATA_KEY]) | {"format_version": 1}
    pq.write_table(earlier.replace_schema_metadata({METADATA_KEY: json.dumps(about)}), path)
    assert str(read_scales(path).table.to_pylist()) == str(made_table.to_pylist())  # as text, NaN equals NaN


def after_silu(seed: int, size: int = 3000) -> Distribution:
    random = np.random.default_rng(seed)
    values = random.standard_t(3, size) * 2
    return Distribution.of_values(values / (1 + np.exp(-values)))


def affine_error(distribution: Distribution, scale: float, zero_point: int) -> float:
    values = distribution.values.astype(np.float64)
    codes = np.clip(np.rint(distribution.values / np.float32(scale)) + zero_point, -128, 127).astype(np.float64)
    return float(((values - (codes - zero_point) * float(np.float32(scale))) ** 2 * distribution.counts).sum())


@pytest.mark.parametrize("zero_point", [-128, -110, -40, 0, 77, 127])
def test_the_scale_is_the_best_of_its_zero_point(zero_point: int) -> None:
    distribution = after_silu(0)
    scale, error = kernels.least_squares(*least_squares._sides(distribution), 127 - zero_point, math.inf)
    assert error == pytest.approx(
        affine_error(distribution, scale, zero_point), rel=1e-6
    )  # the scale is a float32 there
    top = float(np.abs(distribution.values).max())
    least = min(affine_error(distribution, s, zero_point) for s in np.geomspace(top / 600, 2 * top, 4000))
    assert error <= least * (1 + 1e-9)


def best_of_every_zero_point(distribution: Distribution) -> tuple[float, int, float]:
    """Least error, the zero point that has it (the nearest to 0 of several) and its scale: each searched by itself."""
    sides = least_squares._sides(distribution)
    found = []
    for zero_point in range(-128, 128):
        scale, error = kernels.least_squares(*sides, 127 - zero_point, math.inf)
        found.append((error, abs(zero_point), zero_point, scale))
    error, _, zero_point, scale = min(found)
    return error, zero_point, scale


@pytest.mark.parametrize("seed", range(3))
def test_the_zero_point_is_the_best_of_all(seed: int) -> None:
    distribution = after_silu(seed)
    found = least_squares.optimal_affine(distribution)
    error, zero_point, scale = best_of_every_zero_point(distribution)
    assert found == Affine(scale, zero_point) and zero_point < -90
    symmetric = kernels.least_squares(*least_squares._sides(distribution), 127, math.inf)[1]
    assert error < 0.5 * symmetric, "half of the codes were unused"
    mirrored = Distribution(-distribution.values[::-1].copy(), distribution.counts[::-1].copy())
    # There are 127 codes above 0 and 128 below it, so the mirrored zero point is the complement or beside it.
    assert abs(least_squares.optimal_affine(mirrored).zero_point - (-1 - found.zero_point)) <= 1


SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda random, n: random.normal(size=n),
    "heavy tails": lambda random, n: random.standard_t(2, n),
    "few values": lambda random, n: random.integers(-5, 6, n) * random.random(),
    "a fine lattice": lambda random, n: random.integers(0, 300, n) * 0.01,
    "two hills": lambda random, n: np.concatenate([random.normal(size=n), random.normal(5, 0.1, n)]),
    "uniform": lambda random, n: random.uniform(-0.3, 5, n),
    "three values": lambda random, n: random.random(3) * 10 - 5,
    "unlike sides": lambda random, n: np.concatenate([-random.lognormal(0, 1, n), random.lognormal(-2, 1, n)]),
    "two outliers": lambda random, n: np.append(random.normal(0, 0.01, n), [-40, 30]),
    "nothing": lambda random, n: np.zeros(n),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_zero_point_is_missed_whatever_the_shape(shape: str) -> None:
    random = np.random.default_rng(5)
    for size in (1, 40, 3000):
        distribution = Distribution.of_values(SHAPES[shape](random, size).astype(np.float32))
        found = least_squares.optimal_affine(distribution)
        error, _, _ = best_of_every_zero_point(distribution)
        sides = least_squares._sides(distribution)
        scale, mine = kernels.least_squares(*sides, 127 - found.zero_point, math.inf)
        signal = float((distribution.values.astype(np.float64) ** 2 * distribution.counts).sum())
        assert scale == found.scale and mine <= error + 2 * kernels.TIE * signal


def test_errors_of_every_zero_point_on_a_grid_against_their_definition() -> None:
    distribution = after_silu(2, 500)
    values, counts = distribution.values.astype(np.float64), distribution.counts
    top, ratio, steps = 1.3 * float(np.abs(values).max()) / 100, 0.9, 12
    errors, best = kernels.errors_by_highest(*least_squares._sides(distribution), top, ratio, steps)
    signal = float((values**2 * counts).sum())
    expected = {}
    for highest in range(256):
        for scale in (top * ratio**step for step in range(steps)):
            codes = np.clip(np.rint(values / scale), highest - 255, highest)
            if codes.any():
                # The parabola of these codes at its minimum.
                error = signal - float((codes * values * counts).sum()) ** 2 / float((codes**2 * counts).sum())
                expected[highest, scale] = error
    of_highest = [min([e for (h, _), e in expected.items() if h == highest], default=signal) for highest in range(256)]
    # Errors are differences of sums of about the size of the signal, of 500 terms each.
    np.testing.assert_allclose(errors, of_highest, rtol=0, atol=500 * 2.0**-52 * signal)
    assert best == pytest.approx(min(expected, key=expected.__getitem__)[1], rel=1e-12)


@pytest.mark.parametrize("share", [0.5, 1 - 1e-9, 1 + 1e-9, 2.0])
def test_a_search_with_a_limit_finds_the_same_or_nothing(share: float) -> None:
    sides = least_squares._sides(after_silu(1))
    scale, error = kernels.least_squares(*sides, 200, math.inf)
    expected = (scale, error) if share > 1 else (0.0, math.inf)
    assert kernels.least_squares(*sides, 200, share * error) == expected


def test_figures_of_a_scale_with_a_zero_point() -> None:
    distribution, scale = after_silu(4), Affine(0.02, -100)
    found = figures(distribution, scale)
    rounded = np.rint(distribution.values / np.float32(0.02)) - 100
    codes = np.clip(rounded, -128, 127)
    assert found.squared_error == pytest.approx(affine_error(distribution, 0.02, -100), rel=1e-12)
    assert found.clipped == distribution.counts[codes != rounded].sum()
    assert found.codes_used == np.unique(codes).size
    assert found.codes_above_120 == np.unique(codes[np.abs(codes) > 120]).size
    sensitivity = Sensitivity(distribution.values, distribution.counts * 0.25, 5)
    assert predicted_kl(sensitivity, scale) == pytest.approx(found.squared_error * 0.25 / 2 / 5, rel=1e-12)


def test_zero_points_of_a_table_are_checked(fabricated_database: Path, tmp_path: Path) -> None:
    path = tmp_path / "scales.parquet"
    analyze(fabricated_database, strategies=["mse"], out=path)
    stored = pq.read_table(path)
    for site, zero_point, message in (
        ("out_proj:input", 5, "zero point 5 at layer 0 out_proj:input .mse., expected 0"),
        ("x_proj:input", 200, "zero point 200 at layer 0 x_proj:input .mse., expected -128 to 127"),
    ):
        changed = [zero_point if (row["layer"], row["site"]) == (0, site) else 0 for row in stored.to_pylist()]
        column = stored.schema.get_field_index("zero_point")
        edited = stored.set_column(column, stored.schema.field(column), pa.array(changed, pa.int16()))
        write_scales(path, edited, json.loads(stored.schema.metadata[METADATA_KEY]))
        with pytest.raises(ScalesInvalid, match=message):
            read_scales(path)
