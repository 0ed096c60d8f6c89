"""Sensitivities: against a plain loop over labels, tokens and values, and against the divergence they predict."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from device_models import PlainLoop, tiny_weights
from stored_runs import bytes_of, stored_table
from test_collect import run_tiny
from tiny_model import write_texts, write_tiny_model

import quambase.collector.collect as run_module
from quambase.collector import sensitivity
from quambase.collector.documents import DocumentSet, TokenizedDocument
from quambase.collector.layouts import site_layouts
from quambase.collector.sensitivity import (
    SENSITIVITY,
    SensitivityPlan,
    SensitivitySums,
    acting_sites,
    add_squares,
    distinct_values,
    fixed_point_sums,
    part_sums,
)
from quambase.model.language_model import LanguageModel
from quambase.model.operators.choice import choose_differentiable_operators
from quambase.model.operators.differentiable import on_gradient
from quambase.model.packed_batch import Batch
from quambase.schema.errors import DataInvalid
from quambase.schema.sites import FAMILIES, SiteKey
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.manifest import Manifest, table_of

CPU = torch.device("cpu")
SEED = 3


def documents(*lengths: int) -> list[TokenizedDocument]:
    random = np.random.default_rng(0)
    return [TokenizedDocument(2 * i, "", random.integers(0, 60, n).astype(np.int32)) for i, n in enumerate(lengths)]


def every_site(family: str) -> list[str]:
    return [site.name for site in FAMILIES[family] if not site.sampled]


def model_of(family: str) -> LanguageModel:
    weights = tiny_weights(family)
    return LanguageModel(weights, choose_differentiable_operators(weights.config.operator_sizes, CPU), rotated=True)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two documents share a pass, and four a file: the few texts here are several of both."""
    monkeypatch.setattr(sensitivity, "TOGETHER", 2)
    monkeypatch.setattr(sensitivity, "PART", 4)


def keep(seen: list[tuple[torch.Tensor, torch.Tensor]], values: torch.Tensor, gradient: torch.Tensor) -> None:
    seen.append((values, gradient.clone()))


def plain_sums(family: str, texts: list[TokenizedDocument], key: SiteKey) -> dict[float, tuple[int, float]]:
    """Value to (count, sum of squared gradients): one document at a time, labels by adding probabilities one by one."""
    weights = tiny_weights(family)
    model = LanguageModel(weights, PlainLoop(weights.config.operator_sizes.ngroups), rotated=True)
    found: dict[float, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for text in texts:
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def tap(layer: int, site: str, values: torch.Tensor, _: slice, seen: list = seen) -> None:
            if (layer, site) == key:
                on_gradient(values, partial(keep, seen, values.detach()))

        hidden = model.differentiable_hidden(Batch.pack([text.tokens.tolist()]), tap)
        logits = F.linear(hidden, model.lm_head)
        labels = []
        draws = np.random.default_rng([SEED, text.index]).random(len(text.tokens))
        for row, u in zip(torch.softmax(logits.detach().double(), -1), draws, strict=True):
            reached, label = 0.0, 0
            while (reached := reached + float(row[label])) <= u and label < len(row) - 1:
                label += 1
            labels.append(label)
        F.cross_entropy(logits, torch.tensor(labels), reduction="sum").backward()
        ((values, gradient),) = seen
        for value, slope in zip(values.flatten().half().tolist(), gradient.flatten().tolist(), strict=True):
            count, total = found[value + 0.0]
            found[value + 0.0] = count + 1, total + slope * slope
    return found


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_sums_are_those_of_the_plain_loop(family: str) -> None:
    texts, model = documents(9, 1, 30), model_of(family)
    index = acting_sites(site_layouts(model.config, every_site(family)), family)
    found = part_sums(model, texts, index, SEED)
    assert set(index.layouts) == {
        (layer if not site.head else -1, site.name)
        for layer in range(2)
        for site in FAMILIES[family]
        if site.consumed and not site.decode_only
    }
    for key in index.layouts:
        wanted = plain_sums(family, texts, key)
        total: dict[float, list[float]] = defaultdict(lambda: [0, 0.0])
        for group in range(index.groups[key].start, index.groups[key].stop):
            for value, count, square in zip(*distinct_values(found, group), strict=True):
                total[float(value)][0] += int(count)
                total[float(value)][1] += float(square)
        # A float32 value is some hundred roundings of 2^-24 off, and rounds to another float16 value, 2^-10 away, in at
        # most one of a hundred cases.
        common = total.keys() & wanted.keys()
        assert len(common) >= 0.98 * len(wanted), key
        largest = max(square for _, square in wanted.values())
        moved = [v for v in common if total[v][0] != wanted[v][0]]
        assert len(moved) <= 0.04 * len(wanted), key
        # Float32 gradients, of some hundred roundings, squared.
        wrong = [abs(total[v][1] - wanted[v][1]) for v in common if v not in moved]
        assert max(wrong) <= 1e-3 * largest, key


def test_half_of_gradient_times_error_squared_predicts_the_divergence() -> None:
    """Errors of random signs at one site, small enough for the second order; labels and signs averaged out."""
    texts, key, size, draws = documents(60, 40), (0, "x_proj:input"), 0.02, 40
    model = model_of("mamba1")
    index = acting_sites(site_layouts(model.config, [key[1]]), "mamba1")
    squares = [
        part_sums(model, texts, index, seed).gradient_sq[index.groups[key]].sum().item() for seed in range(draws)
    ]
    predicted = 0.5 * np.mean(squares) * size**2
    batch = Batch.pack([text.tokens.tolist() for text in texts])
    clean = torch.log_softmax(model.logits(model.hidden(batch)).double(), -1)
    conv, calls, measured = model.operators.conv_silu, [0], []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)

        def disturbed(*arguments: object, generator: torch.Generator = generator) -> torch.Tensor:
            calls[0] += 1
            out = conv(*arguments)  # type: ignore[arg-type]
            signs = torch.randint(0, 2, out.shape, generator=generator) * 2 - 1
            return out + size * signs if calls[0] % 2 else out  # the first of two layers

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.operators, "conv_silu", disturbed)
            other = torch.log_softmax(model.logits(model.hidden(batch)).double(), -1)
        measured.append(float((clean.exp() * (clean - other)).sum()))
    # The spread of 40 draws of either, and the third order: a tenth.
    assert predicted == pytest.approx(np.mean(measured), rel=0.1)


