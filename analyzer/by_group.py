"""Work on many scale groups, several at a time, in their order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from quambase.analyzer.scale_groups import ScaleGroup
from quambase.schema.progress import Progress

Result = TypeVar("Result")

WORKERS = min(4, os.cpu_count() or 1)
"""Groups worked on at a time. Two thirds of the time are spent in kernels, which run beside one another. The rest is
Python's, so more workers would wait for the interpreter.
"""


def of_each(
    function: Callable[[ScaleGroup], Result], groups: Sequence[ScaleGroup], shown: Progress
) -> Iterator[tuple[ScaleGroup, Result]]:
    """Each of ``groups`` with what ``function`` makes of it, in their order.

    ``shown`` counts groups; the work of each is its number of distinct values, to which the time of a strategy is
    proportional. The first group is computed by itself in this thread, so that ``shown`` can tell of kernels that are
    compiled. Groups that have not begun are left when one fails or the reader stops.
    """
    pool = ThreadPoolExecutor(WORKERS)
    coming: list[Future[Result]] = []
    try:
        for place, group in enumerate(groups):
            with shown.piece(1, group.distribution.values.size, f"layer {group.layer} {group.site}"):
                result = coming[place - 1].result() if place else function(group)
            if not place:
                coming = [pool.submit(function, each) for each in groups[1:]]
            yield group, result
    finally:
        pool.shutdown(cancel_futures=True)
