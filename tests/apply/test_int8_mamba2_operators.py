# mypy: disable-error-code="attr-defined, call-arg"
"""The INT8 Mamba-2's own operators against the slow twin, on integer input: rounding, ties, decoding, weights."""

from __future__ import annotations

import int8_mamba2_twin as twin2
import int8_twin as twin
import numpy as np
import pytest
import torch
from test_int8_operators import factors_that_do_not_commute
from tiny_int8_mamba2 import CONFIG, tiny_prepared

from quambase.apply.int8 import arithmetic as int8
from quambase.apply.int8.mamba2 import Int8Mamba2Weights
from quambase.apply.int8.operators import host_kernels as kernels


def codes(generator, *shape):
    return generator.integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize("away", [False, True])
def test_epilogue_codes_by_column(away):
    generator = np.random.default_rng(0)
    acc = generator.integers(-60000, 60000, (50, 40))
    first = generator.uniform(0.01, 0.2, 40).astype(np.float32)
    second = np.float32(0.0313)
    out = np.empty(acc.shape, np.int8)
    kernels.scale_columns_to_int8(acc.astype(np.float32), first, second, away, out)
    valued = twin.scaled(acc, first.astype(np.float64) * float(second))
    assert twin.few(twin.check_codes(out, valued, twin.half_away if away else twin.half_even), valued)


def test_epilogue_ties():
    acc = np.array([[-7, -5, -1, 1, 3, 5, 1000, -1000]], np.float32)
    out = np.empty(acc.shape, np.int8)
    half, one = np.full(8, 0.5, np.float32), np.float32(1)
    kernels.scale_columns_to_int8(acc, half, one, False, out)
    assert out.tolist() == [[-4, -2, 0, 0, 2, 2, 127, -128]]
    kernels.scale_columns_to_int8(acc, half, one, True, out)
    assert out.tolist() == [[-4, -3, -1, 1, 2, 3, 127, -128]]


def test_epilogue_multiplies_by_the_columns_factor_first():
    values = np.arange(-128, 128, dtype=np.float32)
    first, second, expected = factors_that_do_not_commute(np.rint, lambda v: np.floor(v) + 0.5, values)
    out = np.empty((256, 1), np.int8)
    kernels.scale_columns_to_int8(values[:, None].copy(), np.array([first]), second, False, out)
    np.testing.assert_array_equal(out[:, 0], expected)


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_convolution_codes_by_channel(decoded, affine):
    generator = np.random.default_rng(1)
    channels, width, first = 150, 4, 7
    offsets = np.array([0, 7, 7, 8, 40]) if not decoded else np.arange(0, 4 * 30 + 1, 4)
    x = codes(generator, offsets[-1], first + channels + 5)
    weight, bias = codes(generator, channels, width), codes(generator, channels)
    s_x, s_w, s_b, s_out = (generator.uniform(*r, channels).astype(np.float32) for r in ((0.01, 0.05),) * 4)
    shared = (weight.T.astype(np.float32).copy(), s_w * s_x, bias.astype(np.float32) * s_b, s_out)
    zero_point = generator.integers(-128, 100, channels) if affine else np.zeros(channels, np.int64)
    shared += (zero_point.astype(np.float32),)
    arguments = [v.astype(np.float64) for v in (s_x, s_w, s_b, s_out)]
    read = x[:, first : first + channels]
    valued = twin.conv(read, weight.astype(np.int64), bias.astype(np.int64), *arguments, offsets)
    if decoded:  # every document's last token, its first ones already in the window
        sequences = x.reshape(30, 4, -1)
        window = np.ascontiguousarray(np.roll(sequences[:, :, first : first + channels], 1, axis=1))
        out = np.empty((30, channels), np.int8)
        kernels.conv_update_int8(np.ascontiguousarray(sequences[:, 3]), first, window, *shared, out)
        np.testing.assert_array_equal(window, sequences[:, :, first : first + channels])
        valued = valued[0][3::4], valued[1][3::4]
    else:
        out = np.empty((offsets[-1], channels), np.int8)
        kernels.conv_silu_int8(x, first, *shared, offsets, out)
    assert twin.few(twin.check_codes(out, valued, twin.shifted(zero_point)), valued)


def test_convolutions_round_once_and_ties_away():
    # SiLU is the identity at 1e4, so the code is round(1e4 / 4000 = 2.5): 3, where half to even would give 2.
    x, one = np.array([[100]], np.int8), np.ones(1, np.float32)
    for decoded in (False, True):
        out = np.empty((1, 1), np.int8)
        arguments = (one[:, None], 100 * one, 0 * one, 4000 * one, 0 * one)
        if decoded:
            kernels.conv_update_int8(x, 0, np.zeros((1, 1, 1), np.int8), *arguments, out)
        else:
            kernels.conv_silu_int8(x, 0, *arguments, np.array([0, 1]), out)
        assert out[0, 0] == 3


