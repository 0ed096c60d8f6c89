"""The models of one evaluation: an applied folder, every strategy of a scale table, or the float model alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quambase.apply.apply import load_named, load_source
from quambase.apply.evaluation.tasks import no_text
from quambase.apply.int8.build import AnyInt8Model, check_any_scales, leaving_in_16_bit, on_host, prepared_for
from quambase.apply.int8.group_scales import as_json, channel_maps
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.apply.int8.model_folder import load_stored, weights_digest
from quambase.apply.int8.needed_scales import check_model, loadable_labels, needed_sites
from quambase.apply.int8.state_formats import StateFormat
from quambase.apply.int8.two_segments import TwoSegmentModel
from quambase.apply.int8.weights import quantize
from quambase.apply.scale_choice import check_granularity, describe
from quambase.apply.second_moments import second_moments_of
from quambase.model.checkpoint import LoadedModel, load_model
from quambase.model.inputs.sources import is_bundled
from quambase.schema.errors import DataInvalid, ScalesInvalid
from quambase.schema.progress import remark
from quambase.schema.scale_table import MIXED, SELECTED, ScaleTable, read_scales
from quambase.schema.stored.int8_models import SCALES
from quambase.schema.stored.results import STATE, UPSTREAM


@dataclass(frozen=True)
class Candidates:
    """The models to compare: the float one, and INT8 ones by label, which share their weights."""

    source: LoadedModel
    models: Mapping[str, AnyInt8Model]
    scales: str
    run: str | None
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def with_states(self, formats: Sequence[str]) -> Candidates:
        """Each strategy also with the state in each of ``formats``, labelled ``LABEL, state FORMAT`` (STATE).

        DataInvalid: no such format. Codes of two segments have no state.
        """
        parsed = [StateFormat.parse(text) for text in formats]
        models = dict(self.models)
        for label, model in self.models.items():
            if isinstance(model, Int8LanguageModel):
                models |= {f"{label}{STATE}{form}": model.with_state(form) for form in parsed}
        return replace(self, models=models)

    def identity(self) -> dict[str, Any]:
        """Everything that determines the models' outputs, as JSON: weights, scales, arithmetic, tokenizer, versions."""
        weights = {weights_digest(model) for model in {id(m.weights): m for m in self.models.values()}.values()}
        return {
            "weights": self.source.weights_sha256,
            "tokenizer": self.source.tokenizer_sha256,
            "int8": sorted(weights),
            "models": [
                [
                    label,
                    model.compat,
                    sorted((*key, as_json(scale)) for key, scale in model.scales.items()),
                    *([sorted(model.in_16_bit)] if model.in_16_bit else []),
                    *([str(model.state_format)] if model.state_format else []),
                ]
                for label, model in self.models.items()
            ],
            "versions": {name: version(name) for name in ("quambase", "torch", "numba", "tokenizers")},
        }


def from_folder(folder: Path, model: str | None) -> Candidates:
    """An applied model, and upstream's scales on the same weights where the folder keeps them."""
    stored = load_stored(folder)
    about = stored.about
    loaded = load_named(str(about["source"]["name"]), str(about["source"]["path"]), model)
    if loaded.weights_sha256 != about["weights_sha256"]:
        raise ScalesInvalid(
            f"{folder} was made of other weights ({about['weights_sha256'][:12]}) than {loaded.name} has "
            f"({loaded.weights_sha256[:12]}); give the model it was made of with --model"
        )
    models: dict[str, AnyInt8Model] = {about["strategy"]: stored.model}
    path = folder / SCALES
    if path.exists():
        table = read_scales(path)
        check_model(table, loaded.weights_sha256, loaded.name)
        needed = needed_sites(loaded.any_weights.config, stored.model.quantized_lm_head)
        if UPSTREAM in loadable_labels(table, needed)[0] and UPSTREAM not in models:
            models |= _of_upstreams_scales(stored.model, loaded, table)
    return Candidates(loaded, models, str(path.resolve()), about.get("run"))


