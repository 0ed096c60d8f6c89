"""Tables as text for people, and as JSON, CSV and Parquet for programs."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from quambase.cli.terminal.console import line_width, note
from quambase.schema.errors import printable
from quambase.schema.files import replacing

ROWS = 1000
"""Rows of a table that format `table` shows without `--wide`."""

SHORTEST = 16
"""Least width to which a long text is shortened."""

SHARE = re.compile(r"(^|_)share(_|$)|^beyond_\d+_sigma$|^top1_agreement$|^(flips|(token_)?accuracy)(_low|_high)?$")
"""Names of columns that hold shares of one: people read them as % or, under 0.1 %, as ppm."""


def emit(
    table: pa.Table,
    format_: str = "table",
    output: Path | None = None,
    *,
    wrap: str | None = None,
    rows: int | None = None,
) -> None:
    """Print ``table`` to stdout, or write it to ``output`` at once, in one of FORMATS.

    Format ``table`` fits the width of the terminal, 100 columns where there is none, and shows ROWS rows at most: long
    texts are shortened, the last columns left out, and a line to stderr says so. ``--wide`` shows all. No other format
    is cut. ``wrap`` names a column whose texts are broken into lines instead of shortened. ``rows``:
    how many there are, if the table holds only the first.
    """
    notes: list[str] = []
    if format_ == "csv":
        content = _csv(table)
    elif format_ == "parquet":
        content = _written(pyarrow.parquet.write_table, table)
    else:
        if format_ == "json":
            text = _json_text(table.to_pylist(), indent=1)
        elif format_ == "markdown":
            text = _markdown(table)
        else:
            text, notes = _plain(table, line_width(), wrap, rows or table.num_rows)
        content = (text + "\n").encode()
    if output:
        with replacing(output) as temporary:
            temporary.write_bytes(content)
    else:
        click.echo(content, nl=False)
    for line in notes:
        note(line)


def _csv(table: pa.Table) -> bytes:
    """CSV has no lists, maps or structs: they are written as JSON."""
    for place, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            texts = [None if value is None else _json_text(value) for value in table[place].to_pylist()]
            table = table.set_column(place, field.name, pa.array(texts, pa.string()))
    return _written(pyarrow.csv.write_csv, table)


def _written(write: Callable[[pa.Table, BytesIO], None], table: pa.Table) -> bytes:
    sink = BytesIO()
    write(table, sink)
    return sink.getvalue()


def format_cell(value: Any, share: bool = False) -> str:
    """A value as a person reads it: 3 significant digits, thousands grouped, dash for null.

    Whole numbers are shown in full, and numbers from 1,000 on without decimals. ``share``: a share of one, as % or ppm.
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        if share and abs(value) <= 1:
            return f"{format_cell(1e6 * value)} ppm" if 0 < abs(value) < 0.001 else f"{format_cell(100 * value)} %"
        # From 999.5 on three digits would be 1e+03; beyond 1e15 float64 holds no more digits.
        return f"{value:,.0f}" if 999.5 <= abs(value) < 1e15 else f"{value:.3g}"
    if isinstance(value, list):
        shown = ", ".join(format_cell(v) for v in value[:8])
        return f"[{shown}{f', … {len(value)} in all' if len(value) > 8 else ''}]"
    # A token may be a line break. It is shown as an escape, so that it does not break the table.
    return printable(str(value))


def _cells(table: pa.Table) -> list[list[str]]:
    shares = [SHARE.search(name) is not None for name in table.schema.names]
    return [
        [format_cell(value, share) for value, share in zip(row.values(), shares, strict=True)]
        for row in table.to_pylist()
    ]


def _numeric(table: pa.Table) -> list[bool]:
    return [
        pa.types.is_integer(f.type) or pa.types.is_floating(f.type) or pa.types.is_decimal(f.type) for f in table.schema
    ]


def _plain(table: pa.Table, width: int | None, wrap: str | None, rows: int) -> tuple[str, list[str]]:
    """The lines of a table in ``width`` columns (None: no limit), and a line that says what is left out."""
    notes, names, right = [], list(table.schema.names), _numeric(table)
    if width is not None and rows > ROWS:
        left = rows - ROWS
        notes.append(f"… {left:,} more rows: --wide shows all, and --format csv, json and parquet hold every row")
        table = table.slice(0, ROWS)
    cells = _cells(table)
    natural = [max(len(cell) for cell in column) for column in zip(names, *cells, strict=True)]
    floor = [
        full if r else min(full, max(SHORTEST, len(name))) for full, r, name in zip(natural, right, names, strict=True)
    ]
    widths = _fitting(natural, floor, width)
    if len(widths) < len(names):
        notes.append(_left_out(names[len(widths) :], width or 0))
    cut = [w < full and name != wrap for w, full, name in zip(widths, natural, names, strict=False)]
    if any(cut) and len(widths) == len(names):
        notes.append("… some texts are shortened: --wide shows all")
    lines = []
    for row in [names, ["-" * w for w in widths], *cells]:
        parts = [
            (textwrap.wrap(cell, w) or [""]) if name == wrap else [cell if len(cell) <= w else cell[: w - 1] + "…"]
            for cell, w, name in zip(row, widths, names, strict=False)
        ]
        for k in range(max(map(len, parts), default=1)):
            line = [part[k] if k < len(part) else "" for part in parts]
            shown = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=False))
            lines.append("  ".join(shown).rstrip())
    return "\n".join(lines), notes


def _fitting(natural: list[int], floor: list[int], width: int | None) -> list[int]:
    """Widths of the first columns, as many as fit ``width``, two blanks between them; texts are cut, longest first.

    The first column is always shown, however wide.
    """
    if width is None:
        return natural
    for shown in range(len(natural), 0, -1):
        if sum(floor[:shown]) + 2 * (shown - 1) <= width or shown == 1:
            break
    else:
        return []
    widths = natural[:shown]
    while sum(widths) + 2 * (shown - 1) > width:
        room, place = max((w - least, i) for i, (w, least) in enumerate(zip(widths, floor, strict=False)))
        if room <= 0:
            break
        widths[place] -= 1
    return widths


def _left_out(names: list[str], width: int) -> str:
    """Which columns are left out, in one line of ``width``."""
    kind = "column" if len(names) == 1 else "columns"
    for named in range(len(names), -1, -1):
        shown = ", ".join([*names[:named], *(["…"] if named < len(names) else [])])
        line = f"… {len(names)} more {kind} ({printable(shown)}): --wide shows all"
        if len(line) <= width:
            break
    return line


def _markdown(table: pa.Table) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    rule = ["---:" if right else "---" for right in _numeric(table)]
    return "\n".join([line(list(table.schema.names)), line(rule), *map(line, _cells(table))])


def _json_text(value: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    """``value`` with null for NaN and infinity, which JSON does not have, at any depth."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
