"""JSON files: written atomically with their own checksum, read back as values of the expected types.

msgspec checks the types. Whatever is wrong with a file ends in one error that names the file, the fault and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from quambase.schema.checksums import ALTERED, CHECKSUM, PLACEHOLDER, add_checksum, check_own
from quambase.schema.errors import QuambaseError, first_line
from quambase.schema.files import check_format_version, read_regular, replacing

T = TypeVar("T")

CHECKED = "checked"
"""The key that says that the file has a checksum; files of earlier versions have none."""

LARGEST = 256 << 20
"""Largest accepted JSON file in bytes: the manifest of the largest sorted model has a few million."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A number of things."""

Size = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
"""A size of a model."""

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` and its checksum, atomically. OSError."""
    with replacing(path) as temporary:
        whole = {**content, CHECKED: True, CHECKSUM: PLACEHOLDER}
        text = json.dumps(whole, indent=1, ensure_ascii=False)
        if any("\ud800" <= c <= "\udfff" for c in text):  # a path that is not UTF-8
            text = json.dumps(whole, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
        add_checksum(temporary)


def read_json(
    path: Path, error: type[QuambaseError], advice: str, newest: int | None = None, checked_since: int = 0
) -> dict[str, Any]:
    """The object that `write_json` wrote, or an earlier version without a checksum. FileNotFoundError.

    error          another file, damaged or altered; its line ends in ``advice``, what to do
    newest         the newest ``format_version`` that this quambase reads; None: the file has none at its top
    checked_since  the first version of which every file has a checksum; 0: one that has CHECKED has it
    """
    content = read_regular(path, error, advice, LARGEST)
    try:
        found = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise error(f"{path} is not valid JSON (it is nested too deep); {advice}") from None
    except ValueError as wrong:  # also a number of thousands of digits, and bytes that are not UTF-8
        raise error(f"{path} is not valid JSON ({first_line(wrong)}); {advice}") from None
    if not isinstance(found, dict):
        raise error(f"{path} holds no JSON object; {advice}")
    version = 0 if newest is None else check_format_version(path, found.get("format_version"), newest, error)
    own = check_own(content)
    if own == "wrong" or (own == "none" and (CHECKED in found or 0 < checked_since <= version)):
        raise error(f"{path} {ALTERED}; {advice}")
    for key in (CHECKED, CHECKSUM):
        found.pop(key, None)
    return found


def as_type(raw: object, kind: type[T], path: Path, error: type[QuambaseError], advice: str) -> T:
    """``raw``, read from the file ``path``, as a ``kind``; ``error``: something is missing or of another type."""
    try:
        return msgspec.convert(raw, kind)
    except QuambaseError as wrong:  # of a type that checks itself
        raise error(f"{path} is damaged ({wrong}); {advice}") from None
    except (msgspec.ValidationError, ValueError, RecursionError, OverflowError) as wrong:  # half a surrogate, too
        raise error(f"{path} is damaged ({first_line(wrong)}); {advice}") from None
