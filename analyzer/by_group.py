"""Work on many scale groups, several at a time, in their order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from quambase.analyzer.scale_groups import ScaleGroup, scale_groups_by_layer
from quambase.schema.progress import Progress
from quambase.schema.sql.database import StatsDB

Result = TypeVar("Result")

WORKERS = min(4, os.cpu_count() or 1)
"""Groups worked on at a time. Two thirds of the time are spent in kernels, which run beside one another. The rest is
Python's, so more workers would wait for the interpreter.
"""


def of_each(
    function: Callable[[ScaleGroup], Result],
    groups: Sequence[ScaleGroup],
    shown: Progress,
    units: float,
    work: float | None = None,
) -> Iterator[tuple[ScaleGroup, Result]]:
    """Each of ``groups`` with what ``function`` makes of it, in their order.

    ``shown`` is told of ``units`` and ``work`` for all of them, None: `work_of` them. The first group is computed by
    itself in this thread, so that ``shown`` can tell of kernels that are compiled. Groups that have not begun are left
    when one fails or the reader stops.
    """
    pool = ThreadPoolExecutor(WORKERS)
    coming: list[Future[Result]] = []
    whole = work_of(groups)
    try:
        for place, group in enumerate(groups):
            mine = work_of([group]) * (1.0 if work is None else work / whole)
            with shown.piece(units / len(groups), mine, f"layer {group.layer} {group.site}"):
                result = coming[place - 1].result() if place else function(group)
            if not place:
                coming = [pool.submit(function, each) for each in groups[1:]]
            yield group, result
    finally:
        pool.shutdown(cancel_futures=True)


def of_every(
    function: Callable[[ScaleGroup], Result],
    database: StatsDB,
    run: str,
    shown: Progress,
    granularity: str | None = None,
) -> Iterator[tuple[ScaleGroup, Result]]:
    """`of_each` of every scale group of ``run``, a layer in memory at a time; ``granularity`` as in `scale_groups`.

    ``shown`` counts layers; the work of each is its rows of `counts`. Errors: those of `StatsDB.distributions`.
    """
    layers = database.layers(run)
    for work, groups in zip(layers.values(), scale_groups_by_layer(database, run, granularity, layers), strict=True):
        yield from of_each(function, groups, shown, 1, work)


def work_of(groups: Iterable[ScaleGroup]) -> int:
    """The distinct values of all groups, to which the time of a strategy is proportional; one more for each group."""
    return sum(1 + group.distribution.values.size for group in groups)
