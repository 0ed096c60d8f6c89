# mypy: disable-error-code="list-item"
"""The INT8 model: every layer's wiring against the slow twin, decoding, packing, and what it refuses."""

from __future__ import annotations

import int8_twin as twin
import numpy as np
import pytest
import torch
from recorded_operators import recorded
from tiny_int8 import CONFIG, absmax_scales, documents, needed, tiny_prepared

from quambase.apply.int8.build import build
from quambase.model.language_model import floating_model
from quambase.model.packed_batch import Batch
from quambase.schema.errors import ScalesInvalid


@pytest.fixture(scope="module")
def prepared():
    return tiny_prepared()


@pytest.fixture(scope="module")
def scales(prepared):
    return absmax_scales(prepared, documents(1))


@pytest.mark.parametrize("uneven", [False, True])
def test_every_layer_follows_the_twin(prepared, scales, uneven):
    """Each operator of each layer, from the codes our model fed it, with the twin's own weights and scales."""
    if uneven:  # every site's scale another multiple: a scale fed to the wrong place shows
        scales = {key: scale * (0.8 + 0.07 * (i % 7)) for i, (key, scale) in enumerate(scales.items())}
    scales = {key: float(np.float32(scale)) for key, scale in scales.items()}
    texts = documents(2)
    model, seen = recorded(build(prepared, scales))
    batch = Batch.pack(texts)
    model.hidden(batch)
    offsets, e, n, r = batch.offsets.numpy(), CONFIG.d_inner, CONFIG.d_state, CONFIG.dt_rank
    residual = np.zeros((batch.tokens.numel(), CONFIG.d_model), np.float32)
    block_out = prepared.embedding[batch.tokens].numpy()
    near, total = 0, 0
    for i, layer in enumerate(prepared.layers):
        half = {
            name: twin.quantize_half(getattr(layer, name))
            for name in ("in_proj", "conv_weight", "conv_bias", "x_proj", "dt_proj", "out_proj")
        }
        single = {name: twin.quantize_float32(getattr(layer, name)) for name in ("A_log", "D", "dt_bias")}
        site = {name: scale for (number, name), scale in scales.items() if number == i}
        norm, conv, rotated, out = (
            seen.results(name)[i] for name in ("add_norm_to_int8", "conv_silu", "rotate", "linear_to_half")
        )
        xz, dt_b_c, dt = seen.results("linear_to_int8")[3 * i : 3 * i + 3]
        y = seen.of("rotate")[i].arguments[0].numpy()
        np.testing.assert_array_equal(y, seen.results("selective_scan")[i])

        residual = residual + block_out
        steps = [
            (norm, twin.rms_norm(residual, 1e-5, site["in_proj:input"]), twin.half_even),
            (
                xz,
                twin.scaled(
                    twin.gemm(norm, half["in_proj"][0]),
                    half["in_proj"][1] * site["in_proj:input"] / site["in_proj:output"],
                ),
                twin.half_even,
            ),
            (
                conv,
                twin.conv(
                    xz[:, :e],
                    half["conv_weight"][0],
                    half["conv_bias"][0],
                    site["in_proj:output"],
                    half["conv_weight"][1],
                    half["conv_bias"][1],
                    site["x_proj:input"],
                    offsets,
                ),
                twin.half_away,
            ),
            (
                dt_b_c,
                twin.scaled(
                    twin.gemm(conv, half["x_proj"][0]), half["x_proj"][1] * site["x_proj:input"] / site["x_proj:output"]
                ),
                twin.half_even,
            ),
            (
                dt,
                twin.scaled(
                    twin.gemm(dt_b_c[:, :r], half["dt_proj"][0]),
                    half["dt_proj"][1] * site["x_proj:output"] / site["dt_proj:output"],
                ),
                twin.half_even,
            ),
        ]
        delta = twin.softplus_delta(dt, site["dt_proj:output"], *single["dt_bias"])
        exponent = single["A_log"][1] * single["A_log"][0]
        a = -np.exp(exponent), np.exp(exponent) * (twin.EXP + twin.U * np.abs(exponent))
        shared = site["x_proj:output"]
        (gated, bound), _ = twin.scan(
            conv,
            delta,
            a,
            dt_b_c[:, r : r + n],
            dt_b_c[:, r + n :],
            single["D"][0],
            xz[:, e:],
            offsets,
            (site["x_proj:input"], shared, shared, single["D"][1], site["in_proj:output"]),
        )
        twin.check_half(y, (gated, bound))
        matrix = twin.hadamard_matrix(e)
        steps.append((rotated, twin.hadamard(y, site["out_proj:input"], matrix), twin.half_away))
        for codes, valued, rounding in steps:
            found = twin.check_codes(codes, valued, rounding)
            assert twin.few(found, valued)
            near, total = near + found, total + codes.size
        twin.check_half(
            out, twin.scaled(twin.gemm(rotated, half["out_proj"][0]), half["out_proj"][1] * site["out_proj:input"])
        )
        block_out = out
    assert near < total / 1000
    assert not {code.min() for code in seen.results("add_norm_to_int8")} == {0}


