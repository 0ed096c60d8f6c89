"""Exports a scale table in upstream Quamba's own form: a file with `act_scales` and `reorder_params`.

The file is a `torch.save` of ``{"act_scales": [...], "reorder_params": {...} | None, "quambase": "..."}``: plain lists,
dicts, tuples and tensors on the CPU, read with ``torch.load(path, weights_only=True)``.

act_scales      a dict per layer and one for the head, each from upstream's site name to scale. A scale is a float32
                tensor: 0-d, or (SSD groups,) of B and C of a sorted Mamba-2. Its x and state have, for each SSD group,
                a list of its head groups: (heads () int32, channels (channel groups,) int32, scales). Those scales are
                (channel groups,), of the state (channel groups, d_state)
reorder_params  of a sorted Mamba-2 head_index, head_groups, channel_index, channel_group, each a tensor per layer
                (`quambase.schema.groups.LayerGroups`)
quambase        JSON: the origin of the scales

Upstream's kernels need the scales on the GPU (`on_device`). After its ``configure_model`` they replace its calibration:
``reorder_mamba``, ``fuse_had_matrices``, ``quantize_fp16_model`` (`apply.upstream.backend`).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch

from quambase.apply.int8.group_scales import STATE, X
from quambase.apply.int8.needed_scales import Replaced, Scales, checked_scale, clip_safe, missing_scale
from quambase.apply.scale_choice import DEFAULT_OTHERWISE, choose_scales, describe, notes_on
from quambase.schema import FORMAT_VERSION
from quambase.schema.errors import ScalesInvalid
from quambase.schema.files import refuse_foreign_file, replacing
from quambase.schema.groups import LayerGroups
from quambase.schema.scale_table import MIXED, SELECTED, Scale, ScaleTable, SymmetricScale, read_scales
from quambase.schema.sites import FAMILIES, HEAD_LAYER, MAMBA2, layer_sites
from quambase.schema.stored.model_info import ModelInfo
from quambase.schema.values.number_format import Affine

HeadGroup = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Grouped = list[list[HeadGroup]]
UpstreamScale = torch.Tensor | Grouped

BY_SSD = ("B_conv_out:input", "C_conv_out:input")

SAME_AS_INPUT = ("z_act", "x_conv_in", "B_conv_in", "C_conv_in", "dt_act")
"""Identities whose codes upstream's Mamba-2 makes with the scale of ``:input`` and dequantizes with that of
``:output``.
"""


@dataclass(frozen=True)
class Exported:
    """An export: its file, the scales that were replaced, and notes for the user, a line each."""

    path: Path
    replaced: list[Replaced]
    notes: list[str]


def export_act_scales(
    scales: Path,
    out: Path,
    *,
    strategy: str = SELECTED,
    at: Collection[str] = (),
    otherwise: str = DEFAULT_OTHERWISE,
    granularity: str | None = None,
    force: bool = False,
) -> Exported:
    """Write one strategy's scales (``at`` some sites, ``otherwise``'s elsewhere) to ``out`` as upstream has them.

    Scales of a coarser ``granularity`` than upstream's form are repeated. ``force``: replace ``out`` even if it is not
    such an export. Equal scales give equal bytes.

    Upstream's Hadamard quantizer at out_proj:input wraps where ours clamps: scales that clip there are replaced
    (`quambase.apply.int8.needed_scales.clip_safe`).

    OutputRefused: ``out`` is not such an export. ScalesInvalid: a scale that the INT8 model reads is missing, or
    upstream has no form for the groups.
    """
    refuse_foreign_file(out, _is_export, "export of scales", force=force)
    table = read_scales(scales)
    content, replaced = upstream_form(table, strategy, at, otherwise, granularity)
    buffer = io.BytesIO()
    torch.save(content, buffer)  # not to a path, whose name would be written into the file
    with replacing(out) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return Exported(out, replaced, notes_on(table))


def _is_export(path: Path) -> bool:
    """Whether `export_act_scales` wrote the file: a PyTorch zip archive whose pickle contains the name act_scales."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            # torch.save does not compress; what another program packed is not ours, however large it is.
            stored = [entry for entry in entries if entry.compress_type == zipfile.ZIP_STORED]
            return any(b"act_scales" in archive.read(entry) for entry in stored)
    except Exception:  # a damaged archive raises BadZipFile, RuntimeError, NotImplementedError, EOFError and others
        return False


def upstream_form(
    table: ScaleTable,
    strategy: str,
    at: Collection[str] = (),
    otherwise: str = DEFAULT_OTHERWISE,
    granularity: str | None = None,
) -> tuple[dict[str, Any], list[Replaced]]:
    """The content that `export_act_scales` writes, and the scales that were replaced because they would clip."""
    model = table.model
    family = model.family
    if family not in FAMILIES:
        raise ScalesInvalid(f"the scale table describes {model.name} (family {family}); expected a Mamba model's")
    if strategy == MIXED:
        raise ScalesInvalid("upstream's INT8 model has no operator in 16 bit, as mixed has; name another strategy")
    chosen, replaced = clip_safe(table, choose_scales(table, strategy, at, otherwise, granularity))
    n_layer = model.n_layer
    sites = list(layer_sites(n_layer, family))
    needed = [(layer, site.name) for layer, site in sites if site.consumed and layer != HEAD_LAYER]
    if missing := [key for key in needed if key not in chosen]:
        raise missing_scale(missing, needed)
    groups = model.layer_groups
    form = _Form(chosen, groups, model)
    layers: list[dict[str, UpstreamScale]] = [{} for _ in range(n_layer + 1)]
    for layer, site in sites:
        name, _, end = site.name.partition(":")
        source = f"{name}:input" if family == MAMBA2 and end == "output" and name in SAME_AS_INPUT else site.name
        if (layer, source) in chosen:
            layers[layer][site.name] = form.scale(layer, source)
    origin = {
        "format_version": FORMAT_VERSION,
        "quambase": version("quambase"),
        "strategy": describe(strategy, at, otherwise, granularity),
        "replaced": [str(one) for one in replaced],
        "run": table.run,
        "model": {key: value for key, value in model.to_json().items() if key not in ("groups", "path")},
        "weights_sha256": table.weights_sha256,
    }
    content = {
        "act_scales": layers,
        "reorder_params": None if groups is None else reorder_params(groups),
        "quambase": json.dumps(origin, sort_keys=True),
    }
    return content, replaced


