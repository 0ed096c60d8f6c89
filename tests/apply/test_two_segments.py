"""Codes of two segments in an INT8 model: against the analyzer's, which are computed value by value in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_int8
import tiny_int8_mamba2
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_device_int8 import host_model
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.analyzer.analyze import analyze
from quambase.analyzer.quantization_error import piecewise_codes
from quambase.apply.apply import apply
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.int8.arithmetic import weight_values
from quambase.apply.int8.group_scales import channel_groups_of
from quambase.apply.int8.two_segments import TwoSegmentModel, decode, encode
from quambase.collector.collect import collect
from quambase.model.language_model import LanguageModel
from quambase.model.operators.torch import TorchOperators
from quambase.model.packed_batch import Batch
from quambase.schema.errors import ScalesInvalid
from quambase.schema.scale_table import Segments, read_scales
from quambase.schema.sites import find_site

LABEL = "outlier_piecewise"


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1.0), st.floats(-1.0, 0.0) | st.floats(0.01, 4.0))
def test_codes_are_the_analyzers(seed: int, inner: float, outer: float) -> None:
    inner, outer = float(np.float32(inner)), float(np.float32(outer))
    random = np.random.default_rng(seed)
    values = np.concatenate([random.standard_t(3, 200) * 60 * inner, [0.0, 120 * inner, -120 * inner]])
    values = values.astype(np.float32)
    codes, rebuilt = piecewise_codes(values, inner, outer)
    tensors = torch.from_numpy(values)[:, None], torch.tensor([inner]), torch.tensor([outer])
    found = encode(*tensors)
    assert found.dtype == torch.int8
    # A quotient near a tie may round the other way in float32: a code apart, and few of them.
    apart = np.abs(found[:, 0].numpy().astype(np.int64) - codes)
    assert apart.max() <= 1 and (apart > 0).sum() <= 3
    same = apart == 0
    decoded = decode(found, *tensors[1:])[:, 0].numpy()
    # Two products and their sum in float32: three roundings of at most 2^-24 of the result.
    assert np.allclose(decoded[same], rebuilt[same], rtol=3 * 2.0**-24, atol=0)


def segments_of(family: str, head: bool) -> tuple[Any, dict[tuple[int, str], Segments]]:
    """A tiny INT8 model, and two segments for every scale of it: a third of its reach, and the rest."""
    model = host_model(family, quantize_lm_head=head, quantize_embedding=head)

    def pairs(scale: Any) -> Segments:
        parts = scale if isinstance(scale, tuple) else (scale,)
        return tuple((127 * part / 3 / 120, 127 * part * 2 / 3 / 7) for part in parts if isinstance(part, float))

    return model, {key: pairs(scale) for key, scale in model.scales.items()}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_the_model_reads_decoded_codes(family: str, head: bool) -> None:
    model, segments = segments_of(family, head)
    prepared = (tiny_int8 if family == "mamba1" else tiny_int8_mamba2).tiny_prepared()
    found = TwoSegmentModel(model.weights, prepared, segments, channel_groups=model.channel_groups)
    batch = Batch.pack(tiny_int8.documents())

    # The slow twin: plain PyTorch over decoded weights, each value coded by the analyzer's function, group by group.
    layers = [
        type(layer)(**{**vars(layer), **{name: weight_values(w) for name, w in vars(codes).items()}})
        for layer, codes in zip(prepared.layers, model.weights.layers, strict=True)
    ]
    embedding = model.weights.embedding.float()
    if head:
        embedding = embedding * model.weights.embedding_scales.float()[:, None]
    weights = type(prepared)(
        **{
            **vars(prepared),
            "layers": tuple(layers),
            "embedding": embedding,
            "lm_head": weight_values(model.weights.lm_head),
        }
    )

    def coded(layer: int, site: str, values: torch.Tensor) -> torch.Tensor:
        pairs = segments[layer, site]
        width = values.shape[1]
        groups = np.zeros(width, np.int64)
        if len(pairs) > 1 and site in ("x_conv_out:input", "ssm_state_act:input"):
            groups = channel_groups_of(model.config, model.channel_groups[layer], len(pairs)).numpy()
        elif len(pairs) > 1:
            groups = np.arange(width) * len(pairs) // width
        out = np.empty(values.shape, np.float32)
        for number, (inner, outer) in enumerate(pairs):
            mine = groups == number
            out[:, mine] = piecewise_codes(values.numpy()[:, mine], inner, outer)[1]
        return torch.from_numpy(out)

    operators = TorchOperators(torch.float32, getattr(model.config, "ngroups", 1))
    twin = LanguageModel(weights, operators, rotated=True)
    hidden = twin.hidden(batch, change=coded)
    if head:
        hidden = coded(-1, "lm_head:input", hidden)
    wanted = twin.logits(hidden)
    # Sums in another order move a value across a tie once in some thousand; without codes the two are far apart.
    plain = LanguageModel(weights, operators, rotated=True)
    assert (wanted - plain.logits(plain.hidden(batch))).norm() > 0.02 * wanted.norm()
    assert (found.logits(found.hidden(batch)) - wanted).norm() < 0.002 * wanted.norm()


def test_what_cannot_be_built_is_refused() -> None:
    model, segments = segments_of("mamba1", False)
    prepared = tiny_int8.tiny_prepared()
    del segments[1, "out_proj:input"]
    with pytest.raises(ScalesInvalid, match="no scale for layer 1 out_proj:input"):
        TwoSegmentModel(model.weights, prepared, segments)


@pytest.mark.parametrize("write", [write_tiny_model, write_tiny_mamba2])
def test_it_is_evaluated_like_everything_else(write: Any, tmp_path: Path) -> None:
    model, data = write(tmp_path / "tiny"), write_texts(tmp_path / "texts.jsonl")
    db, path = tmp_path / "db", tmp_path / "scales.parquet"
    collect(str(model), data=str(data), db=db, samples=9, seq_len=32, progress=False)
    analyze(db, out=path)
    table = read_scales(path)
    assert table.needs_decode(LABEL) and not table.needs_decode("mse") and not table.needs_decode("selected")
    family = table.model.family
    for (_, site), pairs in table.segments_for(LABEL).items():
        read = find_site(site, family)
        assert all(len(pair) == 2 for pair in pairs) and (len(pairs) == 1 or read.grouped or not read.consumed)
    found = evaluate(scales=path, strategies=["all"], data=str(data), samples=9, task="perplexity", db=db)
    assert not [note for note in found.notes if "left out" in note]
    kl = {}
    for row in found.results.to_pylist():
        kl[row["strategy"]] = kl.get(row["strategy"], 0.0) + row["kl"] if row["kl"] is not None else None
    # With seven codes for the outliers it is far better than the same first segment that clips them.
    assert 0 < kl[LABEL] < kl["outlier_aware"]
    with pytest.raises(ScalesInvalid, match=f"measure it: evaluate --strategy {LABEL}"):
        apply(path, strategy=LABEL, db=db)
    with pytest.raises(ScalesInvalid, match="no codes of two segments; leave out --compat or outlier_piecewise"):
        evaluate(scales=path, strategies=[LABEL], compat="upstream", data=str(data), samples=9, db=db)
    upstream = evaluate(scales=path, strategies=["all"], compat="upstream", data=str(data), samples=9, db=db)
    assert [note for note in upstream.notes if f"left out: {LABEL}" in note]
