"""Each INT8 operator against its slow twin on its own integer input."""

from __future__ import annotations

from dataclasses import replace

import int8_twin as twin
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.apply.int8 import arithmetic as int8
from quambase.apply.int8.operators import host_kernels as kernels
from quambase.apply.int8.operators.host import HostInt8Operators
from quambase.apply.int8.operators.interface import Multipliers, ScanScales
from quambase.model.hadamard import hadamard
from quambase.model.operators.interface import OperatorSizes, ScanInputs
from quambase.model.packed_batch import Batch, PlacedBatch

OPERATORS = HostInt8Operators(OperatorSizes(d_model=16, d_inner=32, d_state=4, d_conv=4))


def codes(generator, *shape):
    return generator.integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
def test_weights_are_quantized_in_float16(spread):
    weight = np.random.default_rng(0).normal(0, spread, (40, 33)).astype(np.float16).astype(np.float32)
    ours = int8.quantize_weight(torch.from_numpy(weight))
    expected, scale = twin.quantize_half(weight)
    assert ours.scale == scale
    np.testing.assert_array_equal(ours.codes.numpy(), expected)


def test_float16_arithmetic_gives_other_codes_than_float32():
    weight = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float16).astype(np.float32)
    ours = int8.quantize_weight(torch.from_numpy(weight)).codes.numpy()
    assert 0 < (ours != twin.quantize_float32(weight)[0]).mean() < 0.05


def test_scan_parameters_are_quantized_in_float32():
    weight = np.random.default_rng(2).normal(size=(16, 9)).astype(np.float32)
    ours = int8.quantize_weight_float32(torch.from_numpy(weight))
    expected, scale = twin.quantize_float32(weight)
    assert ours.scale == scale
    np.testing.assert_array_equal(ours.codes.numpy(), expected)


def test_half_the_largest_scan_parameter_is_rounded_as_on_cuda():
    """A_log in layer 3 of mamba-5m, whose every 63 was 64 in upstream's model on a GPU."""
    ours = int8.quantize_weight_float32(torch.tensor([4.46875, 2.234375]))
    assert ours.codes.tolist() == [127, 64]
    assert ours.scale == 0.0351870059967041  # 0.0351870097219944 would be the quotient by 127


def test_a_weight_of_zeros_keeps_a_positive_scale():
    ours = int8.quantize_weight(torch.zeros(3, 4))
    assert ours.scale > 0 and not ours.codes.any()


@pytest.mark.parametrize("signed", [False, True])
def test_embedding_rows(signed):
    rows = np.random.default_rng(3).normal(size=(20, 16)).astype(np.float16)
    rows[4] = -np.abs(rows[4])  # no positive value
    rows[5] = 0
    ours, scales = int8.quantize_rows(torch.from_numpy(rows.astype(np.float32)), signed_max=signed)
    for row, found, scale in zip(rows, ours.numpy(), scales.numpy(), strict=True):
        if signed:
            expected_scale = np.float16(max(row) / np.float16(127))
        else:
            expected_scale = np.float16(max(*abs(row), np.float16(1e-5)) / np.float16(127))
        assert scale == expected_scale
        if expected_scale != 0:
            with np.errstate(over="ignore"):
                quotients = [float(np.float16(x / expected_scale)) for x in row]
            expected = [round(min(127.0, max(-128.0, q))) for q in quotients]
            np.testing.assert_array_equal(found, expected)
    if not signed:
        # Half a scale of rounding, and 2^-11 of float16 rounding of scale, quotient and product each.
        restored = ours.numpy() * scales.numpy().astype(np.float64)[:, None]
        bound = (0.5 + 127 * 3 * 2**-11) * scales.numpy().astype(np.float64)[:, None]
        assert (np.abs(restored - rows) <= bound).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 300), st.integers(1, 7))
def test_gemm_integers_are_exact(seed, rows, width, out):
    generator = np.random.default_rng(seed)
    x, weight = codes(generator, rows, width), codes(generator, out, width)
    ours = int8.matmul(torch.from_numpy(x), int8.Int8Weight(torch.from_numpy(weight), 1.0))
    np.testing.assert_array_equal(ours.numpy().astype(np.int64), twin.gemm(x, weight.astype(np.int64)))


