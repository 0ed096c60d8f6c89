"""Weights of 4 bits by GPTQ: against the exact solution of each of its steps, and the models built of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from stored_runs import stored_table
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.analyzer.analyze import analyze
from quambase.apply.apply import apply
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.int8.arithmetic import SplitInt8Weight, compensated_codes, quantize_weight_4bit, weight_values
from quambase.apply.int8.build import build_model, leaving_in_16_bit, prepared_for
from quambase.apply.int8.model_folder import load_stored
from quambase.apply.int8.weights import quantize
from quambase.apply.second_moments import second_moments_of
from quambase.cli.main import load_command
from quambase.collector.collect import collect
from quambase.collector.documents import read_document_set
from quambase.collector.layouts import site_layouts
from quambase.collector.second_moments import moment_widths, part_moments
from quambase.model.checkpoint import load_model
from quambase.model.language_model import floating_model
from quambase.model.prepare import prepare
from quambase.schema.errors import DatabaseInvalid, ScalesInvalid
from quambase.schema.scale_table import read_scales
from quambase.schema.sites import MAMBA1, PRODUCT_SITES
from quambase.schema.stored.manifest import Manifest

float32 = np.float32


def exact_steps(weight: np.ndarray, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (out, in) and scales (out, groups): before each column is rounded, the columns that are left are those that
    minimize tr((W - Q) H (W - Q)^T), H damped, with the columns before as they were rounded: a linear system.
    """
    out, width = weight.shape
    mean = np.trace(moments) / width
    h = moments + (0.01 * mean or 1.0) * np.eye(width)
    wide = weight.astype(np.float64)
    rounded, codes, scales = np.zeros((out, width)), np.zeros((out, width)), []
    for i in range(width):
        error = wide[:, :i] - rounded[:, :i]
        left = wide[:, i:] + np.linalg.solve(h[i:, i:], h[i:, :i] @ error.T).T
        if i % 128 == 0:
            amax = np.abs(left[:, :128].astype(float32)).max(1)
            scales.append(float32(2) * np.maximum(amax, float32(1e-5)) / float32(15))
        codes[:, i] = np.clip(np.rint(left[:, 0].astype(float32) / scales[-1]), -8, 7)
        rounded[:, i] = codes[:, i].astype(float32) * scales[-1]
    return codes, np.stack(scales, 1)


