"""An INT8 model's folder whose config.json has other sizes than its tensors, with right checksums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.analyzer.analyze import analyze
from quambase.apply.apply import apply
from quambase.apply.int8 import model_folder
from quambase.apply.int8.block_kinds import BY_FORMAT
from quambase.apply.int8.model_folder import load_stored
from quambase.collector.collect import collect
from quambase.schema.checksums import CHECKSUM
from quambase.schema.errors import CheckpointInvalid
from quambase.schema.json_files import write_json
from quambase.schema.stored.int8_models import CONFIG

FAMILIES = {"mamba1": write_tiny_model, "mamba2": write_tiny_mamba2}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](root / "model")
    write_texts(root / "texts.jsonl")
    collect(root / "model", 3, data=root / "texts.jsonl", db=root / "db", progress=False)
    analyze(root / "db", strategies=["absmax"], out=root / "scales.parquet")
    return apply(root / "scales.parquet", db=root / "db", quantize_embedding=True).folder


def about_of(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    del about[CHECKSUM]
    return about


def test_each_size_is_compared_before_a_model_is_built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = about_of(folder)
    sizes = {name: size for name, size in original["sizes"].items() if type(size) is int}
    assert {"d_model", "n_layer", "vocab_size", "d_inner", "d_state", "d_conv"} <= sizes.keys()
    loaded = load_stored(folder)
    monkeypatch.setattr(model_folder, "_model_of", lambda *_: pytest.fail("it is built"))
    for name, size in sizes.items():
        for other in (size + 1, 2 * size + 2, 10**6, 2**31 - 1, 2**40, *([size - 1] if size > 1 else [])):
            write_json(folder / CONFIG, original | {"sizes": original["sizes"] | {name: other}})
            with pytest.raises(CheckpointInvalid, match=r"the sizes in config.json imply|is damaged") as raised:
                load_stored(folder)
            assert "\n" not in str(raised.value) and str(raised.value).endswith("run `apply` again")
    monkeypatch.undo()
    write_json(folder / CONFIG, original)
    assert load_stored(folder).about == loaded.about


def test_a_configuration_of_the_other_family(folder: Path) -> None:
    original = about_of(folder)
    (other,) = BY_FORMAT.keys() - {original["family"]}
    write_json(folder / CONFIG, original | {"family": other})
    with pytest.raises(CheckpointInvalid, match="config"):
        load_stored(folder)
    write_json(folder / CONFIG, original)
