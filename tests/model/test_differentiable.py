"""Gradients of the differentiable operators, against PyTorch's own through the plain loop over time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from device_models import PlainLoop, tiny_weights

from quambase.model.hadamard import hadamard
from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.operators.differentiable import DifferentiableOperators, HostDifferentiableOperators, on_gradient
from quambase.model.operators.torch import TorchOperators
from quambase.model.packed_batch import Batch
from quambase.schema.sites import FAMILIES, STATE_SITES, SiteKey

Make = Callable[[int], TorchOperators]
CPU = torch.device("cpu")
LENGTHS = (70, 1, 130, 3)
"""A document of one token, and two that end inside the second and third chunk of an SSD scan."""


def documents() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch.pack([torch.randint(0, 60, (length,), generator=generator).tolist() for length in LENGTHS])


def gradients(family: str, operators: TorchOperators) -> dict[SiteKey, torch.Tensor]:
    """The gradient at every site but the states, of a sum of the final hidden states with random weights."""
    model = LanguageModel(tiny_weights(family), operators, rotated=True)
    found: dict[SiteKey, torch.Tensor] = {}

    def tap(layer: int, site: str, values: torch.Tensor, _: slice) -> None:
        if site not in STATE_SITES:
            on_gradient(values, lambda gradient: found.update({(layer, site): gradient.clone()}))

    hidden = model.differentiable_hidden(documents(), tap)
    hidden.backward(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden.device))
    return found


@pytest.mark.parametrize("make", [lambda n: DifferentiableOperators(n), lambda n: HostDifferentiableOperators(n, CPU)])
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_gradients_are_those_of_the_plain_loop(family: str, make: Make) -> None:
    ngroups = tiny_weights(family).config.operator_sizes.ngroups
    found, wanted = gradients(family, make(ngroups)), gradients(family, PlainLoop(ngroups))
    assert set(found) == set(wanted)
    assert {site for _, site in found} == {site.name for site in FAMILIES[family] if not site.sampled} - {
        *STATE_SITES,
        "lm_head:output",
    }
    for key, gradient in found.items():
        largest = wanted[key].abs().max()
        # Sums of 130 tokens and two layers forward and back: some thousand roundings of 2^-24 of the largest.
        assert largest > 0
        assert (gradient - wanted[key]).abs().max() <= 3000 * 2.0**-24 * largest, key


@pytest.mark.parametrize("make", [lambda n: DifferentiableOperators(n), lambda n: HostDifferentiableOperators(n, CPU)])
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_the_forward_pass_is_the_model_s(family: str, make: Make) -> None:
    weights = tiny_weights(family)
    model = LanguageModel(weights, make(weights.config.operator_sizes.ngroups), rotated=True)
    shown: set[str] = set()
    found = model.differentiable_hidden(documents(), lambda layer, site, values, rows: shown.add(site)).detach()
    wanted = floating_model(weights, rotated=True).hidden(documents())
    assert shown == {site.name for site in FAMILIES[family] if not site.sampled} - {"lm_head:output"}
    assert (found - wanted).abs().max() <= 1000 * 2.0**-24 * wanted.abs().max()


@pytest.mark.parametrize("dim", [8, 24, 40, 56, 80])
def test_the_transposed_transform(dim: int) -> None:
    matrix = hadamard(torch.eye(dim))  # rows: the transform of unit vectors, so the transposed matrix
    x = torch.randn(5, dim, generator=torch.Generator().manual_seed(dim))
    # Sums of dim products, each rounded.
    assert torch.allclose(hadamard(x, transposed=True), x @ matrix.T, atol=dim * 2.0**-22)
    assert torch.allclose(hadamard(x), x @ matrix, atol=dim * 2.0**-22)
