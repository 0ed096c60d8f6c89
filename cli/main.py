"""The group `quambase`, and the commands that are console scripts of their own.

Commands are named as strings and imported when run, so `quambase sql` works where torch is not installed and
`--help` is quick.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import click

from quambase.cli.terminal.console import HELP_NAMES, debug_option
from quambase.schema.errors import UnknownName

if "OMP_WAIT_POLICY" not in os.environ:
    # In GNU's OpenMP, which PyTorch and Numba use on Linux, threads that wait for each other spin for 300,000 turns by
    # default. Beside any other busy program they then hold the core that the awaited thread needs; docs/speed.md has
    # the figures. The variable is read when the first of the two is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

COMMANDS: dict[str, str] = {
    "collect": "quambase.cli.collect:collect",
    "analyze": "quambase.cli.analyze:analyze",
    "adopt": "quambase.cli.adopt:adopt",
    "apply": "quambase.cli.apply:apply",
    "evaluate": "quambase.cli.evaluate:evaluate",
    "sql": "quambase.cli.sql:sql",
    "stats": "quambase.cli.query:stats",
    "runs": "quambase.cli.query:runs",
    "compare": "quambase.cli.compare:compare",
    "groups": "quambase.cli.compare:groups",
    "plot": "quambase.cli.plot:plot",
    "converge": "quambase.cli.converge:converge",
    "report": "quambase.cli.results:report",
    "lm-eval": "quambase.cli.lm_eval:lm_eval",
    "results": "quambase.cli.results:results",
    "diff": "quambase.cli.diff:diff",
    "import": "quambase.cli.collect:import_tensor",
    "merge": "quambase.cli.collect:merge",
    "demo": "quambase.cli.demo:demo",
    "generate": "quambase.cli.generate:generate",
    "doctor": "quambase.cli.query:doctor",
}
"""Command name to ``module:object``; the order is that of the help."""


def load_command(name: str) -> click.Command:
    """Import the command called ``name``; UnknownName lists the nearest."""
    if name not in COMMANDS:
        raise UnknownName.of("command", name, COMMANDS)
    module, _, attribute = COMMANDS[name].partition(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    return command


def summary(name: str) -> str:
    """The first sentence of a command's help, read from its source: importing `collect` would need torch."""
    module, _, attribute = COMMANDS[name].partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    return ""


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is run or its help is shown."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary(name)) for name in COMMANDS])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS:
            raise click.UsageError(str(UnknownName.of("command", args[0], COMMANDS)), ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, invoke_without_command=True, context_settings=HELP_NAMES)
@click.version_option(package_name="quambase")
@click.pass_context
def quambase(ctx: click.Context) -> None:
    """Collect activation statistics once; try every INT8 scale; load the best into a Quamba model.

    Without a command: what this folder holds, and what to do next.

    \b
    Example:
      quambase collect --model mamba-5m --samples 128
      quambase analyze
      quambase evaluate --strategy all --samples 24
    """
    if ctx.invoked_subcommand is None:
        from quambase.cli.overview import show_folder

        show_folder()


quambase.params.append(debug_option())


def _script(name: str) -> Callable[[], None]:
    def run() -> None:
        load_command(name)(prog_name=name)

    run.__doc__ = f"Entry point of the console script `{name}`."
    return run


collect = _script("collect")
analyze = _script("analyze")
apply = _script("apply")
evaluate = _script("evaluate")
