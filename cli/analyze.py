"""`analyze`: every strategy at every site, as a scale table."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pyarrow as pa

from quambase.cli.query import run_option, strategies_option
from quambase.cli.terminal.console import (
    FILE,
    PEOPLE,
    Command,
    answer,
    database_option,
    force_option,
    format_option,
    next_command,
    note,
    options,
)
from quambase.cli.terminal.formats import emit, format_cell
from quambase.schema.errors import QuambaseError
from quambase.schema.groups import GRANULARITIES
from quambase.schema.scale_table import MSE, QUAMBASE, SELECTIONS, TARGETS, read_scales


def _number_after(word: str, example: str, convert: Callable[[str], float]) -> Callable[..., Any]:
    """A callback that reads ``word=NUMBER``."""

    def read(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
        if value is None:
            return None
        name, _, number = value.partition("=")
        try:
            if name != word:
                raise ValueError
            return convert(number)
        except ValueError:
            raise click.BadParameter(
                f"{value!r}; expected {word}=NUMBER, such as {example}", context, parameter
            ) from None

    return read


analyze_options = options(
    strategies_option(
        "A strategy: mse, percentile:0.9999, your own FILE.py:NAME; once for each; all for every one. "
        "[default: see --list]"
    ),
    click.option(
        "--granularity",
        type=click.Choice(GRANULARITIES),
        help="One scale per site; also one per SSD group, head group, smallest group. "
        "[default: what the INT8 model reads]",
    ),
    click.option(
        "--target",
        type=click.Choice(TARGETS),
        default=QUAMBASE,
        show_default=True,
        help="Whose INT8 model the selected scales are for; upstream's wraps what clips at out_proj:input.",
    ),
    click.option(
        "--select",
        type=click.Choice(SELECTIONS),
        help="What selected scales have the least of: predicted effect on the output, or squared error. "
        "[default: effect if the run has sensitivities]",
    ),
    click.option(
        "--keep",
        metavar="16bit=N",
        callback=_number_after("16bit", "16bit=6", int),
        help="Also make the strategy `mixed`: as selected, with N operators (in_proj, conv_scan, x_proj, out_proj of a "
        "layer) in 16 bit, those of most predicted effect.",
    ),
    click.option(
        "--budget",
        metavar="KL=X",
        callback=_number_after("KL", "KL=0.003", float),
        help="Likewise, with the fewest operators in 16 bit that bring the predicted loss down to X nats a token.",
    ),
    click.option(
        "--sweep",
        metavar="STRATEGY:LOW..HIGH/COUNT",
        help="Instead, one parameter over a range (percentile:0.999..0.99999/20): what it costs, which value is best. "
        "Writes a scale table only with --out.",
    ),
    click.option(
        "--picture",
        type=FILE,
        help="With --sweep, draw it. [default: sweep.png]",
    ),
    click.option("--out", type=click.Path(path_type=Path), help="Scale table to write. [default: scales.parquet]"),
    click.option("--list", "list_", is_flag=True, help="List the strategies and their definitions instead."),
    database_option,
)
"""Which strategies, for whose model, and where they are written."""


@click.command(cls=Command)
@analyze_options
@run_option
@format_option
@force_option
def analyze(
    strategies: tuple[str, ...],
    granularity: str | None,
    target: str,
    select: str | None,
    keep: int | None,
    budget: float | None,
    sweep: str | None,
    picture: Path | None,
    out: Path | None,
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
      quambase analyze --sweep percentile:0.999..0.99999/20
    """
    if list_:
        emit(_definitions(), format_, wrap="definition")
        return
    if picture is not None and sweep is None:
        raise click.UsageError("--picture goes with --sweep")
    if sweep is not None:
        if strategies or keep is not None or budget is not None:
            raise click.UsageError("--sweep makes its own strategies: leave out --strategy, --keep and --budget")
        chosen = {"granularity": granularity, "target": target, "select": select}
        _sweep(sweep, db, run, out, picture or Path("sweep.png"), format_, force, chosen)
        return
    out = out or Path("scales.parquet")
    from quambase.analyzer.analyze import analyze as analyze_run
    from quambase.analyzer.sixteen_bit import sentence
    from quambase.analyzer.summary import selection, summarize

    before = _held(out)
    found = analyze_run(db, run, strategies, granularity, out, True, target, force, select, keep, budget)
    answer(*found.notes)
    summary = summarize(found.table)
    emit(summary if format_ not in PEOPLE else strategies_for_people(summary), format_)
    if any(summary["needs_decode"].to_pylist()):
        answer("d: its codes need a decoder: `evaluate` measures it, no integer product reads it")
    answer(*selection(found.table, target, by_effect=select != MSE))
    if (mixed := sentence(found.frontier, found.mix)) is not None:
        answer(mixed)
    note(f"written: {out}")
    answer(f"it holds {found.table.num_rows:,} scales of {summary.num_rows} strategies{before}")
    next_command(f"quambase evaluate --scales {shlex.quote(str(out))}", db)


def _sweep(
    text: str,
    db: Path,
    run: str | None,
    out: Path | None,
    picture: Path,
    format_: str,
    force: bool,
    chosen: dict[str, Any],
) -> None:
    """`analyze --sweep`: a row for each value, which is best, and a picture."""
    from quambase.analyzer.sweep import sweep

    found = sweep(text, db, run, out, picture, True, force, **chosen)
    answer(*found.analysis.notes)
    emit(found.table if format_ not in PEOPLE else _swept_for_people(found.table), format_)
    answer(*found.summary)
    note(*(f"written: {path}" for path in (found.picture, out) if path is not None))
    best = found.best["strategy"]
    next_command(
        f"quambase analyze --strategy {shlex.quote(best)} --strategy quamba --strategy mse --out best.parquet", db
    )


def _swept_for_people(table: pa.Table) -> pa.Table:
    """The rows of a sweep."""
    known = table["predicted_kl"].null_count < table.num_rows
    rows = [
        _losses(row, known) | {"clipped": format_cell(row["clipped_share_mean"], share=True)}
        for row in table.to_pylist()
    ]
    return pa.Table.from_pylist(rows)


def _losses(row: dict[str, Any], known: bool) -> dict[str, Any]:
    """What a strategy loses, the first columns of a table; ``known``: the predicted KL of some."""
    kl = {"predicted KL": row["predicted_kl"]} if known else {}
    return {"strategy": row["strategy"], **kl, "median dB": row["sqnr_db_median"], "least": row["sqnr_db_least"]}


def _held(out: Path) -> str:
    """In words, what the scale table at ``out`` holds before it is replaced; empty if there is none."""
    try:
        held = read_scales(out)
    except QuambaseError:
        return ""
    return f"; it replaced {len(held.labels())} strategies of run {', '.join(held.runs())}"


def strategies_for_people(summary: pa.Table) -> pa.Table:
    """The summary of strategies for people: the best one starred, those that need a decoder marked d."""
    known = any(kl is not None for kl in summary["predicted_kl"].to_pylist())
    rows = [
        {
            "": "d" if row["needs_decode"] else "*" if place == 0 else "",
            **_losses(row, known),
            "worst site": "-" if row["worst_site"] is None else f"{row['worst_layer']} {row['worst_site']}",
            "clipped": format_cell(row["clipped_share_mean"], share=True),
            "wraps": row["wraps_upstream"],
            "selected": f"{row['selected']} of {row['scales']}",
        }
        for place, row in enumerate(summary.to_pylist())
    ]
    return pa.Table.from_pylist(rows)


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
