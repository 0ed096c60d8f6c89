"""Builds an INT8 Quamba model from a scale table, and evaluates it.

`apply.apply` writes a model folder, `evaluate.evaluate` scores models per document, `summary.summarize` compares them.
The package itself can be called: ``quambase.apply("scales.parquet")`` is `quambase.apply.apply.apply`.
"""

from quambase.schema.callable_package import make_callable

make_callable(__name__)
