"""`evaluate`: INT8 models against the floating-point one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quambase.apply.evaluation.paired_statistics import (
    FEWEST_RESAMPLES,
    MOST_RESAMPLES,
    MOST_WITHIN,
    RESAMPLES,
    WITHIN,
)
from quambase.cli.apply import int8_options
from quambase.cli.terminal.complete import complete_labels
from quambase.cli.terminal.console import (
    COUNT,
    FILE,
    FOLDER,
    PEOPLE,
    SEED,
    Command,
    answer,
    database_option,
    device_option,
    line_width,
    next_command,
    note,
    one_each,
    options,
    output_options,
    wrapped,
)
from quambase.cli.terminal.formats import emit
from quambase.model.inputs.sources import find_given
from quambase.schema.groups import GRANULARITIES
from quambase.schema.stored.results import DECODE, PREFILL, PROMPT_TOKENS, WINDOW

if TYPE_CHECKING:
    from quambase.apply.evaluation.stored import Evaluation


statistics_options = options(
    click.option(
        "--bootstrap",
        type=click.IntRange(FEWEST_RESAMPLES, MOST_RESAMPLES),
        default=RESAMPLES,
        show_default=True,
        help="Resamples of documents for the 95 % intervals of perplexity and KL; differences need none.",
    ),
    click.option(
        "--seed", type=SEED, default=0, show_default=True, help="Seed of the bootstrap and of the sign flips."
    ),
    click.option(
        "--within",
        type=click.FloatRange(0, MOST_WITHIN, min_open=True),
        default=WITHIN,
        show_default=True,
        metavar="PERCENT",
        help="Say whether the loss of perplexity (of last words: points) is shown to be no more than this.",
    ),
)
"""How the statistics are computed."""


def emit_evaluation(
    found: Evaluation, bootstrap: int, seed: int, within: float, format_: str, output: Path | None
) -> None:
    """Print an evaluation: a sentence for each text, then for people a table for each, best strategy first.

    With `--wide`, two tables with every figure; for programs, one with every number in its own column, and the
    sentences on stderr.
    """
    from quambase.apply.evaluation.sentences import remarks
    from quambase.apply.evaluation.summary import summarize
    from quambase.apply.evaluation.summary_text import rank, readable

    summary = summarize(found.results, bootstrap=bootstrap, seed=seed, within=within)
    ranked = rank(summary)
    shown = format_ in PEOPLE and not output
    for text in ranked:
        for line in text.sentences:
            click.echo(wrapped(f"{text.data}, {text.task}: {line}" if len(ranked) > 1 else line), err=not shown)
    if not shown:
        emit(summary, format_, output)
    elif line_width() is None:
        click.echo()
        figures, differences, footnotes = readable(summary)
        emit(figures, format_)
        if differences.num_rows:
            click.echo("\ndifferences, paired over documents, with 95 % intervals:")
            emit(differences, format_)
        for footnote in footnotes:
            click.echo(f"\n{footnote}")
    else:
        own = {text["data"] for text in found.about.get("tasks", []) if text["self_generated"]}
        for text in ranked:
            title = f"{text.data}, {text.task}: {text.size}"
            click.echo()
            click.echo(
                wrapped(title + ("; written by bundled models, no measure of real text" if text.data in own else ""))
            )
            emit(text.table, format_)
            for footnote in text.footnotes:
                click.echo(f"\n{wrapped(footnote)}")
    _emit_decoded(found, shown)
    answer(*found.notes, *remarks(summary, bootstrap))


def _emit_decoded(found: Evaluation, shown: bool) -> None:
    """Of an evaluation by decoding: what decoding adds, in words and, for people, by tokens decoded."""
    from quambase.apply.evaluation.decode_summary import sentences, table

    rows = found.by_position().to_pylist()
    texts = dict.fromkeys(row["data"] for row in rows)
    for data in texts:
        mine = [row for row in rows if row["data"] == data]
        if shown:
            click.echo(f"\n{data}, by tokens decoded one by one after the prompt:")
            emit(table(mine), "table")
        for line in sentences(mine):
            click.echo(wrapped(f"{data}: {line}" if len(texts) > 1 else line), err=not shown)


def names_of(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Names without commas: the option may be repeated, or hold several as lm-eval's own `--tasks`."""
    return tuple(dict.fromkeys(name.strip() for value in values for name in value.split(",") if name.strip()))


