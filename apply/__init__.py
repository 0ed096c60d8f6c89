"""Builds an INT8 Quamba model from a scale table, and evaluates it.

`apply.apply` writes a model folder, `evaluate.evaluate` scores models per document, `summary.summarize` compares them.
The package itself can be called: ``quambase.apply("scales.parquet")`` is `quambase.apply.apply.apply`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """``quambase.apply`` is the name of a package and of a function, so the imported package is made callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `quambase.apply.apply.apply`."""
        from quambase.apply.apply import apply

        return apply(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
