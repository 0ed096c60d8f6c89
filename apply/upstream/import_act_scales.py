"""Imports a file of upstream Quamba's act_scales (`quambase.apply.upstream.act_scales`) as a scale table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from quambase.apply.int8.group_scales import STATE, X
from quambase.apply.int8.needed_scales import checked_scale, needed_sites
from quambase.apply.upstream.act_scales import check_rectangular
from quambase.model.checkpoint import LoadedModel, load_model
from quambase.model.inputs.tensor_files import read_pytorch
from quambase.schema import FORMAT_VERSION
from quambase.schema.checksums import file_sha256
from quambase.schema.errors import DatabaseInvalid, ScalesInvalid, first_line
from quambase.schema.files import check_format_version
from quambase.schema.groups import GROUP, TENSOR, LayerGroups, granularity_of
from quambase.schema.scale_table import refuse_foreign_table, write_scales
from quambase.schema.sites import HEAD_LAYER, WHOLE, find_site, is_model_site
from quambase.schema.tables import SCALES

IMPORTED = "imported"
"""Strategy and label of the rows, which are the selected ones."""

Row = tuple[str, float, list[float] | None]
"""group_name, scale, and a scale for each state index if those of the layer differ (``scale`` is the largest)."""


def import_act_scales(path: Path, model: str, out: Path, *, force: bool = False) -> int:
    """Write the scales in ``path`` as the scale table ``out``; returns the number of rows.

    path   a file of `act_scales.export_act_scales`, or upstream's own list alone, saved with `torch.save` (only if it
           has no groups, which need reorder_params)
    model  the floating-point model of the scales, as in `quambase.model.checkpoint.load_model`
    force  replace ``out`` even if it is not a scale table

    Columns that only activations determine (amax, errors, codes) are null.
    Errors: ScalesInvalid, and load_model's.
    """
    refuse_foreign_table(out, force=force)
    content = _read(path)
    loaded = load_model(model)
    origin = _origin(path, content, loaded)
    groups = _groups(path, content, loaded)
    rows = list(_rows(path, content["act_scales"], groups, loaded))
    run = f"{IMPORTED}-{file_sha256(path)[:12]}"
    family = loaded.family
    about = {
        "name": loaded.name,
        "path": loaded.name if loaded.bundled else str(loaded.path.resolve()),
        "family": family,
        **asdict(loaded.any_weights.config),
        **({"groups": {"variant": IMPORTED, "layers": [layer.to_json() for layer in groups]}} if groups else {}),
    }
    unknown = dict.fromkeys(SCALES.names)
    table = [
        unknown
        | {"run": run, "layer": layer, "site": site, "group_name": name}
        | {"strategy": IMPORTED, "label": IMPORTED, "params": "{}", "granularity": granularity_of(name)}
        | {"scale": scale, "component_scales": components}
        | {"qmin": -128, "qmax": 127, "needs_decode": False, "selected": True}
        | {"consumed": find_site(site, family).consumed, "decode_only": find_site(site, family).decode_only}
        for layer, site, (name, scale, components) in rows
    ]
    provenance = {
        "format_version": FORMAT_VERSION,
        "quambase": version("quambase"),
        "granularity": GROUP if groups else TENSOR,
        "runs": {run: {"model": about, "identity": {"weights_sha256": loaded.weights_sha256}, "data": {}}},
        "imported": {"file": path.name, "origin": origin},
    }
    write_scales(out, pa.Table.from_pylist(table, schema=SCALES), provenance)
    return len(table)


def _read(path: Path) -> dict[str, Any]:
    """The file's act_scales, reorder_params and quambase; the last two may be None."""
    raw = read_pytorch(path, ScalesInvalid)
    found = raw if isinstance(raw, dict) else {"act_scales": raw}
    scales = found.get("act_scales")
    if not isinstance(scales, list) or not scales or not all(isinstance(layer, dict) for layer in scales):
        raise ScalesInvalid(
            f"{path} holds no act_scales; expected a list of dicts, one for each layer and one for the head, alone or "
            "as the entry act_scales of a dict"
        )
    return {"act_scales": scales, **{key: found.get(key) for key in ("reorder_params", "quambase")}}