def test_products_are_scaled_in_upstreams_order(prepared, scales):
    """`to_seqlen_last` (in_proj, dt_proj) takes in/out first; `forward` (x_proj, out_proj) the weight's scale first."""
    model, seen = recorded(build(prepared, scales))
    model.hidden(Batch.pack(documents(1)))
    calls = []
    for call in seen.of("linear_to_int8", "linear_to_half"):
        _, weight, (first, second, away), *offset = call.arguments
        assert offset in ([], [None]), "no zero point here"
        calls.append((weight.scale == first, weight.scale == second))
        assert not away
    ratio_first, weight_first = (False, True), (True, False)
    assert calls == [ratio_first, weight_first, ratio_first, weight_first] * CONFIG.n_layer


@pytest.mark.parametrize("sequences", [1, 2])
def test_a_decoded_tokens_products_are_scaled_as_upstreams(prepared, scales, sequences):
    """Several rows by the weight's scale first, whatever the projection; one row alone by one factor."""
    model, seen = recorded(build(prepared, scales))
    model.step(torch.tensor([3, 7][:sequences]), model.new_state(sequences))
    places = [("in_proj:input", "in_proj:output"), ("x_proj:input", "x_proj:output")]
    places += [("x_proj:output", "dt_proj:output"), ("out_proj:input", None)]
    wanted = []
    for layer, weights in enumerate(model.weights.layers):
        for name, (source, target) in zip(("in_proj", "x_proj", "dt_proj", "out_proj"), places, strict=True):
            scale, read = getattr(weights, name).scale, model.scales[layer, source]
            made = model.scales[layer, target] if target else 1.0
            both = scale, float(np.float32(read / made))
            one = float(np.float32(np.float32(scale * read) / made)), 1.0
            wanted.append(one if sequences == 1 else both)
    calls = seen.of("linear_to_int8", "linear_to_half")
    assert [call.arguments[2] for call in calls] == [(*factors, False) for factors in wanted]