class _Form:
    """Converts the chosen scales to upstream's form."""

    def __init__(self, chosen: Scales, groups: Sequence[LayerGroups] | None, model: ModelInfo) -> None:
        self.chosen, self.groups = chosen, groups
        if groups is not None and "d_state" not in model.sizes:
            raise ScalesInvalid("the scale table does not say the model's d_state; collect and analyze again")
        self.d_state = model.sizes.get("d_state", 0)

    def scale(self, layer: int, site: str) -> UpstreamScale:
        scale = _symmetric(layer, site, self.chosen[layer, site])
        if self.groups is not None and layer != HEAD_LAYER:
            if site in (X, STATE):
                return self._grouped(layer, site, scale)
            if site in BY_SSD:
                return _float32(
                    _repeated(layer, site, scale, [(g,) for g in range(len(self.groups[layer].head_groups))])
                )
        if isinstance(scale, tuple) and site.endswith(":output"):
            return _float32(max(scale))  # no kernel reads it; upstream has one scale there
        if isinstance(scale, tuple):
            raise ScalesInvalid(
                f"layer {layer} {site} has {len(scale)} scale groups; upstream has one per tensor, or the sorted ones: "
                "use --granularity tensor, or collect without --groups none"
            )
        return _float32(checked_scale(layer, site, scale))

    def _grouped(self, layer: int, site: str, scale: SymmetricScale) -> Grouped:
        assert self.groups is not None
        groups = self.groups[layer]
        check_rectangular(groups, layer)
        numbers = [(group.ssd_group, group.head_group, group.channel_group) for group in groups.groups()]
        values: list[Any] = _repeated(layer, site, scale, numbers)
        if site == STATE:
            values = [value if isinstance(value, tuple) else (value,) * self.d_state for value in values]
        left = iter(values)
        return [
            [
                (
                    torch.tensor(heads, dtype=torch.int32),
                    torch.tensor(sizes, dtype=torch.int32),
                    _float32([next(left) for _ in sizes]),
                )
                for heads, sizes in zip(of_heads, of_channels, strict=True)
            ]
            for of_heads, of_channels in zip(groups.head_groups, groups.channel_group, strict=True)
        ]


def _symmetric(layer: int, site: str, scale: Scale) -> SymmetricScale:
    """``scale``, unless it has a zero point: ScalesInvalid."""
    parts = scale if isinstance(scale, tuple) else (scale,)
    if isinstance(scale, Affine) or any(isinstance(part, Affine) for part in parts):
        raise ScalesInvalid(
            f"layer {layer} {site} has a zero point, which upstream's kernels do not read; take another strategy, or "
            "analyze with --target upstream"
        )
    return cast(SymmetricScale, scale)


def _repeated(layer: int, site: str, scale: SymmetricScale, numbers: Sequence[tuple[int, ...]]) -> list[Any]:
    """The scale, or scales per state index, of each of the groups ``numbers``. ``scale`` may divide the groups by none,
    the first ones, or all of the numbers.
    """

    def checked(part: float | tuple[float, ...]) -> float | tuple[float, ...]:
        if isinstance(part, tuple):
            return tuple(checked_scale(layer, site, value) for value in part)
        return checked_scale(layer, site, part)

    values = [checked(part) for part in (scale if isinstance(scale, tuple) else (scale,))]
    for depth in range(len(numbers[0]) + 1):
        coarse = list(dict.fromkeys(number[:depth] for number in numbers))
        if len(coarse) == len(values):
            return [values[coarse.index(number[:depth])] for number in numbers]
    raise ScalesInvalid(
        f"layer {layer} {site} has {len(values)} scale groups, which is none of its divisions; analyze again"
    )


def check_rectangular(groups: LayerGroups, layer: int) -> None:
    """ScalesInvalid unless all SSD groups have equally many head groups, and those equally many channel groups."""
    heads = {len(sizes) for sizes in groups.head_groups}
    channels = {len(sizes) for of_heads in groups.channel_group for sizes in of_heads}
    if len(heads) > 1 or len(channels) > 1:
        raise ScalesInvalid(
            f"layer {layer} has {sorted(heads)} head groups and {sorted(channels)} channel groups; upstream needs "
            "equal numbers everywhere: collect with --groups none"
        )


def _float32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def reorder_params(groups: Sequence[LayerGroups]) -> dict[str, list[torch.Tensor]]:
    """Upstream's `reorder_params` of these layers, on the CPU."""
    return {
        "head_groups": [torch.tensor(layer.head_groups, dtype=torch.int32) for layer in groups],
        "head_index": [torch.tensor(layer.head_index) for layer in groups],
        "channel_group": [torch.tensor(layer.channel_group, dtype=torch.int32) for layer in groups],
        "channel_index": [torch.tensor(layer.channel_index) for layer in groups],
    }


def on_device(value: Any, device: torch.device | str) -> Any:
    """``value`` (tensors in dicts, lists and tuples) with every tensor on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on_device(inner, device) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_device(inner, device) for inner in value)
    return value
