"""The INT8 Mamba-2: every layer's wiring against the slow twin, group scales, decoding, and what it refuses."""

from __future__ import annotations

import int8_mamba2_twin as twin2
import int8_twin as twin
import numpy as np
import pytest
import torch
from recorded_operators import recorded
from tiny_int8_mamba2 import CONFIG, absmax_scales, channel_groups, documents, tiny_prepared

from quambase.apply.int8.build import build
from quambase.apply.int8.group_scales import BY_CHANNEL_GROUP
from quambase.model.language_model import floating_model
from quambase.model.packed_batch import Batch
from quambase.schema.errors import ScalesInvalid

GROUPS = channel_groups()
DIVISIONS = [[index] for index in GROUPS]
STATE = "ssm_state_act:input"
E, N, W = CONFIG.d_inner, CONFIG.d_state, CONFIG.bc_width
IN_PROJ = [E, E, W, W, CONFIG.heads]
CONV = [E, W, W]
CODES = ("add_norm_to_int8", "linear_to_int8", "conv_silu", "rotate")
"""The operators that make a block's codes, in order."""


@pytest.fixture(scope="module")
def prepared():
    return tiny_prepared()


@pytest.fixture(scope="module")
def by_granularity(prepared):
    found = {name: absmax_scales(prepared, documents(1), name, GROUPS) for name in ("tensor", "ssd", "channel")}
    return found | {"index": by_state_index(found["channel"])}


def by_state_index(scales):
    """The state's scales once for every state index."""
    state = {key: tuple((s,) * CONFIG.d_state for s in scale) for key, scale in scales.items() if key[1] == STATE}
    assert len(state) == CONFIG.n_layer
    return scales | state


def uneven(scales):
    """Every scale another multiple: one fed to the wrong place shows."""
    factors = (0.8 + 0.07 * (i % 7) for i in range(10**6))

    def changed(scale):
        return tuple(map(changed, scale)) if isinstance(scale, tuple) else scale * next(factors)

    return {key: changed(scale) for key, scale in scales.items()}


