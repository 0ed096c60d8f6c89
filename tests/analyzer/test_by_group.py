"""Work on many scale groups: their order, the threads, what is told, and a failure in between."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from quambase.analyzer.by_group import of_each, work_of
from quambase.analyzer.scale_groups import ScaleGroup, group_of_values
from quambase.schema.progress import Progress


def groups(sizes: list[int]) -> list[ScaleGroup]:
    return [group_of_values(np.arange(size, dtype=np.float32)) for size in sizes]


def test_results_come_in_the_order_of_the_groups_and_the_first_is_computed_here() -> None:
    given = groups([3, 900, 0, 40, 7])
    threads = {}

    def size(group: ScaleGroup) -> int:
        threads[id(group)] = threading.get_ident()
        return group.distribution.values.size

    found = list(of_each(size, given, Progress(False), 5))
    assert [group for group, _ in found] == given and [made for _, made in found] == [3, 900, 0, 40, 7]
    mine = [thread == threading.get_ident() for thread in (threads[id(group)] for group in given)]
    assert mine == [True, False, False, False, False]


def test_units_and_work_are_told_in_all() -> None:
    told: list[tuple[int, int]] = []
    given = groups([10, 20, 30])
    with Progress(lambda done, whole: told.append((done, whole))) as shown:
        shown.start("analyze", 2, 1000, unit="layers")
        for work in (600, 400):
            list(of_each(work_one, given, shown, 1, work))
        assert shown.seconds_left() == pytest.approx(0)
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert work_of(given) == 63


def work_one(group: ScaleGroup) -> None:
    """Nothing, for each group."""


def test_a_failure_comes_out_and_the_rest_is_left() -> None:
    begun: list[int] = []

    def fail(group: ScaleGroup) -> None:
        begun.append(group.distribution.values.size)
        if len(begun) > 1:
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        list(of_each(fail, groups([2] * 500), Progress(False), 1))
    assert len(begun) < 500


def test_no_groups() -> None:
    assert list(of_each(work_one, [], Progress(False), 1)) == []
