"""The layout of every observed site's groups, from a model's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from quambase.collector.statistics import SiteLayout
from quambase.model.block import HeadLayout, ModelConfig
from quambase.schema.groups import LayerGroups
from quambase.schema.sites import SAMPLED_STATE_SITES, STATE_BY_CHANNEL, STATE_SITES, SiteKey, layer_sites


def site_layouts(
    config: ModelConfig,
    sites: Sequence[str],
    groups: Sequence[LayerGroups] | None = None,
    state_every: int = 0,
) -> dict[SiteKey, SiteLayout]:
    """The layout of every observed (layer, site) of a model; ``sites``: their names; ``groups``: each layer's groups of
    a reordered Mamba-2, which divide x and the state; ``state_every``: tokens between the states of
    SAMPLED_STATE_SITES.
    """
    edges, heads = config.site_edges(), config.head_layout
    ngroups = heads.ssd_groups if heads else 1
    layouts = {
        (layer, site.name): SiteLayout(
            site.group_names(ngroups),
            edges[site.name],
            site.name in STATE_SITES,
            tuple(range(ngroups)) if site.by_ssd else (),
        )
        for layer, site in layer_sites(config.n_layer, config.kind, sampled=True)
        if site.name in sites
    }
    for layer, name in layouts:
        if name == STATE_BY_CHANNEL and heads:
            layouts[layer, name] = _by_head(heads)
    for layer, found in enumerate(groups or ()):
        for name in (*_SORTED_SITES, *STATE_SITES, STATE_BY_CHANNEL):
            if (layer, name) in layouts:
                layouts[layer, name] = _sorted_layout(found, config.d_state if name in STATE_SITES else 0)
    for layer, name in layouts:
        if name in SAMPLED_STATE_SITES:
            layouts[layer, name] = replace(
                layouts[layer, name], state=True, by_channel=name == STATE_BY_CHANNEL, every=state_every
            )
    return layouts


def _by_head(heads: HeadLayout) -> SiteLayout:
    """The channels of x, divided by head: h0, h1, ..."""
    names, share = tuple(f"h{head}" for head in range(heads.heads)), heads.heads // heads.ssd_groups
    of_ssd = tuple(head // share for head in range(heads.heads)) if heads.ssd_groups > 1 else ()
    return SiteLayout(names, tuple(range(0, heads.channels + 1, heads.headdim)), ssd_groups=of_ssd)


_SORTED_SITES = ("x_conv_out:input", "x_conv_out:output")


def _sorted_layout(layer: LayerGroups, d_state: int) -> SiteLayout:
    """A layer's groups of x, or of its state if ``d_state`` is not 0."""
    groups = list(layer.groups())
    return SiteLayout(
        tuple(group.name for group in groups),
        tuple(accumulate((len(group.channels) for group in groups), initial=0)),
        d_state > 0,
        tuple(group.ssd_group for group in groups),
        tuple(channel for group in groups for channel in group.channels),
        tuple((group.head_group, group.channel_group) for group in groups),
        d_state,
    )