def channel_scales(scale, channels, index):
    """One float32 number per channel (channels,), and state index if there are such scales (channels, n): of one scale,
    of one per SSD group, or by ``index``."""
    values = np.array(scale if isinstance(scale, tuple) else (scale,), np.float32)
    if len(values) in (1, CONFIG.ngroups):
        index = [i * len(values) // channels for i in range(channels)]
    return values[index].astype(np.float64)


def in_proj_factor(weights, site):
    """Accumulator to code, by column."""
    inputs = [site[f"{name}:input"] for name in ("z_act", "x_conv_in", "B_conv_in", "C_conv_in", "dt_act")]
    return weights["in_proj"][1] / twin2.by_row(inputs, IN_PROJ) * site["in_proj:input"]


def conv_of(weights, site, index, codes, offsets):
    """The twin's convolution of codes (t, channels)."""
    outputs = [channel_scales(site[f"{name}_conv_out:input"], n, index) for name, n in zip("xBC", CONV, strict=True)]
    inputs = twin2.by_row([site[f"{name}_conv_in:input"] for name in "xBC"], CONV)
    codes_and_scales = (weights["conv"][0], weights["bias"][0], inputs, weights["conv"][1], weights["bias"][1])
    return twin.conv(codes, *codes_and_scales, np.concatenate(outputs), offsets)


def quantized(layer):
    """The twin's own codes and scales of one layer."""
    parts = [twin.quantize_half(part) for part in torch.split(layer.in_proj, IN_PROJ)]
    conv = [twin.quantize_float32(part) for part in torch.split(layer.conv_weight, CONV)]
    bias = [twin.quantize_float32(part) for part in torch.split(layer.conv_bias, CONV)]
    joined = {
        name: (np.concatenate([codes for codes, _ in found]), twin2.by_row([scale for _, scale in found], widths))
        for name, found, widths in (("in_proj", parts, IN_PROJ), ("conv", conv, CONV), ("bias", bias, CONV))
    }
    return joined | {
        "A_log": twin.quantize_half(layer.A_log),
        "D": twin.quantize_float32(layer.D),
        "out_proj": twin.quantize_half(layer.out_proj),
    }


def scanned(weights, layer, site, groups, in_proj, conv, offsets, initial=None):
    """The twin's scan of our codes: y, last states; with ``initial`` states a decoded token, whose x, B and C are not
    rounded to float16.
    """
    index = groups.numpy()
    scales = np.concatenate(
        [channel_scales(site[f"{name}_conv_out:input"], size, index) for name, size in zip("xBC", CONV, strict=True)]
    )
    values = twin2.dequantized(conv, scales)
    x, b, c = np.split(twin2.half(values) if initial is None else values, [E, E + W], axis=1)
    first = site["dt_act:input"] * np.asarray(in_proj[:, -CONFIG.heads :], np.float64)
    bias = layer.dt_bias.numpy().astype(np.float16).astype(np.float64)
    total = first + bias
    delta = np.where(total > 20, total, np.log1p(np.exp(np.minimum(total, 20))))
    # One product, one sum; softplus has slope at most 1.
    e_delta = twin.U * (np.abs(first) + np.abs(total)) + 2 * twin.EXP * np.abs(delta)
    exponent = weights["A_log"][1] * weights["A_log"][0]
    a = -np.exp(exponent), np.exp(exponent) * (twin.EXP + twin.U * np.abs(exponent))
    d = weights["D"][1] * weights["D"][0]
    decay = twin2.decay_of((delta, e_delta), a)
    return twin2.scan(x, b, c, values[:, :E], (delta, e_delta), decay, d, offsets, CONFIG.ngroups, initial)


@pytest.mark.parametrize(
    ("granularity", "spread"), [("tensor", False), ("tensor", True), ("ssd", True), ("channel", True), ("index", True)]
)
def test_every_layer_follows_the_twin(prepared, by_granularity, granularity, spread):
    """Each operator of each layer, from the codes our model fed it, with the twin's own weights and scales."""
    scales = uneven(by_granularity[granularity]) if spread else by_granularity[granularity]
    model, seen = recorded(build(prepared, scales, channel_groups=DIVISIONS))
    scales = model.scales  # rounded to float32
    batch = Batch.pack(documents(2, (11, 1, 19)))
    _, state = model.prefill(batch)
    offsets = batch.offsets.numpy()
    residual = np.zeros((len(batch.tokens), CONFIG.d_model), np.float32)
    block_out = prepared.embedding[batch.tokens].numpy()
    near = total = 0
    for i, layer in enumerate(prepared.layers):
        weights = quantized(layer)
        site = {name: scale for (number, name), scale in scales.items() if number == i}
        norm, in_proj, conv, had = (seen.results(name)[i] for name in CODES)
        residual = residual + block_out
        factor, index = in_proj_factor(weights, site), GROUPS[i].numpy()
        convolved = conv_of(weights, site, index, in_proj[:, E : 2 * E + 2 * W], offsets)
        steps = [
            (norm, twin.rms_norm(residual, 1e-5, site["in_proj:input"]), twin.half_even),
            (in_proj, twin.scaled(twin.gemm(norm, weights["in_proj"][0]), factor), twin.half_even),
            (conv, convolved, twin.half_away),
        ]
        y, states = scanned(weights, layer, site, GROUPS[i], in_proj, conv, offsets)
        halved = seen.of("gated_rotate")[i].arguments[0].numpy()
        twin.check_half(halved, y)
        gate = site["z_act:input"] * in_proj[:, :E].astype(np.float64)
        norm_weight = layer.gated_norm.numpy().astype(np.float64)
        normed = seen.of("rotate")[i].arguments[0].numpy()
        twin.check_half(normed, twin2.gated_norm(halved, gate, norm_weight, CONFIG.ngroups, CONFIG.norm_eps))
        rotated = twin.hadamard(normed, site["out_proj:input"], twin.hadamard_matrix(E))
        steps.append((had, rotated, twin.half_away))
        for codes, valued, rounding in steps:
            found = twin.check_codes(codes, valued, rounding)
            assert twin.few(found, valued)
            near, total = near + found, total + codes.size
        out = seen.results("linear_to_half")[i]
        acc = twin.gemm(had, weights["out_proj"][0])
        twin.check_half(out, twin.scaled(acc, weights["out_proj"][1] * site["out_proj:input"]))
        block_out = out
        by_channel = channel_scales(site[STATE], E, index).reshape(E, -1)
        for document, last in enumerate(states):
            twin.check_codes(state[i].ssm[document].numpy(), twin2.state_codes(last, by_channel), twin.half_even)
            rows = in_proj[offsets[document] : offsets[document + 1], E : 2 * E + 2 * W]
            padded = np.concatenate([np.zeros((CONFIG.d_conv, E + 2 * W), np.int8), rows])[-CONFIG.d_conv :]
            np.testing.assert_array_equal(state[i].conv[document].numpy(), padded)
    assert near < total / 1000
    assert min(np.abs(seen.results(name)[1]).max() for name in CODES) > 60


@pytest.mark.parametrize(("sequences", "granularity"), [(1, "channel"), (2, "channel"), (2, "index")])
def test_a_decoded_token_follows_the_twin(prepared, by_granularity, sequences, granularity):
    """One row alone is projected by one combined factor and rounded half away from zero, several half to even."""
    model, seen = recorded(build(prepared, uneven(by_granularity[granularity]), channel_groups=DIVISIONS))
    _, state = model.prefill(Batch.pack(documents(5, (9, 6)[:sequences])))
    before = [(of_block.conv.numpy().copy(), of_block.ssm.numpy().copy()) for of_block in state]
    seen.all.clear()
    model.step(torch.tensor([3, 7][:sequences]), state)
    factors = [1 if sequences == 1 else model.scales[i, "in_proj:input"] for i in range(CONFIG.n_layer)]
    calls = [(call.arguments[2].away, call.arguments[2].second) for call in seen.of("linear_to_int8")]
    assert calls == [(sequences == 1, factor) for factor in factors]
    for i, layer in enumerate(prepared.layers):
        weights = quantized(layer)
        site = {name: scale for (number, name), scale in model.scales.items() if number == i}
        norm, in_proj, conv, had = (seen.results(name)[i] for name in CODES)
        rounding = twin.half_away if sequences == 1 else twin.half_even
        twin.check_codes(
            in_proj, twin.scaled(twin.gemm(norm, weights["in_proj"][0]), in_proj_factor(weights, site)), rounding
        )
        window = np.concatenate([before[i][0][:, 1:], in_proj[:, None, E : 2 * E + 2 * W]], axis=1)
        np.testing.assert_array_equal(state[i].conv.numpy(), window)
        width, index = CONFIG.d_conv, GROUPS[i].numpy()
        every = range(0, width * sequences + 1, width)
        valued = conv_of(weights, site, index, window.reshape(width * sequences, -1), every)
        twin.check_codes(conv, tuple(part[width - 1 :: width] for part in valued), twin.half_away)
        by_channel = channel_scales(site[STATE], E, index).reshape(E, -1)
        initial = twin2.dequantized(before[i][1], by_channel)
        y, states = scanned(weights, layer, site, GROUPS[i], in_proj, conv, range(sequences + 1), initial)
        twin.check_half(seen.of("gated_rotate")[i].arguments[0].numpy(), y)
        for document, (value, error) in enumerate(states):
            last = value / by_channel, (error + 4 * twin.U * np.abs(value)) / by_channel
            twin.check_codes(state[i].ssm[document].numpy(), last, twin.half_even)
        acc = twin.gemm(had, weights["out_proj"][0])
        twin.check_half(
            seen.results("linear_to_half")[i], twin.scaled(acc, weights["out_proj"][1] * site["out_proj:input"])
        )


def test_out_proj_multiplies_by_the_weights_scale_first(prepared, by_granularity):
    """And one row alone by both at once (upstream's W8A8B16O16Linear)."""
    model, seen = recorded(build(prepared, by_granularity["tensor"]))
    _, state = model.prefill(Batch.pack(documents(5, (9,))))
    model.step(torch.tensor([3]), state)
    scales = [model.scales[i, "out_proj:input"] for i in range(CONFIG.n_layer)] * 2
    for place, (call, scale) in enumerate(zip(seen.of("linear_to_half"), scales, strict=True)):
        _, matrix, (first, second, _) = call.arguments
        weight, alone = matrix.scale, place >= CONFIG.n_layer
        assert (first, second) == ((np.float32(weight * scale), 1) if alone else (weight, scale))


def test_one_scale_given_to_every_group_is_one_scale(prepared, by_granularity):
    batch = Batch.pack(documents(3))
    whole = by_granularity["tensor"]
    expected = build(prepared, whole).hidden(batch)
    for name, groups in (("ssd", ()), ("channel", DIVISIONS)):
        repeated = {
            key: (whole[key],) * len(scale) if isinstance(scale, tuple) else whole[key]
            for key, scale in by_granularity[name].items()
        }
        assert any(isinstance(scale, tuple) for scale in repeated.values())
        assert torch.equal(build(prepared, repeated, channel_groups=groups).hidden(batch), expected)


def test_other_scales_on_the_same_weights_are_a_new_model(prepared, by_granularity):
    batch = Batch.pack(documents(3))
    first = build(prepared, by_granularity["tensor"], channel_groups=DIVISIONS)
    second = first.with_scales(by_granularity["channel"])
    built = build(prepared, by_granularity["channel"], channel_groups=DIVISIONS)
    assert torch.equal(second.hidden(batch), built.hidden(batch))
    assert not torch.equal(second.hidden(batch), first.hidden(batch))


@pytest.mark.parametrize("head", [False, True])
def test_documents_packed_together_give_the_bits_they_give_alone(prepared, by_granularity, head):
    model = build(prepared, by_granularity["ssd"], quantize_lm_head=head)
    texts = documents(4)
    together = model.hidden(Batch.pack(texts))
    alone = torch.cat([model.hidden(Batch.pack([text])) for text in texts])
    assert torch.equal(together, alone)
    assert together.dtype == (torch.int8 if head else torch.float32)


@pytest.mark.parametrize("granularity", ["tensor", "ssd", "channel"])
def test_int8_is_near_the_float_model(prepared, by_granularity, granularity):
    """About 0.04 of the logits' spread with absmax; a scale in the wrong place gives several tenths."""
    batch = Batch.pack(documents(1))
    reference = floating_model(prepared, rotated=True)
    expected = reference.logits(reference.hidden(batch))
    model = build(prepared, by_granularity[granularity], channel_groups=DIVISIONS)
    found = model.logits(model.hidden(batch))
    assert 0 < (found - expected).std() / expected.std() < 0.08


@pytest.mark.parametrize("granularity", ["tensor", "ssd", "channel"])
def test_decoding_is_near_the_prefill(prepared, by_granularity, granularity):
    """Rounded states, unrounded x, B and C: about 0.03 of the spread; it goes on where a prefill stopped too."""
    model = build(prepared, by_granularity[granularity], channel_groups=DIVISIONS)
    text = documents(7, (25,))[0]
    expected = model.logits(model.hidden(Batch.pack([text])))
    state = model.new_state(1)
    found = torch.cat([model.step(torch.tensor([token]), state) for token in text])
    assert (found - expected).std() / expected.std() < 0.08
    _, state = model.prefill(Batch.pack([text[:12]]))
    last = torch.cat([model.step(torch.tensor([token]), state) for token in text[12:]])
    assert (last - expected[12:]).std() / expected.std() < 0.08


def test_sequences_decoded_together_are_nearly_those_decoded_alone(prepared, by_granularity):
    """One sequence alone rounds otherwise: codes may differ by one, logits hardly."""
    model = build(prepared, by_granularity["channel"], channel_groups=DIVISIONS)
    texts = documents(9, (6, 6))
    together = model.new_state(2)
    both = [model.step(torch.tensor(tokens), together) for tokens in zip(*texts, strict=True)][-1]
    for i, text in enumerate(texts):
        state = model.new_state(1)
        alone = [model.step(torch.tensor([token]), state) for token in text][-1]
        assert (alone[0] - both[i]).std() / both.std() < 0.05


def test_compat_wraps_where_the_default_saturates(prepared, by_granularity):
    scales = by_granularity["tensor"]
    clipped = {key: scale * (0.3 if key[1] == "out_proj:input" else 1) for key, scale in scales.items()}
    batch = Batch.pack(documents(1))
    reference = floating_model(prepared, rotated=True).hidden(batch)
    saturating = build(prepared, clipped).hidden(batch)
    wrapping = build(prepared, clipped, compat="upstream").hidden(batch)
    assert (wrapping - reference).std() > 1.5 * (saturating - reference).std()


@pytest.mark.parametrize("key", [(0, "z_act:input"), (1, "x_conv_out:input"), (-1, "lm_head:input")])
def test_a_missing_scale_is_named(prepared, by_granularity, key):
    without = {k: v for k, v in by_granularity["ssd"].items() if k != key}
    with pytest.raises(ScalesInvalid, match=f"layer {key[0]} {key[1]}"):
        build(prepared, without, quantize_lm_head=True)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-50])
