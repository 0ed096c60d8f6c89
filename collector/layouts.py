"""Where the groups of every observed site lie, from a model's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from quambase.collector.statistics import SiteLayout
from quambase.model.mamba2_weights import Mamba2Config
from quambase.model.weights import MambaConfig
from quambase.schema.groups import LayerGroups
from quambase.schema.sites import MAMBA1, MAMBA2, STATE_SITES, SiteKey, layer_sites


def site_layouts(
    config: MambaConfig | Mamba2Config, sites: Sequence[str], groups: Sequence[LayerGroups] | None = None
) -> dict[SiteKey, SiteLayout]:
    """Every observed (layer, site) of a model and where its groups lie; ``sites``: their names; ``groups``: of each
    layer of a reordered Mamba-2, by which x and the state are divided.
    """
    second = isinstance(config, Mamba2Config)
    edges = _mamba2_edges(config) if isinstance(config, Mamba2Config) else _mamba1_edges(config)
    ngroups = config.ngroups if isinstance(config, Mamba2Config) else 1
    layouts = {
        (layer, site.name): SiteLayout(
            site.group_names(ngroups),
            edges[site.name],
            site.name in STATE_SITES,
            tuple(range(ngroups)) if site.by_ssd else (),
        )
        for layer, site in layer_sites(config.n_layer, MAMBA2 if second else MAMBA1)
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


def _mamba1_edges(c: MambaConfig) -> dict[str, tuple[int, ...]]:
    return {
        "in_proj:input": (0, c.d_model),
        "in_proj:output": (0, c.d_inner, 2 * c.d_inner),
        "x_proj:input": (0, c.d_inner),
        "x_proj:output": (0, c.dt_rank, c.dt_rank + c.d_state, c.dt_rank + 2 * c.d_state),
        "dt_proj:input": (0, c.dt_rank),
        "dt_proj:output": (0, c.d_inner),
        "ssm_state_act:input": (0, c.d_state),
        "ssm_state_act:output": (0, c.d_state),
        "out_proj:input": (0, c.d_inner),
        "out_proj:output": (0, c.d_model),
        "lm_head:input": (0, c.d_model),
        "lm_head:output": (0, c.vocab_size),
    }


def _mamba2_edges(c: Mamba2Config) -> dict[str, tuple[int, ...]]:
    def shared(width: int) -> tuple[int, ...]:
        """Equal slices of a width that the SSD groups divide."""
        return tuple(range(0, width + 1, width // c.ngroups))

    identities = {
        "z_act": (0, c.d_inner),
        "x_conv_in": (0, c.d_inner),
        "B_conv_in": (0, c.bc_width),
        "C_conv_in": (0, c.bc_width),
        "x_conv_out": shared(c.d_inner),
        "B_conv_out": shared(c.bc_width),
        "C_conv_out": shared(c.bc_width),
        "dt_act": (0, c.heads),
        "ssm_state_act": (0, c.d_state),
        "ssd_out_act": (0, c.d_inner),
    }
    return {
        "in_proj:input": (0, c.d_model),
        "in_proj:output": c.in_proj_edges,
        **{f"{name}:{end}": edges for name, edges in identities.items() for end in ("input", "output")},
        "out_proj:input": (0, c.d_inner),
        "out_proj:output": (0, c.d_model),
        "lm_head:input": (0, c.d_model),
        "lm_head:output": (0, c.vocab_size),
    }