def test_gemm_beyond_float32_integers_is_the_rounded_int32():
    generator = np.random.default_rng(4)
    x = generator.choice(np.array([-128, -127], np.int8), (6, 3000))
    weight = generator.choice(np.array([-127, -126], np.int8), (5, 3000))
    prepared = int8.Int8Weight(torch.from_numpy(weight), 1.0)
    assert not prepared.exact_at_once
    exact = twin.gemm(x, weight.astype(np.int64))
    assert (exact > 2**24).all() and (exact % 2).any()
    np.testing.assert_array_equal(int8.matmul(torch.from_numpy(x), prepared).numpy(), exact.astype(np.float32))


def test_epilogue_codes():
    generator = np.random.default_rng(5)
    acc = generator.integers(-60000, 60000, (50, 40))
    first, second = np.float32(0.0371), np.float32(0.0913)
    out = np.empty(acc.shape, np.int8)
    kernels.scale_columns_to_int8(acc.astype(np.float32), np.full(40, first), second, False, out)
    valued = twin.scaled(acc, float(first) * float(second))
    assert twin.few(twin.check_codes(out, valued, twin.half_even), valued)


def test_epilogue_rounds_ties_to_even_and_saturates():
    acc = np.array([[-7, -5, -3, -1, 1, 3, 5, 7, 1000, -1000]], np.float32)
    out = np.empty(acc.shape, np.int8)
    kernels.scale_columns_to_int8(acc, np.full(10, 0.5, np.float32), np.float32(1), False, out)
    assert out.tolist() == [[-4, -2, -2, 0, 0, 2, 2, 4, 127, -128]]


def factors_that_do_not_commute(finish, tie, values):
    """Two float32 factors for which the order of multiplication changes a finished result of ``values``."""
    generator = np.random.default_rng(6)
    for first, goal in generator.uniform(0.01, 1, (20_000, 2)).astype(np.float32):
        # Brings the value 97 next to a tie of the last rounding, where a last bit matters.
        second = np.float32(tie(97 * goal) / (97 * np.float64(first)))
        here, there = finish(values * first * second), finish(values * second * first)
        if (here != there).any():
            return first, second, here
    raise AssertionError("no such factors found")


def test_epilogues_multiply_in_the_order_given():
    values = np.arange(-128, 128, dtype=np.float32)
    identity = int8.Int8Weight(torch.ones(1, 1, dtype=torch.int8), 1.0)
    x = torch.arange(-128, 128, dtype=torch.int8).unsqueeze(1)
    first, second, expected = factors_that_do_not_commute(
        lambda v: v.astype(np.float16), lambda v: np.float16(v) + np.float64(np.spacing(np.float16(v))) / 2, values
    )
    result = OPERATORS.linear_to_half(x, identity, Multipliers(float(first), float(second)))
    np.testing.assert_array_equal(result.numpy()[:, 0], expected.astype(np.float32))
    first, second, expected = factors_that_do_not_commute(np.rint, lambda v: np.floor(v) + 0.5, values)
    codes_out = OPERATORS.linear_to_int8(x, identity, Multipliers(float(first), float(second)))
    np.testing.assert_array_equal(codes_out.numpy()[:, 0], expected)


def test_norm_codes():
    generator = np.random.default_rng(7)
    x = generator.normal(size=(30, 64)).astype(np.float32)
    residual = generator.normal(size=(30, 64)).astype(np.float32)
    total = (x + residual).copy()
    out = np.empty(x.shape, np.int8)
    kernels.add_rms_norm_int8(x, residual, np.float32(1e-5), np.float32(0.02), out)
    np.testing.assert_array_equal(residual, total)
    valued = twin.rms_norm(total, float(np.float32(1e-5)), float(np.float32(0.02)))
    assert twin.few(twin.check_codes(out, valued, twin.half_even), valued)
    assert np.abs(valued[0]).max() > 128  # some saturate


