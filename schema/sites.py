"""The sites of a Mamba-1 model, by upstream Quamba's keys, and what its INT8 model does with each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quambase.schema.errors import UnknownName

HEAD_LAYER = -1
"""The layer number of the language-model head's sites."""

WHOLE = "all"
"""The name of an undivided site's one group, and of the whole of a divided one."""


@dataclass(frozen=True)
class Site:
    """One observed point.

    name        upstream's key, ``module:input`` or ``module:output``
    groups      names of its channel slices, in channel order
    consumed    the INT8 model reads this site's scale
    decode_only only token-by-token decoding reads it (no effect on perplexity)
    saturates   every consumer clamps. Upstream's Hadamard quantizer at ``out_proj:input``
                does not: it wraps modulo 256, so a clipping scale is not safe there
    head        belongs to the head, not to a layer
    """

    name: str
    groups: tuple[str, ...] = (WHOLE,)
    consumed: bool = False
    decode_only: bool = False
    saturates: bool = True
    head: bool = False


STATE_SITES = ("ssm_state_act:input", "ssm_state_act:output")
"""Sites with one (e, n) tensor per document instead of one row per token; their channel is the state index."""

MAMBA1_SITES: tuple[Site, ...] = (
    Site("in_proj:input", consumed=True),
    Site("in_proj:output", groups=("x", "z"), consumed=True),
    Site("x_proj:input", consumed=True),
    Site("x_proj:output", groups=("dt", "B", "C"), consumed=True),
    Site("dt_proj:input"),
    Site("dt_proj:output", consumed=True),
    Site("ssm_state_act:input", consumed=True, decode_only=True),
    Site("ssm_state_act:output"),
    Site("out_proj:input", consumed=True, saturates=False),
    Site("out_proj:output"),
    Site("lm_head:input", consumed=True, head=True),
    Site("lm_head:output", head=True),
)

_BY_NAME = {site.name: site for site in MAMBA1_SITES}


def find_site(name: str) -> Site:
    """The site called ``name``; UnknownName lists the nearest."""
    if name not in _BY_NAME:
        raise UnknownName.of("site", name, _BY_NAME)
    return _BY_NAME[name]


def is_model_site(name: str) -> bool:
    """Whether ``name`` is a site of the model (an imported tensor may be called anything)."""
    return name in _BY_NAME


def layer_sites(n_layer: int) -> Iterator[tuple[int, Site]]:
    """Every (layer, site) of a model with ``n_layer`` layers, head last."""
    for layer in range(n_layer):
        for site in MAMBA1_SITES:
            if not site.head:
                yield layer, site
    for site in MAMBA1_SITES:
        if site.head:
            yield HEAD_LAYER, site
