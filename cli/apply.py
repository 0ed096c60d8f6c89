"""`apply`: a strategy's scales loaded into the INT8 model."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from quambase.cli.terminal.complete import complete_labels, complete_models, complete_sites
from quambase.cli.terminal.console import (
    FILE,
    Command,
    answer,
    database_option,
    force_option,
    next_command,
    note,
    one_each,
    options,
)
from quambase.schema.groups import GRANULARITIES

BACKENDS = ("quambase", "quamba")

WEIGHTS = {"8bit": (8, False), "4bit": (4, False), "4bit:gptq": (4, True)}
"""``weight_bits`` and ``gptq`` of each value of ``--weights``."""


def _weights(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """The bits of ``--weights``; the command's parameter ``gptq`` says how they are rounded."""
    bits, context.params["gptq"] = WEIGHTS[value]
    return bits


int8_options = options(
    click.option("--quantize-lm-head", is_flag=True, help="Quantize the language-model head and its input."),
    click.option("--quantize-embedding", is_flag=True, help="Quantize the embedding, one scale per row."),
    click.option(
        "--weights",
        "weight_bits",
        type=click.Choice(list(WEIGHTS)),
        default="8bit",
        show_default=True,
        callback=_weights,
        help="Weights of in_proj, x_proj and out_proj; 4bit: groups of 128 inputs, rounded to nearest (W4A8); "
        "4bit:gptq: with GPTQ's update, of a run collected with --second-moments.",
    ),
    click.option("--compat", type=click.Choice(["upstream"]), help="Reproduce upstream's overflow defects too."),
    click.option(
        "--model",
        metavar="NAME",
        shell_complete=complete_models,
        help="The floating-point model, if it moved since the scales were made.",
    ),
)
"""What is quantized, and how faithfully to upstream's defects."""

mix_options = options(
    click.option(
        "--scales",
        type=FILE,
        default=Path("scales.parquet"),
        show_default=True,
        help="Scale table written by `analyze`.",
    ),
    click.option(
        "--strategy",
        metavar="LABEL",
        shell_complete=complete_labels,
        help="A strategy of the table; `selected`: the row marked so at each site; `mixed`: these, with operators "
        "in 16 bit. [default: mixed if the table has it, else selected]",
    ),
    click.option(
        "--at",
        multiple=True,
        callback=one_each,
        metavar="SITE",
        shell_complete=complete_sites,
        help="Use the strategy only at this site; once for each.",
    ),
    click.option(
        "--otherwise",
        default="quamba",
        show_default=True,
        metavar="LABEL",
        shell_complete=complete_labels,
        help="The strategy of the other sites.",
    ),
    click.option(
        "--granularity",
        type=click.Choice(GRANULARITIES),
        help="Of a Mamba-2: how finely scales divide its sites. [default: as the table]",
    ),
)
"""Which scales of which table."""

MIX = ("strategy", "at", "otherwise", "granularity")

product_options = options(
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        help="Folder to write, or with --import the scale table. [default: DB/models/<id>; FILE.parquet]",
    ),
    click.option(
        "--export",
        metavar="FILE.pt",
        type=FILE,
        help="Write the scales as upstream Quamba's act_scales (and reorder_params) instead of a model.",
    ),
    click.option(
        "--import",
        "import_",
        metavar="FILE.pt",
        type=FILE,
        help="Make a scale table of upstream's act_scales for the model named with --model instead.",
    ),
    click.option(
        "--backend",
        type=click.Choice(BACKENDS),
        default=BACKENDS[0],
        show_default=True,
        help="quamba: build with upstream's own package and kernels, which need a GPU, and save as it does.",
    ),
    force_option,
)
"""What is made of the scales, and where."""


