"""Scales with zero points in the INT8 model: codes shifted where nothing clips change nothing, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_int8
import tiny_int8_mamba2
import torch
from test_device_int8 import host_model
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.analyzer.analyze import analyze
from quambase.apply.apply import apply
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.apply.int8.model_folder import load_stored
from quambase.apply.upstream.act_scales import export_act_scales
from quambase.collector.collect import collect
from quambase.model.packed_batch import Batch
from quambase.schema.errors import ScalesInvalid
from quambase.schema.scale_table import read_scales
from quambase.schema.sites import AFFINE_SITES
from quambase.schema.values.number_format import Affine

TEXTS = tiny_int8.documents()


def wide_and_shifted(family: str, zero_point: int) -> tuple[Int8LanguageModel, Int8LanguageModel]:
    """Two models of scales so wide after SiLU that codes stay within 60 of 0; the second has codes that far shifted."""
    model = host_model(family)
    wide, shifted = dict(model.scales), dict(model.scales)
    for key, scale in model.scales.items():
        if key[1] in AFFINE_SITES:
            # The scales are absmax / 127; clipped ones in the fixture are narrower by a half at most.
            parts = scale if isinstance(scale, tuple) else (scale,)
            values = tuple(8.0 * part for part in parts if isinstance(part, float))
            several = isinstance(scale, tuple)
            wide[key] = values if several else values[0]
            affine = tuple(Affine(value, zero_point) for value in values)
            shifted[key] = affine if several else affine[0]
    return model.with_scales(wide), model.with_scales(shifted)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("zero_point", [-60, 35, 60])
def test_shifted_codes_are_the_same_model(family: str, zero_point: int) -> None:
    plain, affine = wide_and_shifted(family, zero_point)
    batch = Batch.pack(TEXTS)
    wanted = plain.logits(plain.hidden(batch))
    assert wanted.std() > 0.1 and torch.equal(affine.logits(affine.hidden(batch)), wanted)
    # Decoding: a prompt, then token by token.
    (_, state), (_, other) = (model.prefill(Batch.pack([text[:1] for text in TEXTS])) for model in (plain, affine))
    for token in range(6):
        tokens = torch.tensor([token + 3 * i for i in range(len(TEXTS))])
        assert torch.equal(affine.step(tokens, other), plain.step(tokens, state)), token


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_a_zero_point_where_nothing_reads_one_is_refused(family: str) -> None:
    model = host_model(family)
    scales = dict(model.scales)
    scales[0, "out_proj:input"] = Affine(0.1, 3)
    with pytest.raises(ScalesInvalid, match="layer 0 out_proj:input has the zero point 3"):
        model.with_scales(scales)
    site = min(AFFINE_SITES & {site for _, site in model.scales})
    for zero_point in (-129, 128):
        with pytest.raises(ScalesInvalid, match=f"has the zero point {zero_point}; expected -128 to 127"):
            model.with_scales(dict(model.scales) | {(0, site): Affine(0.1, zero_point)})


@pytest.mark.parametrize("write", [write_tiny_model, write_tiny_mamba2])
def test_from_statistics_to_a_stored_model(write: object, tmp_path: Path) -> None:
    model, data = write(tmp_path / "tiny"), write_texts(tmp_path / "texts.jsonl")  # type: ignore[operator]
    db, path = tmp_path / "db", tmp_path / "scales.parquet"
    collect(str(model), data=str(data), db=db, samples=9, seq_len=32, progress=False, sensitivity=9)
    rows = analyze(db, out=path).table.to_pylist()
    chosen = [row for row in rows if row["selected"] and row["consumed"] and row["zero_point"]]
    assert chosen and {row["site"] for row in chosen} <= AFFINE_SITES
    by_effect = {(r["layer"], r["site"], r["group_name"]): r["predicted_kl"] for r in rows if r["label"] == "effect"}
    for row in chosen:
        assert row["predicted_kl"] < by_effect[row["layer"], row["site"], row["group_name"]]
    applied = apply(path, strategy="effect_affine", db=db, model=str(model))
    stored = load_stored(applied.folder).model
    wanted = read_scales(path).group_scales_for("effect_affine")
    for key, scale in stored.scales.items():
        parts, asked = (x if isinstance(x, tuple) else (x,) for x in (scale, wanted[key]))
        flat = [part for part in asked if not isinstance(part, tuple)]
        assert list(parts) == flat or any(isinstance(part, tuple) for part in asked), key
    assert any("Affine" in repr(scale) for scale in stored.scales.values())
    found = evaluate(
        scales=path, strategies=["effect_affine", "effect"], data=data, db=db, model=str(model), task="perplexity"
    )
    kl = {row["strategy"]: row["kl"] for row in found.results.to_pylist() if row["document"] == 5}
    assert kl["effect_affine"] != kl["effect"] and all(np.isfinite(list(kl.values())))
    with pytest.raises(ScalesInvalid, match="has a zero point, which upstream's kernels do not read"):
        export_act_scales(path, tmp_path / "act_scales.pt", strategy="effect_affine")


def test_the_groups_of_the_tiny_mamba2_have_zero_points_of_their_own() -> None:
    plain, affine = wide_and_shifted("mamba2", 20)
    scales = dict(affine.scales)
    key = next(key for key, scale in scales.items() if key[1] in AFFINE_SITES and isinstance(scale, tuple))
    scales[key] = tuple(Affine(part.scale, 7 * i - 20) for i, part in enumerate(scales[key]))  # type: ignore[union-attr,arg-type]
    batch = Batch.pack(TEXTS)
    mixed = affine.with_scales(scales)
    assert torch.equal(mixed.logits(mixed.hidden(batch)), plain.logits(plain.hidden(batch)))
    assert tiny_int8_mamba2.CONFIG.ngroups > 1
