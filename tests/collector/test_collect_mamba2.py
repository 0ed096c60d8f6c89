# mypy: disable-error-code="attr-defined"
"""Runs of a tiny Mamba-2: recounted, one document at a time, its groups, its scale table, what apply says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference_mamba2
import torch
from click.testing import CliRunner
from interrupting import interrupted
from stored_runs import bytes_of, stored_table
from tiny_model import TEXTS, write_texts, write_tiny_mamba2, write_tiny_model

from quambase.analyzer.analyze import analyze
from quambase.cli.main import quambase
from quambase.collector.collect import CollectedRun, collect
from quambase.model.checkpoint import load_model
from quambase.model.hadamard import hadamard
from quambase.model.prepare import prepare
from quambase.schema.errors import UnknownName
from quambase.schema.sites import MAMBA2, MAMBA2_SITES, layer_sites
from quambase.schema.sql.database import StatsDB
from quambase.schema.values.distribution import Distribution

Rows = list[dict[str, object]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_mamba2(tmp_path_factory.mktemp("model") / "tiny2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts.jsonl")


def run_tiny(model: Path, data: Path, db: Path, **options: object) -> CollectedRun:
    settings = {"samples": 9, "seq_len": 32, "batch_size": 4, "groups": "none", "progress": False} | options
    return collect(str(model), data=str(data), db=db, **settings)


@pytest.fixture(scope="module")
def kept(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> CollectedRun:
    """A run of which every token's activations are kept."""
    return run_tiny(model, data, tmp_path_factory.mktemp("kept"), keep_tokens="all")


def table(run: CollectedRun, name: str) -> Rows:
    return stored_table(run.folder, name).to_pylist()


def test_the_manifest_names_family_and_sizes(kept: CollectedRun) -> None:
    model = kept.manifest.model
    assert model.family == "mamba2"
    assert [model.sizes[name] for name in ("d_inner", "d_state", "headdim", "ngroups")] == [32, 4, 8, 2]
    assert "dt_rank" not in model.sizes
    assert kept.manifest.sites == [(layer, site.name) for layer, site in layer_sites(2, MAMBA2)]


def test_recounting_the_kept_activations_gives_the_counts(kept: CollectedRun) -> None:
    tally: dict[tuple, list] = {}
    for row in table(kept, "activations"):
        tally.setdefault((row["layer"], row["site"], row["group_name"]), []).append(row["values"])
    stored: dict[tuple, list] = {}
    for row in table(kept, "counts"):
        stored.setdefault((row["layer"], row["site"], row["group_name"]), []).append((row["value"], row["count"]))
    assert tally.keys() == stored.keys()
    assert len({(layer, site) for layer, site, _ in stored}) == 2 * 24 + 2
    for key, values in tally.items():
        found = Distribution.of_values(np.concatenate([np.array(v, np.float32) for v in values]))
        assert list(zip(found.values.tolist(), found.counts.tolist(), strict=True)) == stored[key], key


def slices(site: str) -> dict[str, slice]:
    """The channels of each group, written out for d_inner 32, d_state 4, two SSD groups and four heads."""
    if site == "in_proj:output":
        return {"z": slice(0, 32), "x": slice(32, 64), "B": slice(64, 72), "C": slice(72, 80), "dt": slice(80, 84)}
    if site.startswith("x_conv_out"):
        return {"g0": slice(0, 16), "g1": slice(16, 32)}
    if site.startswith(("B_conv_out", "C_conv_out")):
        return {"g0": slice(0, 4), "g1": slice(4, 8)}
    return {"all": slice(None)}


def test_values_are_the_prepared_models_one_document_at_a_time(kept: CollectedRun, model: Path) -> None:
    """Documents that share a forward pass and documents alone, in float64: neighbours leave no trace."""
    loaded = load_model(str(model))
    weights = prepare(loaded.any_weights)
    matrix = hadamard(torch.eye(32)).numpy().astype(np.float64).T
    found: dict[tuple, dict] = {}
    for row in table(kept, "activations"):
        key = (row["document"], f"{row['layer']}/{row['site']}", row["group_name"])
        found.setdefault(key, {})[row["position"]] = row["values"]
    expected_keys = set()
    for index, text in enumerate(TEXTS):
        tokens = loaded.tokenizer.encode(text)[:32]
        if not tokens:
            continue
        for name, true in reference_mamba2.forward(weights, tokens, matrix).items():
            for group, span in slices(name.split("/")[1]).items():
                expected_keys.add((index, name, group))
                places = found[index, name, group]
                if "ssm_state" in name:
                    assert list(places) == [len(tokens) - 1], "one state, of the document's own last token"
                    ours, wanted = np.array(places[len(tokens) - 1]), true.reshape(-1)
                else:
                    assert sorted(places) == list(range(len(tokens)))
                    ours, wanted = np.array([places[i] for i in range(len(tokens))]), true[:, span]
                # Two small float32 layers: some hundred ulps of the site's range.
                assert np.abs(ours - wanted).max() <= 300 * 2.0**-24 * max(1, np.abs(wanted).max())
    assert set(found) == expected_keys


