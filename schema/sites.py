"""The sites of Mamba-1 and Mamba-2 models, by upstream Quamba's keys, and what their INT8 models do with each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quambase.schema.errors import UnknownName

SiteKey = tuple[int, str]
"""(layer, site): the key of statistics and scales."""

HEAD_LAYER = -1
"""The layer number of the language-model head's sites."""

WHOLE = "all"
"""The group name of an undivided site, and of the whole of a divided one."""

HEAD = "lm_head"
"""The operator that reads the head's site."""

IN_PROJ, CONV_SCAN, X_PROJ, OUT_PROJ = OPERATORS = ("in_proj", "conv_scan", "x_proj", "out_proj")
"""The operators of a block that an INT8 model can leave in 16 bit. conv_scan: convolution and scan, with the gated
norm of a Mamba-2; x_proj: x_proj and dt_proj, of a Mamba-1.
"""

PRODUCT_SITES = tuple(f"{name}:input" for name in (IN_PROJ, X_PROJ, OUT_PROJ))
"""What the matrices read that can have weights of 4 bits; a Mamba-2 has no x_proj."""


@dataclass(frozen=True)
class Site:
    """One observed point.

    name        upstream's key, ``module:input`` or ``module:output``
    groups      names of its channel slices, in channel order
    by_ssd      divided by SSD group instead: g0, g1, ... of a model that has several
    read_by     the operators of the INT8 model that read its codes: those of OPERATORS, or the head
    grouped     it may read a scale for each SSD group, head group or channel group instead
    decode_only only token-by-token decoding reads it (no effect on perplexity)
    affine      it may read codes with a zero point instead: values after SiLU, which are hardly ever negative
    saturates   every consumer clamps. Upstream's Hadamard quantizer at ``out_proj:input``
                does not: it wraps modulo 256, so a clipping scale is not safe there
    head        belongs to the head, not to a layer
    sampled     observed only by `collect --state-every N`: the state after every N tokens
    """

    name: str
    groups: tuple[str, ...] = (WHOLE,)
    read_by: tuple[str, ...] = ()
    decode_only: bool = False
    saturates: bool = True
    head: bool = False
    by_ssd: bool = False
    grouped: bool = False
    affine: bool = False
    sampled: bool = False

    @property
    def consumed(self) -> bool:
        """Whether the INT8 model reads this site's scale."""
        return bool(self.read_by)

    @property
    def acts(self) -> bool:
        """A forward pass of the INT8 model reads this site's scale; the head's only where the head is quantized."""
        return self.consumed and not self.decode_only

    def group_names(self, ngroups: int = 1) -> tuple[str, ...]:
        """The names of its groups in a model of ``ngroups`` SSD groups (Mamba-1 has none, which counts as one)."""
        return tuple(f"g{i}" for i in range(ngroups)) if self.by_ssd and ngroups > 1 else self.groups


STATE_SITES = ("ssm_state_act:input", "ssm_state_act:output")
"""Sites with one (e, n) tensor per document instead of one row per token; their channel is the state index."""

STATE_BY_CHANNEL, STATE_BY_INDEX = SAMPLED_STATE_SITES = ("ssm_state_seq:channel", "ssm_state_seq:index")
"""Sites with several (e, n) tensors per document, the state along it. Both have the same values. The channels of the
first are the model's, (head, channel) of a Mamba-2, those of the second the state indices.
"""

_SAMPLED = tuple(Site(name, sampled=True) for name in SAMPLED_STATE_SITES)

MAMBA1_SITES: tuple[Site, ...] = (
    Site("in_proj:input", read_by=(IN_PROJ,)),
    Site("in_proj:output", groups=("x", "z"), read_by=(CONV_SCAN,)),
    Site("x_proj:input", read_by=(X_PROJ, CONV_SCAN), affine=True),
    Site("x_proj:output", groups=("dt", "B", "C"), read_by=(X_PROJ, CONV_SCAN)),
    Site("dt_proj:input"),
    Site("dt_proj:output", read_by=(CONV_SCAN,)),
    Site("ssm_state_act:input", read_by=(CONV_SCAN,), decode_only=True),
    Site("ssm_state_act:output"),
    *_SAMPLED,
    Site("out_proj:input", read_by=(OUT_PROJ,), saturates=False),
    Site("out_proj:output"),
    Site("lm_head:input", read_by=(HEAD,), head=True),
    Site("lm_head:output", head=True),
)

