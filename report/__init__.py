"""Makes one HTML page of a run, its scale table and its evaluation, that needs no network and no other file.

`report.report` gathers the numbers and writes the page. ``quambase.report(...)`` is that function, too.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """``quambase.report`` is the name of a package and of a function, so the imported package is made callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `quambase.report.report.report`."""
        from quambase.report.report import report

        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
