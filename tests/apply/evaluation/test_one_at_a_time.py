"""Each site quantized alone: its KL from logits by NumPy, ranks against SciPy, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from click.testing import CliRunner
from hypothesis import given as tried
from hypothesis import strategies as st
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.analyzer.analyze import analyze
from quambase.apply.evaluation.one_at_a_time import one_at_a_time, rank_correlation
from quambase.cli.main import quambase
from quambase.collector.collect import collect
from quambase.model.checkpoint import load_model
from quambase.model.inputs.text import read_documents
from quambase.model.language_model import floating_model
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare
from quambase.schema.errors import UnknownName
from quambase.schema.scale_table import read_scales
from quambase.schema.sites import find_site


@pytest.fixture(scope="module", params=[write_tiny_model, write_tiny_mamba2], ids=["mamba1", "mamba2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, texts, a run with sensitivities (Mamba-2 without groups), and its scale table."""
    root = tmp_path_factory.mktemp("alone")
    model, data = request.param(root / "tiny"), write_texts(root / "texts.jsonl")
    groups = "none" if request.param is write_tiny_mamba2 else None
    options = {"samples": 9, "seq_len": 64, "sensitivity": 9, "groups": groups, "progress": False}
    collect(str(model), data=str(data), db=root / "db", **options)
    labels = ["mse_affine", "absmax", "percentile:0.95"]
    analyze(root / "db", strategies=labels, granularity="tensor", out=root / "s.parquet")
    return {"root": root, "model": model, "data": data, "db": root / "db", "scales": root / "s.parquet"}


def logits_of(world: dict[str, Path], change: object = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits (t, v) float64 of all documents, and which rows predict a token."""
    loaded = load_model(str(world["model"]))
    texts = [loaded.tokenizer.encode(d.text) for d in read_documents(str(world["data"]), 9)]
    texts = [tokens for tokens in texts if len(tokens) > 1]
    model = floating_model(prepare(loaded.any_weights), rotated=True)
    logits = model.logits(model.hidden(Batch.pack(texts), change=change)).double().numpy()  # type: ignore[arg-type]
    return logits, np.concatenate([np.arange(len(t)) < len(t) - 1 for t in texts])


class Quantized:
    """One site's values as codes and back, by NumPy."""

    def __init__(self, layer: int, site: str, step: float, zero_point: int) -> None:
        self.key, self.step, self.zero_point = (layer, site), np.float32(step), zero_point

    def __call__(self, layer: int, site: str, values: torch.Tensor) -> torch.Tensor:
        if (layer, site) != self.key:
            return values
        codes = np.clip(np.rint(values.numpy() / self.step) + self.zero_point, -128, 127)
        return torch.from_numpy(((codes - self.zero_point) * self.step).astype(np.float32))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def test_the_kl_is_that_of_the_logits(world: dict[str, Path]) -> None:
    found = one_at_a_time(world["scales"], data=world["data"], samples=9, db=world["db"], model=world["model"])
    rows = found.table.to_pylist()
    table = read_scales(world["scales"])
    clean, predicts = logits_of(world)
    p = log_softmax(clean)
    asked = {(row["layer"], row["site"], row["strategy"]) for row in rows}
    sites = {(r["layer"], r["site"]) for r in table.table.to_pylist() if r["consumed"] and not r["decode_only"]}
    assert asked == {(la, s, label) for la, s in sites if la >= 0 for label in table.labels()}
    for row in rows[:: max(1, len(rows) // 12)]:
        scale = table.scales_for(row["strategy"])[row["layer"], row["site"]]
        step, zero = (scale, 0) if isinstance(scale, float) else (scale.scale, scale.zero_point)

        change = Quantized(row["layer"], row["site"], step, zero)
        q = log_softmax(logits_of(world, change)[0])
        wanted = (np.exp(p) * (p - q)).sum(1)[predicts].sum() / predicts.sum()
        # Log-probabilities are float32: some 2^-24 of numbers of size up to 2^4, whose errors do not cancel in the KL.
        assert row["measured_kl"] == pytest.approx(wanted, rel=1e-3, abs=2e-6), row
        key = row["layer"], row["site"], row["strategy"]
        same = [r for r in table.table.to_pylist() if (r["layer"], r["site"], r["label"]) == key]
        stored = [r for r in same if r["consumed"]]
        assert row["predicted_kl"] == pytest.approx(sum(r["predicted_kl"] for r in stored), rel=1e-12)
    assert [row["measured_kl"] for row in rows] == sorted((row["measured_kl"] for row in rows), reverse=True)
    assert "rank correlation" in found.summary[0] and found.summary[2].startswith("sum over the sites")


def test_an_unknown_strategy(world: dict[str, Path]) -> None:
    with pytest.raises(UnknownName, match="unknown strategy 'mze'; known: absmax, mse_affine"):
        one_at_a_time(world["scales"], ["mze"], data=world["data"], db=world["db"], model=world["model"])


def test_the_command(world: dict[str, Path], tmp_path: Path) -> None:
    given = {"--scales": "scales", "--model": "model", "--data": "data", "--db": "db"}
    common = ["evaluate", *(part for option, name in given.items() for part in (option, world[name]))]
    run = CliRunner()
    picture = tmp_path / "alone.svg"
    done = run.invoke(quambase, [*map(str, common), "--one-at-a-time", "--samples", "4", "--picture", str(picture)])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("predicted against measured KL of ") and "<svg" in picture.read_text()
    assert "mathdefault" not in picture.read_text()
    family = read_scales(world["scales"]).model.family
    done = run.invoke(quambase, [*map(str, common), "--one-at-a-time", "--strategy", "absmax", "--format", "json"])
    rows = json.loads(done.stdout)
    assert {row["strategy"] for row in rows} == {"absmax"}
    assert all(find_site(row["site"], family).consumed for row in rows)
    for wrong in (["--picture", "a.png"], ["--one-at-a-time", "--float"]):
        assert run.invoke(quambase, [*map(str, common[:1]), *wrong]).exit_code == 2


@tried(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_ranks_are_scipy_s(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, np.float64).T
    found = rank_correlation(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