MAMBA2_SITES: tuple[Site, ...] = (
    # Upstream also observes the outputs of identities, which equal their inputs, and reads some of them. A code must be
    # decoded by the scale that made it, so only the input's scale is read here.
    Site("in_proj:input", read_by=(IN_PROJ,)),
    Site("in_proj:output", groups=("z", "x", "B", "C", "dt")),
    Site("z_act:input", read_by=(CONV_SCAN,)),
    Site("z_act:output"),
    Site("x_conv_in:input", read_by=(CONV_SCAN,)),
    Site("x_conv_in:output"),
    Site("B_conv_in:input", read_by=(CONV_SCAN,)),
    Site("B_conv_in:output"),
    Site("C_conv_in:input", read_by=(CONV_SCAN,)),
    Site("C_conv_in:output"),
    Site("x_conv_out:input", read_by=(CONV_SCAN,), by_ssd=True, grouped=True, affine=True),
    Site("x_conv_out:output", by_ssd=True),
    Site("B_conv_out:input", read_by=(CONV_SCAN,), by_ssd=True, grouped=True, affine=True),
    Site("B_conv_out:output", by_ssd=True),
    Site("C_conv_out:input", read_by=(CONV_SCAN,), by_ssd=True, grouped=True, affine=True),
    Site("C_conv_out:output", by_ssd=True),
    Site("dt_act:input", read_by=(CONV_SCAN,)),
    Site("dt_act:output"),
    Site("ssm_state_act:input", read_by=(CONV_SCAN,), decode_only=True, grouped=True),
    Site("ssm_state_act:output"),
    *_SAMPLED,
    Site("ssd_out_act:input"),
    Site("ssd_out_act:output"),
    Site("out_proj:input", read_by=(OUT_PROJ,), saturates=False),
    Site("out_proj:output"),
    Site("lm_head:input", read_by=(HEAD,), head=True),
    Site("lm_head:output", head=True),
)

MAMBA1 = "mamba1"
MAMBA2 = "mamba2"
FAMILIES: dict[str, tuple[Site, ...]] = {MAMBA1: MAMBA1_SITES, MAMBA2: MAMBA2_SITES}
"""The sites of each family, in the order a token meets them."""


def _merged() -> tuple[str, ...]:
    """All site names, in one order that keeps each family's own."""
    order = [site.name for site in MAMBA2_SITES]
    place = 0
    for site in MAMBA1_SITES:
        if site.name in order:
            place = order.index(site.name)
        else:
            order.insert(place, site.name)
        place += 1
    return tuple(order)


AFFINE_SITES = frozenset(site.name for sites in FAMILIES.values() for site in sites if site.affine)
"""Sites at which an INT8 model may read codes with a zero point."""

SITE_NAMES = _merged()
"""Every name of a site, in model order."""

_PLACES = {name: place for place, name in enumerate(SITE_NAMES)}


def site_order(name: str) -> tuple[int, str]:
    """What sorts sites in model order; those of imported tensors come last, by name."""
    return _PLACES.get(name, len(_PLACES)), name


_BY_NAME = {family: {site.name: site for site in sites} for family, sites in FAMILIES.items()}
_ANY = _BY_NAME[MAMBA2] | _BY_NAME[MAMBA1]


def _known(family: str) -> dict[str, Site]:
    """An imported tensor's family has no sites of its own: its site may be called like any model's, Mamba-1's first."""
    return _BY_NAME.get(family, _ANY)


def find_site(name: str, family: str = MAMBA1) -> Site:
    """The site called ``name`` in a model of ``family``; UnknownName lists the nearest."""
    known = _known(family)
    if name not in known:
        raise UnknownName.of("site", name, known)
    return known[name]


def is_model_site(name: str, family: str = MAMBA1) -> bool:
    """Whether ``name`` is a site of such a model (an imported tensor may be called anything)."""
    return name in _known(family)


def layer_sites(n_layer: int, family: str = MAMBA1, *, sampled: bool = False) -> Iterator[tuple[int, Site]]:
    """Every (layer, site) of a model with ``n_layer`` layers, head last; ``sampled``: also those that only
    `collect --state-every` observes.
    """
    sites = [site for site in FAMILIES[family] if sampled or not site.sampled]
    for layer in range(n_layer):
        for site in sites:
            if not site.head:
                yield layer, site
    for site in sites:
        if site.head:
            yield HEAD_LAYER, site
