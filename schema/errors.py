"""Errors a user can meet. Each is one line: what was found, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """The first line of a library's error, printable and at most 200 characters; the error's type if it has no text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(c if c.isprintable() else "?" for c in lines[0])[:200]


def printable(text: str) -> str:
    """``text`` with control characters, which a terminal would obey, written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


LONGEST_MESSAGE = 1000
"""Characters of an error; a hostile file can hold names of any length."""


class QuambaseError(Exception):
    """Base of every error that a user can act on. Its text is one printable line, whatever it quotes."""

    def __init__(self, message: str) -> None:
        line = printable(" ".join(message.split()))
        if len(line) > LONGEST_MESSAGE:  # its end says what to do
            line = f"{line[: LONGEST_MESSAGE // 2]} … {line[3 - LONGEST_MESSAGE // 2 :]}"
        super().__init__(line)


class ModelNotFound(QuambaseError):
    """No model of that name is bundled, local or reachable."""


class CheckpointInvalid(QuambaseError):
    """A model folder lacks a file, a tensor or a setting, or holds a family we do not read."""


class DataInvalid(QuambaseError):
    """A text file cannot be read as documents."""


class DatabaseInvalid(QuambaseError):
    """A database folder, run or table is missing, unfinished, altered or of a newer format."""


class RunBusy(QuambaseError):
    """Another process is writing this run."""


class TapNeverFired(QuambaseError):
    """A site the run promised to observe was never reached by the forward pass."""


class UnknownName(QuambaseError):
    """A strategy, site, layer, run, view or column that does not exist."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str], where: str = "") -> UnknownName:
        """Build the message for an unknown ``kind`` (such as "strategy"). It names the nearest known ones, and
        ``where`` they were looked up.
        """
        names = sorted(set(known))
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        shown = names if len(names) <= 16 else [*names[:16], f"… {len(names) - 16} more"]
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(shown) or 'none'}"
        return cls(f"unknown {kind} '{name}'{f' in {where}' if where else ''}; {hint}")


class QueryInvalid(QuambaseError):
    """SQL that DuckDB refused, or that tried to leave the database folder."""


class ScalesInvalid(QuambaseError):
    """A scale table does not fit: another model, missing sites, a scale that is not positive and finite."""


class BackendUnavailable(QuambaseError):
    """Upstream's package, its kernels or a GPU is missing, or its kernels do not compute what they should."""


class OutputRefused(QuambaseError):
    """An output would replace something that quambase did not write."""


class TensorFileInvalid(QuambaseError):
    """A file to import is not a plain tensor file."""