evaluate_options = options(
    click.option(
        "--scales",
        type=FILE,
        help="Evaluate strategies of this scale table, no applied model. [default: scales.parquet, with --strategy]",
    ),
    click.option(
        "--strategy",
        "strategies",
        multiple=True,
        callback=one_each,
        metavar="LABEL|all",
        shell_complete=complete_labels,
        help="A strategy of the scale table, built in memory; once for each. [default: all, with --scales]",
    ),
    click.option(
        "--granularity",
        "granularities",
        multiple=True,
        type=click.Choice(["all", *GRANULARITIES]),
        callback=one_each,
        help="Of a Mamba-2, how finely scales divide its sites; once for each. [default: the table's finest]",
    ),
    click.option(
        "--one-at-a-time",
        is_flag=True,
        help="Quantize one site of the floating-point model at a time: which site costs what, predicted and measured.",
    ),
    click.option(
        "--picture",
        type=FILE,
        help="With --one-at-a-time, save predicted against measured KL (.png, .svg or .pdf).",
    ),
    click.option("--float", "floating", is_flag=True, help="Evaluate the floating-point --model alone."),
    click.option(
        "--data",
        multiple=True,
        metavar="FILE|NAME",
        help="Text to evaluate on; may be repeated. [default: the bundled texts, for a bundled model]",
    ),
    click.option("--samples", "--limit", "samples", type=COUNT, help="Only the first so many documents of each text."),
    click.option(
        "--task",
        type=click.Choice(["perplexity", "last-word", "both"]),
        default="both",
        show_default=True,
        help="What to measure.",
    ),
    click.option(
        "--window",
        type=click.IntRange(2, COUNT.max),
        default=WINDOW,
        show_default=True,
        help="Tokens; longer documents are cut in non-overlapping windows.",
    ),
    click.option(
        "--mode",
        type=click.Choice([PREFILL, DECODE]),
        default=PREFILL,
        show_default=True,
        help="Read each text in one forward pass, or token by token after a prompt, from the cached INT8 state.",
    ),
    click.option(
        "--prompt-tokens",
        type=COUNT,
        default=PROMPT_TOKENS,
        show_default=True,
        help="With --mode decode, tokens that are prefilled; all that follow are decoded and scored.",
    ),
    click.option(
        "--state",
        "states",
        multiple=True,
        callback=one_each,
        metavar="FORMAT",
        help="With --mode decode, each strategy also with the cached state in this format, such as int8:channel, "
        "int8:feedback, fp8:channel:stochastic, float16; once for each (docs/state.md).",
    ),
    click.option(
        "--tasks",
        multiple=True,
        callback=names_of,
        metavar="NAME[,NAME...]",
        help="Tasks of lm-eval (lambada_openai, hellaswag) in place of --data and --task; needs the extra `eval`.",
    ),
    click.option(
        "--include-path",
        type=click.Path(file_okay=False, exists=True, path_type=Path),
        help="With --tasks, a folder with more tasks of lm-eval (.yaml).",
    ),
    device_option,
    int8_options,
    database_option,
)
"""Which models are scored, on which text and how."""


@click.command(cls=Command)
@click.argument("folder", required=False, metavar="[MODEL_DIR]", type=FOLDER)
@evaluate_options
@statistics_options
@output_options
def evaluate(
    folder: Path | None,
    scales: Path | None,
    strategies: tuple[str, ...],
    granularities: tuple[str, ...],
    floating: bool,
    one_at_a_time: bool,
    picture: Path | None,
    bootstrap: int,
    seed: int,
    within: float,
    format_: str,
    output: Path | None,
    **given: Any,
) -> None:
    """KL to the float model, flips, perplexity and last-word accuracy of INT8 models, paired against float and `quamba`
    over documents.

    Without MODEL_DIR, --scales and --strategy: the model applied last. A killed evaluation resumes where it was.

    \b
    Example:
      quambase evaluate --strategy all --samples 24
      quambase evaluate --strategy mse --strategy quamba --samples 24 --task perplexity
      quambase evaluate --strategy mse --strategy quamba --samples 24 --mode decode
      quambase evaluate --strategy all --tasks lambada_openai,hellaswag --limit 200
    """
    _check_together(folder, scales, strategies or granularities, floating, one_at_a_time, picture, given)
    if strategies or granularities:
        scales = scales or Path("scales.parquet")
    # Names are checked before torch is imported, which takes seconds.
    if scales is not None:
        _check_names(scales, strategies, granularities)
    find_given(given["model"], given["data"])
    if one_at_a_time:
        _sites_alone(scales or Path("scales.parquet"), strategies, picture, format_, output, given)
        return
    from quambase.apply.evaluation.evaluate import evaluate as run

    evaluation = run(
        folder,
        scales=scales,
        strategies=strategies or ("all",),
        granularities=granularities,
        floating=floating,
        progress=True,
        **given,
    )
    emit_evaluation(evaluation, bootstrap, seed, within, format_, output)
    note(f"stored: {evaluation.folder}")
    next_command(f"quambase results {evaluation.id} --wide", given["db"])