def test_states_after_a_prefill_are_the_twins(prepared, scales):
    texts = documents(3, (9, 2, 33))
    model, seen = recorded(build(prepared, scales))
    _, state = model.prefill(Batch.pack(texts))
    offsets = Batch.pack(texts).offsets.numpy()
    e, n, r = CONFIG.d_inner, CONFIG.d_state, CONFIG.dt_rank
    for i, layer in enumerate(prepared.layers):
        xz, dt_b_c, dt = seen.results("linear_to_int8")[3 * i : 3 * i + 3]
        single = {name: twin.quantize_float32(getattr(layer, name)) for name in ("A_log", "D", "dt_bias")}
        exponent = single["A_log"][1] * single["A_log"][0]
        a = -np.exp(exponent), np.exp(exponent) * (twin.EXP + twin.U * np.abs(exponent))
        shared = scales[i, "x_proj:output"]
        _, states = twin.scan(
            seen.results("conv_silu")[i],
            twin.softplus_delta(dt, scales[i, "dt_proj:output"], *single["dt_bias"]),
            a,
            dt_b_c[:, r : r + n],
            dt_b_c[:, r + n :],
            single["D"][0],
            xz[:, e:],
            offsets,
            (scales[i, "x_proj:input"], shared, shared, single["D"][1], scales[i, "in_proj:output"]),
        )
        scale = scales[i, "ssm_state_act:input"]
        for document, (value, error) in enumerate(states):
            valued = value / scale, (error + twin.U * np.abs(value)) / scale
            twin.check_codes(state[i].ssm[document].numpy().T, valued, twin.half_away)
            rows = xz[offsets[document] : offsets[document + 1], :e]
            padded = np.concatenate([np.zeros((CONFIG.d_conv, e), np.int8), rows])[-CONFIG.d_conv :]
            np.testing.assert_array_equal(state[i].conv[document].numpy(), padded)


@pytest.mark.parametrize("head", [False, True])
def test_documents_packed_together_give_the_bits_they_give_alone(prepared, scales, head):
    model = build(prepared, scales, quantize_lm_head=head)
    texts = documents(4)
    together = model.hidden(Batch.pack(texts))
    alone = torch.cat([model.hidden(Batch.pack([text])) for text in texts])
    assert torch.equal(together, alone)
    assert together.dtype == (torch.int8 if head else torch.float32)


def test_int8_is_near_the_float_model(prepared, scales):
    batch = Batch.pack(documents(1))
    reference = floating_model(prepared, rotated=True)
    expected = reference.logits(reference.hidden(batch))
    model = build(prepared, scales)
    error = (model.logits(model.hidden(batch)) - expected).std() / expected.std()
    assert 0 < error < 0.1  # 8 bits through two layers; a wrong scale anywhere gives over 0.3


def test_another_strategy_reuses_the_weights_and_gives_what_a_fresh_build_gives(prepared, scales):
    other = {key: scale * 0.7 for key, scale in scales.items()}
    batch = Batch.pack(documents(5))
    first = build(prepared, scales)
    changed = first.with_scales(other)
    assert changed.weights is first.weights
    expected = build(prepared, other).hidden(batch)
    assert torch.equal(changed.hidden(batch), expected)
    assert not torch.equal(first.hidden(batch), expected)


def test_the_state_scale_has_no_effect_on_prefill_but_on_decoding(prepared, scales):
    coarse = {key: scale * (20 if key[1].startswith("ssm") else 1) for key, scale in scales.items()}
    fine, rough = build(prepared, scales), build(prepared, coarse)
    batch = Batch.pack(documents(6))
    assert torch.equal(fine.hidden(batch), rough.hidden(batch))
    token = torch.tensor([3, 5, 7, 9])
    (_, a), (_, b) = fine.prefill(batch), rough.prefill(batch)
    assert not torch.equal(fine.step(token, a), rough.step(token, b))


def test_decoding_follows_prefill(prepared, scales):
    """Logits of token-by-token decoding stay near those of one prefill; only the state's rounding differs."""
    # The weights and scales are the same, the state is rounded each token. With a state
    # scale ten times finer than absmax the codes would saturate, so it keeps absmax.
    model = build(prepared, scales)
    text = documents(7, (25,))[0]
    expected = model.logits(model.hidden(Batch.pack([text])))
    state = model.new_state(1)
    found = torch.cat([model.step(torch.tensor([token]), state) for token in text])
    assert (found - expected).std() / expected.std() < 0.1
    assert torch.equal(found[0], expected[0]) or (found[0] - expected[0]).abs().max() < 0.1 * expected.std()


