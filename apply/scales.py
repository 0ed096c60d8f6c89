"""From a scale table to the activation scales an INT8 model reads."""

from __future__ import annotations

import math
from collections.abc import Mapping

from quambase.apply.int8 import float32
from quambase.model.weights import MambaConfig
from quambase.schema.errors import ScalesInvalid
from quambase.schema.sites import HEAD_LAYER, layer_sites

Scales = Mapping[tuple[int, str], float]
"""(layer, site) to a positive scale."""


def needed_sites(config: MambaConfig, quantize_lm_head: bool) -> list[tuple[int, str]]:
    """The (layer, site) pairs whose scales the model reads."""
    return [
        (layer, site.name)
        for layer, site in layer_sites(config.n_layer)
        if site.consumed and (layer != HEAD_LAYER or quantize_lm_head)
    ]


def check_scales(scales: Scales, needed: list[tuple[int, str]]) -> dict[tuple[int, str], float]:
    """The needed scales, rounded to float32. ScalesInvalid: one is missing, not finite, or not positive."""
    missing = [key for key in needed if key not in scales]
    if missing:
        layer, site = missing[0]
        raise ScalesInvalid(
            f"no scale for layer {layer} {site} ({len(missing)} of {len(needed)} missing); "
            "collect every site of the model and analyze again"
        )
    found = {key: float32(scales[key]) for key in needed}
    for (layer, site), scale in found.items():
        if not (math.isfinite(scale) and scale > 0):
            raise ScalesInvalid(
                f"the scale at layer {layer} {site} is {scale}; expected a positive finite number: "
                "analyze again"
            )
    return found
