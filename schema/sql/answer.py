"""A table that prints as one: what `StatsDB` answers, and how results show themselves in a notebook."""

from __future__ import annotations

import html
import importlib
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from quambase.schema.errors import DataInvalid, printable

SHOWN = 20
"""How many rows are printed at most: the first half from the start of the table, the rest from its end."""


class PrintsAsTable:
    """A result that prints as its most important table; dataclasses of it have ``repr=False``."""

    def shown(self) -> pa.Table:
        """That table."""
        raise AssertionError(f"{type(self).__name__} does not say what it shows")

    def __repr__(self) -> str:
        return text_table(self.shown())

    def _repr_html_(self) -> str:
        return html_table(self.shown())


class Answer(PrintsAsTable):
    """Rows that answer a query. ``table`` is the `pyarrow.Table`, whose attributes and methods the answer has too:
    ``answer.to_pylist()``, ``answer["amax"]``, ``answer.num_rows``. ``answer.df()`` is a pandas DataFrame,
    ``answer.pl()`` one of polars; both libraries and DuckDB take the answer as it is, too. ``rows``: how many the query
    has, of which the table may hold only the first.
    """

    def __init__(self, table: pa.Table, rows: int | None = None) -> None:
        self.table = table
        self.rows: int = table.num_rows if rows is None else rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name)

    def __getitem__(self, key: Any) -> Any:
        return self.table[key]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Arrow's interface for other libraries."""
        return self.table.__arrow_c_stream__(requested_schema)

    def df(self) -> Any:
        """A pandas DataFrame. DataInvalid: pandas is not installed."""
        return self._as("pandas", self.table.to_pandas)

    def pl(self) -> Any:
        """A polars DataFrame. DataInvalid: polars is not installed."""
        return self._as("polars", lambda: importlib.import_module("polars").from_arrow(self.table))

    @staticmethod
    def _as(package: str, convert: Callable[[], Any]) -> Any:
        try:
            return convert()
        except ImportError:
            raise DataInvalid(f"{package} is not installed; pip install {package}") from None

    def shown(self) -> pa.Table:
        """All of it."""
        return self.table


def text_table(table: pa.Table) -> str:
    """The table as text: names, the first and last rows, how many there are."""
    rows, left_out = _shown(table)
    cells = [list(table.schema.names), *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(table.num_columns)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *([f"({table.num_rows:,} rows, {left_out:,} of them not shown)"] if left_out else [])])


def html_table(table: pa.Table) -> str:
    """The table as HTML, everything in it escaped: tokens and names come from files of others."""
    rows, left_out = _shown(table)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.schema.names)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    more = f"<p>{table.num_rows:,} rows, {left_out:,} of them not shown</p>" if left_out else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _shown(table: pa.Table) -> tuple[list[list[str]], int]:
    """The cells of the rows to print, and how many rows are left out."""
    half, left_out = SHOWN // 2, max(0, table.num_rows - SHOWN)
    if left_out:
        table = pa.concat_tables([table.slice(0, half), table.slice(table.num_rows - half)])
    rows = [list(map(_cell, row.values())) for row in table.to_pylist()]
    if left_out:
        rows.insert(half, ["…"] * table.num_columns)
    return rows, left_out


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return printable(text[:60]) + ("…" if len(text) > 60 else "")