def test_prefill_states_are_rounded_half_to_even_by_group():
    state = np.array([[[0.25, 0.75, -0.75], [1.0, 3.0, 900.0]]], np.float32)
    scales = np.array([[2.0, 2.0, 2.0], [0.5, 0.5, 0.5]], np.float32)
    out = np.empty(state.shape, np.int8)
    kernels.state_groups_to_int8(state, scales, np.array([1, 0]), out)
    assert out.tolist() == [[[0, 2, -2], [0, 2, 127]]]


def test_decoded_scan():
    """States and output of one token for 2 sequences, 3 heads of 5 in 3 SSD groups of 8 states, 4 scale groups."""
    generator = np.random.default_rng(2)
    batch, heads, headdim, n = 2, 3, 5, 8
    e = heads * headdim
    state = codes(generator, batch, e, n)
    scales = generator.uniform(0.01, 0.03, (4, n)).astype(np.float32)
    groups = generator.integers(0, 4, e)
    x, b, c = (generator.normal(size=(batch, width)).astype(np.float32) for width in (e, heads * n, heads * n))
    delta = generator.uniform(0.01, 1, (batch, heads)).astype(np.float32)
    decay, d = np.exp(-delta), generator.normal(size=heads).astype(np.float32)
    before = state.astype(np.float64)
    y = np.empty((batch, e), np.float32)
    kernels.ssd_update_int8(x, delta, decay, b, c, d, scales, groups, state, y)
    near = 0
    for i in range(batch):
        for channel in range(e):
            head = channel // headdim
            s = scales[groups[channel]].astype(np.float64)
            gain, read = (v[i, head * n : (head + 1) * n].astype(np.float64) for v in (b, c))
            kept = s * before[i, channel] * float(decay[i, head])
            drive = float(delta[i, head]) * gain * float(x[i, channel])
            new = kept + drive
            # Dequantizing, its product, two products of the drive, the sum.
            error = 3 * twin.U * (np.abs(kept) + np.abs(drive))
            valued = new / s, (error + 4 * twin.U * np.abs(new)) / s
            near += twin.check_codes(state[i, channel], valued, twin.half_even)
            skip = float(d[head]) * float(x[i, channel])
            magnitude = np.abs(new * read).sum() + abs(skip)
            bound = (error * np.abs(read)).sum() + (n + 3) * twin.U * magnitude
            assert abs(y[i, channel] - ((new * read).sum() + skip)) <= bound
    assert near <= 3


def test_decoded_states_are_rounded_half_to_even():
    one = np.ones((1, 1), np.float32)
    x = np.array([[0.5, 1.5]], np.float32)
    state, y = np.zeros((1, 2, 1), np.int8), np.empty((1, 2), np.float32)
    kernels.ssd_update_int8(x, one, one, one, one, np.zeros(1, np.float32), one, np.zeros(2, np.int64), state, y)
    assert state.tolist() == [[[0], [2]]]
    assert y.tolist() == [[0.5, 1.5]]  # before rounding


def test_each_part_of_a_weight_has_its_own_scale():
    layer = tiny_prepared().layers[0]
    ours = Int8Mamba2Weights.quantized(CONFIG, layer)
    e, w = CONFIG.d_inner, CONFIG.bc_width
    for name, widths, quantize in (
        ("in_proj", [e, e, w, w, CONFIG.heads], twin.quantize_half),
        ("conv_weight", [e, w, w], twin.quantize_float32),
        ("conv_bias", [e, w, w], twin.quantize_float32),
    ):
        found = getattr(ours, name)
        parts = [quantize(part) for part in torch.split(getattr(layer, name), widths)]
        np.testing.assert_array_equal(found.codes.numpy(), np.concatenate([codes for codes, _ in parts]))
        assert list(found.scales) == [scale for _, scale in parts]
        assert len(set(found.scales)) == len(parts)
        rows = twin2.by_row(found.scales, widths)
        np.testing.assert_array_equal(found.row_scales.numpy(), rows)
    for name, quantize in (("A_log", twin.quantize_half), ("D", twin.quantize_float32)):
        expected, scale = quantize(getattr(layer, name))
        np.testing.assert_array_equal(getattr(ours, name).codes.numpy(), expected)
        assert getattr(ours, name).scale == scale
    assert ours.dt_bias.dtype == ours.gated_norm.dtype == torch.float16
    assert int8.quantize_weight(layer.conv_weight).scale not in ours.conv_weight.scales
