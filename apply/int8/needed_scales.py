"""The activation scales that an INT8 model reads, and whether a scale table has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from quambase.apply.int8.arithmetic import float32
from quambase.model.block import ModelConfig
from quambase.schema.errors import ScalesInvalid
from quambase.schema.scale_table import Scale, ScaleTable
from quambase.schema.sites import AFFINE_SITES, FAMILIES, HEAD_LAYER, WHOLE, find_site, is_model_site, layer_sites
from quambase.schema.values.number_format import INT8, Affine

Scales = Mapping[tuple[int, str], Scale]
"""(layer, site) to a positive scale, or to one per scale group if the block reads groups."""


def needed_sites(config: ModelConfig, quantize_lm_head: bool) -> list[tuple[int, str]]:
    """The (layer, site) pairs whose scales the model reads."""
    return [
        (layer, site.name)
        for layer, site in layer_sites(config.n_layer, config.kind)
        if site.consumed and (layer != HEAD_LAYER or quantize_lm_head)
    ]


def missing_scale(missing: list[tuple[int, str]], needed: list[tuple[int, str]]) -> ScalesInvalid:
    """The error for ``missing`` of the ``needed`` scales; it names the first."""
    layer, site = missing[0]
    return ScalesInvalid(
        f"no scale for layer {layer} {site} ({len(missing)} of {len(needed)} missing): the strategy has no plain INT8 "
        "scale there, or the run lacks the site; name another strategy, or collect every site and analyze again"
    )


def checked_affine(layer: int, site: str, scale: float | Affine) -> float | Affine:
    """As `checked_scale`, also with a zero point. ScalesInvalid: nothing reads one there, or it is not a code."""
    if not isinstance(scale, Affine):
        return checked_scale(layer, site, scale)
    if site not in AFFINE_SITES or not INT8.qmin <= scale.zero_point <= INT8.qmax:
        raise ScalesInvalid(
            f"layer {layer} {site} has the zero point {scale.zero_point}; expected {INT8.qmin} to {INT8.qmax}, and 0 "
            f"but at {', '.join(sorted(AFFINE_SITES))}"
        )
    return Affine(checked_scale(layer, site, scale.scale), scale.zero_point)


def checked_scale(layer: int, site: str, scale: float) -> float:
    """``scale`` rounded to float32; ScalesInvalid unless it is positive and finite."""
    value = float32(scale)
    if not (math.isfinite(value) and value > 0):
        raise ScalesInvalid(
            f"the scale at layer {layer} {site} is {value}; expected a positive finite number: analyze again"
        )
    return value


def check_model(table: ScaleTable, weights_sha256: str, name: str) -> None:
    """ScalesInvalid unless the table's scales were computed from a run of the model with these weights."""
    model = table.model
    if model.family not in FAMILIES:
        raise ScalesInvalid(
            f"the scale table describes '{model.name}' (family {model.family}), "
            "no Mamba model; expected scales of a run of `collect --model NAME`"
        )
    found = table.weights_sha256
    if found != weights_sha256:
        raise ScalesInvalid(
            f"the scale table belongs to model {model.name} (weights {str(found)[:12]}), "
            f"not to {name} (weights {weights_sha256[:12]}); give that model with --model, "
            f"or collect and analyze {name}"
        )


def loadable_labels(table: ScaleTable, needed: list[tuple[int, str]]) -> tuple[list[str], list[str]]:
    """The labels that have a plain INT8 scale at every needed site, and the others."""
    whole: list[str] = []
    partial: list[str] = []
    for label in table.labels():
        (whole if set(needed) <= table.group_scales_for(label).keys() else partial).append(label)
    return whole, partial


def unsafe_sites(table: ScaleTable, scales: Scales) -> list[tuple[int, str]]:
    """Sites whose consumer does not saturate upstream and whose scale clips values seen in calibration.

    Upstream's kernel would wrap there: ``round(amax / scale) > 127``. Imported scales, without amax, are not checked.
    """
    amax = _amax(table)
    family = table.model.family
    return [
        key
        for key, scale in scales.items()
        if is_model_site(key[1], family)
        and not find_site(key[1], family).saturates
        and isinstance(scale, float)
        and not _clips_nothing(amax[key], scale)
    ]


def _amax(table: ScaleTable) -> dict[tuple[int, str], float | None]:
    rows = table.table.select(["layer", "site", "amax"]).to_pylist()
    return {(row["layer"], row["site"]): row["amax"] for row in rows}


def _clips_nothing(amax: float | None, scale: float) -> bool:
    return amax is None or amax < INT8.rounds_beyond * scale


@dataclass(frozen=True)
class Replaced:
    """A scale at which upstream's kernel would wrap, ``before``, and its replacement, ``scale`` of the strategy
    ``label``.
    """

    layer: int
    site: str
    before: float
    label: str
    scale: float

    def __str__(self) -> str:
        return f"layer {self.layer} {self.site}: scale {self.before:.4g} clips, {self.scale:.4g} ({self.label}) instead"


def clip_safe(table: ScaleTable, scales: Scales) -> tuple[dict[tuple[int, str], Scale], list[Replaced]]:
    """``scales`` for upstream's INT8 model. At sites whose upstream kernel wraps modulo 256, a scale that clips is
    replaced by the table's scale of least squared error that clips nothing, or by absmax if there is none.
    """
    unsafe = set(unsafe_sites(table, scales))
    found, replaced, amax = {**scales}, [], _amax(table)
    rows = [row for row in table.table.to_pylist() if (row["layer"], row["site"]) in unsafe and not row["needs_decode"]]
    for layer, site in sorted(unsafe):
        largest = amax[layer, site]
        before = scales[layer, site]
        assert largest is not None and isinstance(before, float)
        safe = [
            (row["mse"], row["scale"], row["label"])
            for row in rows
            if (row["layer"], row["site"], row["group_name"]) == (layer, site, WHOLE)
            and row["mse"] is not None
            and _clips_nothing(largest, row["scale"])
        ]
        _, scale, label = min(safe, default=(0.0, float32(largest / INT8.qmax), "absmax"))
        found[layer, site] = scale
        replaced.append(Replaced(layer, site, before, label, scale))
    return found, replaced
