"""Sort and cluster: per-channel statistics of x to Quamba 2's groups of heads and channels.

Within each SSD group the heads are clustered by the shape of their sorted channel statistics, and within each head
group the sorted channels are. The definition is upstream's quamba/reorder_utils.py (``group_wise_sort_indices``).
"""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from quambase.schema.errors import UnknownName
from quambase.schema.groups import LayerGroups
from quambase.schema.values.arrays import Float32, Int64

Variant = Literal["fixed", "quamba2"]
"""``quamba2`` does what upstream's code does: it orders heads by an unstable sort of their labels, and indexes the
*old* order with a head group's *new* positions, so channel groups are formed from the wrong heads. ``fixed`` sorts
stably and uses the group's own heads.
"""

VARIANTS: tuple[Variant, ...] = get_args(Variant)

HEAD_GROUPS = 4
CHANNEL_GROUPS = 4


def layer_groups(
    statistics: npt.NDArray[np.floating], headdim: int, ngroups: int, variant: Variant = "fixed"
) -> LayerGroups:
    """The groups of one layer.

    statistics (e,): non-negative, one per channel of x in the model's order: the largest over documents of the mean
    absolute value (``mean_abs_max`` of `channels`). If there are fewer heads or channels than groups, each makes a
    group. UnknownName: no such variant.
    """
    if variant not in VARIANTS:
        raise UnknownName.of("grouping", variant, VARIANTS)
    heads = statistics.size // headdim
    per_head = statistics.astype(np.float32).reshape(ngroups, heads // ngroups, headdim)
    order = np.argsort(per_head, axis=-1, kind="stable")
    ascending = np.take_along_axis(per_head, order, axis=-1)
    norms = np.linalg.norm(ascending, axis=-1, keepdims=True)
    # A head of zeros gets the shape 0; upstream's division gives NaN.
    shapes = ascending / np.where(norms > 0, norms, np.float32(1))
    head_index: list[int] = []
    channel_index: list[int] = []
    head_sizes, channel_sizes = [], []
    for g in range(ngroups):
        labels = _cluster_heads(shapes[g])
        placed = np.argsort(labels, kind="stable" if variant == "fixed" else None)
        sizes = np.bincount(labels).tolist()
        ends = np.cumsum([0, *sizes])
        source = shapes[g][placed] if variant == "fixed" else shapes[g]
        channel_sizes.append(tuple(_channel_sizes(source[ends[i] : ends[i + 1]]) for i in range(len(sizes))))
        head_sizes.append(tuple(sizes))
        first = g * len(placed)
        head_index += (first + placed).tolist()
        channel_index += ((first + placed)[:, None] * headdim + order[g][placed]).ravel().tolist()
    return LayerGroups(tuple(head_index), tuple(head_sizes), tuple(channel_index), tuple(channel_sizes))


def _cluster_heads(shapes: Float32) -> Int64:
    """(heads,) labels of shapes (heads, p) by Ward's linkage, Euclidean; each of 0 .. clusters - 1 occurs."""
    clusters = min(HEAD_GROUPS, len(shapes))
    if clusters == len(shapes):
        return np.arange(clusters)  # nothing to cluster, and the clusterer refuses a single head
    from sklearn.cluster import AgglomerativeClustering  # slow to import, and most runs form no groups

    with warnings.catch_warnings():
        # As many heads of zeros as channels are a square matrix, which scipy mistakes for distances.
        warnings.filterwarnings("ignore", message=".*uncondensed distance matrix")
        found = AgglomerativeClustering(n_clusters=clusters, metric="euclidean", linkage="ward").fit(shapes)
    labels: Int64 = found.labels_.astype(np.int64)
    return labels


def _channel_sizes(shapes: Float32) -> tuple[int, ...]:
    """Sizes of consecutive runs of sorted channels, by k-means of the columns of shapes (heads, p).

    Starting from ordered centres, labels ascend: columns ascend in every head, so which of two ordered centres is
    nearer changes once along them, and the means of consecutive columns are ordered again. Equal columns break that (an
    empty cluster may be moved); then the runs are of equal sizes, where upstream fails.
    """
    columns = np.ascontiguousarray(shapes.T)
    p = len(columns)
    clusters = min(CHANNEL_GROUPS, p)
    if clusters < p and len(np.unique(columns, axis=0)) > clusters:
        from sklearn.cluster import KMeans  # as above

        starts = columns[:: p // clusters][:clusters]
        labels = KMeans(n_clusters=clusters, init=starts, n_init=1).fit(columns).labels_
        sizes = np.bincount(labels, minlength=clusters)
        if (np.diff(labels) >= 0).all() and sizes.all():
            return tuple(sizes.tolist())
    return tuple(len(run) for run in np.array_split(np.arange(p), clusters))
