"""quambase: exact activation statistics of Mamba models, every INT8 scale strategy, and the INT8 model they lead to.

    import quambase
    run = quambase.collect("mamba-5m", 128)            # -> quambase-db/runs/<run id>/
    print(quambase.open("quambase-db").stats())
    quambase.analyze()                                 # -> scales.parquet
    quambase.apply("scales.parquet")                   # -> quambase-db/models/<id>/
    print(quambase.evaluate())
    print(quambase.report())                           # -> report.html
    quambase.plot("heatmap", out="heatmap.pdf")        # and nine other pictures

Each function is the command of its name; docs/python.md has examples. The stages are subpackages, such as
`quambase.schema`; `quambase.apply` and `quambase.report` are both, stages that can be called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quambase.analyzer.adopt import adopt as adopt
    from quambase.analyzer.analyze import analyze as analyze
    from quambase.analyzer.converge import converge as converge
    from quambase.analyzer.opened import open as open
    from quambase.analyzer.pictures.plot import plot as plot
    from quambase.analyzer.strategies import strategy as strategy
    from quambase.analyzer.sweep import sweep as sweep
    from quambase.apply.evaluation.evaluate import evaluate as evaluate
    from quambase.apply.generate import generate as generate
    from quambase.collector.collect import collect as collect
    from quambase.schema.sql.database import StatsDB as StatsDB

    __version__: str

__all__ = [
    "StatsDB",
    "__version__",
    "adopt",
    "analyze",
    "apply",
    "collect",
    "converge",
    "evaluate",
    "generate",
    "open",
    "plot",
    "report",
    "strategy",
    "sweep",
]

_NAMES = {
    "StatsDB": "quambase.schema.sql.database",
    "adopt": "quambase.analyzer.adopt",
    "analyze": "quambase.analyzer.analyze",
    "collect": "quambase.collector.collect",
    "converge": "quambase.analyzer.converge",
    "evaluate": "quambase.apply.evaluation.evaluate",
    "generate": "quambase.apply.generate",
    "open": "quambase.analyzer.opened",
    "plot": "quambase.analyzer.pictures.plot",
    "strategy": "quambase.analyzer.strategies",
    "sweep": "quambase.analyzer.sweep",
}


def __getattr__(name: str) -> Any:
    """Import what a name needs when it is first used: `StatsDB` needs no torch."""
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("quambase")
    if name in ("apply", "report"):
        return importlib.import_module(f"quambase.{name}")
    raise AttributeError(f"module 'quambase' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, *globals()])
