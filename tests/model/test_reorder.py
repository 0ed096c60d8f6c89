# mypy: disable-error-code="call-arg"
"""Reordering heads and channels changes no logit, and every site by the permutation alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.model.language_model import floating_model
from quambase.model.mamba2 import Mamba2Config
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare, reorder
from quambase.model.weights import ModelWeights, random_weights
from quambase.schema.errors import CheckpointInvalid
from quambase.schema.groups import LayerGroups

TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3]]


def random_groups(config: Mamba2Config, rng: np.random.Generator) -> LayerGroups:
    """Any order of the heads of each SSD group and of the channels of each head; one group of everything."""
    per_ssd = config.heads // config.ngroups
    heads = np.concatenate([g * per_ssd + rng.permutation(per_ssd) for g in range(config.ngroups)])
    channels = [h * config.headdim + rng.permutation(config.headdim) for h in heads]
    return LayerGroups(
        tuple(heads.tolist()),
        ((per_ssd,),) * config.ngroups,
        tuple(np.concatenate(channels).tolist()),
        (((config.headdim,),),) * config.ngroups,
    )


def model(ngroups: int, seed: int) -> ModelWeights:
    config = Mamba2Config(d_model=16, n_layer=2, vocab_size=16, d_inner=64, d_state=4, headdim=8, ngroups=ngroups)
    return random_weights(config, seed)


def sites(weights: ModelWeights, *, rotated: bool) -> tuple[torch.Tensor, dict[tuple[int, str], torch.Tensor]]:
    found = {}

    def tap(layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        found[layer, site] = values.clone()

    runner = floating_model(weights, rotated=rotated)
    return runner.logits(runner.hidden(Batch.pack(TOKENS), tap)), found


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    # Two float32 layers whose sums (at most 64 terms) are formed in another order, each to within some ulps of the
    # largest term: some hundred ulps of the range. A misplaced row changes it by the range itself.
    return bool((a - b).abs().max() <= 300 * 2.0**-24 * max(1.0, float(b.abs().max())))


@settings(deadline=None, max_examples=20)
@given(ngroups=st.sampled_from([1, 2, 4]), seed=st.integers(0, 999))
def test_logits_do_not_change(ngroups: int, seed: int) -> None:
    weights = model(ngroups, seed)
    rng = np.random.default_rng(seed)
    groups = [random_groups(weights.config, rng) for _ in range(2)]
    before, plain = sites(weights, rotated=False)
    after, moved = sites(reorder(weights, groups), rotated=False)
    assert close(after, before)
    for layer, layer_groups in enumerate(groups):
        channels, heads = list(layer_groups.channel_index), list(layer_groups.head_index)
        for name in ("z_act", "x_conv_in", "x_conv_out", "ssd_out_act", "out_proj"):
            key = (layer, f"{name}:input")
            assert close(moved[key], plain[key][:, channels]), key
        assert close(moved[layer, "dt_act:input"], plain[layer, "dt_act:input"][:, heads])
        assert close(moved[layer, "B_conv_out:input"], plain[layer, "B_conv_out:input"])
        state = "ssm_state_act:input"
        assert close(moved[layer, state], plain[layer, state][:, channels])


@pytest.mark.parametrize("ngroups", [1, 2, 4])
def test_nor_do_those_of_the_prepared_model(ngroups: int) -> None:
    """Folded and rotated in float32: out_proj's columns are reordered before they are mixed."""
    weights = model(ngroups, 7)
    rng = np.random.default_rng(7)
    moved = reorder(weights, [random_groups(weights.config, rng) for _ in range(2)])
    before, _ = sites(prepare(weights, half=False), rotated=True)
    after, _ = sites(prepare(moved, half=False), rotated=True)
    assert close(after, before)


def test_groups_of_another_model_are_refused() -> None:
    weights = model(2, 0)
    groups = random_groups(weights.config, np.random.default_rng(0))
    with pytest.raises(CheckpointInvalid, match="the groups describe 1 layers"):
        reorder(weights, [groups])
    other = random_groups(replace(weights.config, ngroups=1), np.random.default_rng(0))
    with pytest.raises(CheckpointInvalid, match=r"\(8, 64, 1\)"):
        reorder(weights, [other, other])
