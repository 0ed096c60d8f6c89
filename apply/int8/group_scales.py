"""The activation scales of an INT8 model: one per tensor, or one per scale group where a block reads groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quambase.apply.int8.needed_scales import Scales, checked_affine, checked_scale, missing_scale, needed_sites
from quambase.model.block import ModelConfig
from quambase.schema.errors import ScalesInvalid
from quambase.schema.groups import LayerGroups
from quambase.schema.scale_table import Scale
from quambase.schema.sites import find_site
from quambase.schema.values.number_format import Affine

ChannelGroups = Sequence[Sequence[torch.Tensor]]
"""Per layer the divisions of the channels of x, each the scale group of every channel (e,), int64; empty if the sizes
determine the groups.
"""

X, STATE = BY_CHANNEL_GROUP = ("x_conv_out:input", "ssm_state_act:input")
"""The sites whose scale groups divide the channels of x."""


def values_of(scale: Scale) -> torch.Tensor:
    """A site's scales as float32 (groups,), or (groups, n) of one per group and state index."""
    parts = scale if isinstance(scale, tuple) else (scale,)
    return torch.tensor([part.scale if isinstance(part, Affine) else part for part in parts], dtype=torch.float32)


def as_json(scale: Scale) -> Any:
    """A site's scale or scales as JSON; one with a zero point is an object of both."""
    if isinstance(scale, tuple):
        return [as_json(part) for part in scale]
    return {"scale": scale.scale, "zero_point": scale.zero_point} if isinstance(scale, Affine) else scale


def zero_points_of(scale: Scale) -> torch.Tensor:
    """A site's zero points as int32 (groups,); 0 where there is none."""
    parts = scale if isinstance(scale, tuple) else (scale,)
    return torch.tensor([part.zero_point if isinstance(part, Affine) else 0 for part in parts], dtype=torch.int32)


def channel_maps(layers: Sequence[LayerGroups]) -> list[list[torch.Tensor]]:
    """For each layer the head group and the scale group of every channel of x (e,) in the reordered model, both
    numbered in the order of `LayerGroups.groups`.
    """
    maps = []
    for groups in layers:
        by_head, by_channel = (torch.empty(len(groups.channel_index), dtype=torch.int64) for _ in range(2))
        heads: dict[tuple[int, int], int] = {}
        for number, group in enumerate(groups.groups()):
            by_channel[list(group.channels)] = number
            by_head[list(group.channels)] = heads.setdefault((group.ssd_group, group.head_group), len(heads))
        maps.append([by_head, by_channel])
    return maps


def channel_groups_of(config: ModelConfig, divisions: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """The group (0 to count - 1) of each channel of x (e,), int64: all one group, the SSD groups, or the one of the
    layer's ``divisions`` with ``count`` groups. Divisions are nested, so two of equal count are equal.
    """
    if count in (1, _ssd_groups(config)):
        return torch.arange(config.d_inner) // (config.d_inner // count)
    return next(index for index in divisions if int(index.max()) + 1 == count)


def scale_of_channels(config: ModelConfig, divisions: Sequence[torch.Tensor], site: str, scale: Scale) -> torch.Tensor:
    """A site's scale of each channel, float32 (channels,); ``divisions`` as in `channel_groups_of`."""
    return _of_channels(config, divisions, site, values_of(scale))


def zero_point_of_channels(
    config: ModelConfig, divisions: Sequence[torch.Tensor], site: str, scale: Scale
) -> torch.Tensor:
    """A site's zero point of each channel, likewise."""
    return _of_channels(config, divisions, site, zero_points_of(scale)).to(torch.float32)


def _of_channels(
    config: ModelConfig, divisions: Sequence[torch.Tensor], site: str, values: torch.Tensor
) -> torch.Tensor:
    """(channels,) of ``values``, one for each group."""
    if site in BY_CHANNEL_GROUP:
        return values[channel_groups_of(config, divisions, len(values))]
    return torch.repeat_interleave(values, config.site_edges()[site][-1] // len(values))


def _ssd_groups(config: ModelConfig) -> int:
    return config.head_layout.ssd_groups if config.head_layout else 1


def check_scales(
    scales: Scales, config: ModelConfig, channel_groups: ChannelGroups, quantize_lm_head: bool
) -> dict[tuple[int, str], Scale]:
    """The scales that the model reads, rounded to float32.

    ScalesInvalid: one is missing, not finite or not positive, or their number is not that of the site's groups.
    """
    needed = needed_sites(config, quantize_lm_head)
    missing = [key for key in needed if key not in scales]
    if missing:
        raise missing_scale(missing, needed)
    found: dict[tuple[int, str], Scale] = {}
    for layer, site in needed:
        scale = scales[layer, site]
        _check_count(layer, site, scale, config, channel_groups)
        found[layer, site] = _checked(layer, site, scale, config.d_state)
    return found


def _checked(layer: int, site: str, scale: Scale, d_state: int) -> Scale:
    """``scale`` rounded to float32; a tuple of one scale becomes that scale."""
    if not isinstance(scale, tuple):
        return checked_affine(layer, site, scale)
    groups: list[float | Affine] = []
    by_index: list[tuple[float, ...]] = []
    for part in scale:
        if not isinstance(part, tuple):
            groups.append(checked_affine(layer, site, part))
            continue
        if site != STATE or len(part) != d_state:
            expected = f"one for each of the {d_state} state indices" if site == STATE else "one"
            raise ScalesInvalid(
                f"layer {layer} {site} has {len(part)} scales in a group, expected {expected}; analyze again"
            )
        by_index.append(tuple(checked_scale(layer, site, value) for value in part))
    if by_index and groups:
        raise ScalesInvalid(f"layer {layer} {site} has scales by state index in some groups only; analyze again")
    if by_index:
        return tuple(by_index)
    return tuple(groups) if len(groups) > 1 else groups[0]


def _check_count(layer: int, site: str, scale: Scale, config: ModelConfig, channel_groups: ChannelGroups) -> None:
    if not isinstance(scale, tuple):
        return
    expected = {1}
    if find_site(site, config.kind).grouped:
        expected.add(_ssd_groups(config))
        if site in BY_CHANNEL_GROUP and layer < len(channel_groups):
            expected |= {int(index.max()) + 1 for index in channel_groups[layer]}
    if len(scale) not in expected:
        counts = " or ".join(map(str, sorted(expected)))
        raise ScalesInvalid(
            f"layer {layer} {site} has {len(scale)} scale groups, expected {counts}; "
            "analyze with --granularity tensor, or collect this model again"
        )
