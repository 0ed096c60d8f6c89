"""Numba functions whose machine code is cached on disk, if a folder for it can be written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def kept_njit(**options: Any) -> Callable[[Function], Function]:
    """``numba.njit(cache=True, ...)``; without a cache where none of numba's folders can be written.

    Numba looks for a folder in NUMBA_CACHE_DIR, beside the source, and in the user's home. A cache is code that later
    processes run, so nothing is kept in a folder that others could fill, such as the shared one of temporary files.
    """

    def compiled(function: Function) -> Function:
        if _may_be_kept():
            try:
                kept: Function = numba.njit(cache=True, **options)(function)
                return kept
            except RuntimeError:  # "no locator available"
                _say_once()
        made: Function = numba.njit(**options)(function)
        return made

    return compiled


@cache
def _may_be_kept() -> bool:
    """False where numba takes a folder of the current one for the user's: for someone without a home, or an
    XDG_CACHE_HOME that is empty or relative.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")))  # noqa: PTH111 (raises nothing)
    if os.environ.get("NUMBA_CACHE_DIR") or caches.is_absolute():
        return True
    _say_once()
    return False


@cache
def _say_once() -> None:
    print(
        "note: no folder for compiled kernels can be written, so they are compiled anew each time; "
        "set NUMBA_CACHE_DIR to a folder of your own",
        file=sys.stderr,
    )
