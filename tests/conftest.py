"""Fixtures more than one folder's tests use. (Its presence also lets tests import the modules beside it.)"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fabricate import make_run

import quambase.cli.main  # noqa: F401  (says how threads wait, before PyTorch is imported)


@pytest.fixture(scope="session")
def fabricated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of one hand-made run, `run-a`; not to be written to."""
    database = tmp_path_factory.mktemp("fabricated")
    make_run(database)
    return database


LONGEST = ("test_examples.py", "test_trusted_results.py", "test_lm_eval.py")
"""Files that take minutes. They begin first, so that no worker of `make test` is left with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the rest in its order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Why tests were skipped, a line for each reason."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")
