"""Scale table -> INT8 Quamba model, and its evaluation.

`apply.apply` writes a model folder, `evaluate.evaluate` scores models per document, `summary.summarize` compares them.
The package itself can be called: ``quambase.apply("scales.parquet")`` is `quambase.apply.apply.apply`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """``quambase.apply`` names a package and a function. The package is imported, so it is made callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `quambase.apply.apply.apply`."""
        from quambase.apply.apply import apply

        return apply(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