def correlated(seed: int, width: int, tokens: int) -> np.ndarray:
    """Second moments of inputs that a few common causes drive; of every fifth channel, none."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, width)) + 2 * random.standard_normal((tokens, 3)) @ random.standard_normal(
        (3, width)
    )
    x *= np.exp(random.standard_normal(width))
    x[:, 2::5] = 0
    return x.T @ x


@pytest.mark.parametrize("width", [1, 2, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("tokens", [3, 1000])
def test_each_column_is_the_exact_solution(width: int, tokens: int) -> None:
    random = np.random.default_rng(width)
    weight = (random.standard_t(4, (6, width)) * random.uniform(0.01, 1, (6, 1))).astype(float32)
    moments = correlated(width, width, tokens)
    wanted, steps = exact_steps(weight, moments)
    codes, scales = compensated_codes(torch.from_numpy(weight), torch.from_numpy(moments))
    assert codes.shape == (6, -(-width // 128), 128) and not codes.view(6, -1)[:, width:].any()
    # Both solve in float64, and round its values, some 1e-13 apart, to float32: a scale may be the next float32, and a
    # code the next at a tie.
    assert (scales[..., 0].numpy() == pytest.approx(steps, rel=2.0**-22)) and width > 0
    assert np.mean(codes.view(6, -1)[:, :width].numpy() != wanted) <= 1e-3
    nearest = quantize_weight_4bit(torch.from_numpy(weight))
    found = quantize_weight_4bit(torch.from_numpy(weight), torch.from_numpy(moments))
    if width > 5:
        assert not torch.equal(found.codes, nearest.codes)


def test_inputs_that_do_not_go_together_are_rounded_to_nearest() -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 300, generator=random)
    for moments in (torch.eye(300), 7.5 * torch.eye(300), torch.zeros(300, 300)):
        found, wanted = quantize_weight_4bit(weight, moments), quantize_weight_4bit(weight)
        assert torch.equal(found.codes, wanted.codes) and found.scales == wanted.scales


def test_weights_of_an_input_that_was_always_0_are_rounded_to_nearest() -> None:
    random = torch.Generator().manual_seed(1)
    weight, x = torch.randn(20, 128, generator=random), torch.randn(500, 128, generator=random).cumsum(1)
    x[:, ::3] = 0
    codes, scales = compensated_codes(weight, x.T @ x)
    step = 2 * weight.abs().amax(1, keepdim=True) / 15
    nearest = torch.round(weight / step).clamp(-8, 7)
    assert torch.equal(scales[:, 0], step)
    assert torch.equal(codes[:, 0, ::3], nearest[:, ::3]) and not torch.equal(codes[:, 0], nearest)


@pytest.mark.parametrize("name", ["mamba-5m", "mamba2-8m"])
def test_products_of_a_real_model_lose_less_than_by_rounding_to_nearest(name: str) -> None:
    """tr((W - Q) H (W - Q)^T), the squared error of the product over the texts, of every matrix that has 4 bits."""
    loaded = load_model(name)
    prepared = prepare(loaded.any_weights)
    texts = read_document_set("sample:calibration", loaded.tokenizer, 6, 256)
    layouts = site_layouts(prepared.config, PRODUCT_SITES)
    widths = {key: width for key, width in moment_widths(layouts).items() if key[0] in (0, prepared.config.n_layer - 1)}
    sums = part_moments(floating_model(prepared, rotated=True), texts.documents, widths, 6)
    assert len(sums) == (6 if name == "mamba-5m" else 4)
    for (layer, site), triangle in sums.items():
        moments = torch.zeros(2 * (widths[layer, site],), dtype=torch.float64)
        moments[np.tri(len(moments), dtype=bool)] = torch.from_numpy(triangle)
        moments = moments.tril() + moments.tril(-1).T
        weight = getattr(prepared.layers[layer], site.removesuffix(":input"))

        def lost(found: SplitInt8Weight, weight: torch.Tensor = weight, moments: torch.Tensor = moments) -> float:
            error = (weight_values(found) - weight).double()
            return float(((error @ moments) * error).sum())

        assert lost(quantize_weight_4bit(weight, moments)) < 0.9 * lost(quantize_weight_4bit(weight)), (layer, site)


@pytest.fixture(scope="module", params=[write_tiny_model, write_tiny_mamba2])
def world(request: Any, tmp_path_factory: Any) -> Path:
    """A tiny model, texts, a run with second moments and its scale table."""
    folder = tmp_path_factory.mktemp("world")
    model, data = request.param(folder / "tiny"), write_texts(folder / "texts.jsonl")
    options: dict[str, Any] = {"samples": 9, "seq_len": 32, "progress": False}
    collect(str(model), data=str(data), db=folder / "db", second_moments=9, **options)
    analyze(folder / "db", out=folder / "scales.parquet")
    return folder


def matrices(world: Path) -> dict[tuple[int, str], torch.Tensor]:
    """The second moments of the run, its rows mirrored."""
    found: dict[tuple[int, str], list[list[float]]] = {}
    for row in stored_table(next((world / "db" / "runs").iterdir()), "second_moments").to_pylist():
        found.setdefault((row["layer"], row["site"]), []).append(row["values"])
    return {
        key: torch.tensor([[rows[max(i, j)][min(i, j)] for j in range(len(rows))] for i in range(len(rows))])
        for key, rows in found.items()
    }


def test_a_model_has_the_codes_of_its_run(world: Path, tmp_path: Path) -> None:
    table = read_scales(world / "scales.parquet")
    prepared = prepared_for(load_model(str(world / "tiny")).any_weights, table)
    applied = apply(world / "scales.parquet", strategy="mse", db=world / "db", weight_bits=4, gptq=True)
    stored, moments = load_stored(applied.folder), matrices(world)
    assert stored.about["gptq"] is True and stored.model.weights.gptq
    read = second_moments_of(world / "db", table)
    assert len(moments) == (6 if stored.model.config.kind == MAMBA1 else 4)
    for (layer, site), matrix in moments.items():
        name = site.removesuffix(":input")
        assert torch.equal(read(layer)[site], matrix)
        found, weight = getattr(stored.model.weights.layers[layer], name), getattr(prepared.layers[layer], name)
        wanted = quantize_weight_4bit(weight, matrix)
        assert torch.equal(found.codes, wanted.codes) and found.scales == wanted.scales
        assert not torch.equal(found.codes, quantize_weight_4bit(weight).codes)
    nearest = apply(world / "scales.parquet", strategy="mse", db=world / "db", weight_bits=4, out=tmp_path / "nearest")
    about = json.loads((nearest.folder / "config.json").read_text())
    assert "gptq" not in about and not load_stored(nearest.folder).model.weights.gptq


def test_built_and_stored_it_is_evaluated_alike(world: Path) -> None:
    options: dict[str, Any] = {"data": str(world / "texts.jsonl"), "samples": 9, "task": "perplexity"}
    options |= {"db": world / "db"}
    of_scales: dict[str, Any] = {"scales": world / "scales.parquet", "strategies": ["mse"], "weight_bits": 4}
    built = evaluate(gptq=True, **of_scales, **options)
    nearest = evaluate(**of_scales, **options)
    applied = apply(world / "scales.parquet", strategy="mse", db=world / "db", weight_bits=4, gptq=True)
    assert applied.folder != apply(world / "scales.parquet", strategy="mse", db=world / "db", weight_bits=4).folder
    stored = evaluate(applied.folder, **options)

    def nll(found: Any) -> list[float]:
        return [row["nll"] for row in found.results.to_pylist() if row["strategy"] == "mse"]

    assert nll(stored) == nll(built) != nll(nearest)
    rounded = {
        (found.id, row["strategy"], row["weight_bits"], row["gptq"])
        for found in (built, nearest)
        for row in found.results.to_pylist()
    }
    floats = {(found.id, "float", None, False) for found in (built, nearest)}
    assert rounded == floats | {(built.id, "mse", 4, True), (nearest.id, "mse", 4, False)}
    assert "weights of in_proj, x_proj and out_proj in 4 bits, rounded by GPTQ" in built.notes
    assert built.id != nearest.id and "weights of in_proj, x_proj and out_proj in 4 bits" in nearest.notes


def test_an_operator_in_16_bit_leaves_the_codes_of_the_others(world: Path) -> None:
    table = read_scales(world / "scales.parquet")
    weights, moments = load_model(str(world / "tiny")).any_weights, matrices(world)

    def of_layer(layer: int) -> dict[str, torch.Tensor]:
        return {site: matrix for (of, site), matrix in moments.items() if of == layer}

    scales = table.group_scales_for("mse")
    model = build_model(weights, table, scales, weight_bits=4, second_moments=of_layer)
    without = leaving_in_16_bit(model, prepared_for(weights, table), [(0, "in_proj")])
    before, after = model.weights.layers[0], without.weights.layers[0]
    assert after.in_16_bit == {"in_proj"} and without.weights.gptq
    assert torch.equal(before.out_proj.codes, after.out_proj.codes)  # type: ignore[attr-defined]


def test_a_mixed_model_says_why_upstreams_scales_are_not_beside_it(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, db, scales = str(world / "texts.jsonl"), tmp_path / "db", tmp_path / "mixed.parquet"
    collect(str(world / "tiny"), data=data, db=db, second_moments=9, sensitivity=4, samples=9, seq_len=32)
    analyze(db, out=scales, keep=1)
    strategies = {}
    for gptq in (False, True):
        applied = apply(scales, strategy="mixed", db=db, weight_bits=4, gptq=gptq)
        found = evaluate(applied.folder, data=data, task="perplexity", db=db)
        strategies[gptq] = set(found.results["strategy"].to_pylist())
        assert ("note: quamba is not beside it" in capsys.readouterr().err) == gptq
    assert strategies == {False: {"float", "mixed", "quamba"}, True: {"float", "mixed"}}


def test_the_command_says_how(world: Path) -> None:
    options = ["--scales", str(world / "scales.parquet"), "--db", str(world / "db")]
    done = CliRunner().invoke(load_command("apply"), [*options, "--strategy", "mse", "--weights", "4bit:gptq"])
    assert done.exit_code == 0 and "in INT8 with weights of 4 bits by GPTQ" in done.output
    assert load_stored(Path(done.stdout.splitlines()[-1])).model.weights.gptq
    done = CliRunner().invoke(load_command("evaluate"), ["--weights", "4bit:gptq", "--float", "--model", "mamba-5m"])
    assert done.exit_code == 2 and "--weights goes with --scales or --strategy" in done.output


def test_what_is_missing_is_one_clear_line(world: Path, tmp_path: Path) -> None:
    scales, options = world / "scales.parquet", {"weight_bits": 4, "gptq": True}
    run = read_scales(scales).run
    with pytest.raises(DatabaseInvalid, match=f"need the second moments .* does not have run {run}; name its database"):
        apply(scales, strategy="mse", db=tmp_path / "other", **options)
    with pytest.raises(ScalesInvalid, match="GPTQ is asked for with weights of 8 bits; expected 4"):
        quantize(prepared_for(load_model(str(world / "tiny")).any_weights, read_scales(scales)), second_moments=dict)
    texts, other = {"data": str(world / "texts.jsonl"), "samples": 9}, tmp_path / "scales.parquet"
    collect(str(world / "tiny"), db=tmp_path, seq_len=32, progress=False, **texts)
    analyze(tmp_path, out=other)
    with pytest.raises(DatabaseInvalid, match="has none; collect it with --second-moments, and analyze it again"):
        evaluate(scales=other, strategies=["mse"], db=tmp_path, **texts, **options)
    shutil.copytree(world / "db" / "runs", tmp_path / "altered" / "runs")
    folder = tmp_path / "altered" / "runs" / run
    manifest = Manifest.load(folder)
    replace(manifest, identity=manifest.identity | {"weights_sha256": "0" * 64}).save(folder)
    with pytest.raises(DatabaseInvalid, match="is of other weights than the scale table"):
        apply(scales, strategy="mse", db=tmp_path / "altered", **options)


def test_a_damaged_table_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "db" / "runs", tmp_path / "runs")
    (part,) = list(tmp_path.glob("runs/*/second_moments/part-001.parquet"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(DatabaseInvalid, match=r"part-001\.parquet was altered"):
        apply(world / "scales.parquet", strategy="mse", db=tmp_path, weight_bits=4, gptq=True)
