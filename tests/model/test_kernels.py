# mypy: disable-error-code="attr-defined, call-arg"
import itertools

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.model.operators.host_kernels import causal_conv1d_silu, exp32, selective_scan

EPS = 2.0**-24
"""Half a unit in the last place of 1 in float32."""


def test_exp_is_accurate_to_about_one_ulp_and_saturates() -> None:
    xs = np.linspace(-87.2, 88.2, 20_001).astype(np.float32)
    ours = np.array([exp32(x) for x in xs], np.float64)
    true = np.exp(xs.astype(np.float64))
    # Cephes states 1.7e-7 relative for this polynomial: under 3 half-ulps.
    assert (np.abs(ours - true) / true).max() < 3 * EPS
    assert exp32(np.float32(-1e30)) == exp32(np.float32(-87.3)) > 0
    assert np.isfinite(exp32(np.float32(1e30)))


lengths_lists = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@settings(deadline=None, max_examples=25)
@given(lengths_lists, st.integers(1, 300), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_convolution_equals_its_definition_per_document(lengths: list[int], e: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *lengths])
    x = rng.normal(size=(offsets[-1], e + 3)).astype(np.float32)
    weight, bias = rng.normal(size=(e, k)).astype(np.float32), rng.normal(size=e).astype(np.float32)
    out = np.empty((offsets[-1], e), np.float32)
    causal_conv1d_silu(x, 0, np.ascontiguousarray(weight.T), bias, offsets, out)
    for start, stop in itertools.pairwise(offsets):
        x64, w64 = x[start:stop, :e].astype(np.float64), weight.astype(np.float64)
        true = reference.conv_silu(x64, w64, bias.astype(np.float64))
        # k products and k sums of float32, each off by half an ulp of a partial sum of
        # magnitudes; SiLU has slope < 1.1 and adds a few ulps of its own result.
        size = reference.conv_silu(np.abs(x64), np.abs(w64), np.abs(bias)) + 1
        assert (np.abs(out[start:stop] - true) <= EPS * (2 * k + 12) * size).all()


@settings(deadline=None, max_examples=25)
@given(lengths_lists, st.integers(1, 200), st.integers(1, 17), st.integers(0, 2**32 - 1))
def test_scan_equals_the_recurrence_per_document(lengths: list[int], e: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *lengths])
    t = int(offsets[-1])
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    u, z, b, c, d = draw(t, e), draw(t, e), draw(t, n), draw(t, n), draw(e)
    delta = np.abs(draw(t, e))
    a = -np.exp(draw(n, e))
    state = draw(len(lengths), n, e)
    last, y = state.copy(), np.empty((t, e), np.float32)
    selective_scan(u, delta, a, b, c, d, z, offsets, y, last)
    wide = lambda x: x.astype(np.float64)  # noqa: E731
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        rows = slice(start, stop)
        args = [wide(v[rows]) for v in (u, delta)] + [wide(a).T, wide(b[rows]), wide(c[rows]), wide(d), wide(z[rows])]
        true, true_state = reference.scan(*args, wide(state[i]).T)
        # The same recurrence on magnitudes bounds every partial sum. A step makes about
        # 6 roundings of the state (exp's argument, worth |delta a| <= 60 ulps of exp at
        # worst, included in the generous 80), and errors of earlier steps decay.
        sizes = [np.abs(v) for v in (args[0], args[1])] + [args[2], *[np.abs(v) for v in args[3:6]], args[6]]
        bound, bound_state = reference.scan(*sizes, np.abs(wide(state[i]).T))
        steps = stop - start
        assert (np.abs(last[i].T - true_state) <= EPS * 80 * (steps + 1) * (bound_state + 1e-30)).all()
        assert (np.abs(y[rows] - true) <= EPS * (80 * steps + n + 12) * (np.abs(bound) + 1e-30)).all()


@pytest.mark.parametrize("e", [1, 127, 128, 129])
def test_documents_do_not_touch_each_other(e: int) -> None:
    """A packed batch gives each document the very bits it has alone."""
    rng = np.random.default_rng(e)
    offsets = np.array([0, 4, 4, 9, 10])
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    u, z, b, c, d = draw(10, e), draw(10, e), draw(10, 3), draw(10, 3), draw(e)
    delta, a = np.abs(draw(10, e)), -np.exp(draw(3, e))
    state, y = np.zeros((4, 3, e), np.float32), np.empty((10, e), np.float32)
    selective_scan(u, delta, a, b, c, d, z, offsets, y, state)
    for i in range(4):
        rows = slice(offsets[i], offsets[i + 1])
        alone_state, alone = np.zeros((1, 3, e), np.float32), np.empty((rows.stop - rows.start, e), np.float32)
        whole = np.array([0, rows.stop - rows.start])
        parts = [np.ascontiguousarray(v[rows]) for v in (u, delta, b, c, z)]
        selective_scan(parts[0], parts[1], a, parts[2], parts[3], d, parts[4], whole, alone, alone_state)
        np.testing.assert_array_equal(alone, y[rows])
        np.testing.assert_array_equal(alone_state[0], state[i])
