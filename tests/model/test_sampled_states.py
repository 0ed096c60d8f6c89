"""The state along documents: against the final states of documents that end there."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cuda_kernels_on_host import cuda_or_host
from device_models import PlainLoop, plain_model, tiny_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.operators import cuda as cuda_operators
from quambase.model.operators import sampled_states
from quambase.model.operators.cuda import CudaOperators
from quambase.model.operators.differentiable import HostDifferentiableOperators, on_gradient
from quambase.model.operators.torch import CPU
from quambase.model.packed_batch import Batch, sampled_ends
from quambase.schema.sites import SAMPLED_STATE_SITES, STATE_BY_CHANNEL, STATE_BY_INDEX

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


class WatchedLoop(PlainLoop):
    """A loop over time, of one document, that keeps every token's state and the gradient of what the next token reads
    of it: by layer, tensors whose first axis is the token.
    """

    def __init__(self, ngroups: int) -> None:
        super().__init__(ngroups)
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(self, states: list[torch.Tensor]) -> None:
        gradients = torch.zeros(len(states), *states[0].shape)
        self.layers.append((torch.stack(states).detach(), gradients))
        for state, gradient in zip(states[:-1], gradients, strict=False):
            state.register_hook(gradient.copy_)

    def selective_scan(self, inputs, batch, state=None):  # type: ignore[no-untyped-def]
        u, delta, bc, z, a, d, bias = inputs
        step, n, state, outputs, states = F.softplus(delta + bias), len(a), torch.zeros(a.T.shape), [], []
        for t in range(len(u)):
            now = torch.exp(step[t, :, None] * a.T) * state + (step[t] * u[t])[:, None] * bc[t, None, :n]
            outputs.append((now * bc[t, None, n:]).sum(1))
            state = now.clone()  # as it is kept for the next token
            states.append(state)
        self.watch(states)
        return (torch.stack(outputs) + d * u) * F.silu(z), torch.zeros(1, *a.T.shape)

    def ssd_scan(self, inputs, batch, state=None):  # type: ignore[no-untyped-def]
        x, b, c, dt, a, d, bias = inputs
        heads, step = len(a), F.softplus(dt + bias)
        wide = x.view(len(x), heads, -1)
        shared = [part.view(len(x), self.ngroups, -1).repeat_interleave(heads // self.ngroups, 1) for part in (b, c)]
        state, outputs, states = torch.zeros(heads, wide.shape[2], shared[0].shape[2]), [], []
        for t in range(len(x)):
            driven = (step[t, :, None] * wide[t])[:, :, None] * shared[0][t, :, None]
            now = torch.exp(step[t] * a)[:, None, None] * state + driven
            outputs.append((now * shared[1][t, :, None]).sum(2))
            state = now.clone()
            states.append(state)
        self.watch(states)
        y = torch.stack(outputs) + d[:, None] * wide
        return y.reshape(x.shape), torch.zeros(1, x.shape[1], shared[0].shape[2])


@pytest.mark.parametrize("family", ["mamba1", "mamba2", "mamba2 of one group"])
@pytest.mark.parametrize("every", [1, 7, 64])
def test_gradients_of_states_are_those_of_a_loop_over_time(family: str, every: int) -> None:
    """Of documents one by one; and weighted by the tokens that each state stands for, which add up to all of them but
    half of the first piece.
    """
    weights = tiny_weights(family)
    ngroups = weights.config.operator_sizes.ngroups
    documents = [[(7 * i + 3 * j) % 60 for j in range(length)] for i, length in enumerate((40, 1, 33))]
    draw = torch.Generator().manual_seed(3)
    upstream = [torch.randn(len(document), weights.config.d_model, generator=draw) for document in documents]
    found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def tap(layer: int, site: str, values: torch.Tensor, of: slice) -> None:
        if site == STATE_BY_CHANNEL:
            on_gradient(
                values, lambda gradient: found.setdefault(layer, []).append((values.detach(), gradient.clone()))
            )
        assert site != STATE_BY_INDEX

    packed = Batch.pack(documents)
    model = LanguageModel(weights, HostDifferentiableOperators(ngroups, CPU), rotated=True)
    hidden = model.differentiable_hidden(Batch(packed.tokens, packed.offsets, every), tap)
    hidden.backward(torch.cat(upstream))
    wanted: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for document, gradient in zip(documents, upstream, strict=True):
        loop = WatchedLoop(ngroups)
        alone = LanguageModel(weights, loop, rotated=True).differentiable_hidden(
            Batch.pack([document]), lambda *_: None
        )
        alone.backward(gradient)
        seen = ends(len(document), every)
        lengths = [b - a for a, b in itertools.pairwise([0, *seen])]
        shares = [(a + b) / 2 for a, b in zip(lengths, [*lengths[1:], 0], strict=True)]
        assert sum(shares) == len(document) - lengths[0] / 2
        for layer, (states, of_states) in enumerate(loop.layers):
            for end, share in zip(seen, shares, strict=True):
                one = states[end - 1], of_states[end - 1] * share**0.5
                wanted.setdefault(layer, []).append(tuple(part.flatten(0, -2) for part in one))
    assert found.keys() == wanted.keys() == {0, 1}
    for layer, parts in wanted.items():
        for number in (0, 1):
            ours = torch.cat([part[number] for part in found[layer]])
            true = torch.stack([part[number] for part in parts])
            # Two layers' sums of some fifty products each, in another order.
            assert ours.shape == true.shape and (ours - true).abs().max() <= 2000 * 2.0**-24 * true.abs().max()
            assert bool(ours.any()) is (number == 0 or every < 40)  # nothing follows the last state
