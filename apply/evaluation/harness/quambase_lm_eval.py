"""Makes lm-eval know the model `quambase` in every Python process of an environment.

`quambase lm-eval --enable` copies this file beside lm-eval, with a `.pth` file that imports it whenever Python starts.
It therefore imports nothing but the standard library and does nothing until `lm_eval.models` is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TARGET = "quambase.apply.evaluation.harness.language_model:QuambaseModel"
"""Where the model is, as lm-eval's registry of models names what it imports when it is first asked for."""


class ModelFinder:
    """A finder of `sys.meta_path` that adds our model to the registry once `lm_eval.models` has filled it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of `lm_eval.models`, found by the other finders; None for every other module."""
        if name != "lm_eval.models" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None and importlib.util.find_spec("quambase") is not None:
            loader = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                from lm_eval.api.registry import model_registry

                if "quambase" not in model_registry:
                    model_registry.register("quambase", target=TARGET)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, ModelFinder())
