"""`quambase lm-eval`: the command line of lm-eval, which then knows our models."""

from __future__ import annotations

import sys

import click

from quambase.cli.terminal.console import HELP_NAMES, Command


@click.command(cls=Command, context_settings={**HELP_NAMES, "ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGUMENTS...")
@click.option("--enable", is_flag=True, help="Make the plain command `lm_eval --model quambase` work, too.")
@click.option("--disable", is_flag=True, help="Undo --enable.")
def lm_eval(arguments: tuple[str, ...], enable: bool, disable: bool) -> None:
    """lm-eval's own command with the model `quambase`: ARGUMENTS are those of `lm_eval run` (`lm_eval run --help`).

    --model_args takes path (an INT8 folder, or a model's name or folder), scales, strategy, granularity, max_length and
    what else `apply` has; --device takes cpu or cuda.

    lm-eval finds no model outside its own package. `quambase lm-eval --enable` adds quambase to what it finds, by two
    files in this environment's site-packages; then the plain command `lm_eval --model quambase ...` works, too.

    \b
    Example:
      quambase lm-eval --model quambase --model_args path=mamba-5m,scales=scales.parquet --tasks lambada_openai
    """
    from quambase.apply.evaluation.harness import require_lm_eval

    if enable or disable:
        _plain_command(enable, disable, arguments)
        return
    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    import quambase.apply.evaluation.harness.language_model  # noqa: F401 - makes the model known

    sys.argv = ["lm_eval", *(arguments or ("--help",))]
    cli_evaluate()


def _plain_command(enable: bool, disable: bool, arguments: tuple[str, ...]) -> None:
    """Add our model to what the plain command finds, or take it away again, and say so."""
    from quambase.apply.evaluation.harness import plain_command, require_lm_eval

    if (enable and disable) or arguments:
        raise click.UsageError("--enable and --disable stand alone: `quambase lm-eval --enable`")
    if disable:
        undone = plain_command.disable()
        click.echo(f"`lm_eval` {'no longer knows' if undone else 'did not know'} the model quambase.")
        return
    require_lm_eval()
    folder = plain_command.enable()
    click.echo(
        f"`lm_eval --model quambase` works in this environment now. {plain_command.AT_START} and\n"
        f"{plain_command.MODULE} are in {folder};\n"
        "`quambase lm-eval --disable` removes them, uninstalling quambase does not.\n\n"
        "next: lm_eval --model quambase --model_args path=mamba-5m --tasks lambada_openai"
    )
