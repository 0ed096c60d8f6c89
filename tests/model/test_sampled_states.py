"""The state along documents: against the final states of documents that end there."""

from __future__ import annotations

import pytest
import torch
from cuda_kernels_on_host import cuda_or_host
from device_models import plain_model, tiny_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.operators import cuda as cuda_operators
from quambase.model.operators import sampled_states
from quambase.model.operators.cuda import CudaOperators
from quambase.model.packed_batch import Batch, sampled_ends
from quambase.schema.sites import SAMPLED_STATE_SITES, STATE_BY_CHANNEL

ULPS = 64 * 2.0**-24
"""Of the largest state: a state of at most 50 tokens is a sum of as many products, here in another order, and its decay
is one exponential of a sum instead of a product of exponentials.
"""

Pieces = list[tuple[slice, torch.Tensor]]


def along(model: LanguageModel, documents: list[list[int]], every: int) -> dict[tuple[int, str], Pieces]:
    """What a tap is shown of the sampled states."""
    found: dict[tuple[int, str], Pieces] = {}

    def tap(layer: int, site: str, values: torch.Tensor, of: slice) -> None:
        if site in SAMPLED_STATE_SITES:
            found.setdefault((layer, site), []).append((of, values.cpu().clone()))

    packed = Batch.pack(documents)
    model.hidden(Batch(packed.tokens, packed.offsets, every), tap)
    return found


def finals(model: LanguageModel, documents: list[list[int]], every: int) -> dict[int, torch.Tensor]:
    """The final states of every document cut where its state is seen: the definition."""
    found: dict[int, torch.Tensor] = {}

    def tap(layer: int, site: str, values: torch.Tensor, of: slice) -> None:
        if site == "ssm_state_act:input":
            found[layer] = values.cpu().clone()

    model.hidden(Batch.pack([one[:end] for one in documents for end in ends(len(one), every)]), tap)
    return found


def ends(tokens: int, every: int) -> list[int]:
    return sorted({*range(every, tokens + 1, every), tokens} - {0})


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= ULPS * wanted.abs().max())


@given(st.integers(0, 100), st.integers(1, 40))
def test_a_state_is_seen_every_so_often_and_at_the_end(tokens: int, every: int) -> None:
    assert sampled_ends(tokens, every).tolist() == ends(tokens, every)


@pytest.mark.parametrize("family", ["mamba1", "mamba2", "mamba2 of one group"])
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=5), every=st.integers(1, 60))
def test_states_are_the_final_states_of_shorter_documents(family: str, lengths: list[int], every: int) -> None:
    """On the host and in plain PyTorch, which is what a device without compiled kernels runs."""
    weights = tiny_weights(family)
    documents = [[(7 * i + 3 * j) % 60 for j in range(length)] for i, length in enumerate(lengths)]
    for model in (floating_model(weights, rotated=True), plain_model(weights, torch.float32, rotated=True)):
        wanted = finals(model, documents, every)
        found = along(model, documents, every)
        assert found.keys() == {(layer, site) for layer in range(2) for site in SAMPLED_STATE_SITES}
        for (layer, _), pieces in found.items():
            assert near(torch.cat([values for _, values in pieces]), wanted[layer])


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("states", [0, 3, 11])
def test_few_states_at_a_time_are_the_same_states(family: str, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory for ``states`` states, those of whole documents come together, one document at least."""
    model = floating_model(tiny_weights(family), rotated=True)
    documents, every = [list(range(length)) for length in (40, 1, 9, 33)], 8  # 5, 1, 2 and 5 states
    whole = along(model, documents, every)
    size = whole[0, STATE_BY_CHANNEL][0][1][0].numel()
    monkeypatch.setattr(sampled_states, "MOST_VALUES", states * size)
    found = along(model, documents, every)
    wanted = {0: [(0, 1), (1, 2), (2, 3), (3, 4)], 3: [(0, 1), (1, 3), (3, 4)], 11: [(0, 3), (3, 4)]}[states]
    for key, pieces in found.items():
        assert [(of.start, of.stop) for of, _ in pieces] == wanted
        # Not to the last bit: PyTorch's softplus of the last few values of a tensor is another code's.
        assert near(torch.cat([values for _, values in pieces]), whole[key][0][1])


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_states_along_documents_change_nothing_else(family: str) -> None:
    model, batch = floating_model(tiny_weights(family), rotated=True), Batch.pack([list(range(30)), [3, 4]])
    values: list[list[torch.Tensor]] = [[], []]
    for kept, every in zip(values, (0, 7), strict=True):

        def tap(layer: int, site: str, shown: torch.Tensor, of: slice, kept: list[torch.Tensor] = kept) -> None:
            if site not in SAMPLED_STATE_SITES:
                kept.append(shown.clone())

        model.hidden(Batch(batch.tokens, batch.offsets, every), tap)
    assert all(torch.equal(*pair) for pair in zip(*values, strict=True)) and len(values[0]) > 20


@pytest.fixture(params=["cuda", "host"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device, or the host, whose threads then run the kernels."""
    return cuda_or_host(request, monkeypatch, cuda_operators)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_states_on_a_device_are_the_hosts(family: str, dtype: torch.dtype, device: torch.device) -> None:
    weights, documents = tiny_weights(family), [list(range(length)) for length in (40, 1, 9, 33)]
    there = LanguageModel(weights, CudaOperators(device, dtype, weights.config.operator_sizes), rotated=True)
    host = along(floating_model(weights, rotated=True), documents, 8)
    for key, pieces in along(there, documents, 8).items():
        found, wanted = pieces[0][1], host[key][0][1]
        # In float16 each of some ten operators before it rounds by 2^-11.
        allowed = ULPS if dtype == torch.float32 else 20 * 2.0**-11
        assert found.dtype == torch.float32 and (found - wanted).abs().max() <= allowed * wanted.abs().max()
