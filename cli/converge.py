"""`quambase converge`: whether the calibration set is large enough, with a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pyarrow as pa

from quambase.cli.compare import picture_options
from quambase.cli.query import run_option, strategies_option
from quambase.cli.terminal.complete import complete_sites
from quambase.cli.terminal.console import (
    COUNT,
    PEOPLE,
    SEED,
    Command,
    answer,
    database_option,
    next_command,
    note,
    options,
    output_options,
)
from quambase.cli.terminal.formats import emit

if TYPE_CHECKING:
    from quambase.analyzer.converge import Convergence

TABLES = ("strategies", "sizes")

converge_options = options(
    click.option("--site", shell_complete=complete_sites, help="Only this site. [default: all that the model reads]"),
    click.option("--layer", type=int, help="Only this layer; -1 is the head. [default: all]"),
    strategies_option(),
    click.option(
        "--resamples",
        type=click.IntRange(2, 10_000),
        default=20,
        show_default=True,
        help="Subsamples of each size, without replacement.",
    ),
    click.option(
        "--most-scales",
        type=COUNT,
        default=48,
        show_default=True,
        help="Of more scales look at so many, drawn from the seed: a scale takes a second or more.",
    ),
    click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of what is drawn."),
    picture_options("converge.png"),
    click.option(
        "--table",
        type=click.Choice(TABLES),
        help="Only this table: a row per strategy, or per strategy and size. [default: both, or sizes if not plain]",
    ),
    database_option,
)
"""Which scales, which strategies, and what is shown of them."""


@click.command(cls=Command)
@converge_options
@run_option
@output_options
def converge(
    picture: Path,
    no_picture: bool,
    table: str | None,
    db: Path,
    format_: str,
    output: Path | None,
    force: bool,
    **given: Any,
) -> None:
    """Tell whether the calibration set is large enough: each strategy's scales from 1, 2, 4, ... documents and all.

    A run that was collected with --by-block answers for every strategy, any other run for absmax, quamba and
    ema_percentile.

    \b
    Example:
      quambase collect --model mamba-5m --samples 32 --batch-size 2 --by-block
      quambase converge --strategy mse --strategy absmax
    """
    from quambase.analyzer.converge import converge as find_convergence

    drawn = None if no_picture else picture
    found = find_convergence(db, picture=drawn, progress=True, force=force, **given)
    if table is None and format_ == "table" and output is None:
        click.echo(f"{found.title}: from half to all\n")
        emit(_strategies(found))
        click.echo("\nthe 95 % end of the move from so many documents to all\n")
        emit(_sizes(found))
    else:
        name = table or "sizes"
        shown: Any = {"strategies": _strategies, "sizes": _sizes}[name](found)
        emit(shown if format_ in PEOPLE else getattr(found, name), format_, output)
    note(*found.notes)
    answer(*found.summary)
    if found.picture:
        note(f"written: {found.picture}")
    next_command(found.command, db)


def _strategies(found: Convergence) -> pa.Table:
    """The strategies for people: where each converges, and how far it moves from half of the documents to all."""
    rows = found.strategies.to_pylist()
    known = any(row["predicted_kl"] is not None for row in rows)
    return pa.Table.from_pylist(
        [
            {
                "strategy": row["strategy"],
                "enough": "-" if row["converged_at"] is None else str(row["converged_at"]),
                "move": f"{_percent(row['change'])} ({100 * row['change_low']:.2g} to {100 * row['change_high']:.2g})",
                "MSE": _signed(row["mse_ratio"]),
                **({"KL": _more(row["predicted_kl"], row["predicted_kl_of_all"])} if known else {}),
                "worst scale": f"{_percent(row['worst_change'])} {row['worst_layer']} {row['worst_site']}",
            }
            for row in rows
        ]
    )


def _sizes(found: Convergence) -> pa.Table:
    """The 95 % ends for people: a row per strategy, a column per number of documents."""
    order = found.strategies["strategy"].to_pylist()
    ends: dict[str, dict[int, str]] = {label: {} for label in order}
    for row in found.sizes.to_pylist():
        ends[row["strategy"]][row["documents"]] = _percent(row["change_high"])
    documents = sorted({size for of_label in ends.values() for size in of_label})
    return pa.Table.from_pylist(
        [{"strategy": label, **{str(n): of_label.get(n, "-") for n in documents}} for label, of_label in ends.items()]
    )


def _percent(share: float) -> str:
    """A share in percent, two digits."""
    return f"{100 * share:.2g} %"


def _signed(ratio: float) -> str:
    """A ratio as a signed difference in percent."""
    return f"{100 * (ratio - 1):+.2g} %"


def _more(kl: float | None, of_all: float | None) -> str:
    """How much larger a predicted KL is than that of all documents."""
    return "-" if kl is None or not of_all else _signed(kl / of_all)
