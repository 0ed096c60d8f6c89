"""The parts of docs/ that are generated from the code, between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``.

``python tests/generated_docs.py`` writes them into the pages; a test compares.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fabricate import make_run

from quambase.analyzer.strategies import DEFAULT_LABELS, STRATEGIES
from quambase.schema.sql.database import StatsDB
from quambase.schema.tables import KEY_MEANINGS

DOCS = Path(__file__).parent.parent / "docs"


def columns() -> Iterator[str]:
    """Every view and macro with its columns. Those of the key, which most views begin with, are listed once."""
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder))
        with StatsDB(folder) as database:
            rows = database.describe().to_pylist()
    key = {row["column"]: row for row in rows if row["view"] == "counts" and row["column"] in KEY_MEANINGS}
    yield from ["The key, with which nearly every table and view begins:", ""]
    yield from _table(key.values())
    for view in [row for row in rows if not row["column"]]:
        mine = [row for row in rows if row["view"] == view["view"] and row["column"]]
        keyed = [row["column"] for row in mine if row["column"] in key]
        rest = [row for row in mine if view["view"] == "runs" or row["column"] not in key]
        yield from ["", f"### `{view['view']}`", "", view["comment"]]
        if view["view"] != "runs" and keyed:
            yield f"Key: {', '.join(keyed)}."
        if rest:
            yield from ["", *_table(rest)]


def _table(rows: object) -> Iterator[str]:
    yield from ["| column | type | meaning |", "|---|---|---|"]
    for row in rows:  # type: ignore[attr-defined]
        yield f"| `{row['column']}` | {row['type'].lower()} | {_cell(row['comment'])} |"


def strategies() -> Iterator[str]:
    """Every strategy with its parameters and its definition; in bold those that `analyze` computes by default."""
    yield from ["| name | parameters | scale |", "|---|---|---|"]
    default = {label.partition(":")[0] for label in DEFAULT_LABELS}
    for name, found in STRATEGIES.items():
        shown = f"**`{name}`**" if name in default else f"`{name}`"
        parameters = ", ".join(f"{key} = {value:g}" for key, value in found.parameters.items())
        yield f"| {shown} | {parameters} | {_cell(found.definition.replace('``', '`'))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PARTS: dict[str, tuple[str, Callable[[], Iterator[str]]]] = {
    "columns": ("database.md", columns),
    "strategies": ("strategies.md", strategies),
}


def generated(page: str, name: str, lines: Iterator[str]) -> str:
    """The text of ``page`` with its part ``name`` made of ``lines``."""
    begin, end = f"<!-- generated: {name} -->\n", f"<!-- end: {name} -->"
    assert page.count(begin) == page.count(end) == 1, name
    part = "\n".join(lines)
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{part}\n\n{end}", page, flags=re.S)


if __name__ == "__main__":
    for name, (page, make) in PARTS.items():
        path = DOCS / page
        path.write_text(generated(path.read_text(encoding="utf-8"), name, make()), encoding="utf-8")
