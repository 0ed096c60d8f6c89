"""What several files here begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.commands import ANALYZE, APPLY, EVALUATE, MAMBA1, make_inputs
from faults.started import start


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole chain was run; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    make_inputs(folder)
    for words in (MAMBA1, ANALYZE, APPLY, EVALUATE):
        done = start(folder, "", *words)
        assert done.returncode == 0, done.stderr
    return folder
