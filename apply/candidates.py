"""The models of one evaluation: an applied folder, every strategy of a scale table, or the float model alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quambase.apply.apply import load_source
from quambase.apply.models import Int8Model, build_model, check_any_scales
from quambase.apply.scales import (
    DEFAULT_OTHERWISE,
    check_granularity,
    check_model,
    describe,
    loadable_labels,
    needed_sites,
)
from quambase.apply.store import SCALES, load_stored
from quambase.model.load import LoadedModel, bundled_models, load_model
from quambase.schema.scales import SELECTED, read_scales
from quambase.schema.tables import file_sha256


@dataclass(frozen=True)
class Candidates:
    """The models to compare: the float one and INT8 ones by label; ``identity`` determines their outputs."""

    source: LoadedModel
    models: Mapping[str, Int8Model]
    scales: str
    run: str | None
    identity: dict[str, Any]
    skipped: list[str] = field(default_factory=list)


def from_folder(folder: Path, model: str | None) -> Candidates:
    """An applied model, and upstream's scales on the same weights where the folder keeps them."""
    stored = load_stored(folder)
    about = stored.about
    source = about["source"]
    name = source["name"]
    if name not in bundled_models() and Path(source["path"]).is_dir():
        name = source["path"]
    loaded = load_model(model or name)
    models: dict[str, Int8Model] = {about["strategy"]: stored.model}
    path = folder / SCALES
    if path.exists():
        table = read_scales(path)
        check_model(table, loaded.weights_sha256, loaded.name)
        needed = needed_sites(loaded.any_weights.config, stored.model.quantized_lm_head)
        if DEFAULT_OTHERWISE in loadable_labels(table, needed)[0] and DEFAULT_OTHERWISE not in models:
            models[DEFAULT_OTHERWISE] = stored.model.with_scales(table.group_scales_for(DEFAULT_OTHERWISE))
    identity = {"weights": loaded.weights_sha256, "int8": stored.tensors_sha256, "strategies": list(models)}
    return Candidates(loaded, models, str(path), about.get("run"), identity)


def from_model(model: str) -> Candidates:
    """The floating-point model alone."""
    loaded = load_model(model)
    return Candidates(loaded, {}, "", None, {"weights": loaded.weights_sha256, "strategies": []})


def from_scales(
    scales: Path,
    strategies: Sequence[str],
    model: str | None,
    quantize_lm_head: bool,
    *,
    quantize_embedding: bool,
    compat: str | None,
    granularities: Sequence[str] = (),
) -> Candidates:
    """Strategies of a scale table at each of ``granularities`` ("all": every one the table has; none: its finest),
    built in memory on one set of INT8 weights. Labels name the granularity where it is not the table's finest.
    """
    table = read_scales(scales)
    held = table.granularities()
    levels = held if "all" in granularities else [check_granularity(table, level) for level in granularities]
    loaded = load_source(table, model)
    needed = needed_sites(loaded.any_weights.config, quantize_lm_head)
    skipped: list[str] = []
    labels = list(dict.fromkeys(strategies))
    if "all" in labels:
        whole, skipped = loadable_labels(table, needed)
        labels = [*whole, SELECTED]
    chosen = {
        describe(label, granularity=None if level == held[-1] else level): check_any_scales(
            loaded.any_weights, table, table.group_scales_for(label, level), quantize_lm_head
        )
        for level in levels or held[-1:]
        for label in labels
    }
    first = build_model(
        loaded.any_weights,
        table,
        next(iter(chosen.values())),
        quantize_lm_head=quantize_lm_head,
        quantize_embedding=quantize_embedding,
        compat=compat,
    )
    models = {label: first.with_scales(found) for label, found in chosen.items()}
    identity = {
        "weights": loaded.weights_sha256,
        "scales": file_sha256(scales),
        "strategies": list(chosen),
        "switches": [quantize_lm_head, quantize_embedding, compat],
    }
    return Candidates(loaded, models, str(scales), table.run, identity, skipped)
