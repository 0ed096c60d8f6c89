"""Where raw activations are kept until their rows are made; what may be kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quambase.collector import taps
from quambase.collector.taps import KeptTokens, TorchGather


def test_what_is_kept_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a chunk, where one ends, beyond the size of one, and of no rows at all; nor by the next block."""
    monkeypatch.setattr(taps, "CHUNK_VALUES", 10)
    gather = TorchGather(torch.device("cpu"))
    shapes = [(3, 2), (2, 2), (1, 1), (4, 5), (0, 7), (2, 5), (10, 1), (3, 3)]
    blocks = []
    for block in range(3):
        for number, shape in enumerate(shapes):
            gather.add(torch.full(shape, float(10 * block + number)), None)
        blocks.append(gather.gathered())
    for block, found in enumerate(blocks):
        wanted = [np.full(a * b, 10 * block + number) for number, (a, b) in enumerate(shapes)]
        np.testing.assert_array_equal(torch.cat(found).numpy(), np.concatenate(wanted))
        ends = np.cumsum([len(values) for values in found])
        assert set(ends) <= set(np.cumsum([a * b for a, b in shapes])), "each tensor has the rows of whole calls"
    assert gather.gathered() == []


def test_all_or_some_are_kept_of_tokens_and_states_alike() -> None:
    assert KeptTokens(None, None).everything and not KeptTokens({}, set()).everything
    for positions, states in ((None, set()), ({}, None)):
        with pytest.raises(ValueError, match="either all tokens and states are kept, or some of both"):
            KeptTokens(positions, states)
