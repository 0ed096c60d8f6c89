"""Fixtures more than one folder's tests use. (Its presence also lets tests import the modules beside it.)"""

from __future__ import annotations

from pathlib import Path

import pytest
from fabricate import make_run


@pytest.fixture(scope="session")
def fabricated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of one hand-made run, `run-a`; not to be written to."""
    database = tmp_path_factory.mktemp("fabricated")
    make_run(database)
    return database
