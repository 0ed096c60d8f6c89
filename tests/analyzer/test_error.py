"""The arithmetic of one scale against quantizing every value, and the optimal scale against exhaustive
search.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.analyzer.kernels import TIE, _keep_ties, suffix_sums
from quambase.analyzer.least_squares import optimal_scale
from quambase.analyzer.quantization_error import figures, piecewise_figures
from quambase.schema.values.distribution import Distribution
from quambase.schema.values.number_format import INT8

Float32 = npt.NDArray[np.float32]

halves = st.floats(-1000, 1000, width=16)
scales = st.floats(2**-20, 100, width=32)


def brute_force(values: Float32, scale: float) -> tuple[list[int], int, float]:
    """Codes histogram, clipped count and squared error, value by value."""
    histogram = [0] * 256
    clipped = 0
    errors = []
    for value in values:
        rounded = float(np.round(np.float32(value) / np.float32(scale)))
        code = int(max(-128.0, min(127.0, rounded)))
        histogram[code + 128] += 1
        clipped += rounded != code
        errors.append((float(value) - code * float(np.float32(scale))) ** 2)
    return histogram, clipped, math.fsum(errors)


@settings(deadline=None, max_examples=150)
@given(st.lists(halves, min_size=1, max_size=40), scales, st.booleans())
def test_figures_equal_quantizing_each_value(values: list[float], scale: float, on_boundaries: bool) -> None:
    array = np.array(values, np.float16).astype(np.float32)
    if on_boundaries:
        # Scales that put a value on a boundary c + 1/2, where rounding decides.
        scale = float(np.float32(max(abs(array[0]) / np.float32(2.5), 2**-20)))
    found = figures(Distribution.of_values(array), scale)
    histogram, clipped, error = brute_force(array, scale)
    assert found.histogram.tolist() == histogram
    assert found.clipped == clipped
    # Each term is exact before squaring; squaring, weighting and adding 40 terms round by under 45 ulp.
    assert found.squared_error == pytest.approx(error, rel=1e-14, abs=0)
    assert found.codes_used == sum(n > 0 for n in histogram)
    outer = [n for code, n in enumerate(histogram, -128) if abs(code) > 120]
    assert found.codes_above_120 == sum(n > 0 for n in outer)
    assert found.values_above_120 == sum(outer)
    assert np.bincount(INT8.quantize(array, scale).astype(int) + 128, minlength=256).tolist() == histogram


def test_ties_round_to_even_and_clip_from_127_and_a_half() -> None:
    found = figures(Distribution.of_values(np.array([0.5, 1.5, 2.5, 127.4375, 127.5, -128.5, -129.0])), 1.0)
    codes = {code: n for code, n in enumerate(found.histogram.tolist(), -128) if n}
    assert codes == {-128: 2, 0: 1, 2: 2, 127: 2}
    assert found.clipped == 2  # 127.5 rounds to 128 and -129 lies beyond; -128.5 rounds to -128 and does not clip


def test_summaries_of_the_error() -> None:
    found = figures(Distribution.of_values(np.array([1.0, 1.0, 2.0, -3.25])), 1.0)
    assert (found.total, found.mse) == (4, 0.0625 / 4)
    assert found.sqnr_db == pytest.approx(10 * math.log10((1 + 1 + 4 + 3.25**2) / 0.0625), rel=1e-15)
    assert found.entropy_bits == 1.5  # shares 1/2, 1/4, 1/4
    dead = figures(Distribution.of_values(np.zeros(3)), 1e-6)
    assert (dead.mse, dead.clipped, dead.codes_used, dead.entropy_bits) == (0.0, 0, 1, 0.0)
    assert math.isnan(dead.sqnr_db)
    exact = figures(Distribution.of_values(np.ones(3)), 1.0)
    assert exact.sqnr_db == math.inf
    empty = figures(Distribution.of_values(np.array([])), 1.0)
    assert all(math.isnan(x) for x in (empty.mse, empty.clipped_share, empty.entropy_bits, empty.sqnr_db))


@settings(deadline=None, max_examples=50)
# An outer step is a difference of float32 values over seven: zero, or far above the float64 numbers whose quotient
# is infinite.
@given(st.lists(halves, min_size=1, max_size=30), st.floats(0.01, 2), st.just(0.0) | st.floats(1e-30, 20))
def test_two_segments_equal_quantizing_each_value(values: list[float], inner: float, outer: float) -> None:
    array = np.array(values, np.float16).astype(np.float32)
    histogram = [0] * 256
    errors = []
    for value in array.tolist():
        a = abs(value)
        if a <= 120 * inner or outer <= 0:
            code = min(round(a / inner), 120)  # Python rounds ties to even too
            rebuilt = code * inner
        else:
            code = 120 + min(round((a - 120 * inner) / outer), 7)
            rebuilt = 120 * inner + (code - 120) * outer
        histogram[(-code if value < 0 else code) + 128] += 1
        errors.append((a - rebuilt) ** 2)
    found = piecewise_figures(Distribution.of_values(array), inner, outer)
    assert found.histogram.tolist() == histogram
    # a - rebuilt cancels: the product rounds by half an ulp of at most 1000.
    assert found.squared_error == pytest.approx(math.fsum(errors), rel=1e-9, abs=1e-20)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(halves, st.integers(1, 10**9)), max_size=30))
def test_suffix_sums_are_the_exact_sums(pairs: list[tuple[float, int]]) -> None:
    magnitudes = sorted(abs(v) for v, _ in pairs)
    counts = [n for _, n in pairs]
    sums = suffix_sums(np.array(magnitudes, np.float64), np.array(counts, np.int64))
    for power, found in enumerate(sums):
        for i in range(len(pairs) + 1):
            exact = sum(
                (n * Fraction(a) ** power for a, n in zip(magnitudes[i:], counts[i:], strict=True)), Fraction(0)
            )
            # count * a rounds once, * a twice, the compensated sum once more.
            assert abs(Fraction(float(found[i])) - exact) <= exact * Fraction(4, 2**53)
            if power == 0:
                assert int(found[i]) == exact


# The optimal scale ------------------------------------------------------------------------------------------


def exact_error(pairs: list[tuple[Fraction, int]], scale: Fraction) -> Fraction:
    """Sum of n min_c (x - c s)^2 over the codes -128..127."""
    total = Fraction(0)
    for x, n in pairs:
        code = max(-128, min(127, round(x / scale)))
        total += n * (x - code * scale) ** 2
    return total


def exhaustive_optimum(values: Float32) -> tuple[Fraction, Fraction]:
    """(least error, largest scale that has it) over every piece between breakpoints |x| / (c + 1/2), exactly."""
    distribution = Distribution.of_values(values)
    pairs = [(Fraction(float(v)), int(n)) for v, n in zip(distribution.values, distribution.counts, strict=True)]
    points = {abs(x) / (c + Fraction(1, 2)) for x, _ in pairs if x for c in range(128)}
    edges = sorted(points | {max(points) * 2, min(points) / 2})
    candidates = []
    for low, high in pairwise(edges):
        middle = (low + high) / 2
        codes = [max(-128, min(127, round(x / middle))) for x, _ in pairs]
        energy = sum(n * c * c for (_, n), c in zip(pairs, codes, strict=True))
        if energy:
            scale = Fraction(sum(n * x * c for (x, n), c in zip(pairs, codes, strict=True))) / energy
            candidates.append((exact_error(pairs, scale), scale))
    least = min(error for error, _ in candidates)
    return least, max(scale for error, scale in candidates if error == least)


few_values = st.lists(
    st.one_of(st.floats(-100, 100, width=16), st.integers(-9, 9).map(float), st.sampled_from([0.0, 60000.0, 2**-20])),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=120)
@given(few_values.filter(any), st.integers(1, 3))
def test_the_optimum_is_the_exhaustive_one(values: list[float], repeats: int) -> None:
    array = np.array(values + values[:1] * repeats, np.float16).astype(np.float32)
    distribution = Distribution.of_values(array)
    pairs = [(Fraction(float(v)), int(n)) for v, n in zip(distribution.values, distribution.counts, strict=True)]
    least, scale = exhaustive_optimum(array)
    found = optimal_scale(distribution)
    signal = sum((n * x * x for x, n in pairs), Fraction(0))
    tie = Fraction(TIE) * signal
    # By definition within the tie of the least error, and no smaller than the largest exact minimum (to
    # rounding).
    assert exact_error(pairs, Fraction(found)) <= least + 2 * tie
    assert found >= float(scale) * (1 - 1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["t", "normal", "sparse", "one-sided"]))
def test_no_scale_of_a_fine_grid_is_better(seed: int, kind: str) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_t(2, 3000) if kind == "t" else random.normal(size=3000)
    values = values * (random.random(3000) < 0.01) if kind == "sparse" else values
    values = np.abs(values) if kind == "one-sided" else values
    distribution = Distribution.of_values(values)
    best = figures(distribution, optimal_scale(distribution)).squared_error
    for scale in np.geomspace(distribution.amax / 1e4, distribution.amax * 2, 600):
        # The stored scale is the optimum rounded to float32: its error exceeds the least by a relative
        # (2^-24)^2 rms(code)^2 signal / error, below 1e-9 here.
        assert best <= figures(distribution, float(scale)).squared_error * (1 + 1e-9)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([3.0], 3.0),  # exact at 3, 3/2, 1, ...: the larger wins
        ([-3.0], 3.0),
        ([0.0, 1.0, -1.0], 1.0),
        ([2.0, 4.0, 6.0], 2.0),
        ([-128.0, 1.0], 1.0),  # -128 is a code
        ([0.0], 0.0),
        ([], 0.0),
    ],
)
def test_known_optima(values: list[float], scale: float) -> None:
    assert optimal_scale(Distribution.of_values(np.array(values))) == pytest.approx(scale, rel=1e-15)


def test_positive_128_is_not_a_code() -> None:
    assert optimal_scale(Distribution.of_values(np.array([128.0, 1.0]))) != pytest.approx(1.0, rel=1e-6)


@settings(deadline=None)  # the first example is compiled
@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_of_too_many_ties_the_larger_half_of_the_scales_is_kept(held: int, worse: int, seed: int) -> None:
    """Unless some are no ties any more: then only those go."""
    rng = np.random.default_rng(seed)
    ties = rng.random((held + worse, 2))
    ties[held:, 0] += 1.5
    rng.shuffle(ties)
    before = ties.copy()
    kept = _keep_ties(ties, len(ties), 1.0)
    if worse:
        np.testing.assert_array_equal(ties[:kept], before[before[:, 0] <= 1.0])
    else:
        np.testing.assert_array_equal(ties[:kept], before[np.argsort(-before[:, 1])][: held // 2])