def test_groups_name_their_channels_and_ssd_group(kept: CollectedRun) -> None:
    groups = {(r["site"], r["group_name"]): r for r in table(kept, "groups") if r["layer"] in (1, -1)}
    widths = {"in_proj:output": 84, "x_conv_out:input": 32, "B_conv_out:output": 8, "dt_act:input": 4}
    for site, width in widths.items():
        for name, span in slices(site).items():
            assert groups[site, name]["channels"] == list(range(width))[span]
    ssd_groups = {key: row["ssd_group"] for key, row in groups.items() if row["ssd_group"] is not None}
    ends = [f"{part}_conv_out:{end}" for part in "xBC" for end in ("input", "output")]
    assert ssd_groups == {(site, f"g{g}"): g for site in ends for g in (0, 1)}


def test_a_model_of_one_ssd_group_is_not_divided(data: Path, tmp_path: Path) -> None:
    run = run_tiny(write_tiny_mamba2(tmp_path / "one", ngroups=1), data, tmp_path)
    groups = {(r["site"], r["group_name"]): r["ssd_group"] for r in table(run, "groups")}
    assert groups["B_conv_out:input", "all"] == 0 and groups["x_conv_out:input", "all"] == 0
    assert groups["B_conv_in:input", "all"] is None
    assert not any(name.startswith("g") for _, name in groups)


@pytest.mark.parametrize("groups", ["none", "fixed"])
def test_an_interrupted_run_resumes_to_the_same_bytes(model: Path, data: Path, tmp_path: Path, groups: str) -> None:
    whole = run_tiny(model, data, tmp_path / "whole", groups=groups)
    with interrupted():
        run_tiny(model, data, tmp_path / "cut", groups=groups)
    resumed = run_tiny(model, data, tmp_path / "cut", groups=groups)
    assert bytes_of(resumed.folder) == bytes_of(whole.folder)


def test_sites_of_another_family_are_refused(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="unknown site 'x_proj:input'; did you mean"):
        run_tiny(model, data, tmp_path, sites=["x_proj:input"])
    with pytest.raises(UnknownName, match="unknown site 'dt_act:input'"):
        run_tiny(write_tiny_model(tmp_path / "m1"), data, tmp_path, sites=["dt_act:input"])
    run = run_tiny(model, data, tmp_path, sites=["dt_act:input"])
    assert run.manifest.sites == [(0, "dt_act:input"), (1, "dt_act:input")]


# ---------------------------------------------------------------- what the later stages make of it


def test_the_scale_table_knows_the_sites(kept: CollectedRun) -> None:
    rows = analyze(kept.folder.parent.parent, granularity="group", out=None).table.to_pylist()
    assert {(r["layer"], r["site"]) for r in rows} == {(la, s.name) for la, s in layer_sites(2, MAMBA2)}
    assert {r["site"] for r in rows if r["consumed"]} == {s.name for s in MAMBA2_SITES if s.consumed}
    # Mamba-1's INT8 model reads in_proj:output, Mamba-2's the five parts of it.
    assert not any(r["consumed"] for r in rows if r["site"] == "in_proj:output")
    assert {r["site"] for r in rows if r["decode_only"]} == {"ssm_state_act:input"}
    quamba = {(r["layer"], r["site"], r["group_name"]): r for r in rows if r["label"] == "quamba"}
    assert ("B_conv_out:input", "g1") in {key[1:] for key in quamba}
    for site in ("ssm_state_act:input", "x_conv_out:input", "out_proj:input"):
        row = quamba[1, site, "all"]
        assert row["scale"] == pytest.approx(row["amax"] / 127, rel=2.0**-11)  # at most float16's rounding
        is_float16 = np.float32(np.float16(row["scale"])) == np.float32(row["scale"])
        assert is_float16 == (site == "out_proj:input")


def test_rows_come_in_model_order(kept: CollectedRun) -> None:
    with StatsDB(kept.folder.parent.parent) as db:
        found = [(layer, site) for layer, site, _, _ in db.distributions(kept.manifest.run)]
    assert found == [(layer, site.name) for layer, site in layer_sites(2, MAMBA2)]


def test_the_commands_take_the_run_from_collect_to_evaluate(model: Path, data: Path, tmp_path: Path) -> None:
    db = str(tmp_path / "db")
    run = lambda *arguments: CliRunner().invoke(quambase, list(arguments))  # noqa: E731
    collected = run("collect", "--model", str(model), "--data", str(data), "--samples", "9", "--db", db)
    assert collected.exit_code == 0, collected.output
    assert "in_proj:output" not in collected.stdout, "no INT8 Mamba-2 reads it"
    scales = str(tmp_path / "scales.parquet")
    assert run("analyze", "--db", db, "--out", scales).exit_code == 0
    assert run("apply", "--scales", scales, "--strategy", "mse", "--db", db).exit_code == 0
    evaluated = run("evaluate", "--data", str(data), "--task", "perplexity", "--samples", "4", "--db", db)
    assert evaluated.exit_code == 0, evaluated.output
