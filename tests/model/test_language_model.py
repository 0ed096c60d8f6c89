"""The language model over any operators and any list of blocks, and what a kind of block must say of itself."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from cuda_kernels_on_host import cuda_or_host
from device_models import DOCUMENTS, plain_model, shown, tiny_weights

from quambase.model.block_kinds import KINDS, kind_of
from quambase.model.decoding_steps import DecodingSteps
from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.mamba1 import MambaConfig
from quambase.model.mamba2 import Mamba2Config
from quambase.model.operators import cuda as cuda_operators
from quambase.model.operators.cuda import CudaOperators
from quambase.model.operators.host import HostOperators, whole_rows
from quambase.model.packed_batch import Batch
from quambase.model.weights import random_weights
from quambase.schema.sites import FAMILIES

SINGLE, HALF = torch.float32, torch.float16
ULPS = 300 * 2.0**-24
"""Two small float32 layers: some hundred roundings of 2^-24 of the largest value."""


@pytest.fixture(params=["cuda", "host"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device, or the host, whose threads then run the kernels."""
    return cuda_or_host(request, monkeypatch, cuda_operators)


def decoded(model: LanguageModel, documents: list[list[int]]) -> torch.Tensor:
    """Logits (t, b, v) of documents of one length, fed token by token."""
    state = model.new_state(len(documents))
    steps = torch.tensor(documents, device=model.device).T
    return torch.stack([model.step(tokens, state).float().cpu() for tokens in steps])


def at_once(model: LanguageModel, documents: list[list[int]]) -> torch.Tensor:
    """The same in one forward pass."""
    logits = model.logits(model.hidden(Batch.pack(documents))).float().cpu()
    return logits.view(len(documents), len(documents[0]), -1).transpose(0, 1)


TEXTS = [[5, 3, 8, 1, 1, 60, 2, 9], [40, 41, 3, 3, 0, 7, 8, 22], [9, 9, 9, 9, 12, 13, 14, 15]]


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_a_step_in_plain_torch_goes_on_where_the_one_before_stopped(family: str, dtype: torch.dtype) -> None:
    model = plain_model(tiny_weights(family), dtype, rotated=True)
    found, wanted = decoded(model, TEXTS), at_once(model, TEXTS)
    # In float16 every operator rounds by 2^-11, in two layers of a dozen operators.
    allowed = (ULPS if dtype == SINGLE else 24 * 2.0**-11) * wanted.abs().max()
    assert (found - wanted).abs().max() <= allowed
    assert (found[1] - at_once(model, [text[1:2] for text in TEXTS])[0]).abs().max() > allowed, "nothing carried over"


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_the_whole_model_over_cudas_kernels_is_the_hosts(family: str, device: torch.device) -> None:
    """Every site, and the steps."""
    weights = tiny_weights(family)
    host = floating_model(weights, rotated=True)
    model = LanguageModel(weights, CudaOperators(device, SINGLE, weights.config.operator_sizes), rotated=True)
    wanted, found = shown(host, DOCUMENTS), shown(model, DOCUMENTS)
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert (found[key] - values).abs().max() <= ULPS * max(1, values.abs().max()), key
    steps = decoded(host, TEXTS)
    assert (decoded(model, TEXTS) - steps).abs().max() <= ULPS * steps.abs().max()


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("b", [1, 3])
def test_steps_go_on_from_a_prompt(family: str, dtype: torch.dtype, b: int, device: torch.device) -> None:
    """From prompts of different lengths: as at once, as on the host; on CUDA, a graph's, bit for bit."""
    weights = tiny_weights(family)
    model = LanguageModel(weights, CudaOperators(device, dtype, weights.config.operator_sizes), rotated=True)
    host = floating_model(weights, rotated=True)
    cuts = [3, 1, 5][:b]
    prompts = Batch.pack([text[:cut] for text, cut in zip(TEXTS, cuts, strict=False)])
    following = torch.tensor([text[cut : cut + 3] for text, cut in zip(TEXTS, cuts, strict=False)]).T
    wanted = at_once_after(host, cuts)
    found = {}
    for name, one in (("host", host), ("here", model)):
        hidden, state = one.prefill(prompts)
        assert torch.equal(hidden, one.hidden(prompts))
        if name == "here":
            steps = DecodingSteps(one.step, copy.deepcopy(state))
            replayed = torch.stack([steps.step(tokens) for tokens in following]).float().cpu()
        found[name] = torch.stack([one.step(tokens, state).float().cpu() for tokens in following])
    # In float16 every operator rounds by 2^-11, in two layers of a dozen operators.
    allowed = (ULPS if dtype == SINGLE else 24 * 2.0**-11) * wanted.abs().max()
    assert (found["host"] - wanted).abs().max() <= ULPS * wanted.abs().max()
    assert (found["here"] - wanted).abs().max() <= allowed
    assert torch.equal(replayed, found["here"])


def at_once_after(model: LanguageModel, cuts: list[int]) -> torch.Tensor:
    """Logits (3, b, v) of three tokens after the first ``cuts[i]`` of TEXTS[i], in one forward pass."""
    logits = at_once(model, TEXTS)
    return torch.stack([logits[cut : cut + 3, i] for i, cut in enumerate(cuts)], 1)


