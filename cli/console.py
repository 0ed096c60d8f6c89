"""What every command shares: one-line errors, options used twice, and the output formats."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from quambase.schema.errors import QuambaseError
from quambase.schema.files import refuse_foreign_file, replacing

FORMATS = ("table", "json", "csv", "parquet", "markdown")


def debug_option() -> click.Option:
    """`--debug`, which the program looks up among its arguments, wherever it stands."""
    return click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error.")


HELP_NAMES = {"help_option_names": ["-h", "--help"]}


class Command(click.Command):
    """A command whose QuambaseError (and full disk, and Ctrl-C) ends in one line on stderr and exit code 1.

    `--debug` shows the traceback instead.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"context_settings": HELP_NAMES} | kwargs))
        self.params.append(debug_option())

    def invoke(self, ctx: click.Context) -> Any:
        if "--debug" in sys.argv[1:]:
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except QuambaseError as error:
            fail(str(error))
        except KeyboardInterrupt:
            fail("interrupted; finished parts are kept, run the same command again to go on")
        except OSError as error:
            fail(describe_os_error(error))


def fail(message: str) -> None:
    """Print ``message`` as the one line of an error and leave with exit code 1."""
    click.echo("error: " + printable(" ".join(message.split())), err=True)
    raise click.exceptions.Exit(1)


def describe_os_error(error: OSError) -> str:
    """One line for an operating-system error, with what to do about the common ones."""
    what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    if error.errno == 28:
        return f"{what}; free some space and run the same command again: finished parts are kept"
    return what


def note(message: str) -> None:
    """Print a remark to stderr, where it does not mix with the data."""
    click.echo(printable(message), err=True)


def one_each(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """The values of an option that is given once for each; a usage error that shows how, for a list in one.

    A strategy's label may hold commas between numbers (``outlier_aware:0.95,120``), no name does.
    """
    for value in values:
        parts = [part.strip() for part in re.split(r",(?=\s*[A-Za-z])", value)]
        if len(parts) > 1 or value.endswith(","):
            spelled = " ".join(f"{param.opts[0]} {part.rstrip(',')}" for part in parts)
            raise click.BadParameter(f"'{value}' is a list; give the option once for each: {spelled}", ctx, param)
    return values


def database_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--db DIR`: the database folder."""
    return click.option(
        "--db",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path("quambase-db"),
        show_default=True,
        help="Database folder.",
    )(function)


def device_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--device NAME`: where models run."""
    return click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),  # model.device.DEVICES, whose import would bring torch
        default="auto",
        show_default=True,
        help="Where models run; auto: CUDA if there is any.",
    )(function)


def force_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--force`: replace files that quambase did not write, too."""
    return click.option("--force", is_flag=True, help="Replace an output file that quambase did not write.")(function)


def format_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--format` of a command that prints a table to stdout alone."""
    return click.option(
        "--format", "format_", type=click.Choice(FORMATS), default="table", show_default=True, help="Output format."
    )(function)


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--format`, `--out` and `--force` of a command that prints a table; ``function`` may take the last."""
    takes_force = "force" in inspect.signature(function).parameters

    @format_option
    @click.option("--out", "output", type=click.Path(path_type=Path), help="File to write to instead of stdout.")
    @force_option
    @functools.wraps(function)
    def wrapped(*args: Any, force: bool, output: Path | None, **kwargs: Any) -> Any:
        if output is not None:
            refuse_foreign_file(output, None, "a table", force=force)
        return function(*args, output=output, **({"force": force} if takes_force else {}), **kwargs)

    return wrapped


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


def printable(text: str) -> str:
    """``text`` with whatever a terminal would obey rather than show written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
