"""`apply`: a strategy's scales loaded into the INT8 model."""

from __future__ import annotations

from pathlib import Path

import click

from quambase.cli.console import Command, database_option, note
from quambase.schema.grouping import GRANULARITIES


def names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """The parts of a comma-separated option."""
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def int8_options(function: click.decorators.FC) -> click.decorators.FC:
    """What is quantized, and how faithfully to upstream's defects."""
    for option in (
        click.option(
            "--model",
            metavar="NAME",
            help="The floating-point model, if it moved since the scales were made.",
        ),
        click.option("--compat", type=click.Choice(["upstream"]), help="Reproduce upstream's overflow defects too."),
        click.option("--quantize-embedding", is_flag=True, help="Quantize the embedding, one scale per row."),
        click.option("--quantize-lm-head", is_flag=True, help="Quantize the language-model head and its input."),
    ):
        function = option(function)
    return function


@click.command(cls=Command)
@click.option(
    "--scales",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("scales.parquet"),
    show_default=True,
    help="Scale table written by `analyze`.",
)
@click.option(
    "--strategy",
    default="selected",
    show_default=True,
    metavar="LABEL",
    help="A strategy of the table, or `selected`: the row marked so at each site.",
)
@click.option("--at", callback=names, metavar="SITE[,SITE...]", help="Use the strategy only at these sites.")
@click.option(
    "--otherwise",
    default="quamba",
    show_default=True,
    metavar="LABEL",
    help="The strategy of the other sites.",
)
@click.option(
    "--granularity",
    type=click.Choice(GRANULARITIES),
    help="Of a Mamba-2: how finely scales divide its sites. [default: as the table]",
)
@int8_options
@database_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write. [default: DB/models/<id>]",
)
def apply(
    scales: Path,
    strategy: str,
    at: tuple[str, ...],
    otherwise: str,
    granularity: str | None,
    quantize_lm_head: bool,
    quantize_embedding: bool,
    compat: str | None,
    model: str | None,
    db: Path,
    out: Path | None,
) -> None:
    """Build the INT8 model with one strategy's scales and save it; prints its folder.

    The floating-point model is the one the scale table names.

    \b
    Example:
      apply --scales scales.parquet --strategy mse --at x_proj:input
    """
    from quambase.apply.apply import apply as run

    applied = run(
        scales,
        strategy=strategy,
        at=at,
        otherwise=otherwise,
        granularity=granularity,
        quantize_lm_head=quantize_lm_head,
        quantize_embedding=quantize_embedding,
        compat=compat,
        model=model,
        db=db,
        out=out,
    )
    if applied.unsafe:
        layer, site = applied.unsafe[0]
        note(
            f"warning: {len(applied.unsafe)} scales clip where upstream's kernel wraps modulo 256 "
            f"(first: layer {layer} {site}); a larger scale there, such as absmax, avoids it"
        )
    note(f"strategy {applied.strategy}; evaluate it with: evaluate --db {db}")
    click.echo(applied.folder)
