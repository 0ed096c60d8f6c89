"""Counting by a channel-to-group map, and states by channel groups, against the permuted tensor and plain NumPy."""

import numpy as np
import torch
from counted import Counted, count_site
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.collector.host.counter import HostCounter
from quambase.collector.statistics import ENCODINGS, SiteLayout

COUNTER = HostCounter(ENCODINGS["float16"], 5, 4)


def count(x: torch.Tensor, lengths: list[int], layout: SiteLayout) -> tuple[Counted, np.ndarray]:
    return count_site(COUNTER, x, lengths, layout)


@st.composite
def mapped_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], list[int]]:
    """Values with ties, zeros and now and then NaN or infinity; lengths of documents; the group of each channel."""
    groups = draw(st.integers(1, 4))
    mapping = list(range(groups)) + draw(st.lists(st.integers(0, groups - 1), max_size=20))
    mapping = draw(st.permutations(mapping))
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    x = rng.integers(-6, 7, (sum(lengths), len(mapping))) * rng.choice([1.0, 0.25, 1.7], (1, len(mapping)))
    if draw(st.booleans()) and x.size:
        x[rng.integers(len(x)), rng.integers(len(mapping))] = rng.choice([np.nan, np.inf, -np.inf, 1e6])
    return torch.tensor(x, dtype=torch.float32), lengths, mapping


@settings(deadline=None, max_examples=100)
@given(mapped_tensors())
def test_counting_by_a_map_is_counting_the_permuted_tensor(case: tuple[torch.Tensor, list[int], list[int]]) -> None:
    x, lengths, mapping = case
    order = tuple(int(c) for c in np.argsort(mapping, kind="stable"))
    names = tuple("abcd"[: max(mapping) + 1])
    edges = tuple(np.cumsum([0, *np.bincount(mapping)]).tolist())
    mapped, summaries = count(x, lengths, SiteLayout(names, edges, order=order))
    permuted, expected = count(x[:, list(order)].contiguous(), lengths, SiteLayout(names, edges))
    np.testing.assert_array_equal(mapped.counts, permuted.counts)
    np.testing.assert_array_equal(summaries, expected)
    for mine, theirs in zip(mapped.top, permuted.top, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for name, by_channel in vars(mapped.moments).items():
        np.testing.assert_array_equal(by_channel[list(order)], getattr(permuted.moments, name))
    # And by the definition: the values of the channels that the map sends there.
    for g in range(len(names)):
        members = [c for c, group in enumerate(mapping) if group == g]
        assert mapped.layout.members(g).tolist() == members
        patterns = x[:, members].to(torch.float16).contiguous().view(torch.int16).numpy().astype(np.uint16)
        finite = patterns & 0x7FFF <= 0x7C00  # a NaN has no pattern of its own
        tally = np.bincount(patterns[finite], minlength=65536)
        kept = (np.arange(65536) & 0x7FFF) <= 0x7C00
        np.testing.assert_array_equal(mapped.counts[g][kept], tally[kept])


@settings(deadline=None, max_examples=40)
@given(
    documents=st.integers(1, 3),
    d_state=st.integers(1, 5),
    mapping=st.lists(st.integers(0, 2), min_size=3, max_size=12),
    seed=st.integers(0, 999),
)
def test_states_are_counted_by_channel_group(documents: int, d_state: int, mapping: list[int], seed: int) -> None:
    mapping = [0, 1, 2, *mapping]
    order = tuple(int(c) for c in np.argsort(mapping, kind="stable"))
    edges = tuple(np.cumsum([0, *np.bincount(mapping)]).tolist())
    layout = SiteLayout(("a", "b", "c"), edges, state=True, order=order, d_state=d_state)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randint(-9, 10, (documents, len(mapping), d_state), generator=generator) / 4
    rows = states.transpose(1, 2).reshape(-1, len(mapping))
    stats, summaries = count(rows, [d_state] * documents, layout)
    assert stats.moments.count.size == layout.moments == 3 * d_state
    for g in range(3):
        members = [c for c, group in enumerate(mapping) if group == g]
        mine = states[:, members].double().numpy()
        values = ENCODINGS["float16"].values()
        present = np.flatnonzero(stats.counts[g])
        found = {float(values[p]): int(stats.counts[g][p]) for p in present}
        assert found == {float(v): int((mine == v).sum()) for v in np.unique(mine)}
        np.testing.assert_array_equal(summaries[:, g, 0], np.abs(mine).max((1, 2)))
        places = layout.moment_rows(g)
        m = stats.moments
        assert (m.count[places] == documents * len(members)).all()
        np.testing.assert_array_equal(m.lowest[places], mine.min((0, 1)))
        np.testing.assert_array_equal(m.highest[places], mine.max((0, 1)))
        # Quarters, so that float64 sums are exact whatever their order.
        np.testing.assert_array_equal(m.total[places], mine.sum((0, 1)))
        np.testing.assert_array_equal(m.squares[places], (mine**2).sum((0, 1)))
        np.testing.assert_array_equal(m.mean_abs_max[places], np.abs(mine).mean(1).max(0))
        for magnitude, _, document, index, place in stats.top[g].tolist():
            assert values[magnitude] == abs(states[document, members[place], index])


def test_runs_are_the_consecutive_channels() -> None:
    layout = SiteLayout(("a", "b"), (0, 5, 8), order=(0, 1, 4, 6, 7, 2, 3, 5))
    runs, firsts = layout.runs
    assert runs.tolist() == [[0, 2], [4, 5], [6, 8], [2, 4], [5, 6]]
    assert firsts.tolist() == [0, 3, 5]
    plain, firsts = SiteLayout(("a", "b"), (0, 5, 8)).runs
    assert plain.tolist() == [[0, 5], [5, 8]] and firsts.tolist() == [0, 1, 2]
