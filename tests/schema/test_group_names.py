"""Granularities by the groups' names: against grouping by plain numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quambase.schema.groups import (
    GRANULARITIES,
    GROUP,
    TENSOR,
    granularity_of,
    group_numbers,
    is_scale_group,
    united_groups,
)


@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=11), min_size=1, max_size=11),
    st.sampled_from(GRANULARITIES),
)
def test_groups_unite_by_their_numbers(sizes: list[list[int]], granularity: str) -> None:
    numbers = [(g, h, c) for g, heads in enumerate(sizes) for h, most in enumerate(heads) for c in range(most)]
    names = ["g{}h{}c{}".format(*n) for n in numbers]
    depth = GRANULARITIES.index(granularity)
    expected: dict[tuple[int, ...], list[str]] = {}
    for number, name in zip(numbers, names, strict=True):
        expected.setdefault(number[:depth], []).append(name)
    found = united_groups(names, granularity)
    if granularity != TENSOR and len(expected) == 1:
        assert found == {}, "one group is the whole"
        return
    assert list(found.values()) == list(expected.values())
    for name, key in zip(found, expected, strict=True):
        assert granularity_of(name) == granularity
        assert group_numbers(name) == key


@pytest.mark.parametrize(
    ("names", "levels"),
    [
        (["all"], {TENSOR: 1}),
        (["x", "z"], {TENSOR: 1, GROUP: 2}),
        (["dt", "B", "C"], {TENSOR: 1, GROUP: 3}),
        (["g0", "g1"], {TENSOR: 1, "ssd_group": 2}),
        (["g0h0c0", "g0h0c1", "g0h1c0"], {TENSOR: 1, "head_group": 2, GROUP: 3}),
    ],
)
def test_levels_of_a_site(names: list[str], levels: dict[str, int]) -> None:
    found = {level: len(united_groups(names, level)) for level in GRANULARITIES}
    assert {level: n for level, n in found.items() if n} == levels


def test_only_numbered_groups_have_scales_of_their_own() -> None:
    names = ["all", "x", "dt", "B", "C", "g0", "g10h3", "g0h0c12", "gc", "g1c2", "g0h1c2x"]
    assert [is_scale_group(name) for name in names] == [False] * 5 + [True] * 3 + [False] * 3
