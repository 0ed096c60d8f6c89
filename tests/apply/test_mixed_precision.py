"""INT8 models with some operators in 16 bit: against the definition (`mixed_twin`), decoded, stored, evaluated."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import tiny_int8
import tiny_int8_mamba2
import torch
from mixed_twin import Twin
from safetensors import safe_open
from test_device_int8 import host_model
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.analyzer.analyze import analyze
from quambase.apply.apply import apply
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.int8.build import leaving_in_16_bit
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.apply.int8.model_folder import load_stored, save_model
from quambase.apply.upstream.act_scales import export_act_scales
from quambase.collector.collect import collect
from quambase.model.language_model import floating_model
from quambase.model.packed_batch import Batch
from quambase.model.weights import ModelWeights
from quambase.schema.errors import ScalesInvalid
from quambase.schema.scale_table import Operator
from quambase.schema.sites import AFFINE_SITES
from quambase.schema.values.number_format import Affine

OPERATORS = {"mamba1": ("in_proj", "conv_scan", "x_proj", "out_proj"), "mamba2": ("in_proj", "conv_scan", "out_proj")}
SUBSETS = [
    (family, kept)
    for family, names in OPERATORS.items()
    for count in range(len(names) + 1)
    for kept in itertools.combinations(names, count)
]


def prepared_of(family: str) -> ModelWeights:
    return tiny_int8.tiny_prepared() if family == "mamba1" else tiny_int8_mamba2.tiny_prepared()


def with_zero_points(model: Int8LanguageModel) -> Int8LanguageModel:
    """Scales three quarters as large with codes shifted by 40, where a zero point is read; some codes clip."""
    scales = dict(model.scales)
    for key, scale in model.scales.items():
        if key[1] in AFFINE_SITES:
            parts = scale if isinstance(scale, tuple) else (scale,)
            affine = tuple(Affine(0.75 * part, -40) for part in parts if isinstance(part, float))
            scales[key] = affine if isinstance(scale, tuple) else affine[0]
    return model.with_scales(scales)


def mixed(family: str, operators: tuple[str, ...], layers: tuple[int, ...] = (0, 1)) -> Int8LanguageModel:
    kept = [(layer, name) for layer in layers for name in operators]
    return leaving_in_16_bit(host_model(family), prepared_of(family), kept)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("family", "kept"), SUBSETS)
def test_the_model_is_its_definition(family: str, kept: tuple[str, ...], shifted: bool) -> None:
    batch = Batch.pack(tiny_int8.documents())
    for layers in ((0, 1), (1,)):
        model = mixed(family, kept, layers)
        if shifted:
            model = with_zero_points(model)
        assert model.in_16_bit == {(layer, name) for layer in layers for name in kept}
        found, wanted = model.hidden(batch), Twin(model).hidden(batch)
        floats = floating_model(prepared_of(family), rotated=True).hidden(batch)
        # Float32 sums in another order round to another code or float16 once in some thousand values, and what a code
        # moves is followed by others: no more than that of what INT8 in every operator does.
        assert (found - wanted).norm() <= 0.01 * (host_model(family).hidden(batch) - floats).norm()


@pytest.mark.parametrize("family", OPERATORS)
def test_all_in_16_bit_is_the_floating_point_model(family: str) -> None:
    batch = Batch.pack(tiny_int8.documents())
    floats = floating_model(prepared_of(family), rotated=True).hidden(batch)
    every = mixed(family, OPERATORS[family])
    int8 = (host_model(family).hidden(batch) - floats).norm()
    # Float16 keeps 11 bits where codes have 7 of an average value: a sixteenth of the error, and fewer roundings.
    assert (every.hidden(batch) - floats).norm() < int8 / 16
    none = leaving_in_16_bit(every, prepared_of(family), ())
    assert none.in_16_bit == frozenset() and torch.equal(none.hidden(batch), host_model(family).hidden(batch))


@pytest.mark.parametrize(("family", "kept"), SUBSETS)
def test_decoding_goes_on_from_a_prompt(family: str, kept: tuple[str, ...]) -> None:
    """Token by token the logits are those of the whole documents, as nearly as rounding the state to codes allows."""
    model, plain = mixed(family, kept), host_model(family)
    texts = [text[:17] for text in tiny_int8.documents(lengths=(17, 20, 40))]

    def stepped(model: Int8LanguageModel) -> torch.Tensor:
        """The distance of each step's logits from those of the whole documents."""
        whole = Batch.pack(texts)
        wanted = model.logits(model.hidden(whole)).view(len(texts), 17, -1)
        _, state = model.prefill(Batch.pack([text[:9] for text in texts]))
        found = [model.step(torch.tensor([text[i] for text in texts]), state) for i in range(9, 17)]
        return (torch.stack(found, 1) - wanted[:, 9:]).norm()

    # In 16 bit the state is not rounded, so decoding differs by the order of sums alone, which moves few codes.
    most = 0.1 if "conv_scan" in kept else 1.5
    assert stepped(model) <= most * stepped(plain)


