"""Packages that can be called as the function of the same name in their module of the same name."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function of the package's name."""
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(f"{self.__name__}.{name}"), name)(*args, **kwargs)


def make_callable(package: str) -> None:
    """Make the imported ``package`` callable: ``quambase.apply(...)`` is `quambase.apply.apply.apply`, imported only
    then.
    """
    sys.modules[package].__class__ = _Callable