def test_norm_rounds_ties_to_even():
    # A row of +-1 has mean square 1; eps 0 leaves the value 1, over scale 2: 0.5.
    row = np.array([[1, -1, 1, -1]], np.float32)
    out = np.empty(row.shape, np.int8)
    kernels.add_rms_norm_int8(row, np.zeros_like(row), np.float32(0), np.float32(2), out)
    assert out.tolist() == [[0, 0, 0, 0]]


OFFSETS = np.array([0, 7, 7, 8, 40])  # an empty document and one of a single token among them


@pytest.mark.parametrize("affine", [False, True])
def test_convolution_codes(affine):
    generator = np.random.default_rng(8)
    channels, width = 150, 4  # more than one block of channels
    zero_point = generator.integers(-120, 100, channels) if affine else np.zeros(channels, np.int64)
    x = codes(generator, 40, 2 * channels)
    weight, bias = codes(generator, channels, width), codes(generator, channels)
    s_x, s_w, s_b, s_out = (float(np.float32(s)) for s in (0.031, 0.0062, 0.0094, 0.017))
    out = np.empty((40, channels), np.int8)
    kernels.conv_silu_int8(
        x,
        0,
        weight.T.astype(np.float32).copy(),
        np.full(channels, np.float32(s_w) * np.float32(s_x)),
        bias.astype(np.float32) * np.float32(s_b),
        np.full(channels, s_out, np.float32),
        zero_point.astype(np.float32),
        OFFSETS,
        out,
    )
    valued = twin.conv(x[:, :channels], weight.astype(np.int64), bias.astype(np.int64), s_x, s_w, s_b, s_out, OFFSETS)
    assert twin.few(twin.check_codes(out, valued, twin.shifted(zero_point)), valued)
    assert (out == 127).any() and (out == -128).any() == affine


def test_convolution_rounds_once_and_ties_away():
    # At v = 1e4 SiLU is the identity, so the code is round(1e4 / 4000 = 2.5): 3, where
    # half to even would give 2.
    x = np.array([[100]], np.int8)
    out = np.empty((1, 1), np.int8)
    one = np.ones(1, np.float32)
    for zero_point in (0, -100, 126):
        arguments = (one[:, None], 100 * one, 0 * one, 4000 * one, zero_point * one)
        kernels.conv_silu_int8(x, 0, *arguments, np.array([0, 1]), out)
        assert out[0, 0] == min(3 + zero_point, 127)


def test_an_offset_is_subtracted_from_the_integer_sums():
    """Of codes with a zero point z the product is that of code - z, exactly, beyond 2^24 too."""
    generator = np.random.default_rng(12)
    x, weight = codes(generator, 9, 3000), codes(generator, 7, 3000)
    x[0], weight[0] = -128, 127
    zero_point = -113
    exact = (x.astype(np.int64) - zero_point) @ weight.astype(np.int64).T
    offset = torch.from_numpy(zero_point * weight.astype(np.int32).sum(1, dtype=np.int32))
    prepared = int8.Int8Weight(torch.from_numpy(weight), 1.0)
    np.testing.assert_array_equal(int8.matmul(torch.from_numpy(x), prepared, offset).numpy(), exact.astype(np.float32))
    first = float(np.float32(1 / np.abs(exact).mean()))
    found = OPERATORS.linear_to_int8(torch.from_numpy(x), prepared, Multipliers(first, 50.0), offset)
    scaled = np.float32(np.float32(exact.astype(np.float32) * np.float32(first)) * np.float32(50))
    np.testing.assert_array_equal(found.numpy(), np.clip(np.rint(scaled), -128, 127))


def test_a_scan_reads_codes_without_their_zero_point():
    generator = np.random.default_rng(13)
    batch = PlacedBatch.of(Batch.pack([[0] * 7, [0] * 5]), torch.device("cpu"))
    u, delta, z = (torch.from_numpy(codes(generator, 12, 20)) for _ in range(3))
    bc = torch.from_numpy(codes(generator, 12, 8))
    a, d = -torch.rand(4, 20), torch.rand(20)
    values = (u.float() + 90).clamp(max=127)  # codes of the same values with the zero point 90
    inside = values == u.float() + 90
    scales = ScanScales(0.02, 0.03, 0.01, 0.04, 1.0)
    rest = (delta, bc, z)
    u = torch.where(inside, u, 0)
    inputs = ScanInputs(u, *rest, a, d, torch.zeros(20))
    plain = OPERATORS.selective_scan(inputs, scales, batch)
    shifted = inputs._replace(u=(u + 90).to(torch.int8))
    affine = OPERATORS.selective_scan(shifted, replace(scales, u_zero=90), batch)
    np.testing.assert_array_equal(plain.numpy(), affine.numpy())