def test_a_prefill_goes_on_where_it_stopped(prepared, scales):
    model = build(prepared, scales)
    text = documents(8, (20,))[0]
    _, state = model.prefill(Batch.pack([text[:12]]))
    last = [model.step(torch.tensor([token]), state) for token in text[12:]]
    expected = model.logits(model.hidden(Batch.pack([text])))[12:]
    assert (torch.cat(last) - expected).std() / expected.std() < 0.1


def test_sequences_decoded_together_are_nearly_those_decoded_alone(prepared, scales):
    """One sequence alone multiplies by one combined factor, several by two: codes may differ by one, logits hardly."""
    model = build(prepared, scales)
    texts = documents(9, (6, 6))
    together = model.new_state(2)
    both = [model.step(torch.tensor(tokens), together) for tokens in zip(*texts, strict=True)][-1]
    for i, text in enumerate(texts):
        state = model.new_state(1)
        alone = [model.step(torch.tensor([token]), state) for token in text][-1]
        assert (alone[0] - both[i]).std() / both.std() < 0.05


@pytest.mark.parametrize("sequences", [1, 2])
def test_a_quantized_head_multiplies_one_row_alone_by_one_factor(prepared, scales, sequences):
    """As upstream's W8A8B16O16Linear, which the head is too."""
    model, seen = recorded(build(prepared, scales, quantize_lm_head=True))
    logits = model.step(torch.tensor([3] * sequences), model.new_state(sequences))
    weight, scale = model.weights.lm_head.scale, model.scales[-1, "lm_head:input"]
    *_, head = seen.of("linear_to_half")
    assert head.arguments[1].codes is model.weights.lm_head.codes
    assert head.arguments[2][:2] == ((float(np.float32(weight * scale)), 1) if sequences == 1 else (weight, scale))
    assert logits.shape == (sequences, model.config.vocab_size)
    # Rows that are not decoded are multiplied by two factors, also one alone.
    model.logits(model.hidden(Batch.pack([[3]])))
    assert seen.of("linear_to_half")[-1].arguments[2][:2] == (weight, scale)


def test_compat_wraps_where_the_default_saturates(prepared, scales):
    clipped = {key: scale * (0.3 if key[1] == "out_proj:input" else 1) for key, scale in scales.items()}
    batch = Batch.pack(documents(1))
    reference = floating_model(prepared, rotated=True).hidden(batch)
    saturating = build(prepared, clipped).hidden(batch)
    wrapping = build(prepared, clipped, compat="upstream").hidden(batch)
    assert (wrapping - reference).std() > 1.5 * (saturating - reference).std()


def test_quantized_embedding_and_head_change_little(prepared, scales):
    batch = Batch.pack(documents(1))
    plain = build(prepared, scales)
    full = build(prepared, scales, quantize_lm_head=True, quantize_embedding=True)
    expected = plain.logits(plain.hidden(batch))
    found = full.logits(full.hidden(batch))
    assert 0 < (found - expected).std() / expected.std() < 0.1


@pytest.mark.parametrize("key", [(0, "in_proj:input"), (1, "out_proj:input"), (-1, "lm_head:input")])
def test_a_missing_scale_is_named(prepared, scales, key):
    without = {k: v for k, v in scales.items() if k != key}
    with pytest.raises(ScalesInvalid, match=f"layer {key[0]} {key[1]}"):
        build(prepared, without, quantize_lm_head=True)
    if key[1] == "lm_head:input":
        build(prepared, without)  # nothing reads it


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-50])
def test_a_scale_that_is_not_positive_and_finite_is_refused(prepared, scales, value):
    with pytest.raises(ScalesInvalid, match="positive finite"):
        build(prepared, scales | {(1, "x_proj:input"): value})


def test_unneeded_sites_may_be_missing(prepared, scales):
    batch = Batch.pack([[1, 2, 3]])
    fewer = {key: scales[key] for key in needed()}
    assert len(fewer) < len(scales)
    found, whole = (build(prepared, given, quantize_lm_head=True).hidden(batch) for given in (fewer, scales))
    assert torch.equal(found, whole)
