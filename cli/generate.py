"""`quambase generate`."""

from __future__ import annotations

from pathlib import Path

import click

from quambase.cli.console import COUNT, SEED, Command, force_option, note


@click.command(cls=Command)
@click.option(
    "--model",
    "models",
    multiple=True,
    default=("mamba-5m", "mamba2-8m"),
    show_default=True,
    help="Bundled name, folder, short name or hub id; several write a document each in turn.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the files.")
@click.option("--tokens", default=300_000, show_default=True, type=COUNT, help="Tokens to write.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Seed of lengths and sampling.")
@force_option
def generate(models: tuple[str, ...], out: Path, tokens: int, seed: int, force: bool) -> None:
    """Let models write a calibration text, an evaluation text and a last-word set.

    Useful where no data set can be had. Perplexity of a model on its own text favours it; `evaluate` says so.

    \b
    Example:
      quambase generate --model mamba-5m --out sample --tokens 2000
    """
    from quambase.model.checkpoint import load_model
    from quambase.model.inputs.sample import write_sample

    loaded = [load_model(name) for name in models]
    for name, documents in write_sample(loaded, out, tokens=tokens, seed=seed, force=force).items():
        note(f"{name}: {documents} documents")