def test_decoded_convolution_codes_and_window():
    generator = np.random.default_rng(9)
    batch, channels, width = 3, 20, 4
    weight, bias = codes(generator, channels, width), codes(generator, channels)
    s_x, s_w, s_b, s_out = (float(np.float32(s)) for s in (0.031, 0.0062, 0.0094, 0.017))
    window = codes(generator, batch, width, channels)
    x = codes(generator, batch, channels)
    expected = np.concatenate([window[:, 1:], x[:, None]], axis=1)
    out = np.empty((batch, channels), np.int8)
    kernels.conv_update_int8(
        x,
        0,
        window,
        weight.T.astype(np.float32).copy(),
        np.full(channels, np.float32(s_w) * np.float32(s_x)),
        bias.astype(np.float32) * np.float32(s_b),
        np.full(channels, s_out, np.float32),
        np.zeros(channels, np.float32),
        out,
    )
    np.testing.assert_array_equal(window, expected)
    near = 0
    for one, found in zip(expected, out, strict=True):
        full = twin.conv(one, weight.astype(np.int64), bias.astype(np.int64), s_x, s_w, s_b, s_out, [0, width])
        valued = full[0][-1:], full[1][-1:]
        near += twin.check_codes(found[None], valued, twin.half_away)
    assert near <= 3


@pytest.mark.parametrize("wraps", [False, True])
def test_hadamard_codes(wraps):
    generator = np.random.default_rng(10)
    y = generator.standard_t(3, (50, 64)).astype(np.float16)
    scale = 0.03
    rotated = hadamard(torch.from_numpy(y), 1 / np.sqrt(64) / scale).numpy()
    out = np.empty(y.shape, np.int8)
    kernels.round_to_int8(rotated, wraps, out)
    valued = twin.hadamard(y, scale, twin.hadamard_matrix(64))
    assert np.abs(valued[0]).max() > 140  # some saturate, or wrap
    if wraps:
        value, error = valued
        sure = twin.wrap(value - error) == twin.wrap(value + error)
        np.testing.assert_array_equal(out[sure], twin.wrap(value)[sure])
        assert (~sure).sum() <= 3 + 8 * error.sum()
    else:
        assert twin.few(twin.check_codes(out, valued, twin.half_away), valued)


def test_hadamard_quantizer_ties_and_overflow():
    x = np.array([[0.5, -0.5, 2.5, -2.5, 0.49999997, 127.4, 127.5, 128, -128.5, 300, 3e9]], np.float32)
    out = np.empty(x.shape, np.int8)
    kernels.round_to_int8(x, False, out)
    assert out.tolist() == [[1, -1, 3, -3, 0, 127, 127, 127, -128, 127, 127]]
    kernels.round_to_int8(x, True, out)
    # 3e9 saturates to the int32 2^31 - 1, whose low byte is -1.
    assert out.tolist() == [[1, -1, 3, -3, 0, 127, -128, -128, 127, 44, -1]]


def test_prefill_state_codes():
    state = np.array([[[0.25, -0.25, 0.75, 100.0, -100.0, 0.2499]]], np.float32)
    out = np.empty(state.shape, np.int8)
    kernels.state_to_int8(state, np.float32(0.5), out)
    assert out.tolist() == [[[1, -1, 2, 127, -128, 0]]]