def _of_upstreams_scales(model: Int8LanguageModel, loaded: LoadedModel, table: ScaleTable) -> dict[str, AnyInt8Model]:
    """``model`` with upstream's scales, under their label; empty, with a note, where it cannot be made."""
    if model.in_16_bit:  # upstream's model has no operator in 16 bit
        if model.weights.gptq:  # which needs second moments to round those operators' weights
            remark(
                f"note: {UPSTREAM} is not beside it: the folder does not hold what GPTQ needs for the operators in 16 "
                "bit; evaluate --scales FILE --weights 4bit:gptq compares the two"
            )
            return {}
        model = leaving_in_16_bit(model, prepared_for(loaded.any_weights, table), ())
    return {UPSTREAM: model.with_scales(table.group_scales_for(UPSTREAM))}


def from_model(model: str | None, *, needs_text: bool = False) -> Candidates:
    """The floating-point model alone. DataInvalid: no model is named, or it must bring a text and has none."""
    if model is None:
        raise DataInvalid("no model is named; say which floating-point model to evaluate: --float --model NAME")
    if needs_text and not is_bundled(model):
        raise no_text(model)
    loaded = load_model(model)
    return Candidates(loaded, {}, "", None)


def from_scales(
    scales: Path,
    strategies: Sequence[str],
    model: str | None,
    quantize_lm_head: bool,
    *,
    quantize_embedding: bool,
    compat: str | None,
    weight_bits: int = 8,
    gptq_from: Path | None = None,
    granularities: Sequence[str] = (),
) -> Candidates:
    """Strategies of a scale table at each of ``granularities`` ("all": every one the table has; none: its finest),
    built in memory on one set of INT8 weights. Labels name the granularity where it is not the table's finest.

    model      the floating-point model, if it moved
    gptq_from  the database with the second moments by which GPTQ rounds weights of 4 bits; None: round to nearest
    """
    table = read_scales(scales)
    moments = None if gptq_from is None else second_moments_of(gptq_from, table)
    held = table.granularities()
    levels = held if "all" in granularities else [check_granularity(table, level) for level in granularities]
    loaded = load_source(table, model)
    needed = needed_sites(loaded.any_weights.config, quantize_lm_head)
    skipped: list[str] = []
    labels = list(dict.fromkeys(strategies))
    if "all" in labels:
        whole, partial = loadable_labels(table, needed)
        decoded = [label for label in partial if compat is None and _has_segments(table, label, needed)]
        skipped = [label for label in partial if label not in decoded]
        labels = [*whole, SELECTED, *([MIXED] if table.in_16_bit else []), *decoded]
    if compat is not None and (segmented := [label for label in labels if table.needs_decode(label)]):
        raise ScalesInvalid(f"upstream's INT8 model has no codes of two segments; leave out --compat or {segmented[0]}")
    asked = [(label, level) for level in levels or held[-1:] for label in labels]
    chosen = {
        (label, level): check_any_scales(
            loaded.any_weights, table, table.group_scales_for(label, level), quantize_lm_head
        )
        for label, level in asked
        if not table.needs_decode(label)
    }
    prepared, maps = prepared_for(loaded.any_weights, table), channel_maps(table.model.layer_groups or ())
    switches = {"quantize_lm_head": quantize_lm_head, "quantize_embedding": quantize_embedding}
    placed = on_host(quantize(prepared, **switches, compat=compat, weight_bits=weight_bits, second_moments=moments))
    models: dict[str, AnyInt8Model] = {}
    for label, level in asked:
        name = describe(label, granularity=None if level == held[-1] else level)
        if (label, level) not in chosen:
            segments = table.segments_for(label, level)
            models[name] = TwoSegmentModel(placed.weights, prepared, segments, channel_groups=maps)
            continue
        int8 = Int8LanguageModel(placed, chosen[label, level], channel_groups=maps, compat=compat)
        in_16_bit = table.in_16_bit_for(label)
        models[name] = leaving_in_16_bit(int8, prepared, in_16_bit) if in_16_bit else int8
    by = "" if gptq_from is None else ", rounded by GPTQ"
    notes = [
        *table.notes,
        *([f"weights of in_proj, x_proj and out_proj in {weight_bits} bits{by}"] if weight_bits != 8 else []),
    ]
    return Candidates(loaded, models, str(scales.resolve()), table.run, skipped, notes)


def _has_segments(table: ScaleTable, label: str, needed: Collection[tuple[int, str]]) -> bool:
    """Whether the codes of ``label`` have two segments at every needed site."""
    return table.needs_decode(label) and set(needed) <= table.segments_for(label).keys()
