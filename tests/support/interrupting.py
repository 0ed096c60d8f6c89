"""A collection that is interrupted, and so leaves an unfinished run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import quambase.collector.collect as run_module
from quambase.collector.tables.run_folder import BlockFiles


@contextmanager
def interrupted(after: int = 1, checkpoint_seconds: float = 0.0) -> Iterator[None]:
    """Collecting inside ends as by Ctrl-C when the rows of the block after the first ``after`` come."""
    add, calls = BlockFiles.add, []

    def stop(*args: object) -> None:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(add(*args))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "CHECKPOINT_SECONDS", checkpoint_seconds)
        patch.setattr(BlockFiles, "add", stop)
        yield
