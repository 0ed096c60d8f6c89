"""Tensors to count, and the comparison of a device's counter with the host's; run on the CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from counted import Counted, count_site

from quambase.collector.host.counter import HostCounter
from quambase.collector.statistics import ENCODINGS, SUMS, Counter, SiteLayout

MOST = 7
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65519.0, 65520.0, -70000.0, 6e-8, -6e-8, 1e-30]


@dataclass
class Case:
    """x (rows, channels), perhaps a slice of a wider tensor; the lengths of its documents; the layout of its site."""

    name: str
    x: torch.Tensor
    lengths: list[int]
    layout: SiteLayout
    encoding: str = "float16"


def plain_layout(*edges: int) -> SiteLayout:
    return SiteLayout(tuple(f"g{i}" for i in range(len(edges) - 1)), edges)


def sorted_layout(mapping: np.ndarray, d_state: int = 0) -> SiteLayout:
    """The layout of channels that belong to the groups in ``mapping``."""
    order = tuple(int(c) for c in np.argsort(mapping, kind="stable"))
    edges = tuple(np.cumsum([0, *np.bincount(mapping)]).tolist())
    return SiteLayout(
        tuple(f"g{i}" for i in range(mapping.max() + 1)), edges, state=d_state > 0, order=order, d_state=d_state
    )


def wild(rows: int, channels: int, seed: int, special: float = 0.05) -> torch.Tensor:
    """float32 values of every magnitude, ``special`` of them zeros, NaN, infinities and the like."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, size=(rows, channels)) * 10 ** rng.uniform(-3, 3, (rows, 1))
    chosen = rng.random(x.shape) < special
    x[chosen] = rng.choice(SPECIAL, int(chosen.sum()))
    with np.errstate(over="ignore"):
        return torch.from_numpy(x.astype(np.float32))


def small_cases() -> Iterator[Case]:
    """Every kind of layout, alignment, type and oddity, of at most some ten thousand values."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        encoding = "bfloat16" if dtype == torch.bfloat16 else "float16"
        name = str(dtype).removeprefix("torch.")
        x = wild(23, 37, 1).to(dtype)
        yield Case(f"{name} odd", x, [5, 0, 1, 17], plain_layout(0, 37), encoding)
        yield Case(f"{name} groups", x, [5, 0, 1, 17], plain_layout(0, 2, 3, 20, 37), encoding)
        wide = wild(64, 48, 2).to(dtype)
        yield Case(f"{name} aligned", wide, [32, 32], plain_layout(0, 16, 48), encoding)
        yield Case(f"{name} slice", wide[:, 3:30], [60, 4], plain_layout(0, 27), encoding)
        yield Case(f"{name} later rows", wide[5:, 1:2], [59], plain_layout(0, 1), encoding)
        widest = wild(45, 3500, 9).to(dtype)
        yield Case(f"{name} widest", widest, [13, 0, 31, 1], plain_layout(0, 12, 40, 3500), encoding)
        mapping = np.random.default_rng(3).permutation(np.arange(48) % 5)
        yield Case(f"{name} sorted", wide, [40, 20, 4], sorted_layout(mapping), encoding)
        states = wild(3 * 6, 20, 4).to(dtype)
        groups = np.random.default_rng(4).permutation(np.arange(20) % 3)
        yield Case(f"{name} states", states, [6, 6, 6], sorted_layout(groups, 6), encoding)
        yield Case(
            f"{name} nothing finite", torch.full((4, 3), torch.nan).to(dtype), [2, 2], plain_layout(0, 3), encoding
        )
        yield Case(f"{name} no rows", torch.zeros(0, 3).to(dtype), [0, 0], plain_layout(0, 1, 3), encoding)
    yield Case("one row", wild(1, 300, 5).half(), [1], plain_layout(0, 300))
    yield Case("one value", torch.full((1, 1), -2.5).half(), [1], plain_layout(0, 1))
    yield Case("float32 as bfloat16", wild(30, 9, 6), [30], plain_layout(0, 4, 9), "bfloat16")
    yield Case("float64", wild(9, 5, 7).double(), [4, 5], plain_layout(0, 5))
    yield Case("transposed", wild(16, 21, 8).half().T, [10, 11], plain_layout(0, 16))


def large_cases(values: int) -> Iterator[Case]:
    """Data that fills counters beyond 16 bits, and that queues at one counter, of about ``values`` values."""
    channels = 96
    rows = values // channels
    # Of one value, the first document has three times 32,768, and nothing left when these are taken out of the counter.
    first = min(1024, rows // 2)
    lengths = [first, rows - first]
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, channels, generator=generator)
    layout = plain_layout(0, 40, 96)
    yield Case("normal", normal.half(), lengths, layout)
    yield Case("silu", torch.nn.functional.silu(normal * 2).bfloat16(), lengths, layout, "bfloat16")
    some = torch.where(torch.rand(rows, channels, generator=generator) < 0.5, 0.0, normal)
    yield Case("half zeros", some.half(), lengths, layout)
    eighth = torch.where((torch.arange(channels) % 8 == 7).expand(rows, -1), normal, 0.0)
    yield Case("zeros but for every eighth", eighth.half(), lengths, layout)
    yield Case("all zeros", torch.zeros(rows, channels).half(), lengths, layout)
    yield Case("one value", torch.full((rows, channels), -1.5), lengths, plain_layout(0, 96))
    two = torch.tensor([1.0, 1.0009765625]).half()[torch.randint(0, 2, (rows, channels), generator=generator)]
    yield Case("two neighbours in one word", two, lengths, layout)
    # Among many rows: what is not finite lies beside what is large.
    yield Case("wild", wild(rows, channels, 10).half(), lengths, layout)
    yield Case("wild, odd", wild(rows, 7, 11).bfloat16(), lengths, plain_layout(0, 3, 7), "bfloat16")
    nans = torch.where(torch.rand(rows, channels, generator=generator) < 0.1, torch.nan, normal)
    yield Case("normal beside NaN", nans.half(), lengths, layout)
    late = torch.full((rows, channels), 2.0).half()
    late[-1, -5:] = 3.0
    late[0, 90] = -3.0
    yield Case("ties without end", late, lengths, layout)


def count_on_host(case: Case) -> tuple[Counted, np.ndarray]:
    """What the CPU's counter makes of it."""
    counter = HostCounter(ENCODINGS[case.encoding], MOST, len(case.layout.names))
    return count_site(counter, case.x, case.lengths, case.layout)


