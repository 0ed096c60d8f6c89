"""Compiled kernels kept from one process to the next: compiling ours takes some seconds, in every command."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """Where they are: ``quambase`` in XDG_CACHE_HOME, or in ``.cache`` of the user's home."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(chosen) if chosen else Path.home() / ".cache") / "quambase"


def digest(parts: Iterable[bytes]) -> str:
    """A name for what is made of these parts, whose borders count."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def kept(name: str, make: Callable[[], bytes]) -> bytes:
    """The machine code that is stored under a name, or that ``make`` makes, stored for the next time.

    A file that is not as it was written is made again; where nothing can be stored, nothing is.
    """
    try:
        path = cache_folder() / f"{name}.cubin"
    except RuntimeError:  # there is no home
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
        # Under its own name only once it is whole: other processes may read it at any time.
        handle, part = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        Path(part).replace(path)
    return content
