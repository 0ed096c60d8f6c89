"""`analyze`: every strategy at every site, as a scale table."""

from __future__ import annotations

from pathlib import Path

import click
import pyarrow as pa

from quambase.cli.complete import complete_strategies
from quambase.cli.console import Command, database_option, force_option, format_option, note, one_each
from quambase.cli.formats import emit
from quambase.cli.query import run_option
from quambase.schema.grouping import GRANULARITIES
from quambase.schema.scales import QUAMBASE, TARGETS


@click.command(cls=Command)
@click.option(
    "--strategy",
    "strategies",
    multiple=True,
    metavar="LABEL",
    callback=one_each,
    shell_complete=complete_strategies,
    help="A strategy, such as mse or percentile:0.9999; once for each; all for every one. [default: see --list]",
)
@click.option(
    "--granularity",
    type=click.Choice(GRANULARITIES),
    help="One scale per site; also one per SSD group, head group, smallest group. [default: what the INT8 model reads]",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default=QUAMBASE,
    show_default=True,
    help="Whose INT8 model the selected scales are for; upstream's wraps what clips at out_proj:input.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("scales.parquet"),
    show_default=True,
    help="Scale table to write.",
)
@click.option("--list", "list_", is_flag=True, help="List the strategies and their definitions instead.")
@run_option
@database_option
@format_option
@force_option
def analyze(
    strategies: tuple[str, ...],
    granularity: str | None,
    target: str,
    out: Path,
    list_: bool,
    run: str | None,
    db: Path,
    format_: str,
    force: bool,
) -> None:
    """Compute every scale strategy at every site of a run; prints a summary of each strategy.

    \b
    Example:
      quambase analyze
      quambase analyze --strategy mse --strategy percentile:0.9999 --out two.parquet
    """
    if list_:
        emit(_definitions(), format_)
        return
    from quambase.analyzer.batch import analyze as analyze_run
    from quambase.analyzer.batch import summarize

    found = analyze_run(db, run, strategies, granularity, out, True, target, force)
    for line in found.notes:
        note(line)
    emit(summarize(found.table), format_)
    note(f"written: {out} ({found.table.num_rows} rows)")


def _definitions() -> pa.Table:
    from quambase.analyzer.strategies import DEFAULT_LABELS, STRATEGIES

    defaults = {label.partition(":")[0] for label in DEFAULT_LABELS}
    rows = [
        {
            "strategy": found.name,
            "parameters": ", ".join(f"{name} = {value:g}" for name, value in found.parameters.items()),
            "default": name in defaults,
            "definition": found.definition,
        }
        for name, found in STRATEGIES.items()
    ]
    return pa.Table.from_pylist(rows)