@click.command(cls=Command)
@mix_options
@int8_options
@database_option
@product_options
def apply(export: Path | None, import_: Path | None, backend: str, **given: Any) -> None:
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
    mix = {name: given.pop(name) for name in MIX}
    if import_ is not None:
        _import(import_, given["model"], given["out"], given["force"])
    elif export is not None:
        _export(given["scales"], export, mix, given["force"])
    elif backend != BACKENDS[0]:
        _build_upstream(mix, **given)
    else:
        _build(mix, **given)


def _check_names(scales: Path, mix: dict[str, Any], *, upstream: bool = False) -> None:
    """Report a wrong label, site or granularity before torch is imported, which takes seconds. Names the default
    strategy in ``mix`` where there is none.
    """
    from quambase.apply.scale_choice import choose_scales
    from quambase.schema.scale_table import SELECTED, read_scales

    table = read_scales(scales)
    mix["strategy"] = mix["strategy"] or (SELECTED if upstream else table.default_label)
    choose_scales(table, **mix)


def _build(mix: dict[str, Any], quantize_lm_head: bool, quantize_embedding: bool, force: bool, **given: Any) -> None:
    """Build quambase's own INT8 model, save it, and say how to go on."""
    _check_names(given["scales"], mix)
    from quambase.apply.apply import apply as run

    applied = run(
        given.pop("scales"), **mix, quantize_lm_head=quantize_lm_head, quantize_embedding=quantize_embedding, **given
    )
    if applied.unsafe:
        layer, site = applied.unsafe[0]
        answer(
            f"warning: {len(applied.unsafe)} scales clip where upstream's kernel wraps modulo 256 "
            f"(first: layer {layer} {site}); a scale that clips nothing there avoids it"
        )
    answer(*applied.notes)
    parts = {"head": quantize_lm_head, "embedding": quantize_embedding}
    quantized = ", ".join(["layers", *(name for name, wanted in parts.items() if wanted)])
    floating = " and ".join(name for name, wanted in parts.items() if not wanted)
    kept = f"; {floating} in float" if floating else ""
    but = f" but for {applied.operators_in_16_bit} operators in 16 bit" if applied.operators_in_16_bit else ""
    bits = "" if given["weight_bits"] == 8 else f" with weights of {given['weight_bits']} bits"
    bits += " by GPTQ" if given["gptq"] else ""
    answer(f"strategy {applied.strategy}: {quantized} in INT8{bits}{but}{kept}; model saved in")
    click.echo(applied.folder)
    named = "" if applied.remembered else f" {shlex.quote(str(applied.folder))}"
    next_command(f"quambase evaluate{named}", given["db"])


def _export(scales: Path, export: Path, mix: dict[str, Any], force: bool) -> None:
    """Write the scales in upstream's form, and say which gave way to others."""
    _check_names(scales, mix, upstream=True)
    from quambase.apply.upstream.act_scales import export_act_scales

    exported = export_act_scales(scales, export, **mix, force=force)
    _tell(exported.replaced, exported.notes)
    click.echo(exported.path)


def _build_upstream(
    mix: dict[str, Any],
    out: Path | None,
    compat: str | None,
    weight_bits: int,
    quantize_lm_head: bool,
    force: bool,
    gptq: bool,
    **given: Any,
) -> None:
    """Build the model with upstream's own package, and say which scales gave way to others."""
    if out is None or compat is not None or weight_bits != 8:
        raise click.UsageError("--backend quamba needs --out FOLDER, and --compat and --weights are not for it")
    _check_names(given["scales"], mix, upstream=True)
    del given["db"]
    from quambase.apply.upstream.backend import build_upstream

    built = build_upstream(given.pop("scales"), **mix, quantize_lm_head=quantize_lm_head, out=out, **given)
    _tell(built.replaced, built.notes)
    if not quantize_lm_head:
        note("note: upstream's own loader reads no model without --quantize-lm-head")
    click.echo(out)


def _tell(replaced: Sequence[object], notes: Sequence[str]) -> None:
    """Print the notes, and the scales that were replaced since upstream's kernel would wrap there."""
    answer(*notes)
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