@pytest.mark.parametrize(("family", "kept"), SUBSETS)
def test_a_stored_model_is_the_same(family: str, kept: tuple[str, ...], tmp_path: Path) -> None:
    model = mixed(family, kept, (1,))
    about = {"strategy": "mixed", "source": {"name": "tiny", "path": "."}, "weights_sha256": "0"}
    save_model(tmp_path, model, about)
    stored = load_stored(tmp_path)
    assert stored.model.in_16_bit == model.in_16_bit
    assert stored.about["kept_16bit"] == [[1, name] for name in sorted(kept)]
    batch = Batch.pack(tiny_int8.documents())
    assert torch.equal(stored.model.hidden(batch), model.hidden(batch))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert (file.get_tensor("layers.1.out_proj").dtype == torch.float16) == ("out_proj" in kept)
        assert file.get_tensor("layers.0.out_proj").dtype == torch.int8


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        ((0, "x_proj"), "a Mamba-2 block has no operator x_proj; it has in_proj, conv_scan, out_proj"),
        ((2, "in_proj"), "layer 2 is to be in 16 bit; the model has the layers 0 to 1"),
    ],
)
def test_an_operator_that_is_not_there_is_refused(operator: Operator, message: str) -> None:
    with pytest.raises(ScalesInvalid, match=message):
        leaving_in_16_bit(host_model("mamba2"), prepared_of("mamba2"), [operator])


def test_upstream_has_none() -> None:
    model = host_model("mamba1", compat="upstream")
    with pytest.raises(ScalesInvalid, match="upstream's INT8 model has no operator in 16 bit; leave out --compat"):
        leaving_in_16_bit(model, prepared_of("mamba1"), [(0, "in_proj")])


@pytest.mark.parametrize("write", [write_tiny_model, write_tiny_mamba2])
def test_from_statistics_to_an_evaluation(write: object, tmp_path: Path) -> None:
    model, data = write(tmp_path / "tiny"), write_texts(tmp_path / "texts.jsonl")  # type: ignore[operator]
    db, path = tmp_path / "db", tmp_path / "scales.parquet"
    collect(str(model), data=str(data), db=db, samples=9, seq_len=32, progress=False, sensitivity=9)
    found = analyze(db, out=path, keep=3)
    assert found.mix is not None
    options = {"data": str(data), "samples": 9, "task": "perplexity", "db": db}
    built = evaluate(scales=path, strategies=["all"], **options).results  # type: ignore[arg-type]
    assert {"mixed", "selected", "quamba"} <= set(built["strategy"].to_pylist())
    applied = apply(path, db=db)
    about = json.loads((applied.folder / "config.json").read_text())
    assert applied.strategy == "mixed" and sorted(map(tuple, about["kept_16bit"])) == sorted(found.mix.operators)
    stored = evaluate(applied.folder, **options).results  # type: ignore[arg-type]

    def nll(results: object, strategy: str) -> list[float]:
        rows = results.to_pylist()  # type: ignore[attr-defined]
        return [row["nll"] for row in rows if row["strategy"] == strategy]

    # Upstream's scales beside it are those of a model of codes alone.
    for strategy in ("mixed", "quamba", "float"):
        assert nll(stored, strategy) == nll(built, strategy) and nll(built, strategy)
    assert nll(built, "mixed") != nll(built, "selected")
    with pytest.raises(ScalesInvalid, match="has no operator in 16 bit, as mixed has; name another strategy"):
        export_act_scales(path, tmp_path / "act_scales.pt", strategy="mixed")
    assert apply(path, strategy="selected", db=db).folder != applied.folder
