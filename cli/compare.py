"""`quambase compare` and `quambase groups`: one site in detail, with a picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pyarrow as pa

from quambase.cli.query import run_option, strategies_option
from quambase.cli.terminal.complete import complete_sites
from quambase.cli.terminal.console import (
    FILE,
    SEED,
    Command,
    answer,
    database_option,
    note,
    options,
    output_options,
)
from quambase.cli.terminal.formats import emit
from quambase.schema.sites import WHOLE

if TYPE_CHECKING:
    from quambase.analyzer.site.compare import Comparison

TABLES = ("statistics", "strategies", "values")


def _finite(ctx: click.Context, param: click.Parameter, values: tuple[float, ...]) -> tuple[float, ...]:
    for value in values:
        if not math.isfinite(value):
            raise click.BadParameter(f"{value} has no code; expected a finite number", ctx, param)
    return values


def picture_options(default: str) -> Callable[[click.decorators.FC], click.decorators.FC]:
    """`--picture`, by default the file ``default``, and `--no-picture`."""
    return options(
        click.option(
            "--picture",
            type=FILE,
            default=Path(default),
            show_default=True,
            help="Where to save the picture (png, svg, pdf).",
        ),
        click.option("--no-picture", is_flag=True, help="Save none."),
    )


compare_options = options(
    click.option(
        "--site",
        shell_complete=complete_sites,
        help="Site to compare at. [default: the one with the largest outlier ratio]",
    ),
    click.option("--layer", type=int, help="Its layer; -1 is the head. [default: that with the largest outlier ratio]"),
    click.option("--group", default=WHOLE, show_default=True, help="Slice of a divided site: x, z; dt, B, C."),
    strategies_option(),
    click.option(
        "--value",
        "values",
        type=float,
        multiple=True,
        callback=_finite,
        help="A magnitude to show code, reconstruction and error of; once for each. [default: 2, 4.5, 5, 8, 10, 12]",
    ),
    click.option("--synthetic", is_flag=True, help="No database: a seeded heavy-tailed tensor."),
    click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of --synthetic."),
    picture_options("compare.png"),
    click.option(
        "--table", type=click.Choice(TABLES), help="Only this table. [default: all, or strategies if not plain]"
    ),
    database_option,
)
"""Which site, which strategies, and what is shown of them."""


@click.command(cls=Command)
@compare_options
@run_option
@output_options
def compare(
    values: tuple[float, ...],
    picture: Path,
    no_picture: bool,
    table: str | None,
    format_: str,
    output: Path | None,
    force: bool,
    **given: Any,
) -> None:
    """Compare the strategies at one site: errors, codes, and what becomes of chosen magnitudes.

    \b
    Example:
      quambase compare --synthetic
      quambase compare --site x_proj:input --layer 3 --picture x_proj.png
    """
    from quambase.analyzer.site.compare import MAGNITUDES
    from quambase.analyzer.site.compare import compare as compare_strategies

    drawn = None if no_picture else picture
    found = compare_strategies(values=values or MAGNITUDES, picture=drawn, force=force, **given)
    if table is None and format_ == "table" and output is None:
        _print_all(found)
    else:
        emit(getattr(found, table or "strategies"), format_, output)
    note(*found.notes)
    answer(*found.summary)
    if found.picture:
        note(f"written: {found.picture}")


def _print_all(found: Comparison) -> None:
    click.echo(f"{found.title}\n")
    for place, name in enumerate(TABLES):
        if place:
            click.echo()
        emit(getattr(found, name))


@click.command(cls=Command)
@click.option("--layer", type=int, help="The layer to draw. [default: the one that sorting helps most]")
@picture_options("groups.png")
@run_option
@database_option
@output_options
def groups(
    layer: int | None,
    picture: Path,
    no_picture: bool,
    run: str | None,
    db: Path,
    format_: str,
    output: Path | None,
    force: bool,
) -> None:
    """Show what sorting a Mamba-2's heads and channels did to the spread of its scale groups, layer by layer.

    \b
    Example:
      quambase collect --model mamba2-8m --samples 4
      quambase groups --layer 3 --picture groups.png
    """
    from quambase.analyzer.site.group_spread import group_spread

    found = group_spread(db, run, layer, None if no_picture else picture, force)
    emit(found.table, format_, output)
    note(*found.notes)
    answer(_spread_answer(found.table))
    if found.picture:
        note(f"written: {found.picture} (layer {found.layer})")


def _spread_answer(table: pa.Table) -> str:
    """What sorting did, in one sentence."""
    rows = table.to_pylist()
    best = min(rows, key=lambda row: row["mean_step_after"] / row["mean_step_before"])
    helped = sum(row["mean_step_after"] < row["mean_step_before"] for row in rows)
    return (
        f"sorting makes steps shorter in {helped} of {len(rows)} layers, most in layer {best['layer']}: on average "
        f"{best['mean_step_after']:.3g} of one scale's, before sorting {best['mean_step_before']:.3g}"
    )