def test_decoded_scan():
    generator = np.random.default_rng(11)
    batch, channels, n = 2, 40, 16
    a_log, s_a = codes(generator, channels, n), 0.02
    u, dt, z = (codes(generator, batch, channels) for _ in range(3))
    b, c = codes(generator, batch, n), codes(generator, batch, n)
    d, bias = codes(generator, channels), codes(generator, channels)
    s_u, s_dt, s_bias, s_b, s_d, s_z, s_h = (float(np.float32(s)) for s in (0.03, 0.05, 0.04, 0.02, 0.01, 0.05, 0.013))
    state = codes(generator, batch, n, channels)
    before = state.astype(np.float64).transpose(0, 2, 1) * s_h
    e_before = twin.U * np.abs(before)
    delta = int8.softplus_delta(
        torch.from_numpy(dt), s_dt, torch.from_numpy(bias.astype(np.float32)) * np.float32(s_bias)
    )
    rate = -np.exp(np.float32(s_a) * a_log.astype(np.float32)).T.copy()
    single = [np.float32(s) * x.astype(np.float32) for x, s in ((u, s_u), (b, s_b), (c, s_b), (d, s_d), (z, s_z))]
    y = np.empty((batch, channels), np.float32)
    kernels.scan_update_int8(
        single[0], delta.numpy(), rate, single[1], single[2], single[3], single[4], np.float32(s_h), state, y
    )
    exact_delta = twin.softplus_delta(dt, s_dt, bias.astype(np.int64), s_bias)
    exact_a = -np.exp(float(np.float32(s_a)) * a_log.astype(np.float64))
    near = 0
    for i in range(batch):
        step, e_step = exact_delta[0][i][:, None], exact_delta[1][i][:, None]
        # A: one product before exp, exp itself; then delta A and its exp.
        e_a = np.abs(exact_a) * (twin.EXP + twin.U * np.abs(s_a * a_log))
        exponent = step * exact_a
        decay = np.exp(exponent)
        e_decay = decay * (np.expm1(e_step * -exact_a + step * e_a + twin.U * -exponent) + twin.EXP)
        gain = step * (s_b * b[i].astype(np.float64)) * (s_u * u[i].astype(np.float64))[:, None]
        new = decay * before[i] + gain
        error = e_decay * np.abs(before[i]) + decay * e_before[i] + (e_step / step + 5 * twin.U) * np.abs(gain)
        error += 3 * twin.U * (np.abs(decay * before[i]) + np.abs(gain))
        # state * 1e2 / (scale * 1e2): three more roundings.
        valued = new / s_h, (error + 4 * twin.U * np.abs(new)) / s_h
        near += twin.check_codes(state[i].T, valued, twin.half_even)
        read, skip = s_b * c[i].astype(np.float64), s_d * d * (s_u * u[i].astype(np.float64))
        total = (new * read).sum(1) + skip
        magnitude = (np.abs(new * read)).sum(1) + np.abs(skip)
        gate, e_gate = twin.silu((s_z * z[i].astype(np.float64), twin.U * np.abs(s_z * z[i].astype(np.float64))))
        bound = np.abs(gate) * ((error * np.abs(read)).sum(1) + (n + 5) * twin.U * magnitude)
        bound += np.abs(total) * e_gate + 2 * twin.U * np.abs(total * gate)
        assert (np.abs(y[i] - total * gate) <= bound).all()
    assert near <= 5


def test_states_are_rounded_half_to_even_while_decoding():
    # delta 0 leaves the state as it is; scale 1, state codes come back unchanged; a new
    # value of exactly 0.5 (gain 0.5 from an empty state) is rounded to 0, 1.5 to 2.
    one = np.ones((1, 2), np.float32)
    gains = np.array([[0.5, 1.5]], np.float32)
    state = np.zeros((1, 1, 2), np.int8)
    y = np.empty((1, 2), np.float32)
    kernels.scan_update_int8(
        gains, one, np.zeros((1, 2), np.float32), one[:, :1], one[:, :1], one[0], one, np.float32(1), state, y
    )
    assert state.tolist() == [[[0, 2]]]
    # The output reads the state before rounding: (0.5 + D u) silu(1) with D = 1, u = 0.5.
    np.testing.assert_allclose(y[0], np.array([1.0, 3.0]) / (1 + np.exp(-1)), rtol=1e-6)
