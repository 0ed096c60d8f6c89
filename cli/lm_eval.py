"""`quambase lm-eval`: the command line of lm-eval, which then knows our models."""

from __future__ import annotations

import sys

import click

from quambase.cli.terminal.console import HELP_NAMES, Command


@click.command(cls=Command, context_settings={**HELP_NAMES, "ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGUMENTS...")
def lm_eval(arguments: tuple[str, ...]) -> None:
    """lm-eval's own command with the model `quambase`: ARGUMENTS are those of `lm_eval run` (`lm_eval run --help`).

    lm-eval finds no model outside its own package, so that `lm_eval --model quambase` alone does not work. --model_args
    takes path (an INT8 folder, or a model's name or folder), scales, strategy, granularity, max_length and what else
    `apply` has; --device takes cpu or cuda.

    \b
    Example:
      quambase lm-eval --model quambase --model_args path=mamba-5m,scales=scales.parquet --tasks lambada_openai
    """
    from quambase.apply.evaluation.harness import require_lm_eval

    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    import quambase.apply.evaluation.harness.language_model  # noqa: F401 - makes the model known

    sys.argv = ["lm_eval", *(arguments or ("--help",))]
    cli_evaluate()
