# mypy: disable-error-code="attr-defined"
"""Mamba-2: the forward pass against a float64 twin and against transformers, preparation, decoding, loading."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import reference
import reference_mamba2
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_mamba_forward import Sites

from quambase.model.checkpoint import load_weights
from quambase.model.hadamard import odd_factor, odd_order
from quambase.model.language_model import floating_model
from quambase.model.mamba2 import Mamba2Config
from quambase.model.operators.host_kernels import ssd_scan
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare
from quambase.model.weights import ModelWeights, random_weights, tensors_of, weights_digest
from quambase.schema.errors import CheckpointInvalid
from quambase.schema.sites import MAMBA2, layer_sites

CONFIGS = {
    "one group": Mamba2Config(32, 2, 50, 64, d_state=16, headdim=8, ngroups=1),
    "two groups": Mamba2Config(24, 2, 40, 48, d_state=5, d_conv=3, headdim=12, ngroups=2),
    "four groups": Mamba2Config(40, 2, 40, 80, d_state=8, headdim=10, ngroups=4),
}
LENGTHS = (5, 1, 40, 17)
ULP = 2.0**-24
"""Half the distance of float32 numbers near 1: the relative error of one rounding."""


def documents(vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocabulary, n).tolist() for n in LENGTHS]


def lively_weights(config: Mamba2Config, seed: int) -> ModelWeights:
    """Random weights whose states matter: mamba-ssm's initial time steps are so small that B and C hardly count."""
    weights = random_weights(config, seed)
    layers = tuple(type(layer)(**(vars(layer) | {"dt_bias": layer.dt_bias + 3})) for layer in weights.layers)
    return ModelWeights(config, weights.embedding, layers, weights.norm_f, weights.lm_head)


def hugging_face_model(weights: ModelWeights) -> torch.nn.Module:
    from transformers import Mamba2Config as HFConfig
    from transformers import Mamba2ForCausalLM

    c = weights.config
    model = Mamba2ForCausalLM(
        HFConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            num_hidden_layers=c.n_layer,
            state_size=c.d_state,
            conv_kernel=c.d_conv,
            num_heads=c.heads,
            head_dim=c.headdim,
            n_groups=c.ngroups,
            layer_norm_epsilon=c.norm_eps,
            chunk_size=16,
        )
    ).eval()
    tensors = tensors_of(weights)
    state = {k.replace("embedding.weight", "embeddings.weight"): v for k, v in tensors.items()}
    model.load_state_dict(state | {"lm_head.weight": weights.lm_head})
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_to_float32_rounding(name: str) -> None:
    weights = lively_weights(CONFIGS[name], seed=3)
    theirs = hugging_face_model(weights)
    docs = documents(weights.config.vocab_size)
    batch = Batch.pack(docs)
    model = floating_model(weights)
    ours = model.logits(model.hidden(batch)).numpy()
    for i, tokens in enumerate(docs):
        true = reference_mamba2.forward(weights, tokens)["-1/lm_head:output"]
        with torch.inference_mode():
            found = theirs(torch.tensor([tokens])).logits[0].numpy()
        # Both round in float32 but in another order: ours may be off the float64 result by
        # what theirs is, to a factor for luck, plus a few ulps of the largest logit.
        allowed = 4 * np.abs(found - true).max() + 16 * ULP * np.abs(true).max()
        assert np.abs(found - true).max() < 1e-4 * np.abs(true).max(), "the twin and transformers disagree"
        assert np.abs(ours[batch.rows(i)] - true).max() <= allowed


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_site_is_tapped_once_per_document_with_the_right_values(name: str, rotated: bool) -> None:
    weights = lively_weights(CONFIGS[name], seed=4)
    matrix = None
    if rotated:
        weights = prepare(weights, half=False)
        e = weights.config.d_inner
        order = odd_order(e)
        matrix = np.kron(odd_factor(order), reference.sylvester(e // order)) / np.sqrt(e)
    docs = documents(weights.config.vocab_size)
    batch = Batch.pack(docs)
    tap = Sites(batch)
    floating_model(weights, rotated=rotated).hidden(batch, tap)
    names = [f"{layer}/{site.name}" for layer, site in layer_sites(weights.config.n_layer, MAMBA2)]
    assert len(names) == 2 * 24 + 2
    assert sorted(tap.seen) == sorted((i, name) for i in range(len(docs)) for name in names)
    for i, tokens in enumerate(docs):
        true = reference_mamba2.forward(weights, tokens, matrix)
        for key in names:
            # Sums of at most 80 terms, a state over 40 tokens, two layers: each rounds some
            # tens of times, so errors stay within some hundred ulps of the site's range.
            limit = 300 * ULP * max(np.abs(true[key]).max(), 1)
            assert tap.seen[i, key].shape == true[key].shape
            assert np.abs(tap.seen[i, key] - true[key]).max() <= limit, key


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.sampled_from([(1, 1, 1), (2, 9, 3), (4, 8, 16), (6, 17, 5)]),
    st.sampled_from([1, 2]),
    st.integers(0, 2**32 - 1),
)
def test_the_scan_equals_its_definition_from_any_state(
    lengths: list[int], shape: tuple[int, int, int], groups: int, seed: int
) -> None:
    """Heads of more and fewer channels than a piece of work, empty documents, states that are not zero."""
    heads, p, n = shape
    if heads % groups:
        groups = 1
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *lengths])
    t = int(offsets[-1])
    draw = lambda *size: rng.standard_normal(size).astype(np.float32)  # noqa: E731
    x, b, c, d = draw(t, heads * p), draw(t, groups * n), draw(t, groups * n), draw(heads)
    delta, a = np.abs(draw(t, heads)), -np.abs(draw(heads))
    before = draw(len(lengths), heads * p, n)
    state, y = before.copy(), np.full_like(x, np.nan)
    ssd_scan(x, delta, np.exp(delta * a), b, c, d, offsets, y, state)
    wide = lambda v: v.astype(np.float64)  # noqa: E731
    for i, length in enumerate(lengths):
        rows = slice(offsets[i], offsets[i + 1])
        true, last = reference_mamba2.ssd(
            wide(x[rows]).reshape(length, heads, p),
            wide(delta[rows]),
            wide(a),
            wide(b[rows]).reshape(length, groups, n),
            wide(c[rows]).reshape(length, groups, n),
            wide(d),
            wide(before[i]).reshape(heads, p, n),
        )
        # A token adds four roundings to a state (decay, its product, drive's product, the
        # sum) and n + 2 to y; decays are at most 1. Magnitudes: what the sums of absolute
        # values can reach, 9 tokens of |delta x B| beside the first state.
        driven = np.abs(delta[rows]).sum(0).max(initial=0) * np.abs(x[rows]).max(initial=0)
        size = 1 + np.abs(before[i]).max() + driven * np.abs(b[rows]).max(initial=0)
        assert np.abs(state[i].reshape(heads, p, n) - last).max() <= 4 * 9 * ULP * size
        reach = n * size * np.abs(c[rows]).max(initial=0) + np.abs(d).max() * np.abs(x[rows]).max(initial=0)
        assert np.abs(y[rows].reshape(true.shape) - true).max(initial=0) <= (4 * 9 + n + 2) * ULP * reach