def _check_together(
    folder: Path | None,
    scales: Path | None,
    of_scales: tuple[str, ...],
    floating: bool,
    one_at_a_time: bool,
    picture: Path | None,
    given: dict[str, Any],
) -> None:
    """Report options that exclude or need each other; ``of_scales``: strategies or granularities."""
    if sum([folder is not None, scales is not None or bool(of_scales), floating]) > 1:
        raise click.UsageError("give one of MODEL_DIR, --float, and --scales with --strategy")
    if picture is not None and not one_at_a_time:
        raise click.UsageError("--picture goes with --one-at-a-time")
    if given["tasks"] and (given["data"] or given["task"] != "both" or one_at_a_time):
        raise click.UsageError("--tasks brings its own text: leave out --data, --task and --one-at-a-time")
    if given["states"] and given["mode"] != DECODE:
        raise click.UsageError("--state goes with --mode decode: a forward pass over a text keeps the state in float32")
    if given["mode"] == DECODE and (given["tasks"] or given["task"] != "both" or one_at_a_time or floating):
        raise click.UsageError(
            "--mode decode scores all that follows a prompt by INT8 models: leave out --task, --tasks, --float and "
            "--one-at-a-time"
        )
    if one_at_a_time and (folder is not None or floating or len(given["data"]) > 1):
        raise click.UsageError("--one-at-a-time takes --scales, --strategy and one --data")
    if given["weight_bits"] != 8 and (one_at_a_time or not (scales is not None or of_scales)):
        raise click.UsageError("--weights goes with --scales or --strategy: it says how they are built")
    if given["include_path"] is not None and not given["tasks"]:
        raise click.UsageError("--include-path goes with --tasks")


def _check_names(scales: Path, strategies: tuple[str, ...], granularities: tuple[str, ...]) -> None:
    """Report a wrong label or granularity; imports no torch."""
    from quambase.apply.scale_choice import check_choice
    from quambase.schema.scale_table import read_scales

    check_choice(read_scales(scales), strategies, granularities)


ROWS_SHOWN = 20
"""Scales that people see of `--one-at-a-time`, those that cost most."""


def _sites_alone(
    scales: Path,
    strategies: tuple[str, ...],
    picture: Path | None,
    format_: str,
    output: Path | None,
    given: dict[str, Any],
) -> None:
    """`evaluate --one-at-a-time`: print the costliest scales, or all for programs; ``given``: the shared options."""
    from quambase.apply.evaluation.one_at_a_time import one_at_a_time
    from quambase.apply.evaluation.one_at_a_time import picture as draw
    from quambase.schema.files import refuse_foreign_picture

    if picture is not None:
        refuse_foreign_picture(picture)
    taken = {name: given[name] for name in ("samples", "window", "db", "model", "device")}
    found = one_at_a_time(scales, strategies or ("all",), data=next(iter(given["data"]), None), progress=True, **taken)
    people = format_ in PEOPLE and output is None
    for line in found.summary:
        click.echo(wrapped(line), err=not people)
    emit(found.table.slice(0, ROWS_SHOWN) if people else found.table, format_, output)
    if people and found.table.num_rows > ROWS_SHOWN:
        answer(f"{found.table.num_rows - ROWS_SHOWN} scales that cost less are not shown: --format csv has all")
    answer(*found.notes)
    if picture is not None:
        draw(picture, found.table, "each scale alone")
        note(f"written: {picture}")
