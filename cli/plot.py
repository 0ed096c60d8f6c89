"""`quambase plot`: pictures for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quambase.cli.query import run_option, strategies_option
from quambase.cli.terminal.complete import complete_sites
from quambase.cli.terminal.console import (
    FILE,
    FORMATS,
    Command,
    answer,
    database_option,
    force_option,
    json_option,
    json_or_given,
    note,
    options,
)
from quambase.cli.terminal.formats import emit
from quambase.schema.sites import WHOLE

if TYPE_CHECKING:
    from quambase.apply.evaluation.stored import Evaluation

# Written out: to import them would load matplotlib, which --help does not need. A test compares.
KINDS = (
    "distribution",
    "error",
    "heatmap",
    "channels",
    "positions",
    "tokens",
    "strategies",
    "convergence",
    "evaluation",
    "decoding",
    "groups",
)
QUANTITIES = ("outlier_ratio", "clipped_share", "sqnr_db", "predicted_kl")

plot_options = options(
    click.argument("kind", type=click.Choice(KINDS), metavar="KIND"),
    click.option("--site", shell_complete=complete_sites, help="Site. [default: that of the largest outlier ratio]"),
    click.option("--layer", type=int, help="Its layer; -1 is the head. [default: that of the largest outlier ratio]"),
    click.option("--group", default=WHOLE, show_default=True, help="Slice of a divided site: x, z; dt, B, C."),
    strategies_option(
        "A strategy; once for each. [default: some well-known ones and the selected one, or all there are]"
    ),
    click.option(
        "--scales",
        type=FILE,
        help="Scale table. [default: scales.parquet of the database, then of this folder]",
    ),
    click.option("--evaluation", help="Its id or the beginning of it. [default: the newest]"),
    click.option(
        "--quantity",
        type=click.Choice(QUANTITIES),
        default=QUANTITIES[0],
        show_default=True,
        help="What a heat map shows.",
    ),
    click.option(
        "--columns",
        type=click.Choice(["1", "2"]),
        default="1",
        show_default=True,
        help="Width: 1 or 2 columns of a page, 3.35 or 6.9 inches.",
    ),
    click.option(
        "--out",
        "output",
        type=click.Path(path_type=Path),
        help="Where to save it (png, svg, pdf). [default: KIND.png]",
    ),
    click.option(
        "--format",
        "format_",
        type=click.Choice(FORMATS),
        callback=json_or_given,
        help="Print the numbers drawn, too, in this format.",
    ),
    json_option,
    force_option,
    database_option,
)
"""Which picture, of what, and where to save it."""


@click.command(cls=Command)
@plot_options
@run_option
def plot(
    kind: str,
    evaluation: str | None,
    columns: str,
    output: Path | None,
    format_: str | None,
    db: Path,
    **given: Any,
) -> None:
    """Draw a picture for a paper, and say in a sentence what it shows.

    \b
    distribution  a histogram of |x| at one site, and where each strategy clips
    error         MSE and predicted KL there against the scale
    heatmap       one number for every layer and site (--quantity)
    channels      the channels of a site by their largest |x|
    tokens        the tokens that made the largest values of a site
    strategies    the strategies of a scale table over all sites
    convergence   is the calibration set large enough? As quambase converge
    evaluation    what each strategy loses on each text, with intervals
    decoding      KL against the number of tokens decoded, of evaluate --mode decode
    groups        what sorting did to the scale groups of a Mamba-2

    \b
    Example:
      quambase plot distribution --site x_proj:input --out x_proj.pdf
      quambase plot heatmap --columns 2
    """
    from quambase.analyzer.pictures.plot import plot as plot_picture

    stored = _stored(db, evaluation) if kind in ("evaluation", "decoding") else None
    path = output or Path(f"{kind}.png")
    found = plot_picture(kind, db, evaluation=stored, columns=int(columns), out=path, progress=True, **given)
    if format_ is not None:
        emit(found.table, format_)
    note(*found.notes)
    answer(*found.summary)
    note(f"written: {found.path}")


def _stored(db: Path, evaluation: str | None) -> Evaluation:
    from quambase.apply.evaluation.stored import find_evaluation

    return find_evaluation(db, evaluation)
