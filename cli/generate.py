"""`quambase generate`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from quambase.cli.terminal.complete import complete_labels, complete_models
from quambase.cli.terminal.console import (
    COUNT,
    FILE,
    FOLDER,
    SEED,
    Command,
    answer,
    database_option,
    device_option,
    force_option,
    note,
    options,
)
from quambase.schema.errors import printable

AUTHORS = ("mamba-5m", "mamba2-8m")
"""The models that write a sample by default."""

SAMPLE_TOKENS, CONTINUED_TOKENS = 300_000, 100
"""Tokens by default: of a sample, and of what follows a prompt."""


generate_options = options(
    click.argument("folder", required=False, metavar="[MODEL_DIR]", type=FOLDER),
    click.option("--prompt", metavar="TEXT", help="Continue this text, printed as it is written."),
    click.option(
        "--model",
        "models",
        multiple=True,
        metavar="NAME",
        shell_complete=complete_models,
        help="Floating-point model: bundled name, folder, short name or hub id. Several, with --out, write a document "
        f"each in turn. [default, with --out: {', '.join(AUTHORS)}]",
    ),
    click.option(
        "--scales",
        type=FILE,
        help="With --prompt, build an INT8 model from this scale table. [default: scales.parquet, with --strategy]",
    ),
    click.option("--strategy", metavar="LABEL", shell_complete=complete_labels, help="A strategy of the scale table."),
    click.option("--out", type=FOLDER, help="Without --prompt: folder for the sample's files."),
    click.option(
        "--tokens", type=COUNT, help=f"Tokens to write. [default: {CONTINUED_TOKENS}; of a sample: {SAMPLE_TOKENS:,}]"
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(0, 100),
        default=0.0,
        show_default=True,
        help="With --prompt: 0 takes the most likely token each time, more draws them.",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        default=0.95,
        show_default=True,
        help="With --temperature: draw from the likeliest tokens that have this probability together.",
    ),
    click.option("--seed", default=0, show_default=True, type=SEED, help="Seed of lengths and sampling."),
    device_option,
    database_option,
    force_option,
)
"""What is written by which model, and how."""


@click.command(cls=Command)
@generate_options
def generate(
    folder: Path | None,
    prompt: str | None,
    models: tuple[str, ...],
    out: Path | None,
    tokens: int | None,
    force: bool,
    **given: Any,
) -> None:
    """Continue a prompt with a float or an INT8 model; or, with --out, let models write calibration and evaluation
    texts.

    With --prompt and neither --model nor --strategy: the model applied last. Text that models wrote is useful where no
    data set can be had; perplexity of a model on its own text favours it, and `evaluate` says so.

    \b
    Example:
      quambase generate --model mamba-5m --prompt "The old man" --tokens 20
      quambase generate --strategy quamba --prompt "The old man" --tokens 20
      quambase generate --model mamba-5m --out sample --tokens 2000
    """
    of_table = given["scales"] is not None or given["strategy"] is not None
    if (prompt is None) == (out is None):
        raise click.UsageError("give --prompt TEXT to continue a text, or --out FOLDER to write a sample")
    if prompt is not None:
        if len(models) > 1:
            raise click.UsageError("--prompt takes one --model")
        if folder is not None and of_table:
            raise click.UsageError("give one of MODEL_DIR and --scales with --strategy")
        _continue(prompt, folder, next(iter(models), None), tokens or CONTINUED_TOKENS, **given)
        return
    assert out is not None
    if folder is not None or of_table:
        raise click.UsageError("floating-point models write a sample: leave out MODEL_DIR, --scales, --strategy")
    _write(models or AUTHORS, out, tokens or SAMPLE_TOKENS, given["seed"], force)


def _continue(
    prompt: str,
    folder: Path | None,
    model: str | None,
    tokens: int,
    scales: Path | None,
    strategy: str | None,
    **given: Any,
) -> None:
    """Print ``prompt`` and what follows it, piece by piece, then how fast it was written."""
    from quambase.apply.generate import generate as run

    if strategy is not None:
        scales = scales or Path("scales.parquet")
    found = run(
        prompt, folder=folder, model=model, tokens=tokens, scales=scales, strategy=strategy, progress=True, **given
    )
    for piece in itertools.chain([prompt], found):
        click.echo("\n".join(map(printable, piece.split("\n"))), nl=False)
        sys.stdout.flush()
    click.echo()
    answer(found.says())


def _write(models: Sequence[str], out: Path, tokens: int, seed: int, force: bool) -> None:
    """Write a sample."""
    from quambase.model.checkpoint import load_model
    from quambase.model.inputs.sample import write_sample

    loaded = [load_model(name) for name in models]
    for name, documents in write_sample(loaded, out, tokens=tokens, seed=seed, force=force).items():
        note(f"{name}: {documents} documents")
