"""The SQL of the product: views.sql, and the named queries of queries.sql."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

_NAME = re.compile(r"^-- name: (\w+)\n", re.M)
_CREATED = re.compile(r"^CREATE (?:VIEW|MACRO) (\w+)", re.M)


def sql_file(name: str) -> str:
    """The text of an SQL file of this package."""
    return files("quambase.schema.sql").joinpath(name).read_text(encoding="utf-8")


@cache
def named_queries() -> dict[str, str]:
    """The queries of queries.sql by name, without their comments."""
    _, *parts = _NAME.split(sql_file("queries.sql"))
    texts = (re.sub(r"^--.*\n", "", text, flags=re.M) for text in parts[1::2])
    return {name: text.strip().removesuffix(";") for name, text in zip(parts[::2], texts, strict=True)}


@cache
def _definitions() -> dict[str, str]:
    """The statements of views.sql, by the view or macro that each creates."""
    statements = re.findall(r"^CREATE .*?;$", sql_file("views.sql"), re.M | re.S)
    return {_CREATED.findall(statement)[0]: statement for statement in statements}


def definitions_for(query: str) -> list[str]:
    """The statement of each view and macro that ``query`` names and of those that these name, in the order of
    views.sql.
    """
    known = _definitions()
    found: set[str] = set()
    texts = [query]
    while texts:
        named = set(re.findall(r"\w+", texts.pop().lower())) & known.keys() - found
        found |= named
        texts += [known[name] for name in named]
    return [statement for name, statement in known.items() if name in found]
