# mypy: disable-error-code="attr-defined, call-arg"
"""The forward pass against a float64 twin and against transformers' Mamba, and what preparation changes."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch

from quambase.model.hadamard import odd_factor, odd_order
from quambase.model.language_model import floating_model
from quambase.model.mamba1 import MambaConfig
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare
from quambase.model.weights import ModelWeights, random_weights, tensors_of
from quambase.schema.sites import layer_sites

CONFIGS = {
    "pow2": MambaConfig(d_model=32, n_layer=3, vocab_size=50, d_inner=64, d_state=16, d_conv=4, dt_rank=2),
    "twelve": MambaConfig(d_model=24, n_layer=2, vocab_size=40, d_inner=48, d_state=5, d_conv=3, dt_rank=3),
    "forty": MambaConfig(d_model=40, n_layer=2, vocab_size=40, d_inner=80, d_state=8, d_conv=4, dt_rank=4),
}
LENGTHS = (5, 1, 40, 17)


def documents(vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocabulary, n).tolist() for n in LENGTHS]


class Sites:
    """A tap that keeps everything, per document."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.seen = batch, {}

    def __call__(self, layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        start = int(self.batch.offsets[documents.start])
        for i in range(documents.start, documents.stop):
            if site.startswith("ssm_state"):
                part = values[i - documents.start]
            else:
                rows = self.batch.rows(i)
                part = values[rows.start - start : rows.stop - start]
            assert (i, f"{layer}/{site}") not in self.seen, "a document arrived twice"
            self.seen[i, f"{layer}/{site}"] = part.clone().numpy()


def transformers_logits(weights: ModelWeights, tokens: list[int], dtype: torch.dtype = torch.float32) -> np.ndarray:
    from transformers import MambaConfig as HFConfig
    from transformers import MambaForCausalLM

    c = weights.config
    model = MambaForCausalLM(
        HFConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            num_hidden_layers=c.n_layer,
            state_size=c.d_state,
            conv_kernel=c.d_conv,
            time_step_rank=c.dt_rank,
            intermediate_size=c.d_inner,
            layer_norm_epsilon=c.norm_eps,
        )
    ).eval()
    state = {k.replace("embedding.weight", "embeddings.weight"): v for k, v in tensors_of(weights).items()}
    state["lm_head.weight"] = weights.lm_head
    model.load_state_dict(state)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_to_float32_rounding(name: str) -> None:
    weights = random_weights(CONFIGS[name], seed=3)
    docs = documents(weights.config.vocab_size)
    batch = Batch.pack(docs)
    model = floating_model(weights)
    ours = model.logits(model.hidden(batch)).numpy()
    for i, tokens in enumerate(docs):
        true = reference.forward(weights, tokens)["-1/lm_head:output"]
        theirs = transformers_logits(weights, tokens)
        # Both round in float32 but in another order: ours may be off the float64 result by
        # what theirs is, to a factor for luck, plus a few ulps of the largest logit.
        allowed = 4 * np.abs(theirs - true).max() + 16 * 2.0**-24 * np.abs(true).max()
        assert np.abs(theirs - true).max() < 1e-4 * np.abs(true).max(), "the twin and transformers disagree"
        assert np.abs(ours[batch.rows(i)] - true).max() <= allowed


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_site_is_tapped_once_per_document_with_the_right_values(name: str, rotated: bool) -> None:
    weights = random_weights(CONFIGS[name], seed=4)
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
    names = [f"{layer}/{site.name}" for layer, site in layer_sites(weights.config.n_layer)]
    assert sorted(tap.seen) == sorted((i, name) for i in range(len(docs)) for name in names)
    for i, tokens in enumerate(docs):
        true = reference.forward(weights, tokens, matrix)
        for key in names:
            # Three small layers: errors stay within some hundred float32 ulps of the site's range.
            limit = 300 * 2.0**-24 * max(np.abs(true[key]).max(), 1)
            assert tap.seen[i, key].shape == true[key].shape
            assert np.abs(tap.seen[i, key] - true[key]).max() <= limit, key


@pytest.mark.parametrize("name", CONFIGS)
def test_preparation_without_rounding_leaves_the_logits(name: str) -> None:
    weights = random_weights(CONFIGS[name], seed=5)
    batch = Batch.pack(documents(weights.config.vocab_size))
    before, after = floating_model(weights), floating_model(prepare(weights, half=False), rotated=True)
    logits = before.logits(before.hidden(batch))
    moved = after.logits(after.hidden(batch))
    # Rotations are orthonormal: a float32 rounding per weight and per activation of the
    # same relative size as the forward's own, so some hundred ulps of the range.
    assert (logits - moved).abs().max() <= 500 * 2.0**-24 * logits.abs().max()
    assert not torch.equal(logits, moved), "nothing was rotated"