def test_a_device_adds_in_fixed_point() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(500, 6, generator=random).half()
    values[:50] = 0.0
    values[50:60] = -0.0
    gradient = torch.randn(500, 6, generator=random) * 10.0 ** torch.randint(-12, 3, (500, 6), generator=random)
    group_of = torch.tensor([0, 0, 1, 2, 1, 1])
    wanted = SensitivitySums.zeros(3)
    add_squares(wanted, values.float(), gradient, group_of)
    counts, squares = fixed_point_sums(values, gradient, group_of, 3)
    assert (counts == wanted.counts).all() and counts.sum() == 3000
    # Each of 3,000 squares loses half a unit, of 2^-61 of 3,000 times the largest; float64 sums lose more.
    largest = float(gradient.double().square().max())
    assert (squares - wanted.gradient_sq).abs().max() <= 3000 * largest * 3000 * 2.0**-52
    shuffled = torch.randperm(500, generator=random)
    again = fixed_point_sums(values[shuffled], gradient[shuffled], group_of, 3)[1]
    assert (again == squares).all(), "the order matters"


def test_documents_are_evenly_spaced_and_no_more_than_there_are() -> None:
    texts = DocumentSet(tuple(documents(*range(1, 21))), 20, 0, 0)
    plan = SensitivityPlan.of(texts, 5, every_site("mamba1"), "mamba1", 0)
    assert [[document.tokens.size for document in part] for part in plan.parts] == [[3, 7, 11, 15], [19]]
    assert plan.identity() == {"documents": 5, "tokens": 55}
    assert SensitivityPlan.of(texts, 99, every_site("mamba1"), "mamba1", 0).identity()["documents"] == 20
    with pytest.raises(DataInvalid, match="--site leaves none"):
        SensitivityPlan.of(texts, 5, ["ssm_state_act:input", "out_proj:output"], "mamba1", 0)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    model, data = write_tiny_model(tmp_path / "tiny"), write_texts(tmp_path / "texts.jsonl")
    options = {"batch_size": 2, "keep_tokens": 8, "sensitivity": 6}
    whole = run_tiny(model, data, tmp_path / "whole", **options)
    rows = stored_table(whole.folder, "sensitivities")
    assert rows.num_rows > 0 and not (whole.folder / SENSITIVITY).exists()
    sites = {site for site in rows["site"].to_pylist()}
    assert sites == {s.name for s in FAMILIES["mamba1"] if s.consumed and not s.decode_only}
    db = tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(run_module, "tables_of_parts", stop)
        run_tiny(model, data, db, **options)
    parts = sorted(next(db.glob("runs/*")).glob(f"{SENSITIVITY}/*"))
    assert len(parts) == 2
    # One part is missing, of the other a byte is wrong: both are computed again.
    parts[0].unlink()
    damaged = bytearray(parts[1].read_bytes())
    damaged[len(damaged) // 2] ^= 4
    parts[1].write_bytes(damaged)
    assert bytes_of(run_tiny(model, data, db, **options).folder) == bytes_of(whole.folder)


def test_a_run_without_has_an_empty_table_and_an_id_of_its_own(tmp_path: Path) -> None:
    model, data = write_tiny_model(tmp_path / "tiny"), write_texts(tmp_path / "texts.jsonl")
    without = run_tiny(model, data, tmp_path / "db")
    assert stored_table(without.folder, "sensitivities").num_rows == 0
    assert run_tiny(model, data, tmp_path / "db", sensitivity=3).manifest.run != without.manifest.run
    # A run of before the table existed.
    shutil.rmtree(without.folder / "sensitivities")
    manifest = Manifest.load(without.folder)
    earlier = {file: entry for file, entry in manifest.tables.items() if table_of(file) != "sensitivities"}
    replace(manifest, tables=earlier).save(without.folder)
    with StatsDB(tmp_path / "db", without.manifest.run) as database:
        assert database.sql("select count(*) as n from sensitivities").to_pylist() == [{"n": 0}]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_a_device_s_sums_are_the_host_s(family: str) -> None:
    weights, texts = tiny_weights(family), documents(9, 1, 130, 66)
    index = acting_sites(site_layouts(weights.config, every_site(family)), family)
    there = choose_differentiable_operators(weights.config.operator_sizes, torch.device("cuda"))
    model = LanguageModel(weights, there, rotated=True)
    found, wanted = part_sums(model, texts, index, SEED), part_sums(model_of(family), texts, index, SEED)
    assert (found.counts.sum(1).cpu() == wanted.counts.sum(1)).all()
    # Float32 gradients whose sums are ordered differently; a value may round to a neighbouring pattern.
    np.testing.assert_allclose(found.gradient_sq.sum(1).cpu(), wanted.gradient_sq.sum(1), rtol=1e-3)
    again = part_sums(model, texts, index, SEED)
    assert (again.gradient_sq == found.gradient_sq).all() and (again.counts == found.counts).all()
