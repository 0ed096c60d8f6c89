"""Where a block's raw activations are kept until its tables are made."""

from __future__ import annotations

import numpy as np
import pytest

from quambase.collector import taps as recorder


def test_what_is_kept_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a room, where one ends, beyond the size of one, and of no rows at all."""
    monkeypatch.setattr(recorder, "ROOM", 10)
    room = recorder._Room()
    shapes = [(3, 2), (2, 2), (1, 1), (4, 5), (0, 7), (2, 5), (10, 1), (3, 3)]
    taken = [room.take(*shape) for shape in shapes]
    for number, rows in enumerate(taken):
        rows[:] = number
    assert [rows.shape for rows in taken] == shapes
    for number, rows in enumerate(taken):
        np.testing.assert_array_equal(rows, number)
