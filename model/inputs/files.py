"""Checks of a file before it is read: it is a regular file with content, and no Git LFS pointer."""

from __future__ import annotations

import zipfile
from pathlib import Path

from quambase.model.inputs.hub import mend
from quambase.schema.errors import QuambaseError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of the text that Git leaves in place of a large file if git-lfs is not installed."""


def check_file(path: Path, invalid: type[QuambaseError], most: int | None = None) -> None:
    """``invalid`` unless ``path`` is a file that can be opened, has content (at most ``most`` bytes) and is no pointer.

    Links are followed; a device or a pipe, which may never end, is not opened.
    """
    if not path.is_file():
        found = "is not a regular file" if path.exists() else "is missing"
        raise invalid(f"{path} {found}; expected a file, {mend(path)}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise invalid(f"{path} cannot be opened ({error.strerror}); expected a file that you may read") from None
    if start == LFS_POINTER:
        raise invalid(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository, or download it "
            "again"
        )
    if size == 0:
        raise invalid(f"{path} is empty; {mend(path)}")
    if most is not None and size > most:
        raise invalid(f"{path} has {size:,} bytes; expected at most {most:,}: {mend(path)}")


def is_packed(path: Path, entries: list[zipfile.ZipInfo]) -> bool:
    """Whether the archive's ``entries`` are compressed, or claim more bytes than the file has: they could exhaust
    memory. NumPy and PyTorch store arrays as they are.
    """
    compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    return compressed or sum(entry.file_size for entry in entries) > path.stat().st_size
