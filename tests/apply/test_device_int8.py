# mypy: disable-error-code="attr-defined"
"""What INT8 models on a device share with the CPU's, on the CPU: the wiring, and the scoring of logits."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_int8
import tiny_int8_mamba2
import torch
from recorded_operators import laid_out_as_on_cuda, recorded

from quambase.apply.evaluation.likelihood import compare, log_probabilities, torch_compare, torch_log_probabilities
from quambase.apply.int8.build import build
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.model.packed_batch import Batch


def _clipping(scales: dict) -> dict:
    """Placement upstream wraps."""
    return {key: scale / 4 if key[1] == "out_proj:input" else scale for key, scale in scales.items()}


def host_model(family: str, **switches: object) -> Int8LanguageModel:
    """A tiny INT8 model that clips before out_proj; of a Mamba-2, with a scale per channel group."""
    if family == "mamba1":
        prepared = tiny_int8.tiny_prepared()
        scales = tiny_int8.absmax_scales(prepared, tiny_int8.documents())
        return build(prepared, _clipping(scales), **switches)
    prepared2 = tiny_int8_mamba2.tiny_prepared()
    groups = tiny_int8_mamba2.channel_groups()
    scales2 = tiny_int8_mamba2.absmax_scales(prepared2, tiny_int8_mamba2.documents(), "channel", groups)
    return build(prepared2, _clipping(scales2), channel_groups=[[index] for index in groups], **switches)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize(
    "switches", [{}, {"quantize_lm_head": True, "quantize_embedding": True}, {"compat": "upstream"}]
)
def test_rows_may_be_apart_and_halves_in_float16(family: str, switches: dict[str, object]) -> None:
    """As CUDA's operators leave them: the blocks and the model around them ask for neither."""
    host = host_model(family, **switches)
    model = laid_out_as_on_cuda(host)
    batch = Batch.pack(tiny_int8.documents())
    wanted, found = host.hidden(batch), model.hidden(batch)
    assert torch.equal(found.float(), wanted.float())
    assert found.dtype == (torch.int8 if wanted.dtype == torch.int8 else torch.float16)
    assert torch.equal(model.logits(found).float(), host.logits(wanted))


def test_factors_are_multiplied_in_upstreams_order() -> None:
    """Another order rounds differently once in some hundred thousand products: too rarely for the test above."""
    host = host_model("mamba1")
    model, calls = recorded(host)
    model.hidden(Batch.pack([[1, 2, 3]]))
    wanted = []
    for i, layer in enumerate(host.weights.layers):
        s = {site: scale for (at, site), scale in host.scales.items() if at == i}
        ratios = [
            float(np.float32(s[source] / s[target]))
            for source, target in (
                ("in_proj:input", "in_proj:output"),
                ("x_proj:input", "x_proj:output"),
                ("x_proj:output", "dt_proj:output"),
            )
        ]
        wanted += [
            (ratios[0], layer.in_proj.scale),
            (layer.x_proj.scale, ratios[1]),
            (ratios[2], layer.dt_proj.scale),
            (layer.out_proj.scale, s["out_proj:input"]),
        ]
    assert [call.arguments[2][:2] for call in calls.of("linear_to_int8", "linear_to_half")] == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_of_logits_in_torch_are_those_of_the_compiled_loops(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(50, 300, generator=generator) * 4
    logits = (reference + torch.randn(50, 300, generator=generator)).to(dtype)
    logits[3, 200] = logits[3, 7] = logits[3].max() + 1  # a tie
    targets = torch.randint(0, 300, (50,), generator=generator)
    logp, top = torch_log_probabilities(reference)
    wanted_logp, wanted_top = log_probabilities(reference.clone())
    assert torch.equal(top, wanted_top) and torch.equal(top, reference.argmax(1))
    # Both round a sum of 300 exponentials, its logarithm and a difference of size up to 2^5: a few 2^-24 of it.
    assert (logp - wanted_logp).abs().max() < 2**5 * 4 * 2.0**-24
    found, wanted = torch_compare(logp, logits, targets), compare(wanted_logp, logits.float(), targets)
    assert torch.equal(found[2], wanted[2]) and found[2][3] == 7
    exact = torch.log_softmax(logits.double(), 1)
    p = torch.log_softmax(reference.double(), 1)
    for nll, kl, _ in (found, wanted):
        assert (nll + exact.gather(1, targets[:, None])[:, 0]).abs().max() < 2**5 * 4 * 2.0**-24
        # Weighted by p, which sums to one, so no more than the differences themselves are off.
        assert (kl - (p.exp() * (p - exact)).sum(1)).abs().max() < 2**5 * 16 * 2.0**-24
