"""Sort and cluster against upstream's steps written out, on planted groups, and where there is little to cluster."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.cluster import AgglomerativeClustering, KMeans

from quambase.collector.clustering import VARIANTS, layer_groups
from quambase.schema.errors import DatabaseInvalid, UnknownName
from quambase.schema.groups import LayerGroups


def lognormal(heads: int, headdim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(size=heads * headdim)


def upstream(values: np.ndarray, headdim: int, ngroups: int) -> dict[str, list]:
    """reorder_utils.py:87-136, step by step, with its mistake."""
    x = torch.tensor(values, dtype=torch.float32).view(ngroups, -1, headdim)
    heads = x.shape[1]
    head_index, channel_index, head_groups, channel_group = [], [], [], []
    for g in range(ngroups):
        ascending, places = x[g].sort(dim=-1)
        shapes = (ascending / ascending.norm(dim=-1, keepdim=True)).numpy()
        labels = AgglomerativeClustering(n_clusters=4, metric="euclidean", linkage="ward").fit(shapes).labels_
        order = np.argsort(labels)
        starts = [int((labels < label).sum()) for label in range(5)]
        sizes = []
        for row_start, row_end in itertools.pairwise(starts):
            columns = shapes[row_start:row_end].T  # the heads that *were* at these places
            found = KMeans(n_clusters=4, init=columns[0 :: headdim // 4]).fit(columns).labels_
            assert (np.diff(found) >= 0).all()
            sizes.append([int((found == label).sum()) for label in range(4)])
        head_index += [g * heads + int(i) for i in order]
        channel_index += [(g * heads + int(i)) * headdim + int(c) for i in order for c in places[i]]
        head_groups.append(np.diff(starts).tolist())
        channel_group.append(sizes)
    return {
        "head_index": head_index,
        "head_groups": head_groups,
        "channel_index": channel_index,
        "channel_group": channel_group,
    }


@pytest.mark.parametrize(("heads", "ngroups"), [(12, 1), (24, 2), (32, 4)])
def test_quamba2_is_upstreams(heads: int, ngroups: int) -> None:
    values = lognormal(heads, 16, seed=heads)
    assert layer_groups(values, 16, ngroups, "quamba2").to_json() == upstream(values, 16, ngroups)


# Every fourth sorted channel, where k-means starts, is of another level.
SIZES = [(1, 5, 6, 4), (4, 4, 4, 4), (2, 4, 5, 5), (3, 5, 4, 4)]


def planted() -> np.ndarray:
    """(8, 16): heads 0, 4 / 1, 5 / 2, 6 / 3, 7 alike: as many channels of four levels as SIZES says, shuffled."""
    rng = np.random.default_rng(5)
    rows = []
    for head in range(8):
        levels = np.repeat([0.1, 10.0, 20.0, 40.0], SIZES[head % 4])
        rows.append(rng.permutation(levels + rng.uniform(0, 0.01, 16)) * rng.uniform(1, 9))
    return np.array(rows)


def test_fixed_finds_planted_groups_and_quamba2_takes_channel_groups_from_other_heads() -> None:
    found = layer_groups(planted().ravel(), 16, 1, "fixed")
    assert found.head_groups == ((2, 2, 2, 2),)
    pairs = [set(found.head_index[i : i + 2]) for i in (0, 2, 4, 6)]
    assert sorted(map(sorted, pairs)) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert found.channel_group == (tuple(SIZES[min(pair)] for pair in pairs),)
    theirs = layer_groups(planted().ravel(), 16, 1, "quamba2")
    assert theirs.head_groups == found.head_groups
    assert theirs.channel_group != found.channel_group


def test_channels_ascend_within_a_head_and_heads_move_whole() -> None:
    values = lognormal(12, 8, seed=3)
    found = layer_groups(values, 8, 2)
    for place, head in enumerate(found.head_index):
        mine = found.channel_index[place * 8 : place * 8 + 8]
        assert sorted(mine) == list(range(head * 8, head * 8 + 8))
        assert (np.diff(values[list(mine)]) >= 0).all()
    assert {head // 6 for head in found.head_index[:6]} == {0}, "heads stay in their SSD group"


# Every head is dead, and there are as many as channels.
@example(variant="fixed", ngroups=1, heads=5, headdim=5, levels=1, seed=0)
@settings(deadline=None, max_examples=40)
@given(
    variant=st.sampled_from(VARIANTS),
    ngroups=st.integers(1, 3),
    heads=st.integers(1, 7),
    headdim=st.integers(1, 9),
    levels=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_any_statistics_give_a_partition(
    variant: str, ngroups: int, heads: int, headdim: int, levels: int, seed: int
) -> None:
    """Few heads, few channels, many equal values, zeros: never a failure or a warning, always every channel once."""
    values = np.random.default_rng(seed).integers(0, levels, ngroups * heads * headdim).astype(float)
    found = layer_groups(values, headdim, ngroups, variant)  # type: ignore[arg-type]
    groups = list(found.groups())
    assert sorted(c for group in groups for c in group.channels) == list(range(values.size))
    assert all(group.channels for group in groups)
    numbers = [(group.ssd_group, group.head_group, group.channel_group) for group in groups]
    expected = np.ndindex(ngroups, min(4, heads), min(4, headdim))
    assert numbers == list(expected)
    assert LayerGroups.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_groups_lie_where_the_sizes_say() -> None:
    found = LayerGroups((1, 0, 2), ((2, 1),), (4, 3, 5, 0, 1, 2, 8, 7, 6), (((1, 2), (2, 1)),))
    assert [(group.name, group.channels) for group in found.groups()] == [
        ("g0h0c0", (0, 3)),
        ("g0h0c1", (1, 2, 4, 5)),
        ("g0h1c0", (6, 7)),
        ("g0h1c1", (8,)),
    ]


def test_what_does_not_fit_is_refused() -> None:
    good = {"head_index": [0, 1], "head_groups": [[2]], "channel_index": [0, 1, 2, 3], "channel_group": [[[1, 1]]]}
    LayerGroups.from_json(good)
    for change in (
        {"head_index": [0, 0]},
        {"head_groups": [[1]]},
        {"channel_index": [0, 1, 2, 2]},
        {"channel_group": [[[1, 2]]]},
        {"channel_group": [[[2], [2]]]},
    ):
        with pytest.raises(DatabaseInvalid, match="do not fit together"):
            LayerGroups.from_json(good | change)
    with pytest.raises(UnknownName, match="unknown grouping 'quamba'; did you mean"):
        layer_groups(np.ones(4), 2, 1, "quamba")  # type: ignore[arg-type]
