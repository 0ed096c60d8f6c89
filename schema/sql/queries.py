"""The SQL of the product: views.sql, the named queries of queries.sql, and the cookbook's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from quambase.schema.errors import QueryInvalid, UnknownName

_NAME = re.compile(r"^-- name: ([\w-]+)\n", re.M)
_PARAMETER = re.compile(r"^-- \$(\w+) = (.*)\n", re.M)
_CREATED = re.compile(r"^CREATE (?:VIEW|MACRO) (\w+)", re.M)


def sql_file(name: str) -> str:
    """The text of an SQL file of this package."""
    return files("quambase.schema.sql").joinpath(name).read_text(encoding="utf-8")


@cache
def named_queries() -> dict[str, str]:
    """The queries of queries.sql by name, without their comments."""
    return {name: _statement(text) for name, text in _named("queries.sql")}


def _named(file: str) -> Iterable[tuple[str, str]]:
    """The names of a file's queries, and the text of each."""
    _, *parts = _NAME.split(sql_file(file))
    return zip(parts[::2], parts[1::2], strict=True)


def _statement(text: str) -> str:
    return re.sub(r"^--.*\n", "", text, flags=re.M).strip().removesuffix(";")


Value = int | float | str
"""Of a query's parameter."""


@dataclass(frozen=True)
class Recipe:
    """A query of the cookbook: its name, the question, its parameters with their defaults, and its SQL."""

    name: str
    question: str
    parameters: Mapping[str, Value]
    sql: str

    def with_values(self, given: Iterable[str]) -> dict[str, Value]:
        """The parameters with the values that ``given`` has, each ``NAME=VALUE``.

        QueryInvalid: no such form, or no number where the default is one. UnknownName: no such parameter.
        """
        values = dict(self.parameters)
        for text in given:
            name, equals, value = text.partition("=")
            if not equals:
                raise QueryInvalid(f"--set is '{text}'; expected PARAMETER=VALUE, such as limit=10")
            if name not in values:
                raise UnknownName.of(f"parameter of @{self.name}", name, values)
            values[name] = _value(value)
            if isinstance(values[name], str) != isinstance(self.parameters[name], str):
                raise QueryInvalid(f"--set {name} is '{value}'; expected a value such as {self.parameters[name]}")
        return values


@cache
def cookbook() -> dict[str, Recipe]:
    """The queries of cookbook.sql by name."""
    found = {}
    for name, text in _named("cookbook.sql"):
        question = text.partition("\n")[0].removeprefix("-- ")
        parameters = {key: _value(value) for key, value in _PARAMETER.findall(text)}
        found[name] = Recipe(name, question, parameters, _statement(text))
    return found


def recipe(name: str) -> Recipe:
    """The query of the cookbook called ``name``; UnknownName lists the nearest."""
    if name not in cookbook():
        raise UnknownName.of("query of the cookbook", name, cookbook())
    return cookbook()[name]


def _value(text: str) -> Value:
    """A number where ``text`` is one, else the text."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, int | float) and not isinstance(found, bool) else text


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
