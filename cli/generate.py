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
    SEED,
    Command,
    answer,
    database_option,
    device_option,
    force_option,
    note,
)
from quambase.schema.errors import printable

AUTHORS = ("mamba-5m", "mamba2-8m")
"""The models that write a sample by default."""

SAMPLE_TOKENS, CONTINUED_TOKENS = 300_000, 100
"""Tokens by default: of a sample, and of what follows a prompt."""


@click.command(cls=Command)
@click.argument("folder", required=False, metavar="[MODEL_DIR]", type=click.Path(file_okay=False, path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Continue this text, printed as it is written.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_models,
    help="Floating-point model: bundled name, folder, short name or hub id. Several, with --out, write a document each "
    f"in turn. [default, with --out: {', '.join(AUTHORS)}]",
)
@click.option(
    "--scales",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --prompt, build an INT8 model from this scale table. [default: scales.parquet, with --strategy]",
)
@click.option("--strategy", metavar="LABEL", shell_complete=complete_labels, help="A strategy of the scale table.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Without --prompt: folder for the sample's files."
)
@click.option(
    "--tokens", type=COUNT, help=f"Tokens to write. [default: {CONTINUED_TOKENS}; of a sample: {SAMPLE_TOKENS:,}]"
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 100),
    default=0.0,
    show_default=True,
    help="With --prompt: 0 takes the most likely token each time, more draws them.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="With --temperature: draw from the likeliest tokens that have this probability together.",
)
@click.option("--seed", default=0, show_default=True, type=SEED, help="Seed of lengths and sampling.")
@device_option
@database_option
@force_option
def generate(
    folder: Path | None,
    prompt: str | None,
    models: tuple[str, ...],
    scales: Path | None,
    strategy: str | None,
    out: Path | None,
    tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    device: str,
    db: Path,
    force: bool,
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
    of_int8 = folder is not None or scales is not None or strategy is not None
    if (prompt is None) == (out is None):
        raise click.UsageError("give --prompt TEXT to continue a text, or --out FOLDER to write a sample")
    if prompt is not None:
        if len(models) > 1:
            raise click.UsageError("--prompt takes one --model")
        if folder is not None and (scales is not None or strategy is not None):
            raise click.UsageError("give one of MODEL_DIR and --scales with --strategy")
        _continue(
            prompt,
            folder=folder,
            model=next(iter(models), None),
            scales=scales or (Path("scales.parquet") if strategy is not None else None),
            strategy=strategy,
            tokens=tokens or CONTINUED_TOKENS,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            device=device,
            db=db,
        )
        return
    assert out is not None
    if of_int8:
        raise click.UsageError("floating-point models write a sample: leave out MODEL_DIR, --scales, --strategy")
    _write(models or AUTHORS, out, tokens or SAMPLE_TOKENS, seed, force)


def _continue(prompt: str, **given: Any) -> None:
    """Print ``prompt`` and what follows it, piece by piece, then how fast it was written."""
    from quambase.apply.generate import generate as run

    found = run(prompt, progress=True, **given)
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
