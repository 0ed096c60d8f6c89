"""`apply`: a strategy's scales loaded into the INT8 model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from quambase.cli.complete import complete_labels, complete_models, complete_sites
from quambase.cli.console import Command, answer, database_option, force_option, next_command, note, one_each
from quambase.schema.groups import GRANULARITIES

BACKENDS = ("quambase", "quamba")


def int8_options(function: click.decorators.FC) -> click.decorators.FC:
    """What is quantized, and how faithfully to upstream's defects."""
    for option in (
        click.option(
            "--model",
            metavar="NAME",
            shell_complete=complete_models,
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
    shell_complete=complete_labels,
    help="A strategy of the table, or `selected`: the row marked so at each site.",
)
@click.option(
    "--at",
    multiple=True,
    callback=one_each,
    metavar="SITE",
    shell_complete=complete_sites,
    help="Use the strategy only at this site; once for each.",
)
@click.option(
    "--otherwise",
    default="quamba",
    show_default=True,
    metavar="LABEL",
    shell_complete=complete_labels,
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
    type=click.Path(path_type=Path),
    help="Folder to write, or with --import the scale table. [default: DB/models/<id>; FILE.parquet]",
)
@click.option(
    "--export",
    metavar="FILE.pt",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the scales as upstream Quamba's act_scales (and reorder_params) instead of a model.",
)
@click.option(
    "--import",
    "import_",
    metavar="FILE.pt",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Make a scale table of upstream's act_scales for the model named with --model instead.",
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default=BACKENDS[0],
    show_default=True,
    help="quamba: build with upstream's own package and kernels, which need a GPU, and save as it does.",
)
@force_option
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
    export: Path | None,
    import_: Path | None,
    backend: str,
    force: bool,
) -> None:
    """Build the INT8 model with one strategy's scales and save it; prints its folder.

    The floating-point model is the one the scale table names.

    \b
    Example:
      quambase apply --scales scales.parquet --strategy mse
      quambase apply --strategy mse --at x_proj:input --otherwise absmax
      quambase apply --strategy mse --export act_scales.pt
    """
    if sum([export is not None, import_ is not None, backend != BACKENDS[0]]) > 1:
        raise click.UsageError("give one of --export, --import and --backend quamba")
    if import_ is not None:
        _import(import_, model, out, force)
        return
    mix: dict[str, Any] = {"strategy": strategy, "at": at, "otherwise": otherwise, "granularity": granularity}
    if export is not None:
        from quambase.apply.upstream.act_scales import export_act_scales

        path, replaced = export_act_scales(scales, export, **mix, db=db, force=force)
        _tell(replaced)
        click.echo(path)
        return
    if backend != BACKENDS[0]:
        from quambase.apply.upstream.backend import build_upstream

        if out is None or compat is not None:
            raise click.UsageError("--backend quamba needs --out FOLDER, and --compat is not for it")
        _, replaced = build_upstream(
            scales,
            **mix,
            quantize_lm_head=quantize_lm_head,
            quantize_embedding=quantize_embedding,
            model=model,
            out=out,
            db=db,
        )
        _tell(replaced)
        if not quantize_lm_head:
            note("note: upstream's own loader reads no model without --quantize-lm-head")
        click.echo(out)
        return
    from quambase.apply.apply import apply as run

    applied = run(
        scales,
        **mix,
        quantize_lm_head=quantize_lm_head,
        quantize_embedding=quantize_embedding,
        compat=compat,
        model=model,
        db=db,
        out=out,
    )
    if applied.unsafe:
        layer, site = applied.unsafe[0]
        answer(
            f"warning: {len(applied.unsafe)} scales clip where upstream's kernel wraps modulo 256 "
            f"(first: layer {layer} {site}); a scale that clips nothing there avoids it"
        )
    for line in applied.notes:
        answer(line)
    parts = [name for name, wanted in (("head", quantize_lm_head), ("embedding", quantize_embedding)) if wanted]
    kept = (
        "" if len(parts) == 2 else "; " + " and ".join(n for n in ("head", "embedding") if n not in parts) + " in float"
    )
    answer(f"strategy {applied.strategy}: " + ", ".join(["layers", *parts]) + f" in INT8{kept}; model saved in")
    click.echo(applied.folder)
    next_command("quambase evaluate", db)


def _tell(replaced: Sequence[object]) -> None:
    """Which scales upstream's kernel could not have taken, and what took their places."""
    if replaced:
        note("upstream's kernel at out_proj:input wraps what clips; these scales gave way to ones that clip nothing:")
    for line in replaced:
        note(f"  {line}")


def _import(file: Path, model: str | None, out: Path | None, force: bool) -> None:
    """Make the scale table and say how to go on."""
    from quambase.apply.upstream.import_act_scales import import_act_scales

    if model is None:
        raise click.UsageError("--import needs --model NAME, the floating-point model that the scales are for")
    table = out or file.with_suffix(".parquet")
    rows = import_act_scales(file, model, table, force=force)
    note(f"written: {table} ({rows} scales); load them with: apply --scales {table} --model {model}")
    click.echo(table)
