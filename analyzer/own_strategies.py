"""Strategies from elsewhere: functions that a user passes, Python files, entry points of other packages."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from quambase.schema.errors import DataInvalid, UnknownName
from quambase.schema.values.number_format import INT8, multipliers, zero_point_of

ENTRY_POINTS = "quambase.strategies"
"""The entry points' group: their names are those of strategies, their objects the functions."""

_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)(?P<values>:.*)?", re.S)


def from_file(label: str) -> tuple[Callable[..., Any], str] | None:
    """The function that ``FILE.py:NAME`` or ``FILE.py:NAME:value,value`` names, whose file is run, and the rest of the
    label. None where ``label`` has another form.

    DataInvalid: the file is missing or fails. UnknownName: it has no such function.
    """
    found = _FILE.fullmatch(label)
    if found is None:
        return None
    path = Path(found["file"]).expanduser()
    module = _module(path)
    function = getattr(module, found["name"], None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UnknownName.of("function", found["name"], known, where=str(path))
    return function, found["values"] or ""


def _module(path: Path) -> Any:
    name = f"quambase_strategies_{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        raise DataInvalid(f"there is no file {path}; expected Python with the strategy's function") from None
    except Exception as error:  # whatever a user's code raises
        raise DataInvalid(f"{path} fails: {_described(error)}; mend it, or run it with Python to see where") from error
    return module


@cache
def installed() -> dict[str, EntryPoint]:
    """The entry points of other packages, by the strategy's name."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def from_entry_point(name: str) -> Callable[..., Any]:
    """The function of an installed strategy. DataInvalid: its package fails."""
    entry = installed()[name]
    try:
        function = entry.load()
    except Exception as error:  # whatever a package raises
        package = entry.dist.name if entry.dist else entry.value
        raise DataInvalid(
            f"strategy {name} of package {package} fails: {_described(error)}; mend the package"
        ) from error
    if not callable(function):
        raise DataInvalid(f"the entry point {entry.value} is no function; expected a strategy's function")
    return function  # type: ignore[no-any-return]


def checked(name: str, function: Callable[..., Any], *arguments: Any, **parameters: float) -> Any:
    """What a user's strategy returns for a scale group. DataInvalid: it fails, or returns no scale."""
    try:
        found = function(*arguments, **parameters)
    except Exception as error:  # whatever a user's code raises
        raise DataInvalid(f"strategy {name} fails: {_described(error)}; mend its function") from error
    try:
        right = all(math.isfinite(number) and number >= 0 for number in multipliers(found))
    except TypeError:
        right = False
    if not right or not INT8.qmin <= zero_point_of(found) <= INT8.qmax:
        raise DataInvalid(f"strategy {name} returns {found!r}; expected a scale: a finite number, not below zero")
    return found


def _described(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