def test_a_scale_that_is_not_positive_and_finite_is_refused(prepared, by_granularity, value):
    good = by_granularity["ssd"]
    with pytest.raises(ScalesInvalid, match="positive finite"):
        build(prepared, good | {(1, "B_conv_out:input"): (good[1, "B_conv_out:input"][0], value)})


def test_scales_by_state_index_where_there_are_none_are_refused(prepared, by_granularity):
    good = by_granularity["index"]
    for key, scale, message in (
        (
            (1, STATE),
            tuple(part[:-1] for part in good[1, STATE]),
            "15 scales in a group, expected one for each of the 16",
        ),
        ((1, STATE), (0.1, *good[1, STATE][1:]), "by state index in some groups only"),
        ((1, "x_conv_out:input"), good[1, STATE], "16 scales in a group, expected one;"),
    ):
        with pytest.raises(ScalesInvalid, match=message):
            build(prepared, good | {key: scale}, channel_groups=DIVISIONS)


def test_a_wrong_number_of_groups_is_refused(prepared, by_granularity):
    for site in (*BY_CHANNEL_GROUP, "C_conv_out:input", "z_act:input"):
        three = by_granularity["tensor"] | {(1, site): (0.1, 0.1, 0.1)}
        with pytest.raises(ScalesInvalid, match=f"layer 1 {site} has 3 scale groups, expected 1"):
            build(prepared, three, channel_groups=DIVISIONS)
    with pytest.raises(ScalesInvalid, match="has 6 scale groups, expected 1 or 2"):
        build(prepared, by_granularity["channel"])  # their channels are unknown


def test_weights_that_are_not_rounded_to_float16_stay_float32(prepared):
    """D is float32 upstream, the rest of the block float16."""
    assert not torch.equal(prepared.layers[0].D, prepared.layers[0].D.half().float())
    for name in ("A_log", "dt_bias", "gated_norm", "conv_weight", "in_proj"):
        values = getattr(prepared.layers[0], name)
        assert torch.equal(values, values.half().float())
