"""Scale table -> INT8 Quamba model, and its evaluation.

`apply.apply` writes a model folder, `evaluate.evaluate` scores models per document, `summary.summarize` compares them.
"""
