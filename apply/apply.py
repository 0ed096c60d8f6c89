"""Makes an INT8 model folder from a scale table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from quambase.apply.int8.build import build_model, check_any_scales
from quambase.apply.int8.group_scales import as_json
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.apply.int8.model_folder import refuse_foreign_folder, save_model
from quambase.apply.int8.needed_scales import check_model, unsafe_sites
from quambase.apply.int8.weights import UPSTREAM
from quambase.apply.scale_choice import DEFAULT_OTHERWISE, choose_scales, describe, notes_on
from quambase.apply.second_moments import second_moments_of
from quambase.model.checkpoint import LoadedModel, load_model
from quambase.model.inputs.names import bundled_models
from quambase.schema.errors import ModelNotFound
from quambase.schema.files import local_folder
from quambase.schema.scale_table import MIXED, SELECTED, ScaleTable, read_scales
from quambase.schema.stored.int8_models import remember


@dataclass(frozen=True)
class Applied:
    """Result of `apply`: the model's folder, the strategy's name, how many operators are in 16 bit, the sites where
    upstream's kernel would wrap, notes for the user, a line each, and whether the database remembers the model.
    """

    folder: Path
    strategy: str
    operators_in_16_bit: int
    unsafe: list[tuple[int, str]]
    notes: list[str]
    remembered: bool


def load_source(table: ScaleTable, model: str | Path | None) -> LoadedModel:
    """The float model of a scale table, found by ``model`` or by the table's provenance. ScalesInvalid: it is another
    model.
    """
    loaded = load_named(table.model.name, str(table.model.path), model)
    check_model(table, loaded.weights_sha256, loaded.name)
    return loaded


def load_named(name: str, path: str, model: str | Path | None) -> LoadedModel:
    """Load the float model ``model`` or, if that is None, the one recorded as ``name`` at ``path``.

    ModelNotFound: it is no longer at ``path``.
    """
    if model is not None:
        return load_model(str(model))
    if name not in bundled_models() and Path(path).is_dir():
        return load_model(path)
    try:
        return load_model(name)
    except ModelNotFound as error:
        raise ModelNotFound(
            f"the model {name} was at {path} when it was collected, and is no longer there; name its folder with "
            f"--model ({error})"
        ) from None


def apply(
    scales: str | Path,
    *,
    strategy: str | None = None,
    at: Collection[str] = (),
    otherwise: str = DEFAULT_OTHERWISE,
    granularity: str | None = None,
    quantize_lm_head: bool = False,
    quantize_embedding: bool = False,
    compat: str | None = None,
    weight_bits: int = 8,
    gptq: bool = False,
    db: str | Path = Path("quambase-db"),
    out: str | Path | None = None,
    model: str | Path | None = None,
) -> Applied:
    """Load one strategy's scales into the INT8 model and write it to ``out`` (default ``db/models/<id>``).

    strategy     a label of the table; "selected": each site's selected row; "mixed": these with the operators in 16 bit
                 that `analyze` chose. None: mixed if the table has it, else selected
    at           use ``strategy`` only at these sites, and ``otherwise`` at the others
    granularity  the finest division of a Mamba-2's sites to use; None: the table's finest
    compat       None, or "upstream": reproduce its wrapping Hadamard quantizer and its embedding maximum
    weight_bits  of in_proj, x_proj and out_proj: 8, or 4 (groups of 128 inputs, rounded to nearest)
    gptq         round weights of 4 bits as GPTQ does, by the second moments of the scales' run in ``db``
    model        the floating-point model, if it is not at the path in the scale table

    An existing ``out`` must be empty or an INT8 model's folder.
    Errors: OutputRefused, ScalesInvalid, UnknownName, ModelNotFound, CheckpointInvalid, DatabaseInvalid, RunBusy.
    """
    db, out = local_folder(db), None if out is None else Path(out)
    if out is not None:
        refuse_foreign_folder(out)
    table = read_scales(Path(scales))
    strategy = strategy or table.default_label
    chosen = choose_scales(table, strategy, at, otherwise, granularity)
    moments = second_moments_of(db, table) if gptq else None
    loaded = load_source(table, model)
    used_scales = check_any_scales(loaded.any_weights, table, chosen, quantize_lm_head)
    int8 = build_model(
        loaded.any_weights,
        table,
        used_scales,
        quantize_lm_head=quantize_lm_head,
        quantize_embedding=quantize_embedding,
        compat=compat,
        weight_bits=weight_bits,
        second_moments=moments,
        in_16_bit=table.in_16_bit_for(strategy),
    )
    settings = {
        "strategy": describe(strategy, at, otherwise, granularity),
        "source": {"name": loaded.name, "path": str(loaded.path.resolve()), "bundled": loaded.bundled},
        "weights_sha256": loaded.weights_sha256,
        "tokenizer_sha256": loaded.tokenizer_sha256,
        "run": table.run,
    }
    folder = out or db / "models" / _id(int8, settings)
    labels = [strategy, *([otherwise] if at else []), DEFAULT_OTHERWISE]
    rows = _rows_of(table, labels), table.provenance
    save_model(folder, int8, settings, loaded.tokenizer.path, rows)
    notes, remembered = notes_on(table), True
    try:
        remember(db, folder)
    except OSError as error:
        remembered = False
        notes.append(f"{db} cannot be written ({error.strerror}): `evaluate` needs the folder's name, {folder}")
    unsafe = unsafe_sites(table, used_scales) if compat == UPSTREAM else []
    return Applied(folder, str(settings["strategy"]), len(int8.in_16_bit), unsafe, notes, remembered)


def _id(model: Int8LanguageModel, settings: dict[str, Any]) -> str:
    """The model's id: a hash of all that determines it."""
    weights = model.weights
    switches: list[Any] = [model.quantized_lm_head, weights.embedding_scales is not None, model.compat]
    switches += [weights.weight_bits] if weights.weight_bits != 8 else []
    switches += ["gptq"] if weights.gptq else []
    used = {f"{layer}/{site}": as_json(scale) for (layer, site), scale in model.scales.items()}
    mixed = [sorted(model.in_16_bit)] if model.in_16_bit else []
    identity = [settings["weights_sha256"], settings["strategy"], switches, used, *mixed]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _rows_of(table: ScaleTable, labels: Collection[str]) -> pa.Table:
    """The rows of these labels, and every selected row if "selected" or "mixed" is among them."""
    wanted = pc.is_in(table.table["label"], value_set=pa.array(sorted(labels), pa.string()))
    if SELECTED in labels or MIXED in labels:
        wanted = pc.or_(wanted, table.table["selected"])
    return table.table.filter(wanted)
