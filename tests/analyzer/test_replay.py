"""Upstream's two observers, written again in torch from the reference, against the replay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fabricate import half, random_activations
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quambase.analyzer.scale_groups import ScaleGroup
from quambase.analyzer.strategies import parse_label
from quambase.analyzer.upstream_observers import ema_scale, minmax_scale, quantile_column
from quambase.schema.errors import UnknownName
from quambase.schema.sql.database import DocumentSeries
from quambase.schema.tables import DOCUMENT_QUANTILES
from quambase.schema.values.distribution import Distribution


def cuda_divide(tensor: torch.Tensor, number: int) -> torch.Tensor:
    """``tensor / number`` as CUDA computes it: times the float32 reciprocal, rounded once to the tensor's
    type.
    """
    reciprocal = torch.tensor(1.0) / torch.tensor(float(number))
    return (tensor.float() * reciprocal).to(tensor.dtype)


class MinmaxObserver:
    """observer.py: the running maximum in the activations' type, its quotient in the same type."""

    def __init__(self) -> None:
        self.maximum: torch.Tensor | None = None

    def update(self, w: torch.Tensor) -> None:
        current = w.abs().amax().clamp(min=1e-5)
        self.maximum = current if self.maximum is None else torch.max(self.maximum, current)

    def scale(self) -> torch.Tensor:
        assert self.maximum is not None
        return cuda_divide(self.maximum, 127).to(torch.float32).clamp(min=1e-6)


class PercentileObserver:
    """observer.py: float32 quantiles, averaged over documents in order."""

    def __init__(self, alpha: float, sigma: float) -> None:
        self.alpha, self.sigma = alpha, sigma
        self.maximum: torch.Tensor | None = None

    def update(self, w: torch.Tensor) -> None:
        current = torch.quantile(w.to(torch.float32).abs().flatten(), self.alpha)
        if self.maximum is None:
            self.maximum = current
        else:
            self.maximum = self.maximum + self.sigma * (current - self.maximum)

    def scale(self) -> torch.Tensor:
        assert self.maximum is not None
        return cuda_divide(self.maximum, 127).clamp(min=1e-6)


def series(documents: list[np.ndarray]) -> DocumentSeries:
    """What `documents` holds of float16 activations: quantiles by torch itself."""
    tensors = [torch.from_numpy(d).float().abs().flatten() for d in documents]
    return DocumentSeries(
        np.arange(len(documents), dtype=np.int32),
        np.array([t.max().item() for t in tensors], np.float32),
        {
            name: np.array([torch.quantile(t, p).item() for t in tensors], np.float32)
            for name, p in DOCUMENT_QUANTILES.items()
        },
    )


def group(site: str, documents: list[np.ndarray], family: str = "mamba1") -> ScaleGroup:
    pooled = Distribution.of_values(np.concatenate([d.ravel() for d in documents]))
    return ScaleGroup(0, site, "all", pooled, series(documents), family)


@pytest.mark.parametrize("site", ["in_proj:input", "x_proj:input", "ssm_state_act:input", "x_proj:output"])
@pytest.mark.parametrize("spread", [1e-7, 1e-3, 1.0, 300.0])
def test_quamba_is_upstreams_scale_to_the_bit(site: str, spread: float) -> None:
    random = np.random.default_rng(len(site) * 1000 + round(np.log10(spread)))
    lengths = [7, 1, 40, 3, 25, 2] * 8
    documents = [(random.standard_t(3, (n, 50)) * spread).astype(np.float16) for n in lengths]
    percentile = site in ("x_proj:input", "ssm_state_act:input")
    observer = PercentileObserver(0.9995, 0.01) if percentile else MinmaxObserver()
    for document in documents:
        observer.update(torch.from_numpy(document))
    found = parse_label("quamba").scale(group(site, documents))
    assert found == observer.scale().item()
    assert np.float32(found) == found


@pytest.mark.parametrize("site", ["in_proj:input", "B_conv_out:input", "x_conv_out:input", "ssm_state_act:input"])
@pytest.mark.parametrize("spread", [1e-7, 1e-3, 1.0, 300.0])
def test_quamba_is_upstreams_mamba2_scale_to_the_bit(site: str, spread: float) -> None:
    """observer.py:173-405: maxima only; those of x_conv_out and of the state cast to float32 first."""
    random = np.random.default_rng(len(site) * 1000 + round(np.log10(spread)))
    documents = [(random.standard_t(3, (n, 50)) * spread).astype(np.float16) for n in [7, 1, 40, 3]]
    observer = MinmaxObserver()
    for document in documents:
        wide = site in ("x_conv_out:input", "ssm_state_act:input")
        observer.update(torch.from_numpy(document).to(torch.float32 if wide else torch.float16))
    assert parse_label("quamba").scale(group(site, documents, "mamba2")) == observer.scale().item()


@pytest.mark.parametrize("alpha", [0.99, 0.9999, 1.0])
@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0])
def test_ema_percentile_has_other_constants(alpha: float, sigma: float) -> None:
    documents = [half(d).astype(np.float16) for d in random_activations()[1, "x_proj:input"]["all"]]
    observer = PercentileObserver(alpha, sigma)
    for document in documents:
        observer.update(torch.from_numpy(document))
    choice = parse_label(f"ema_percentile:{alpha},{sigma}")
    assert choice.scale(group("out_proj:input", documents)) == observer.scale().item()


@settings(deadline=None, max_examples=200)
@given(st.floats(0, 65504, width=16))
def test_minmax_over_the_whole_of_float16(amax: float) -> None:
    observer = MinmaxObserver()
    observer.update(torch.tensor([amax], dtype=torch.float16))
    assert minmax_scale(np.array([amax], np.float32)) == observer.scale().item()


@settings(deadline=None, max_examples=100)
@given(arrays(np.float32, st.integers(1, 30), elements=st.floats(0, 2**100, width=32)))
def test_ema_in_float32(observed: np.ndarray) -> None:
    average = torch.tensor(observed[0])
    for value in observed[1:]:
        average = average + 0.01 * (torch.tensor(value) - average)
    assert ema_scale(observed) == cuda_divide(average, 127).clamp(min=1e-6).item()


def test_the_average_depends_on_order() -> None:
    up = np.arange(1, 9, dtype=np.float32)
    assert ema_scale(up) < ema_scale(up[::-1].copy())


def test_documents_without_finite_values_are_skipped_and_scales_stay_finite() -> None:
    nan = np.float32("nan")
    assert ema_scale(np.array([nan, 2, nan, 4], np.float32)) == ema_scale(np.array([2, 4], np.float32))
    assert ema_scale(np.array([nan], np.float32)) == np.float32(1e-6)
    assert minmax_scale(np.array([nan, 3], np.float32)) == minmax_scale(np.array([3], np.float32))
    assert np.isfinite(minmax_scale(np.array([1e30], np.float32)))
    assert minmax_scale(np.array([0], np.float32)) == np.float32(1e-6)


def test_only_stored_quantiles_can_be_replayed() -> None:
    assert quantile_column(0.9995) == "q9995"
    assert quantile_column(1.0) == "amax"
    with pytest.raises(UnknownName, match=r"unknown stored document quantile '0\.9994'; did you mean"):
        quantile_column(0.9994)