def test_blocks_of_different_kinds_make_one_model() -> None:
    """A block's sites and state are its own: the model asks for nothing that all blocks share."""
    one = random_weights(MambaConfig(16, 2, 64, 24, d_state=4, dt_rank=2))
    two = random_weights(Mamba2Config(16, 2, 64, 32, d_state=6, headdim=8, ngroups=2))
    model, other = floating_model(one), floating_model(two)
    model.blocks[1], model.norms[1] = other.blocks[0], other.norms[0]
    wanted = at_once(model, TEXTS)
    assert (decoded(model, TEXTS) - wanted).abs().max() <= ULPS * wanted.abs().max()
    assert [tuple(state.ssm.shape) for state in model.new_state(3)] == [(3, 24, 4), (3, 32, 6)]
    sites = shown(model, DOCUMENTS)
    found = [{site for layer, site in sites if layer == index} for index in range(2)]
    assert found == [
        {site.name for site in FAMILIES[kind] if not (site.head or site.sampled)} for kind in ("mamba1", "mamba2")
    ]
    # The residual stream between them, by hand.
    alone = shown(floating_model(one), DOCUMENTS)
    assert torch.equal(sites[0, "out_proj:output"], alone[0, "out_proj:output"])
    assert not torch.equal(sites[-1, "lm_head:input"], alone[-1, "lm_head:input"])


CONFIGS = {
    "mamba1": MambaConfig(16, 2, 64, 24, d_state=4, dt_rank=2),
    "mamba2": Mamba2Config(16, 2, 64, 32, d_state=6, headdim=8, ngroups=2),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_says_the_same_everywhere(name: str) -> None:
    config, kind = CONFIGS[name], KINDS[name]
    weights = random_weights(config)
    assert kind is kind_of(config) is kind_of(weights.layers[0])
    of_block = [field.name for field in fields(kind.weights)]
    assert of_block == list(kind.names) == list(config.block_shapes())
    assert {key: tuple(value.shape) for key, value in vars(weights.layers[0]).items()} == config.block_shapes()
    assert set(kind.float32) < set(of_block)
    assert list(config.block_edges()) == [site.name for site in FAMILIES[name] if not site.head]
    # Every site is as wide as it is said to be.
    model = floating_model(weights)
    for (_, site), values in shown(model, DOCUMENTS).items():
        assert values.shape[-1] == config.site_edges()[site][-1], site


def test_a_slice_of_columns_is_read_where_it_lies() -> None:
    wide = torch.randn(6, 10)
    for columns in (slice(0, 10), slice(0, 4), slice(3, 10), slice(3, 7)):
        rows, first = whole_rows(wide[:, columns])
        assert rows.flags["C_CONTIGUOUS"] and rows.__array_interface__["data"][0] == wide.data_ptr()
        assert (rows[:, first : first + wide[:, columns].shape[1]] == wide[:, columns].numpy()).all()
    # What is no slice of whole rows is copied.
    for x in (wide.T, wide[2:], wide[:, ::2], wide[1:, 3:], torch.randn(4, 3)[:0]):
        rows, first = whole_rows(x)
        assert (rows[:, first : first + x.shape[1]] == x.numpy()).all() and rows.flags["C_CONTIGUOUS"]
    host = HostOperators()
    assert host.dtype == SINGLE and host.device.type == "cpu"


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_a_change_is_seen_by_what_reads_the_site_and_by_nothing_before(family: str) -> None:
    """Each site that an INT8 model's forward pass reads, changed alone: its own tap shows it, earlier taps do not."""
    model = floating_model(tiny_weights(family), rotated=True)
    before = shown(model, DOCUMENTS)
    sites = [s for s in FAMILIES[family] if s.consumed and not s.decode_only and not s.head]
    order = [s.name for s in FAMILIES[family]]
    for site in sites:
        seen: dict[str, torch.Tensor] = {}

        def double(layer: int, name: str, values: torch.Tensor, site: str = site.name) -> torch.Tensor:
            return 2 * values if (layer, name) == (1, site) else values

        def tap(layer: int, name: str, values: torch.Tensor, _: slice, seen: dict = seen) -> None:
            if layer == 1:
                seen[name] = values.clone()

        changed = model.hidden(Batch.pack(DOCUMENTS), tap, double)
        assert not torch.equal(changed, model.hidden(Batch.pack(DOCUMENTS))), site.name
        assert torch.equal(seen[site.name], 2 * before[1, site.name]), site.name
        for earlier in order[: order.index(site.name)]:
            # In Mamba-2 z and dt leave in_proj beside the convolution's input: what is listed earlier may be later.
            if earlier.startswith("in_proj"):
                assert torch.equal(seen[earlier], before[1, earlier]), (site.name, earlier)
    asked: list[str] = []

    def note(layer: int, name: str, values: torch.Tensor) -> torch.Tensor:
        asked.append(name)
        return values

    model.hidden(Batch.pack(DOCUMENTS), change=note)
    assert set(asked) == {site.name for site in sites} and len(asked) == 2 * len(sites)
