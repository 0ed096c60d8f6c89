"""The scale table of a run: one row per scale group and strategy, each figure exact, one row selected."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fabricate import half, make_run, random_activations

from quambase.analyzer.analyze import analyze, scale_columns
from quambase.analyzer.scale_groups import group_of_values
from quambase.analyzer.strategies import DEFAULT_LABELS
from quambase.analyzer.summary import selection, summarize
from quambase.schema.errors import DatabaseInvalid, UnknownName
from quambase.schema.scale_table import UPSTREAM, read_scales
from quambase.schema.sites import find_site
from quambase.schema.tables import SCALES

SENSITIVE = ("effect", "effect_affine")
"""Strategies of runs with sensitivities."""


def test_one_row_per_site_and_strategy(fabricated_database: Path) -> None:
    found = analyze(fabricated_database, out=None)
    assert found.path is None and found.notes == ["run run-a"]
    assert found.table.schema.equals(SCALES)
    keys = [(r["layer"], r["site"], r["group_name"], r["label"]) for r in found.table.to_pylist()]
    labels = [label for label in DEFAULT_LABELS if label not in SENSITIVE]
    assert keys == [(la, site, "all", label) for la, site in random_activations() for label in labels]


def test_figures_are_those_of_the_stored_scale(fabricated_database: Path) -> None:
    for row in analyze(fabricated_database, strategies=["mse", "percentile:0.9"], out=None).table.to_pylist():
        groups = random_activations()[row["layer"], row["site"]]
        values = half(np.concatenate([d.ravel() for ds in groups.values() for d in ds]))
        quotient = np.rint(values / np.float32(row["scale"]))
        codes = np.clip(quotient, -128, 127)
        assert row["clipped_share"] == (quotient != codes).sum() / values.size
        assert row["codes_used"] == np.unique(codes).size
        assert row["codes_above_120"] == np.unique(codes[np.abs(codes) > 120]).size
        error = ((values.astype(np.float64) - codes.astype(np.float64) * row["scale"]) ** 2).mean()
        assert row["mse"] == pytest.approx(error, rel=1e-12)  # sums of 192 terms in another order
        share = np.unique(codes, return_counts=True)[1] / values.size
        assert row["entropy_bits"] == pytest.approx(-(share * np.log2(share)).sum(), rel=1e-12, abs=1e-15)
        assert row["amax"] == np.abs(values).max()
        site = find_site(row["site"])
        assert (row["consumed"], row["decode_only"]) == (site.consumed, site.decode_only)
        assert row["clip_safe"] == (site.saturates or row["scale"] * 127.5 > row["amax"])
        assert (row["qmin"], row["qmax"]) == (-128, 127)


@pytest.mark.parametrize("target", ["quambase", "upstream"])
def test_selected_is_the_least_error_that_the_target_can_use(fabricated_database: Path, target: str) -> None:
    found = analyze(fabricated_database, strategies=["all"], out=None, target=target)
    assert found.provenance["target"] == target
    rows = found.table.to_pylist()
    for key in random_activations():
        mine = [r for r in rows if (r["layer"], r["site"]) == key]
        chosen = [r for r in mine if r["selected"]]
        assert len(chosen) == 1
        usable = [
            r
            for r in mine
            if not r["needs_decode"] and (target == "quambase" or (r["clip_safe"] and not r["zero_point"]))
        ]
        assert chosen[0]["mse"] == min(r["mse"] for r in usable)
        if key[1] == "out_proj:input" and target == "upstream":
            # Upstream's kernel wraps there: only scales that clip nothing are eligible.
            assert chosen[0]["clipped_share"] == 0
            assert any(not r["clip_safe"] for r in mine)
        elif key != (0, "dt_proj:input"):
            best = {"mse", "mse_affine"} if find_site(key[1]).affine and target == "quambase" else {"mse"}
            assert chosen[0]["label"] in best


def test_an_unknown_target(fabricated_database: Path) -> None:
    with pytest.raises(UnknownName, match="unknown target 'upstraem'; did you mean upstream"):
        analyze(fabricated_database, out=None, target="upstraem")


@pytest.mark.parametrize(("largest", "safe"), [(127.4375, True), (127.5, False), (-127.4375, True), (-127.5, False)])
def test_half_a_code_beyond_127_is_not_safe_where_nothing_clamps(largest: float, safe: bool) -> None:
    group = group_of_values(np.array([largest, 1.0]))
    assert scale_columns(group, 1.0, saturates=False)["clip_safe"] is safe
    assert scale_columns(group, 1.0, saturates=True)["clip_safe"] is True


def test_groups_have_their_own_scales(fabricated_database: Path) -> None:
    rows = analyze(fabricated_database, strategies=["absmax"], granularity="group", out=None).table.to_pylist()
    groups = [(r["group_name"], r["consumed"]) for r in rows if (r["layer"], r["site"]) == (1, "x_proj:output")]
    assert groups == [("all", True), ("dt", False), ("B", False), ("C", False)]
    scales = {r["group_name"]: r["scale"] for r in rows if (r["layer"], r["site"]) == (1, "x_proj:output")}
    assert scales["all"] == max(scales["dt"], scales["B"], scales["C"])


def test_the_file_says_where_it_comes_from_and_is_the_same_twice(fabricated_database: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    analyze(fabricated_database, out=first)
    analyze(fabricated_database, run="run-a", out=second)
    assert first.read_bytes() == second.read_bytes()
    table = read_scales(first)
    assert table.run == "run-a"
    assert table.model.name == "fabricated"
    assert table.weights_sha256 is not None
    assert "elsewhere" not in str(table.provenance)  # the host
    assert set(table.scales_for("mse")) == set(random_activations())


def test_several_runs(tmp_path: Path) -> None:
    small = {(0, "in_proj:input"): random_activations()[0, "in_proj:input"]}
    make_run(tmp_path, "r2", small)
    make_run(tmp_path, "r1", small)
    found = analyze(tmp_path, run="all", strategies=["absmax"], out=None)
    assert found.table["run"].to_pylist() == ["r1", "r2"]
    assert set(found.provenance["runs"]) == {"r1", "r2"}


def test_nonfinite_values_are_reported(tmp_path: Path) -> None:
    values = np.array([1.0, np.nan, np.inf, 1e6, 2.0], np.float32)
    make_run(tmp_path, "r", {(0, "in_proj:input"): {"all": [values[None]] * 5}})
    found = analyze(tmp_path, strategies=["absmax"], out=None)
    assert found.table["scale"].to_pylist() == [np.float32(2 / 127)]
    assert found.notes == [
        "run r",
        "warning: layer 0 in_proj:input: 15 values are NaN or infinite (5 of them finite before rounding to 16 bits); "
        "no scale accounts for them",
    ]


def test_an_imported_tensor_may_have_any_site_name(tmp_path: Path) -> None:
    make_run(tmp_path, "r", {(0, "my tensor"): random_activations()[1, "x_proj:input"]}, family="tensor")
    rows = analyze(tmp_path, out=None).table.to_pylist()
    assert {r["site"] for r in rows} == {"my tensor"}
    assert not any(r["consumed"] for r in rows)


def test_unknown_names(fabricated_database: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="unknown strategy 'msee'"):
        analyze(fabricated_database, strategies=["msee"], out=None)
    with pytest.raises(UnknownName, match="unknown granularity 'site'"):
        analyze(fabricated_database, granularity="site", out=None)
    with pytest.raises(DatabaseInvalid, match="there is no database"):
        analyze(tmp_path, out=None)


def test_works_without_torch(fabricated_database: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from quambase.analyzer.analyze import analyze\n"
        f"print(analyze(Path({str(fabricated_database)!r}), out=None).table.num_rows, 'click' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(22 * (len(DEFAULT_LABELS) - len(SENSITIVE))), "False"]


def fabricated_scale(label: str, sqnr: float, site: str = "x_proj:input", layer: int = 0, **more: object) -> dict:
    row = dict.fromkeys(SCALES.names) | {"run": "r", "layer": layer, "site": site, "group_name": "all"}
    row |= {"strategy": label, "label": label, "granularity": "tensor", "consumed": True, "decode_only": False}
    row |= {"needs_decode": False, "clip_safe": True, "selected": False, "sqnr_db": sqnr, "clipped_share": 1e-4}
    return row | more


def test_the_summary_is_best_first_and_states_do_not_decide() -> None:
    state = {"site": "ssm_state_act:input", "decode_only": True, "clipped_share": 0.5}
    rows = [
        fabricated_scale("low", 20.0),
        fabricated_scale("low", 22.0, layer=1),
        fabricated_scale("decoded", 90.0, needs_decode=True),
        fabricated_scale("high", 30.0, clip_safe=False, selected=True),
        fabricated_scale("high", 28.0, layer=1, selected=True),
        fabricated_scale("high", 1.0, **state),
        fabricated_scale("empty", math.nan),
    ]
    found = summarize(pa.Table.from_pylist(rows, SCALES)).to_pylist()
    assert [row["strategy"] for row in found] == ["high", "low", "empty", "decoded"]
    high = found[0]
    assert (high["sqnr_db_median"], high["sqnr_db_least"], high["worst_layer"]) == (29.0, 28.0, 1)
    assert high["worst_site"] == "x_proj:input" and high["clipped_share_mean"] == pytest.approx(1e-4, rel=1e-12)
    assert (high["wraps_upstream"], high["selected"], high["scales"]) == (1, 2, 3)
    assert found[2]["sqnr_db_median"] is None


def test_the_selection_in_words() -> None:
    rows = [
        fabricated_scale("mse", 30.0, selected=True, clip_safe=False),
        fabricated_scale("quamba", 24.0),
        fabricated_scale("mse", 35.0, layer=1),
        fabricated_scale("quamba", 35.0, layer=1, selected=True),
    ]
    lines = selection(pa.Table.from_pylist(rows, SCALES))
    assert lines[0] == "selected takes mse at 1, quamba at 1 of 2 scales: the least squared error at each"
    # Gains are 6 and 0 dB; their median, 3 dB, is half of the 6.02 of one bit.
    assert lines[1] == (
        "against upstream's quamba: +3 dB at the median scale (+0.5 bits), +6 dB at most (layer 0 x_proj:input)"
    )
    assert lines[2].startswith("1 of the selected scales clip where upstream's kernel wraps")
    assert (
        "at out_proj:input among scales that clip nothing" in selection(pa.Table.from_pylist(rows, SCALES), UPSTREAM)[0]
    )
    (nothing,) = selection(pa.Table.from_pylist([fabricated_scale("d", 9.0, needs_decode=True)], SCALES))
    assert nothing.startswith("nothing is selected")