def count_on_device(
    counter: Counter, case: Case, device: torch.device, cuts: tuple[int, ...] = ()
) -> tuple[Counted, np.ndarray]:
    """What a device's counter makes of it, in one call, or in several that end at the documents ``cuts``."""
    x = case.x
    if device.type == "cuda":  # the same strides there
        whole = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype, device=device)
        whole.copy_(torch.as_strided(x, whole.shape, (1,), 0))
        x = torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())
    return count_site(counter, x, case.lengths, case.layout, cuts)


def assert_same(found: tuple[Counted, np.ndarray], wanted: tuple[Counted, np.ndarray], encoding: str) -> None:
    """Every integer, extremum, quantile and place equal; float64 sums but for the order of their terms."""
    infinity = ENCODINGS[encoding].infinity
    (mine, my_summaries), (theirs, their_summaries) = found, wanted
    np.testing.assert_array_equal(nan_joined(mine.counts, infinity), nan_joined(theirs.counts, infinity))
    np.testing.assert_array_equal(my_summaries, their_summaries)
    for ours, true in zip(mine.top, theirs.top, strict=True):
        np.testing.assert_array_equal(ours, true)
    for name, true in vars(theirs.moments).items():
        ours = getattr(mine.moments, name)
        if name in SUMS:
            # n additions of float64 each: n roundings of at most the sum of magnitudes.
            magnitude = np.sqrt(theirs.moments.count * theirs.moments.squares) + true**2 / 2**60
            slack = 2.0**-51 * theirs.moments.count * (true if name == "squares" else magnitude)
            assert (np.abs(ours - true) <= slack + 1e-300).all(), name
        else:
            np.testing.assert_array_equal(ours, true, err_msg=name)


def nan_joined(counts: np.ndarray, infinity: int) -> np.ndarray:
    """Counts (groups, 65536) with every NaN pattern under one: which one a NaN becomes is the hardware's choice."""
    joined = counts.copy()
    nan = np.arange(65536) & 0x7FFF > infinity
    joined[:, nan] = 0
    joined[:, infinity + 1] = counts[:, nan].sum(1)
    return joined
