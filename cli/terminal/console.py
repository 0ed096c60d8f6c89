"""What every command shares: one-line errors, and options used twice."""

from __future__ import annotations

import errno
import functools
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from quambase.schema.commands import DATABASE, of_database
from quambase.schema.errors import QuambaseError, printable
from quambase.schema.files import refuse_foreign_file

FORMATS = ("table", "json", "csv", "parquet", "markdown")

PEOPLE = ("table", "markdown")
"""Formats for people; the others carry every number in its own column, with all digits."""


COUNT = click.IntRange(1, 2**31 - 1)
"""A count: at least 1, and small enough for 32 bits."""

SEED = click.IntRange(0, 2**63 - 1)

FILE, FOLDER = click.Path(dir_okay=False, path_type=Path), click.Path(file_okay=False, path_type=Path)


def debug_option() -> click.Option:
    """`--debug`, at any place among the arguments."""
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
        except BrokenPipeError:
            raise  # click ends the command without a word: who reads its output, `head` perhaps, has enough
        except OSError as error:
            fail(describe_os_error(error))


def fail(message: str) -> None:
    """Print ``message`` as the one line of an error and leave with exit code 1."""
    click.echo("error: " + printable(" ".join(message.split())), err=True)
    raise click.exceptions.Exit(1)


def describe_os_error(error: OSError) -> str:
    """One line for an operating-system error, with what to do about the common ones."""
    file = error.filename2 or error.filename  # of a copy or a rename, the second is the one that is written
    what = f"{error.strerror or error}" + (f": {file}" if file else "")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{what}; name another place, or change its permissions"
    if error.errno == errno.ENOSPC:
        return f"{what}; free some space and run the same command again: finished parts are kept"
    return what


def note(*messages: str) -> None:
    """Print remarks to stderr, a line each, where they do not mix with the data."""
    for message in messages:
        click.echo(printable(message), err=True)


PAGE = 100
"""Columns of a line where stdout is no terminal."""

_WIDE = "quambase.wide"


def line_width() -> int | None:
    """Columns that a line may have: the terminal's, PAGE where stdout is none; None with `--wide`."""
    context = click.get_current_context(silent=True)
    if context and context.meta.get(_WIDE):
        return None
    return shutil.get_terminal_size((PAGE, 24)).columns if sys.stdout.isatty() else PAGE


def wrapped(text: str) -> str:
    """``text`` broken into lines of the terminal's width, between words where that is possible."""
    width, shown = line_width(), printable(text)
    if width is None:
        return shown
    return textwrap.fill(shown, width, subsequent_indent="    ", break_on_hyphens=False)


def answer(*sentences: str) -> None:
    """Print sentences to stderr, each on lines of its own, wrapped to the width of the terminal."""
    for sentence in sentences:
        click.echo(wrapped(sentence), err=True)


def next_command(command: str, db: Path | None = None) -> None:
    """Print the next command, with `--db` unless that is the default."""
    click.echo(printable(f"next: {command}{of_database(db)}"), err=True)


def one_each(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Check an option that is repeated for several values; a comma-separated list is a usage error that shows how.

    A strategy's label may hold commas between numbers (``outlier_aware:0.95,120``), no name does.
    """
    for value in values:
        parts = [part.strip() for part in re.split(r",(?=\s*[A-Za-z])", value)]
        if len(parts) > 1 or value.endswith(","):
            spelled = " ".join(f"{param.opts[0]} {part.rstrip(',')}" for part in parts)
            raise click.BadParameter(f"'{value}' is a list; give the option once for each: {spelled}", ctx, param)
    return values


def options(*decorators: Callable[[Any], Any]) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """Several options as one decorator, in the order of `--help`."""

    def decorate(function: click.decorators.FC) -> click.decorators.FC:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


database_option = click.option("--db", type=FOLDER, default=DATABASE, show_default=True, help="Database folder.")

device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),  # as DEVICES of model/, whose import would load torch
    default="auto",
    show_default=True,
    help="Where models run; auto: CUDA if there is any.",
)

force_option = click.option("--force", is_flag=True, help="Replace an output file that quambase did not write.")

_JSON = "quambase.json"


def _noted(key: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    """A callback that keeps the value of a flag under ``key`` of the context's ``meta``."""

    def keep(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[key] = value

    return keep


def json_or_given(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Callback of `--format`: json where `--json` is given, otherwise the given value."""
    return "json" if ctx.meta.get(_JSON) else value


# A parameter of its own: click before 8.3 finds no default for two options that share one.
json_option = click.option(
    "--json",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_noted(_JSON),
    help="The same as --format json.",
)

format_option = options(
    click.option(
        "--format",
        "format_",
        type=click.Choice(FORMATS),
        default="table",
        show_default=True,
        callback=json_or_given,
        help="Output format.",
    ),
    json_option,
    click.option(
        "--wide",
        is_flag=True,
        expose_value=False,
        callback=_noted(_WIDE),
        help="Show every column, row and text of a table in full. [default: what fits the terminal, or 100 columns]",
    ),
)
"""Of a command that prints a table to stdout alone."""


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--format`, `--wide`, `--out` and `--force` of a command that prints a table; ``function`` may take the last."""
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
