"""Tables as text for people, and as JSON, CSV and Parquet for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from quambase.cli.console import printable
from quambase.schema.files import replacing


def emit(table: pa.Table, format_: str = "table", output: Path | None = None) -> None:
    """Print ``table`` to stdout, or write it to ``output`` at once, in one of FORMATS."""
    if format_ == "csv":
        content = _csv(table)
    elif format_ == "parquet":
        content = _parquet(table)
    else:
        text: Callable[[pa.Table], str] = {"json": _json, "markdown": _markdown, "table": _plain}[format_]
        content = (text(table) + "\n").encode()
    if output:
        with replacing(output) as temporary:
            temporary.write_bytes(content)
    else:
        click.echo(content, nl=False)


def _csv(table: pa.Table) -> bytes:
    """Lists, maps and structs, which CSV has no form for, become JSON."""
    for place, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            texts = [None if value is None else _json_text(value) for value in table[place].to_pylist()]
            table = table.set_column(place, field.name, pa.array(texts, pa.string()))
    sink = pa.BufferOutputStream()
    pyarrow.csv.write_csv(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def format_cell(value: Any) -> str:
    """A value as a person reads it: 5 significant digits, digits grouped, dash for null."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 100_000 else str(value)
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value:.5g}"
    if isinstance(value, list):
        shown = ", ".join(format_cell(v) for v in value[:8])
        return f"[{shown}{f', … {len(value)} in all' if len(value) > 8 else ''}]"
    # A token may be a line break: shown as it would be typed, so that it does not break the table.
    return printable(str(value))


def _cells(table: pa.Table) -> list[list[str]]:
    return [[format_cell(v) for v in row.values()] for row in table.to_pylist()]


def _numeric(table: pa.Table) -> list[bool]:
    return [
        pa.types.is_integer(f.type) or pa.types.is_floating(f.type) or pa.types.is_decimal(f.type) for f in table.schema
    ]


def _plain(table: pa.Table) -> str:
    rows = [list(table.schema.names), *_cells(table)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows[0] else []
    right = _numeric(table)
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def _markdown(table: pa.Table) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    rule = ["---:" if right else "---" for right in _numeric(table)]
    return "\n".join([line(list(table.schema.names)), line(rule), *map(line, _cells(table))])


def _json(table: pa.Table) -> str:
    return _json_text(table.to_pylist(), indent=1)


def _json_text(value: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    """``value`` with null for NaN and infinity, which JSON does not have, at any depth."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
