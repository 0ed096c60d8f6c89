"""`evaluate`: INT8 models against the floating-point one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from quambase.apply.statistics import FEWEST_RESAMPLES, MOST_RESAMPLES, RESAMPLES
from quambase.cli.apply import int8_options, names
from quambase.cli.console import Command, database_option, device_option, emit, note, output_options

if TYPE_CHECKING:
    from quambase.apply.evaluate import Evaluation

PEOPLE = ("table", "markdown")
"""Formats for people: intervals in brackets; the others carry every number in its own column."""


def bootstrap_options(function: click.decorators.FC) -> click.decorators.FC:
    """How intervals are computed."""
    function = click.option(
        "--seed",
        type=click.IntRange(0, 2**63 - 1),
        default=0,
        show_default=True,
        help="Seed of the bootstrap and of the sign flips.",
    )(function)
    return click.option(
        "--bootstrap",
        type=click.IntRange(FEWEST_RESAMPLES, MOST_RESAMPLES),
        default=RESAMPLES,
        show_default=True,
        help="Resamples of documents for the 95 % intervals of perplexity and KL; differences need none.",
    )(function)


def emit_evaluation(found: Evaluation, bootstrap: int, seed: int, format_: str, output: Path | None) -> None:
    """Print an evaluation: two tables for people, one with every number in its own column for programs."""
    from quambase.apply.summary import readable, remarks, summarize

    summary = summarize(found.results, bootstrap=bootstrap, seed=seed)
    if format_ not in PEOPLE or output:
        emit(summary, format_, output)
    else:
        figures, differences, footnotes = readable(summary)
        emit(figures, format_)
        if differences.num_rows:
            click.echo("\ndifferences, paired over documents, with 95 % intervals:")
            emit(differences, format_)
        for footnote in footnotes:
            click.echo(f"\n{footnote}")
    for remark in [*found.notes, *remarks(summary, bootstrap)]:
        note(remark)


@click.command(cls=Command)
@click.argument("folder", required=False, metavar="[MODEL_DIR]", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--scales",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Evaluate strategies of this scale table, built in memory, instead of an applied model.",
)
@click.option(
    "--strategy",
    "strategies",
    callback=names,
    default="all",
    show_default=True,
    metavar="all|LABEL[,LABEL...]",
    help="With --scales: which strategies.",
)
@click.option(
    "--granularity",
    "granularities",
    callback=names,
    metavar="all|LEVEL[,LEVEL...]",
    help="With --scales, of a Mamba-2: tensor, ssd_group, head_group, group. [default: the table's finest]",
)
@click.option("--float", "floating", is_flag=True, help="Evaluate the floating-point --model alone.")
@click.option(
    "--data",
    multiple=True,
    metavar="FILE|NAME",
    help="Text to evaluate on; may be repeated. [default: the bundled texts, for a bundled model]",
)
@click.option("--samples", type=click.IntRange(min=1), help="Only the first so many documents of each text.")
@click.option(
    "--task",
    type=click.Choice(["perplexity", "last-word", "both"]),
    default="both",
    show_default=True,
    help="What to measure.",
)
@click.option(
    "--window",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Tokens; longer documents are cut in non-overlapping windows.",
)
@device_option
@bootstrap_options
@int8_options
@database_option
@output_options
def evaluate(
    folder: Path | None,
    scales: Path | None,
    strategies: tuple[str, ...],
    granularities: tuple[str, ...],
    floating: bool,
    data: tuple[str, ...],
    samples: int | None,
    task: str,
    window: int,
    device: str,
    bootstrap: int,
    seed: int,
    quantize_lm_head: bool,
    quantize_embedding: bool,
    compat: str | None,
    model: str | None,
    db: Path,
    format_: str,
    output: Path | None,
) -> None:
    """Perplexity, KL, agreement and last-word accuracy of INT8 models, paired against the float model and `quamba`.

    Without MODEL_DIR and --scales: the model applied last. A killed evaluation resumes where it was.

    \b
    Example:
      evaluate --scales scales.parquet --strategy all --samples 100
    """
    from quambase.apply.evaluate import evaluate as run

    if sum([folder is not None, scales is not None, floating]) > 1:
        raise click.UsageError("give one of MODEL_DIR, --scales and --float")
    evaluation = run(
        folder,
        scales=scales,
        strategies=strategies,
        granularities=granularities,
        floating=floating,
        data=data,
        samples=samples,
        task=task,
        window=window,
        quantize_lm_head=quantize_lm_head,
        quantize_embedding=quantize_embedding,
        compat=compat,
        model=model,
        db=db,
        device=device,
        progress=True,
    )
    emit_evaluation(evaluation, bootstrap, seed, format_, output)
    note(f"stored: {evaluation.folder}; print it again with: quambase results {evaluation.id} --db {db}")