@pytest.mark.parametrize("name", CONFIGS)
def test_preparation_without_rounding_leaves_the_logits(name: str) -> None:
    weights = lively_weights(CONFIGS[name], seed=5)
    batch = Batch.pack(documents(weights.config.vocab_size))
    before, after = floating_model(weights), floating_model(prepare(weights, half=False), rotated=True)
    logits = before.logits(before.hidden(batch))
    moved = after.logits(after.hidden(batch))
    # Rotations are orthonormal: a float32 rounding per weight and per activation of the
    # same relative size as the forward's own, so some hundred ulps of the range.
    assert (logits - moved).abs().max() <= 500 * ULP * logits.abs().max()
    assert not torch.equal(logits, moved), "nothing was rotated"


def test_float16_preparation_rounds_where_upstream_does() -> None:
    """Against the steps of configure_model and fuse_hadamard written out with dense float64 matrices."""
    weights = random_weights(CONFIGS["two groups"], seed=7)
    prepared = prepare(weights)
    h = {d: np.kron(odd_factor(12), reference.sylvester(d // 12)) / np.sqrt(d) for d in (24, 48)}
    half = lambda x: x.astype(np.float16).astype(np.float64)  # noqa: E731
    layer, ours = weights.layers[1], prepared.layers[1]
    folded = half(half(layer.in_proj.numpy()) * half(layer.norm.numpy()))
    rotated = {
        "embedding": (prepared.embedding, half(half(weights.embedding.numpy()) @ h[24].T)),
        "lm_head": (
            prepared.lm_head,
            half(half(half(weights.lm_head.numpy()) * half(weights.norm_f.numpy())) @ h[24].T),
        ),
        "in_proj": (ours.in_proj, half(folded @ h[24].T)),
        "out_proj": (ours.out_proj, half(half(half(layer.out_proj.numpy()) @ h[48].T).T @ h[24].T).T),
    }
    for name, (found, true) in rotated.items():
        # float32 butterflies and a float64 product may fall on two sides of a rounding
        # boundary of float16: then they differ by one float16 ulp, seldom; out_proj, rotated
        # twice, may add that of the first rotation.
        apart = np.abs(found.numpy() - true)
        ulp = np.spacing(np.abs(true).astype(np.float16)).astype(np.float64)
        assert (apart <= 2 * ulp).all(), name
        assert (apart > 0).mean() < 0.02, name
        assert torch.equal(found, found.half().float()), name
    for name in ("conv_weight", "conv_bias", "dt_bias", "A_log", "gated_norm"):
        assert torch.equal(getattr(ours, name), getattr(layer, name).half().float()), name
    # mamba_ssm creates D in float32 whatever the model's dtype (modules/mamba2.py:139).
    assert torch.equal(ours.D, layer.D) and not torch.equal(layer.D, layer.D.half().float())
    assert torch.equal(ours.norm, torch.ones(24)) and torch.equal(prepared.norm_f, torch.ones(24))


@pytest.mark.parametrize("name", CONFIGS)
def test_step_by_step_equals_the_whole(name: str) -> None:
    weights = prepare(lively_weights(CONFIGS[name], seed=8))
    model = floating_model(weights, rotated=True)
    docs = [d[:17] for d in documents(40) if len(d) >= 17]
    batch = Batch.pack(docs)
    whole = model.logits(model.hidden(batch))
    state = model.new_state(len(docs))
    for t in range(17):
        logits = model.step(torch.tensor([d[t] for d in docs]), state)
        for i in range(len(docs)):
            limit = 300 * ULP * whole.abs().max()  # float32 sums in another order, as above
            assert (logits[i] - whole[batch.rows(i)][t]).abs().max() <= limit


# ---------------------------------------------------------------- configuration and loading

TINY = CONFIGS["two groups"]
MAMBA_SSM = {
    "d_model": 24, "n_layer": 2, "vocab_size": 35, "attn_layer_idx": [], "d_intermediate": 0,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 5, "d_conv": 3, "headdim": 12, "ngroups": 2},
}  # fmt: skip


def write(folder: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


def test_both_layouts_give_the_same_model(tmp_path: Path) -> None:
    weights = random_weights(TINY, seed=1)
    mamba_ssm = load_weights(write(tmp_path / "a", MAMBA_SSM, tensors_of(weights)))
    hugging_face_model(weights).save_pretrained(tmp_path / "b")
    hugging_face = load_weights(tmp_path / "b")
    for loaded in (mamba_ssm, hugging_face):
        assert loaded.config == TINY
        assert weights_digest(loaded) == weights_digest(weights)
        assert loaded.lm_head is loaded.embedding


def test_published_sizes_are_represented() -> None:
    """Rows of in_proj as state-spaces/mamba2-* have them, and the converted 8b of upstream (ngroups 8)."""
    shapes = {(768, 24): 3352, (1024, 48): 4384, (1536, 48): 6448, (2048, 48): 8512, (2560, 64): 10576}
    raw = {"vocab_size": 50277, "pad_vocab_size_multiple": 16, "rms_norm": True}
    for (d_model, n_layer), rows in shapes.items():
        sizes = {"d_model": d_model, "n_layer": n_layer, "ssm_cfg": {"layer": "Mamba2"}}
        config = Mamba2Config.from_mamba_ssm(raw | sizes)
        assert config.in_proj_edges[-1] == rows
        assert (config.d_state, config.headdim, config.ngroups, config.vocab_size) == (128, 64, 1, 50288)
    large = {"d_model": 4096, "n_layer": 56, "ssm_cfg": {"layer": "Mamba2", "ngroups": 8, "chunk_size": 128}}
    assert Mamba2Config.from_mamba_ssm(raw | large).in_proj_edges == (0, 8192, 16384, 17408, 18432, 18560)
    sizes = {"hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 32768}
    assert Mamba2Config.from_hugging_face(sizes).in_proj_edges[-1] == 18560  # the rest as transformers' defaults


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "ssm_cfg.rmsnorm = false; expected true"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate = true; expected false"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim = true; expected false"),
        ({"ssm_cfg": {"layer": "Mamba2", "bias": True}}, "projection biases"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 24}}, "d_ssm = 24 of 48 channels"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.0, 0.1]}}, r"dt_limit = \[0.0, 0.1\]; expected \[0, infinity"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 64}}, "48 channels in heads of 64 and 1 groups"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 12, "ngroups": 3}}, "heads of 12 and 3 groups"),
        ({"attn_layer_idx": [1]}, "hybrid"),
        ({"rms_norm": False}, "rms_norm = false"),
        ({"n_layer": 3}, "has no tensor backbone.layers.2.norm.weight; expected a Mamba-2 of 3 layers"),
        ({"d_model": 48}, "config.json implies"),
    ],
)
def test_a_config_we_cannot_follow_is_refused(tmp_path: Path, config: dict[str, object], message: str) -> None:
    tensors = tensors_of(random_weights(TINY))
    with pytest.raises(CheckpointInvalid, match=message) as error:
        load_weights(write(tmp_path / "m", MAMBA_SSM | config, tensors))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_bias": True}, "projection biases"),
        ({"num_heads": 5}, "num_heads = 5; expected expand x hidden_size / head_dim, which is 4"),
        ({"time_step_limit": [0.01, math.inf]}, r"time_step_limit = \[0.01, Infinity\]; expected \[0, inf"),
    ],
)
def test_a_hugging_face_config_we_cannot_follow_is_refused(config: dict[str, object], message: str) -> None:
    raw = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 40, "num_heads": 4, "head_dim": 12, "n_groups": 2}
    assert Mamba2Config.from_hugging_face(raw | {"time_step_limit": [0.0, math.inf]}).heads == 4
    with pytest.raises(CheckpointInvalid, match=message):
        Mamba2Config.from_hugging_face(raw | config)
