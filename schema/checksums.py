"""Checksums: of a file, stored elsewhere; and of a file's other bytes, stored in the file itself.

A writer leaves PLACEHOLDER in a file, in JSON as the value of a key or in a Parquet file's metadata, and calls
`add_checksum`, which puts the SHA-256 of the whole file, with the placeholder in it, in the placeholder's place. So
one changed bit anywhere in the file is found.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

CHECKSUM = "quambase-sha256"
"""The key under which our JSON and Parquet files carry their own checksum."""

PLACEHOLDER = f"{CHECKSUM}:{'0' * 64}"

_STORED = re.compile(rf"{CHECKSUM}:([0-9a-f]{{64}})".encode())

OwnChecksum = Literal["right", "wrong", "none"]
"""Whether the checksum that a file's bytes contain is theirs; "none": there is none, as in the file of another tool or
of an earlier version.
"""

ALTERED = "was altered or cut short since it was written (its checksum differs)"


def add_checksum(path: Path) -> None:
    """Replace the last PLACEHOLDER in a file by the file's checksum. ValueError: the file has none. OSError."""
    path.write_bytes(with_checksum(path.read_bytes()))


def with_checksum(content: bytes) -> bytes:
    """A file's bytes with its checksum in place of the last PLACEHOLDER. ValueError: there is none."""
    before, mark, after = content.rpartition(PLACEHOLDER.encode())
    if not mark:
        raise ValueError("the file has no place for its checksum")
    return b"".join([before, f"{CHECKSUM}:{hashlib.sha256(content).hexdigest()}".encode(), after])


def check_own(content: bytes) -> OwnChecksum:
    """Compare the checksum that a file's bytes contain with theirs."""
    stored = list(_STORED.finditer(content))
    if not stored:
        return "wrong" if CHECKSUM.encode() in content else "none"  # what is left of one
    start, stop = stored[-1].span(1)
    digest = hashlib.sha256(content[:start])
    digest.update(b"0" * (stop - start))
    digest.update(content[stop:])
    return "right" if digest.hexdigest().encode() == stored[-1][1] else "wrong"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_damage(path: Path, sha256: str) -> str | None:
    """What is wrong with a file that had this SHA-256 when it was written: "is missing" or ALTERED; None if nothing."""
    if not path.exists():
        return "is missing"
    return None if file_sha256(path) == sha256 else ALTERED
