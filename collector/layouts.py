"""The layout of every observed site's groups, from a model's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from quambase.collector.statistics import SiteLayout
from quambase.model.block import ModelConfig
from quambase.schema.groups import LayerGroups
from quambase.schema.sites import STATE_SITES, SiteKey, layer_sites


def site_layouts(
    config: ModelConfig, sites: Sequence[str], groups: Sequence[LayerGroups] | None = None
) -> dict[SiteKey, SiteLayout]:
    """The layout of every observed (layer, site) of a model; ``sites``: their names; ``groups``: each layer's groups of
    a reordered Mamba-2, which divide x and the state.
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
        for layer, site in layer_sites(config.n_layer, config.kind)
        if site.name in sites
    }
    for layer, found in enumerate(groups or ()):
        for name in (*_SORTED_SITES, *STATE_SITES):
            if (layer, name) in layouts:
                layouts[layer, name] = _sorted_layout(found, config.d_state if name in STATE_SITES else 0)
    return layouts


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