@pytest.mark.parametrize("name", CONFIGS)
def test_float16_preparation_moves_the_logits_no_more_than_its_roundings_can(name: str) -> None:
    weights = random_weights(CONFIGS[name], seed=6)
    batch = Batch.pack(documents(weights.config.vocab_size))
    plain, half = floating_model(weights), floating_model(prepare(weights), rotated=True)
    logits = plain.logits(plain.hidden(batch))
    moved = (half.logits(half.hidden(batch)) - logits).abs().max()
    # The weights are rounded up to four times (load, fold, two rotations), each time by at
    # most 2^-11 of a weight of the row's typical size. What such noise does to the logits
    # is measured: random relative changes of 4 x 2^-11 in every matrix, the worst of three.
    generator = torch.Generator().manual_seed(0)

    def shaken(x: torch.Tensor) -> torch.Tensor:
        return x + (torch.rand(x.shape, generator=generator) * 2 - 1) * 4 * 2.0**-11 * x.abs().max(-1, keepdim=True)[0]

    allowed = 0.0
    for _ in range(3):
        noisy = ModelWeights(
            weights.config,
            shaken(weights.embedding),
            tuple(
                replace(layer, **{name: shaken(x) for name, x in vars(layer).items() if x.ndim == 2})
                for layer in weights.layers
            ),
            weights.norm_f,
            shaken(weights.lm_head),
        )
        model = floating_model(noisy)
        allowed = max(allowed, float((model.logits(model.hidden(batch)) - logits).abs().max()))
    assert 0 < moved <= allowed


def test_float16_preparation_rounds_where_upstream_does() -> None:
    """Against the steps of configure_model and fuse_hadamard written out with dense float64 matrices."""
    weights = random_weights(CONFIGS["twelve"], seed=7)
    prepared = prepare(weights)
    h = {d: np.kron(odd_factor(12), reference.sylvester(d // 12)) / np.sqrt(d) for d in (24, 48)}
    half = lambda x: x.astype(np.float16).astype(np.float64)  # noqa: E731
    layer = weights.layers[0]
    folded = half(half(layer.in_proj.numpy()) * half(layer.norm.numpy()))
    out = half(half(half(layer.out_proj.numpy()) @ h[48].T).T @ h[24].T).T
    expected = {
        "embedding": (prepared.embedding, half(half(weights.embedding.numpy()) @ h[24].T)),
        "lm_head": (
            prepared.lm_head,
            half(half(half(weights.lm_head.numpy()) * half(weights.norm_f.numpy())) @ h[24].T),
        ),
        "in_proj": (prepared.layers[0].in_proj, half(folded @ h[24].T)),
        "out_proj": (prepared.layers[0].out_proj, out),
        "x_proj": (prepared.layers[0].x_proj, half(layer.x_proj.numpy())),
        "dt_bias": (prepared.layers[0].dt_bias, half(layer.dt_bias.numpy())),
        "A_log": (prepared.layers[0].A_log, layer.A_log.numpy()),
        "D": (prepared.layers[0].D, layer.D.numpy()),
    }
    for name, (ours, true) in expected.items():
        # float32 butterflies and a float64 product may fall on two sides of a rounding
        # boundary of float16: then they differ by one float16 ulp, seldom.
        apart = np.abs(ours.numpy() - true)
        ulp = np.spacing(np.abs(true).astype(np.float16)).astype(np.float64)
        assert (apart <= 2 * ulp).all(), name
        assert (apart > 0).mean() < 0.02, name
        assert torch.equal(ours, ours.half().float()) or name in ("A_log", "D"), name


def test_step_by_step_equals_the_whole() -> None:
    weights = prepare(random_weights(CONFIGS["forty"], seed=8))
    model = floating_model(weights, rotated=True)
    docs = [d[:17] for d in documents(40) if len(d) >= 17]
    batch = Batch.pack(docs)
    whole = model.logits(model.hidden(batch))
    state = model.new_state(len(docs))
    for t in range(17):
        logits = model.step(torch.tensor([d[t] for d in docs]), state)
        for i in range(len(docs)):
            limit = 300 * 2.0**-24 * whole.abs().max()  # float32 sums in another order, as above
            assert (logits[i] - whole[batch.rows(i)][t]).abs().max() <= limit


def test_batch_packing_and_chunks() -> None:
    batch = Batch.pack([[1, 2], [], [3], [4, 5, 6]])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.offsets.tolist() == [0, 2, 2, 3, 6]
    assert [(c.start, c.stop) for c in batch.chunks(3)] == [(0, 3), (3, 4)]
    assert [(c.start, c.stop) for c in batch.chunks(1)] == [(0, 1), (1, 3), (3, 4)]
    assert [(c.start, c.stop) for c in batch.chunks(100)] == [(0, 4)]
