"""The reach of the scale groups of a layer's channels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quambase.schema.groups import LayerGroups
from quambase.schema.values.arrays import Float64


@dataclass(frozen=True)
class Division:
    """The channels of one layer's x, group by group.

    amax    (e,): the largest absolute value of each channel
    sizes   (groups,) channels of each group
    """

    amax: Float64
    sizes: tuple[int, ...]

    @property
    def reach(self) -> Float64:
        """(groups,): the largest absolute value of each group, which is 127 steps of its absmax scale."""
        starts = np.cumsum([0, *self.sizes[:-1]])
        return np.maximum.reduceat(self.amax, starts)

    @property
    def spread(self) -> float:
        """Reach of the farthest group over that of the nearest; NaN where a group is all zeros."""
        least = self.reach.min()
        return float(self.reach.max() / least) if least > 0 else float("nan")

    @property
    def mean_step(self) -> float:
        """Mean over channels of the group's reach over the layer's: the mean INT8 step relative to one scale."""
        top = self.amax.max()
        return float((self.reach * self.sizes).sum() / sum(self.sizes) / top) if top > 0 else float("nan")


def divide(groups: LayerGroups, amax: Float64) -> tuple[Division, Division]:
    """The channels in the model's own order and sorted, both cut into groups of the same sizes.

    amax (e,): the largest magnitude of each channel of the sorted layer.
    """
    original = np.empty_like(amax)
    original[list(groups.channel_index)] = amax
    members = [list(group.channels) for group in groups.groups()]
    sizes = tuple(map(len, members))
    order = [channel for group in members for channel in group]
    return Division(original[order], sizes), Division(amax[order], sizes)
