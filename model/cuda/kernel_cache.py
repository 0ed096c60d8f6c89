"""A cache of compiled kernels on disk: without it every command would compile for some seconds."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """The cache's folder: ``quambase`` in XDG_CACHE_HOME, or in ``.cache`` of the home directory."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(chosen) if chosen else Path.home() / ".cache") / "quambase"


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 over the parts and their lengths: the name of what is compiled from them."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def cached(name: str, make: Callable[[], bytes]) -> bytes:
    """The machine code stored under ``name``, or else the result of ``make``, which is then stored.

    A damaged file is replaced. Errors of the file system are ignored.
    """
    try:
        path = cache_folder() / f"{name}.cubin"
    except RuntimeError:  # the user has no home directory
        return make()
    stored = b""
    with suppress(OSError):
        stored = path.read_bytes()
    checksum, content = stored[:32], stored[32:]
    if content and hashlib.sha256(content).digest() == checksum:
        return content
    content = make()
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Renamed when complete, since other processes may read it at any time.
        handle, part = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        Path(part).replace(path)
    return content
