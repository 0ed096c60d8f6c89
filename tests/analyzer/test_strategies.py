"""The registry, the labels, and each strategy against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.analyzer import kernels, strategies
from quambase.analyzer.scale_groups import ScaleGroup, group_of_values
from quambase.analyzer.strategies import DEFAULT_LABELS, STRATEGIES, parse_label, parse_labels, strategy
from quambase.schema.errors import DataInvalid, UnknownName
from quambase.schema.values.number_format import Affine

VALUES = (np.random.default_rng(5).standard_t(3, 4000) * 2).astype(np.float16)
A = np.abs(VALUES.astype(np.float64))


@pytest.fixture(scope="module")
def group() -> ScaleGroup:
    return group_of_values(VALUES)


def error(scale: float) -> float:
    """Squared error by quantizing every value in float32."""
    codes = np.clip(np.rint(VALUES.astype(np.float32) / np.float32(scale)), -128, 127).astype(np.float64)
    return float(((VALUES.astype(np.float64) - codes * np.float64(np.float32(scale))) ** 2).sum())


def least(candidates: list[float]) -> float:
    return min(candidates, key=lambda s: (error(s), -s))


EXPECTED = {
    "absmax": lambda: A.max() / 127,
    "percentile": lambda: np.quantile(A, 0.9995) / 127,
    "percentile:0.9": lambda: np.quantile(A, 0.9) / 127,
    "outlier_aware": lambda: np.quantile(A, 0.99) / 120,
    "outlier_aware:0.95,100": lambda: np.quantile(A, 0.95) / 100,
    "adaptive_outlier_aware": lambda: least([np.quantile(A, r) / (127 * r) for r in (0.95, 0.97, 0.99, 0.995)]),
    "sigma": lambda: 5 * VALUES.astype(np.float64).std() / 127,
    "sigma:3": lambda: 3 * VALUES.astype(np.float64).std() / 127,
    "pow2": lambda: least([2.0**k for k in range(-20, 10)]),
    "aciq_gauss": lambda: strategies.ACIQ_GAUSS * VALUES.astype(np.float64).std() / 127,
    "aciq_laplace": lambda: (
        strategies.ACIQ_LAPLACE * np.abs(VALUES.astype(np.float64) - VALUES.astype(np.float64).mean()).mean() / 127
    ),
}


@pytest.mark.parametrize("label", EXPECTED)
def test_scale_is_the_definition(group: ScaleGroup, label: str) -> None:
    # Sums over 4000 values in another order differ by a relative 1e-12 before rounding to float32.
    assert parse_label(label).scale(group) == pytest.approx(float(np.float32(EXPECTED[label]())), rel=2**-23)


def test_mse_is_better_than_every_other_strategy(group: ScaleGroup) -> None:
    scales = {c.label: c.scale(group) for c in parse_labels(["all"]) if not c.strategy.needs_decode}
    assert min(scales, key=lambda label: error(float(scales[label]))) == "mse"  # type: ignore[arg-type]


def test_lp_is_the_best_of_its_grid(group: ScaleGroup) -> None:
    def power(scale: float) -> float:
        codes = np.clip(np.rint(VALUES.astype(np.float32) / np.float32(scale)), -128, 127)
        return float((np.abs(VALUES.astype(np.float64) - codes * np.float64(np.float32(scale))) ** 2.4).sum())

    grid = [A.max() / 127 * i / 100 for i in range(1, 101)]
    assert parse_label("lp").scale(group) == pytest.approx(min(grid, key=power), rel=2**-23)


def kl_divergence(bins: np.ndarray, i: int) -> float:
    """Clip at ``i`` bins, quantize to 128 levels, and compare, bin by bin."""
    level = np.digitize(np.arange(i), np.linspace(0, i, 129)) - 1
    filled = bins[:i] > 0
    quantized = np.zeros(i)
    for k in range(128):
        mine = (level == k) & filled
        if mine.any():
            quantized[mine] = bins[:i][mine].sum() / mine.sum()
    reference = bins[:i].copy()
    reference[-1] += bins[i:].sum()
    if ((reference > 0) & (quantized <= 0)).any():
        return math.inf
    p, q = reference / reference.sum(), quantized / quantized.sum()
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@pytest.mark.parametrize("seed", range(4))
def test_entropy_has_the_least_divergence(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = (random.standard_t(2 + seed, 30000) * (1 if seed % 2 else 10)).astype(np.float16)
    magnitudes = np.abs(values.astype(np.float64))
    bins, edges = np.histogram(magnitudes, 2048, (0.0, magnitudes.max()))
    bins = bins.astype(np.float64)
    bins[0] = bins[1]
    divergences = [kl_divergence(bins, i) for i in range(128, 2049)]
    # The twin adds up to 2048 terms in another order: differences of 1e-12 decide nothing.
    np.testing.assert_allclose(kernels.entropy_divergences(bins, 128), divergences, rtol=1e-9, atol=1e-12)
    scale = parse_label("entropy").scale(group_of_values(values))
    assert isinstance(scale, float)
    chosen = int(np.argmin(np.abs(edges - scale * 127)))
    assert divergences[chosen - 128] <= min(divergences) + 1e-11


def test_outlier_piecewise_reaches_the_largest_value(group: ScaleGroup) -> None:
    inner, outer = parse_label("outlier_piecewise").scale(group)  # type: ignore[misc]
    assert inner == pytest.approx(np.quantile(A, 0.99) / 120, rel=2**-23)
    assert 120 * inner + 7 * outer == pytest.approx(A.max(), rel=2**-22)


def test_aciqs_constants_are_minima_of_their_errors() -> None:
    def laplace(t: float) -> float:
        return 2 * math.exp(-t) + t * t / (3 * 4**8)

    def gauss(t: float) -> float:
        tail, density = math.erfc(t / math.sqrt(2)) / 2, math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        return 2 * ((1 + t * t) * tail - t * density) + t * t / (3 * 4**8)

    for function, constant in ((laplace, strategies.ACIQ_LAPLACE), (gauss, strategies.ACIQ_GAUSS)):
        slope = (function(constant + 1e-4) - function(constant - 1e-4)) / 2e-4
        curvature = (function(constant + 1e-2) - 2 * function(constant) + function(constant - 1e-2)) / 1e-4
        # Newton's step to the true minimum: float64 differences of 1e-4 resolve it to about 1e-5.
        assert abs(slope / curvature) < 1e-4


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-60000, 60000, width=16), max_size=6), st.sampled_from(["in_proj:input", "x_proj:input"]))
def test_every_scale_is_positive_and_finite(values: list[float], site: str) -> None:
    group = group_of_values(np.array(values), site)
    for choice in parse_labels(["all"]):
        found = choice.scale(group)
        scales = found if isinstance(found, tuple) else (found.scale if isinstance(found, Affine) else found,)
        for scale in scales:
            assert math.isfinite(scale) and scale >= np.float32(1e-6)
            assert float(np.float32(scale)) == scale


def test_a_dead_site_has_the_floor() -> None:
    dead = group_of_values(np.zeros(10))
    assert {c.scale(dead) for c in parse_labels(["all"]) if not c.strategy.needs_decode} == {float(np.float32(1e-6))}


def test_registering_a_name_twice_is_an_error() -> None:
    def absmax(group: ScaleGroup) -> float:
        return 1.0

    with pytest.raises(DataInvalid, match="quambase has a strategy absmax"):
        strategy(absmax)


def test_every_strategy_is_defined() -> None:
    for name, found in STRATEGIES.items():
        assert len(found.definition) > 20, name


def test_labels() -> None:
    assert parse_label("percentile").params == {"alpha": 0.9995}
    assert parse_label("percentile:0.9995").label == "percentile"
    assert parse_label("percentile:0.9999").label == "percentile:0.9999"
    assert parse_label("percentile:0.9999999").label == "percentile:0.9999999"
    assert parse_label("outlier_aware:0.95").label == "outlier_aware:0.95,120"
    assert parse_label("percentile:0.9999").params_json == '{"alpha": 0.9999}'
    assert [c.label for c in parse_labels(None)] == list(DEFAULT_LABELS)
    assert [c.label for c in parse_labels(["mse", "absmax", "mse"])] == ["mse", "absmax"]
    assert {c.strategy.name for c in parse_labels(["all"])} == set(STRATEGIES)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("percentil", "unknown strategy 'percentil'; did you mean percentile or ema_percentile"),
        ("percentile:a", "strategy 'percentile:a' is not understood; expected percentile:alpha"),
        ("percentile:0.9,1", "is not understood; expected percentile:alpha"),
        ("percentile:", "is not understood"),
        ("absmax:1", "expected absmax:no parameters"),
        ("percentile:1.5", "has alpha = 1.5; expected 0 < alpha <= 1"),
        ("percentile:0", "has alpha = 0; expected 0 < alpha"),
        ("sigma:-1", "has k = -1"),
        ("ema_percentile:0.5", "unknown stored document quantile '0.5'"),
    ],
)
def test_bad_labels(label: str, message: str) -> None:
    with pytest.raises(UnknownName) as caught:
        parse_label(label)
    assert message in str(caught.value)
