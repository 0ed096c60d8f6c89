"""Weights in 4 bits: each code from the definition, and INT8 models of them against the slow twin."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_int8
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_twin import Twin
from test_device_int8 import host_model
from test_mixed_precision import prepared_of, with_zero_points
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.analyzer.analyze import analyze
from quambase.apply.apply import apply
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.int8.arithmetic import SplitInt8Weight, quantize_weight_4bit, weight_values
from quambase.apply.int8.build import leaving_in_16_bit
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.apply.int8.model_folder import load_stored, save_model
from quambase.cli.main import load_command
from quambase.collector.collect import collect
from quambase.model.packed_batch import Batch
from quambase.schema.errors import ScalesInvalid


def by_definition(weight: np.ndarray) -> tuple[list[list[int]], list[float]]:
    """Row by row and group by group: the int8 codes, and each row's scale. In float32, since the largest weight of a
    group is always at a tie, 7.5 steps.
    """
    codes, scales, one = [], [], np.float32
    for row in weight:
        groups = [row[start : start + 128] for start in range(0, len(row), 128)]
        steps = [one(2) * max(np.abs(group).max(), one(1e-5)) / one(15) for group in groups]
        four = [np.clip(np.rint(group / step), -8, 7) for group, step in zip(groups, steps, strict=True)]
        largest = max(np.abs(found * step).max() for found, step in zip(four, steps, strict=True))
        scale = max(largest, one(1e-5)) / one(127)
        ratios = [float(np.float16(step / scale)) for step in steps]
        wide = [np.clip(np.rint(found * ratio), -128, 127) for found, ratio in zip(four, ratios, strict=True)]
        codes.append([int(code) for group in wide for code in group])
        scales.append(float(scale))
    return codes, scales


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([1, 3, 64, 127, 128, 129, 256, 300]))
def test_codes_are_their_definition(seed: int, rows: int, width: int) -> None:
    random = np.random.default_rng(seed)
    weight = (random.standard_t(4, (rows, width)) * random.uniform(0.01, 1, (rows, 1))).astype(np.float32)
    found = quantize_weight_4bit(torch.from_numpy(weight))
    codes, scales = by_definition(weight)
    assert found.codes.dtype == torch.int8 and found.widths == (1,) * rows
    assert list(found.scales) == scales and found.codes.tolist() == codes
    for row, group in itertools.product(range(rows), range(0, width, 128)):
        assert len(set(found.codes[row, group : group + 128].tolist())) <= 16, "sixteen values a group"


def four_bits(family: str) -> Int8LanguageModel:
    return host_model(family, weight_bits=4)


@pytest.mark.parametrize("kept", [(), ("in_proj",), ("conv_scan",), ("out_proj",)])
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_the_model_is_its_definition(family: str, kept: tuple[str, ...]) -> None:
    batch = Batch.pack(tiny_int8.documents())
    model, eight = four_bits(family), host_model(family)
    quantized = [vars(model.weights.layers[1])[name] for name in ("in_proj", "out_proj")]
    assert all(isinstance(weight, SplitInt8Weight) and weight.widths[0] == 1 for weight in quantized)
    assert (model.hidden(batch) - eight.hidden(batch)).norm() > 0.02 * eight.hidden(batch).norm(), "4 bits show"
    model = leaving_in_16_bit(model, prepared_of(family), [(layer, name) for layer in (0, 1) for name in kept])
    if not kept:
        model = with_zero_points(model)
    wanted = Twin(model).hidden(batch)
    # As for 8 bits (test_mixed_precision): sums in another order move a few codes.
    assert (model.hidden(batch) - wanted).norm() <= 0.01 * (eight.hidden(batch) - wanted).norm()


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_weights_are_half_a_step_off(family: str) -> None:
    """The error of a 4-bit weight is at most half a step of its group, and half an int8 step of its row; where the
    largest weight of a group is clipped, half a step more.
    """
    prepared = prepared_of(family)
    model = four_bits(family)
    for layer, codes in zip(prepared.layers, model.weights.layers, strict=True):
        weight, found = layer.in_proj, codes.in_proj  # type: ignore[attr-defined]
        groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128)).view(len(weight), -1, 128)
        step = (2 * groups.abs().amax(-1) / 15).repeat_interleave(128, 1)[:, : weight.shape[1]]
        row = torch.tensor(found.scales)[:, None]
        # The ratio of the scales is a float16: 2^-11 of a code of at most 127.
        assert ((weight_values(found) - weight).abs() <= 0.51 * step + 0.57 * row).all()


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_decoding_and_storing(family: str, tmp_path: Path) -> None:
    model = four_bits(family)
    texts = [text[:12] for text in tiny_int8.documents(lengths=(12, 12))]
    whole = model.logits(model.hidden(Batch.pack(texts))).view(2, 12, -1)
    _, state = model.prefill(Batch.pack([text[:6] for text in texts]))
    several = torch.stack([model.step(torch.tensor([t[i] for t in texts]), state) for i in range(6, 12)], 1)
    _, state = model.prefill(Batch.pack([texts[0][:6]]))
    alone = torch.stack([model.step(torch.tensor([texts[0][i]]), state) for i in range(6, 12)], 1)
    # The state is rounded to codes while decoding: a few hundredths; a wrong factor is as far as the logits are large.
    assert (several - whole[:, 6:]).norm() < 0.2 * whole[:, 6:].norm()
    assert (alone - whole[:1, 6:]).norm() < 0.2 * whole[:1, 6:].norm()
    save_model(tmp_path, model, {"strategy": "s", "source": {"name": "t", "path": "."}, "weights_sha256": "0"})
    stored = load_stored(tmp_path).model
    assert stored.weights.weight_bits == 4
    assert torch.equal(stored.hidden(Batch.pack(texts)), model.hidden(Batch.pack(texts)))


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ScalesInvalid, match="weights of 3 bits are asked for; expected 8 or 4"):
        host_model("mamba1", weight_bits=3)
    with pytest.raises(ScalesInvalid, match="weights of 4 bits are asked for; expected 8 with --compat"):
        host_model("mamba1", weight_bits=4, compat="upstream")


@pytest.mark.parametrize("write", [write_tiny_model, write_tiny_mamba2])
def test_applied_and_evaluated(write: Any, tmp_path: Path) -> None:
    model, data = write(tmp_path / "tiny"), write_texts(tmp_path / "texts.jsonl")
    db, path = tmp_path / "db", tmp_path / "scales.parquet"
    collect(str(model), data=str(data), db=db, samples=9, seq_len=32, progress=False)
    analyze(db, out=path)
    options: dict[str, Any] = {"data": str(data), "samples": 9, "task": "perplexity", "db": db}
    built = evaluate(scales=path, strategies=["mse"], weight_bits=4, **options)
    eight = evaluate(scales=path, strategies=["mse"], **options)
    assert any("in 4 bits" in note for note in built.notes) and built.id != eight.id
    applied = apply(path, strategy="mse", db=db, weight_bits=4)
    assert applied.folder != apply(path, strategy="mse", db=db).folder
    stored = evaluate(applied.folder, **options)

    def column(found: Any, strategy: str, name: str) -> list[Any]:
        return [row[name] for row in found.results.to_pylist() if row["strategy"] == strategy]

    assert column(stored, "mse", "nll") == column(built, "mse", "nll") != column(eight, "mse", "nll")
    assert set(column(built, "mse", "weight_bits")) == {4} and set(column(eight, "mse", "weight_bits")) == {8}
    assert set(column(built, "float", "weight_bits")) == {None}


@pytest.mark.parametrize("others", [["--float", "--model", "mamba-5m"], ["--one-at-a-time"], []])
def test_what_is_not_built_takes_no_weights(others: list[str]) -> None:
    done = CliRunner().invoke(load_command("evaluate"), ["--weights", "4bit", *others])
    assert done.exit_code == 2 and "--weights goes with --scales or --strategy" in done.output
