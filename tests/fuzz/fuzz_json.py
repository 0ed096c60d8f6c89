"""Changes the structure of JSON: other types, extreme numbers, deep nesting, missing and doubled keys."""

from __future__ import annotations

import json
from random import Random
from typing import Any


class Pairs(list[list[Any]]):
    """A JSON object as a list of [key, value]: keys may be doubled."""


class Raw:
    """JSON text that stands for itself, such as what `json.dumps` does not write."""

    def __init__(self, text: str) -> None:
        self.text = text


DEPTH = 5000
"""Levels of a deep value: Python's own parsers give up at about 1,000."""

DIGITS = 5000
"""Digits of a long number: Python does not convert more than 4,300."""

STRINGS = (
    "",
    "x",
    "1",
    "NaN",
    "../x",
    "/etc/passwd",
    "x" * 70_000,
    "a\nb",
    "\x1b[31mred\x1b[0m",
    "\x00",
    "\u202e",
    "é😀",
)

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 255, 65_536, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, 2**63),
    *(-(2**63), 2**64, 10**12, 10**30, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, *STRINGS),
    *(Raw(text) for text in ("NaN", "Infinity", "-Infinity", "1e400", "1.0", "[]", "{}", "[[]]", "[{}]", '{"a":1}')),
    *(Raw(text) for text in ('"\\ud800"', '"\\udc00x"', '{"\\ud800":1}', "01", "nul", "'x'", "[1,]", "")),
    Raw("9" * DIGITS),
    Raw("-" + "9" * DIGITS),
    Raw("0." + "9" * DIGITS),
    Raw("[" * DEPTH + "]" * DEPTH),
    Raw('{"a":' * DEPTH + "1" + "}" * DEPTH),
    Raw("[" * DEPTH),
    Raw("[" + "0," * 50_000 + "0]"),
)


def text_of(value: Any) -> str:
    """A value as JSON text."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{text_of(key)}:{text_of(inner)}" for key, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(text_of, value)) + "]"
    return json.dumps(value)


def parsed(text: str | bytes) -> Any:
    """JSON text as a value whose objects are Pairs. ValueError."""
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]))


def places(root: list[Any]) -> list[tuple[list[Any], int]]:
    """Every value in ``root``, each as the list that holds it and its place there; of an object also the keys."""
    found: list[tuple[list[Any], int]] = []
    waiting = [root]
    while waiting:
        holder = waiting.pop()
        if isinstance(holder, Pairs):
            found += [(pair, place) for pair in holder for place in (0, 1)]
            waiting += [value for _, value in holder if isinstance(value, list)]
        else:
            found += [(holder, place) for place in range(len(holder))]
            waiting += [value for value in holder if isinstance(value, list)]
    return found


def change_value(random: Random, root: list[Any]) -> None:
    """Change one value somewhere in ``root`` in place."""
    all_places = places(root)
    holder, place = random.choice(all_places)
    value = holder[place]
    kind = random.randrange(10)
    if kind <= 4 or not isinstance(value, list | int | float | str):
        holder[place] = random.choice(VALUES)
    elif kind == 5 and isinstance(value, int | float) and not isinstance(value, bool):
        holder[place] = random.choice((value + 1, value - 1, -value, value * 2, value // 2, value / 3, str(value)))
    elif kind == 5 and isinstance(value, str):
        cut = random.randrange(len(value) + 1)
        holder[place] = random.choice((value[:cut], value + "x", value.upper(), value[:cut] + "\ud800" + value[cut:]))
    elif kind in (6, 7) and isinstance(value, list) and value:
        inner = random.randrange(len(value))
        if kind == 6:
            del value[inner]
        else:
            value.insert(inner, random.choice((value[inner], random.choice(VALUES))))
            if isinstance(value, Pairs):  # a doubled key, or something that is no pair
                value[inner] = [value[inner + 1][0], random.choice((value[inner + 1][1], random.choice(VALUES)))]
    elif kind == 8 and isinstance(value, Pairs):
        holder[place] = [inner for pair in value for inner in pair]
    elif kind == 8 and isinstance(value, list):
        holder[place] = Pairs([[str(number), inner] for number, inner in enumerate(value)])
    else:
        other, elsewhere = random.choice(all_places)
        # Through text, so that no value holds itself.
        holder[place] = Raw(text_of(other[elsewhere]))


def change_json(random: Random, data: bytes) -> bytes:
    """JSON text with one to three values changed; text that is no JSON comes back as it is."""
    try:
        root = [parsed(data)]
    except (ValueError, RecursionError):
        return data
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        change_value(random, root)
    return text_of(root[0]).encode("utf-8", "surrogatepass")


def change_json_lines(random: Random, data: bytes) -> bytes:
    """JSON objects, one a line, with one of them changed."""
    lines = data.splitlines(keepends=True)
    place = random.randrange(len(lines))
    lines[place] = change_json(random, lines[place]) + random.choice((b"\n", b"\r\n", b" ", b"\n\n", b","))
    return b"".join(lines)