def _origin(path: Path, content: dict[str, Any], loaded: LoadedModel) -> dict[str, Any] | None:
    """The provenance that `apply --export` wrote; None without it. ScalesInvalid: the scales are for other weights."""
    if content["quambase"] is None:
        return None
    try:
        origin: dict[str, Any] = json.loads(content["quambase"])
        weights, format_version = origin["weights_sha256"], int(origin["format_version"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise ScalesInvalid(f"the provenance in {path} is damaged; export it again") from None
    check_format_version(path, format_version, FORMAT_VERSION, ScalesInvalid)
    if weights is not None and weights != loaded.weights_sha256:
        raise ScalesInvalid(
            f"{path} has scales of other weights ({str(weights)[:12]}) than {loaded.name} "
            f"({loaded.weights_sha256[:12]}); give their model with --model"
        )
    return origin


def _groups(path: Path, content: dict[str, Any], loaded: LoadedModel) -> list[LayerGroups] | None:
    """The groups of heads and channels in reorder_params; None without them."""
    raw = content["reorder_params"]
    if raw is None:
        return None
    config = loaded.any_weights.config
    n_layer = config.n_layer
    try:
        plain = {key: [tensor.tolist() for tensor in tensors] for key, tensors in raw.items()}
        if any(len(tensors) != n_layer for tensors in plain.values()):
            raise ValueError("as many tensors as layers are expected")
        groups = [LayerGroups.from_json({key: tensors[i] for key, tensors in plain.items()}) for i in range(n_layer)]
    except (AttributeError, KeyError, TypeError, ValueError, DatabaseInvalid) as error:
        raise ScalesInvalid(
            f"the reorder_params in {path} are not upstream's ({first_line(error)}); save them again"
        ) from None
    for layer, found in enumerate(groups):
        check_rectangular(found, layer)
        sizes = (len(found.head_index), len(found.channel_index), len(found.head_groups))
        if sizes != config.head_layout:
            raise ScalesInvalid(
                f"the reorder_params in {path} are of {sizes[0]} heads, {sizes[1]} channels and {sizes[2]} SSD groups, "
                f"which {loaded.name} has not; give their model with --model"
            )
    return groups


def _rows(
    path: Path, scales: list[dict[str, Any]], groups: list[LayerGroups] | None, loaded: LoadedModel
) -> Iterator[tuple[int, str, Row]]:
    """(layer, site, row) of every scale, layer by layer, the head's last."""
    config, family = loaded.any_weights.config, loaded.family
    if len(scales) != config.n_layer + 1:
        raise ScalesInvalid(
            f"{path} has scales of {len(scales) - 1} layers and a head, {loaded.name} has {config.n_layer} layers; "
            "give their model with --model"
        )
    for layer, site in needed_sites(config, quantize_lm_head=False):
        if site not in scales[layer]:
            raise ScalesInvalid(
                f"{path} has no scale for layer {layer} {site}, which the INT8 model reads; calibrate again with the "
                "current upstream, or name the model they are for with --model"
            )
    for place, found in enumerate(scales):
        layer = HEAD_LAYER if place == config.n_layer else place
        for site, value in found.items():
            if not isinstance(site, str) or not is_model_site(site, family):
                raise ScalesInvalid(f"{path} has a scale at {site}, which is no site of a {family} model")
            for row in _site_rows(path, layer, site, value, groups, config.d_state):
                yield layer, site, row


def _site_rows(
    path: Path, layer: int, site: str, value: Any, groups: list[LayerGroups] | None, d_state: int
) -> Iterator[Row]:
    """A site's scale or scales, each checked."""

    def checked(values: torch.Tensor) -> list[float]:
        return [checked_scale(layer, site, one) for one in values.to(torch.float32).flatten().tolist()]

    if isinstance(value, torch.Tensor) and value.numel() == 1:
        yield WHOLE, checked(value)[0], None
        return
    if isinstance(value, torch.Tensor) and value.dim() == 1:
        yield from ((f"g{i}", scale, None) for i, scale in enumerate(checked(value)))
        return
    if not isinstance(value, list) or site not in (X, STATE):
        raise ScalesInvalid(f"{path}: layer {layer} {site} is no scale tensor and no scales of sorted groups")
    if groups is None:
        raise ScalesInvalid(
            f"{path} has scales of sorted heads and channels and no reorder_params; save both as a dict: "
            "act_scales, reorder_params"
        )
    layout = groups[layer]
    per_group = d_state if site == STATE else 1
    values: list[float] = []
    try:
        for of_heads, heads, channels in zip(value, layout.head_groups, layout.channel_group, strict=True):
            for (size, sizes, tensor), expected, widths in zip(of_heads, heads, channels, strict=True):
                # Upstream's loop leaves a stale value in the state's second entry, which nothing reads.
                if int(size) != expected or (site == X and tuple(int(s) for s in sizes) != widths):
                    raise ValueError("sizes differ from reorder_params")
                if tensor.numel() != per_group * len(widths):
                    raise ValueError(f"{tensor.numel()} scales for {len(widths)} channel groups")
                values += checked(tensor)
    except (TypeError, ValueError, AttributeError) as error:
        raise ScalesInvalid(
            f"{path}: layer {layer} {site} has not the groups of reorder_params ({first_line(error)})"
        ) from None
    mine = [values[start : start + per_group] for start in range(0, len(values), per_group)]
    by_index = any(len(set(of_group)) > 1 for of_group in mine)
    for group, of_group in zip(layout.groups(), mine, strict=True):
        yield group.name, max(of_group), of_group if by_index else None
