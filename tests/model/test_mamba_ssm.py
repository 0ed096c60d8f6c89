# mypy: disable-error-code="call-arg"
"""The forward passes on CUDA against mamba-ssm's own kernels, where that package is installed."""

from __future__ import annotations

import pytest
import torch

from quambase.model.language_model import floating_model
from quambase.model.mamba1 import MambaConfig
from quambase.model.mamba2 import Mamba2Config
from quambase.model.operators.cuda import CudaOperators
from quambase.model.operators.interface import ScanInputs, SsdInputs
from quambase.model.packed_batch import Batch, PlacedBatch
from quambase.model.weights import random_weights, tensors_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DOCUMENTS, LENGTH = 3, 200
HALF = torch.float16


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def batch(device: torch.device) -> PlacedBatch:
    return PlacedBatch.of(Batch.pack([[0] * LENGTH] * DOCUMENTS), device)


def draw(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(sum(shape)), device=device)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """(t, channels) as (documents, channels, length), mamba-ssm's layout."""
    return x.view(DOCUMENTS, LENGTH, -1).transpose(1, 2).contiguous()


def test_selective_scan(device: torch.device, batch: PlacedBatch) -> None:
    interface = pytest.importorskip("mamba_ssm.ops.selective_scan_interface", exc_type=ImportError)
    channels, states, t = 96, 16, DOCUMENTS * LENGTH
    u, delta, z, bc = (draw(device, t, width).to(HALF) for width in (channels, channels + 1, channels + 2, 2 * states))
    delta, z = delta[:, :channels].contiguous(), z[:, :channels]
    a, d, bias = -torch.rand(states, channels, device=device) * 8, draw(device, channels), draw(device, channels + 3)
    bias = bias[:channels] - 3
    config = MambaConfig(16, 1, vocab_size=64, d_inner=channels, d_state=states, dt_rank=1)
    inputs = ScanInputs(u, delta, bc, z, a, d, bias)
    y, state = CudaOperators(device, HALF, config.operator_sizes).selective_scan(inputs, batch)
    b, c = (channels_last(part) for part in bc.split(states, dim=1))
    wanted, last = interface.selective_scan_fn(
        channels_last(u),
        channels_last(delta),
        a.T.contiguous(),
        b,
        c,
        d,
        channels_last(z),
        bias,
        delta_softplus=True,
        return_last_state=True,
    )
    # Both are float32 inside, with another exp and order of sums, and round y to float16 once.
    assert apart(y, wanted.transpose(1, 2).reshape(t, channels)) <= 2.0**-10
    assert apart(state, last) <= 2.0**-15


def test_ssd_scan(device: torch.device, batch: PlacedBatch) -> None:
    combined = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined", exc_type=ImportError)
    heads, headdim, states, ngroups, t = 4, 64, 128, 2, DOCUMENTS * LENGTH
    e, w = heads * headdim, ngroups * states
    conv, dt = draw(device, t, e + 2 * w).to(HALF), draw(device, t, heads).to(HALF)
    a, d, bias = -torch.rand(heads, device=device) * 8, draw(device, heads + 1)[:heads], draw(device, heads + 2)[:heads]
    parts = torch.split(conv, [e, w, w], dim=1)
    config = Mamba2Config(16, 1, vocab_size=64, d_inner=e, d_state=states, headdim=headdim, ngroups=ngroups)
    inputs = SsdInputs(*parts, dt, a, d, bias - 3)
    y, state = CudaOperators(device, HALF, config.operator_sizes).ssd_scan(inputs, batch)
    x, b, c = (
        part.reshape(DOCUMENTS, LENGTH, count, -1) for part, count in zip(parts, (heads, ngroups, ngroups), strict=True)
    )
    wanted, last = combined.mamba_chunk_scan_combined(
        x,
        dt.view(DOCUMENTS, LENGTH, heads),
        a,
        b,
        c,
        64,
        D=d,
        dt_bias=bias - 3,
        dt_softplus=True,
        return_final_states=True,
    )
    # In chunks, whose products C B^T, decays and states between chunks are rounded to float16: some roundings of 2^-11.
    assert apart(y, wanted.reshape(t, e)) <= 2.0**-8
    assert apart(state, last.reshape(DOCUMENTS, e, states)) <= 2.0**-8


def test_a_whole_model(device: torch.device) -> None:
    mixer = pytest.importorskip("mamba_ssm.models.mixer_seq_simple", exc_type=ImportError)
    configs = pytest.importorskip("mamba_ssm.models.config_mamba", exc_type=ImportError)
    config = MambaConfig(d_model=64, n_layer=3, vocab_size=96, d_inner=128, d_state=16, d_conv=4, dt_rank=4)
    weights = random_weights(config)
    theirs = mixer.MambaLMHeadModel(
        configs.MambaConfig(
            d_model=64, n_layer=3, vocab_size=96, ssm_cfg={"use_fast_path": False}, fused_add_norm=False
        ),
        device=device,
        dtype=HALF,
    )
    # Files leave a tied head out; their model, where the two are one tensor, wants both names.
    theirs.load_state_dict(tensors_of(weights) | {"lm_head.weight": weights.lm_head})
    tokens = torch.randint(0, 96, (DOCUMENTS, LENGTH), generator=torch.Generator().manual_seed(0))
    model = floating_model(weights, device, HALF)
    found = model.logits(model.hidden(Batch.pack(tokens.tolist())))
    with torch.inference_mode():
        wanted = theirs(tokens.to(device)).logits.view(DOCUMENTS * LENGTH, -1)
    # Three layers whose activations are rounded to float16 (2^-11) at the same places, of other sums.
    assert apart(found, wanted) <= 20 * 2.0**-11
