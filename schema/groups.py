"""How the heads and channels of a Mamba-2 layer are sorted into groups that share a scale (Quamba 2)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from quambase.schema.errors import DatabaseInvalid
from quambase.schema.json_files import Size
from quambase.schema.sites import WHOLE

TENSOR, SSD_GROUP, HEAD_GROUP, GROUP = GRANULARITIES = ("tensor", "ssd_group", "head_group", "group")
"""How finely scales divide a site, coarse to fine: not at all; by SSD group (g0); by head group (g0h1); by the smallest
groups (g0h1c2 of a sorted Mamba-2; x and z, or dt, B and C of a Mamba-1)."""

_NUMBERED = re.compile(r"(g\d+)(?:(h\d+)(c\d+)?)?")


def granularity_of(group_name: str) -> str:
    """The granularity at which a scale group of this name is one."""
    if group_name == WHOLE:
        return TENSOR
    numbered = _NUMBERED.fullmatch(group_name)
    if not numbered or numbered[3]:
        return GROUP
    return HEAD_GROUP if numbered[2] else SSD_GROUP


def is_scale_group(group_name: str) -> bool:
    """Whether a group of this name can have its own scale in an INT8 Mamba-2: an SSD group or a part of one."""
    return _NUMBERED.fullmatch(group_name) is not None


def group_numbers(group_name: str) -> tuple[int, ...]:
    """The SSD group, head group and channel group that a scale group's name holds; a coarse one holds fewer."""
    return tuple(map(int, re.findall(r"\d+", group_name)))


def united_groups(names: Iterable[str], granularity: str) -> dict[str, list[str]]:
    """The groups of a site at ``granularity``, each as the smallest groups (``names``) that form it, in order.

    Empty where the site has no such division: it is undivided, divided otherwise or less finely, or into one group.
    """
    if granularity == TENSOR:
        return {WHOLE: list(names)}
    united: dict[str, list[str]] = {}
    for name in names:
        finest = granularity_of(name)
        if GRANULARITIES.index(finest) < GRANULARITIES.index(granularity):
            return {}
        numbered = _NUMBERED.fullmatch(name)
        if granularity == GROUP:
            united.setdefault(name, []).append(name)
        elif numbered:
            parts = numbered.groups(default="")[: GRANULARITIES.index(granularity)]
            united.setdefault("".join(parts), []).append(name)
    return united if len(united) > 1 else {}


class ChannelGroup(NamedTuple):
    """One scale group of x: its numbers and its channels, ascending, in the reordered layer."""

    ssd_group: int
    head_group: int
    channel_group: int
    channels: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its ``group_name`` in the tables."""
        return f"g{self.ssd_group}h{self.head_group}c{self.channel_group}"


@dataclass(frozen=True)
class LayerGroups:
    """The order of one layer's heads and channels and the sizes of its groups, by upstream's names.

    head_index     (h,): the head that comes to each place; heads stay within their SSD group
    head_groups    (g, head groups): consecutive heads of each head group
    channel_index  (e,): the channel that comes to each place, head by head in the order of ``head_index``
    channel_group  (g, head groups, channel groups): consecutive channels, the same in every head of a head group
    DatabaseInvalid where these are no permutations or the sizes do not add up.
    """

    head_index: tuple[Size, ...]
    head_groups: tuple[tuple[Size, ...], ...]
    channel_index: tuple[Size, ...]
    channel_group: tuple[tuple[tuple[Size, ...], ...], ...]

    def __post_init__(self) -> None:
        heads, channels = len(self.head_index), len(self.channel_index)
        whole = heads and not channels % heads and sum(map(sum, self.head_groups)) == heads
        ordered = sorted(self.head_index) == list(range(heads)) and sorted(self.channel_index) == list(range(channels))
        fits = whole and [len(sizes) for sizes in self.channel_group] == [len(sizes) for sizes in self.head_groups]
        if not ordered or not fits or any(sum(s) != self.headdim for sizes in self.channel_group for s in sizes):
            raise DatabaseInvalid(
                f"groups of {heads} heads and {channels} channels do not fit together; expected permutations and sizes "
                "that add up: collect again"
            )

    @property
    def headdim(self) -> int:
        """Channels of a head."""
        return len(self.channel_index) // len(self.head_index)

    def groups(self) -> Iterator[ChannelGroup]:
        """Every scale group of x, by SSD group, head group, channel group."""
        first_head = 0
        for g, sizes in enumerate(self.head_groups):
            for h, heads in enumerate(sizes):
                for c, (start, stop) in enumerate(pairwise(accumulate(self.channel_group[g][h], initial=0))):
                    rows = range(first_head, first_head + heads)
                    channels = tuple(head * self.headdim + i for head in rows for i in range(start, stop))
                    yield ChannelGroup(g, h, c, channels)
                first_head += heads

    def to_json(self) -> dict[str, Any]:
        """Plain lists under the fields' names."""
        return {
            "head_index": list(self.head_index),
            "head_groups": [list(sizes) for sizes in self.head_groups],
            "channel_index": list(self.channel_index),
            "channel_group": [[list(sizes) for sizes in of_ssd] for of_ssd in self.channel_group],
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> LayerGroups:
        """What `to_json` wrote."""
        return cls(
            tuple(raw["head_index"]),
            tuple(tuple(sizes) for sizes in raw["head_groups"]),
            tuple(raw["channel_index"]),
            tuple(tuple(tuple(sizes) for sizes in of_ssd) for of_ssd in raw["channel_group"]),
        )
