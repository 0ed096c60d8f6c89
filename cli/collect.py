"""`collect`, `quambase merge` and `quambase import`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.decorators import FC

from quambase.cli.terminal.complete import complete_models, complete_runs, complete_sites, complete_texts
from quambase.cli.terminal.console import (
    COUNT,
    SEED,
    Command,
    answer,
    database_option,
    device_option,
    next_command,
    note,
    one_each,
    options,
)
from quambase.schema.sites import WHOLE, find_site
from quambase.schema.sql.yardstick import DECODING, EVALUATED, outlier_line, worst_site

if TYPE_CHECKING:
    from quambase.collector.collect import CollectedRun

GROUPS = ("fixed", "quamba2", "none")
"""As quambase.collector.first_pass.CHOICES, whose import would load torch."""

MOST_WARNINGS = 3
"""How many sites with values that are not finite get a warning of their own."""

DTYPES = ("float16", "float32")
"""As quambase.collector.block_runners.DTYPES, for the same reason."""

SENSITIVITY_DOCUMENTS = 40
"""Of `collect --sensitivity` without a number: with 120 the scales chosen were the same."""

MOMENT_DOCUMENTS = 128
"""Of `collect --second-moments` without a number, as many as GPTQ's authors take."""

STATE_EVERY = 64
"""Of `collect --state-every` without a number: states then add a fifteenth to the values counted of a mamba-130m."""


def _with_usual(name: str, metavar: str, usual: int, text: str) -> Callable[[FC], FC]:
    """An option that takes a count, ``usual`` without a number."""
    text = f"{text}  [without a number: {usual}]"
    return click.option(name, type=COUNT, is_flag=False, flag_value=usual, metavar=metavar, help=text)


collect_options = options(
    click.option(
        "--model",
        required=True,
        metavar="NAME",
        shell_complete=complete_models,
        help="Bundled name, folder, short name (mamba-130m) or hub id.",
    ),
    click.option("--samples", default=512, show_default=True, type=COUNT, help="Documents to read."),
    click.option("--seq-len", default=512, show_default=True, type=COUNT, help="Tokens per document at most."),
    click.option(
        "--data",
        metavar="FILE|NAME",
        shell_complete=complete_texts,
        help="Text file, or a name such as python-docs:calibration. [default: the model's own]",
    ),
    database_option,
    click.option("--batch-size", default=32, show_default=True, type=COUNT, help="Documents per forward pass."),
    click.option(
        "--keep-tokens", default="64", show_default=True, help="Tokens whose raw activations are kept, or all."
    ),
    click.option(
        "--site",
        "sites",
        multiple=True,
        callback=one_each,
        shell_complete=complete_sites,
        help="Observe only this site; once for each. [default: every one]",
    ),
    click.option("--seed", default=0, show_default=True, type=SEED, help="Seed of the token sample."),
    click.option("--tokenizer", help="tokenizer.json, folder or hub id. [default: the model's own]"),
    click.option(
        "--groups",
        type=click.Choice(GROUPS),
        help="Sort a Mamba-2's heads and channels into groups: corrected, as upstream does, or not. [default: fixed]",
    ),
    click.option(
        "--group-samples",
        type=COUNT,
        help="Documents of the first pass that finds the groups. [default: 64; quamba2: all]",
    ),
    click.option(
        "--groups-from",
        metavar="RUN",
        shell_complete=complete_runs,
        help="Find the groups in a stored run's statistics instead.",
    ),
    _with_usual(
        "--sensitivity",
        "[DOCUMENTS]",
        SENSITIVITY_DOCUMENTS,
        "Also measure how much the output depends on each value, by a backward pass over so many documents; "
        "`analyze` then selects scales by their effect on the output.",
    ),
    _with_usual(
        "--second-moments",
        "[DOCUMENTS]",
        MOMENT_DOCUMENTS,
        "Also sum x x^T of what in_proj, x_proj and out_proj read, over so many documents: `apply --weights "
        "4bit:gptq` needs it. A matrix as wide as the site for each, which memory and run then hold.",
    ),
    _with_usual(
        "--state-every",
        "[TOKENS]",
        STATE_EVERY,
        "Also observe the recurrent state after every so many tokens of a document, by channel and by state index.",
    ),
    click.option(
        "--by-position",
        is_flag=True,
        help="Also divide every site by how many tokens of the document were read: 1 to 8, then up to each power of "
        "two. Every value is then counted twice, and each of these takes as much memory as the counts do.",
    ),
    click.option(
        "--by-block",
        is_flag=True,
        help="Also store the counts of each block of documents by itself: `quambase converge` then judges every "
        "strategy. They are large: each block of --batch-size documents takes half as much space as the run's or more.",
    ),
    click.option(
        "--shard",
        metavar="i/N",
        help="Only every N-th block of documents, from block i on (i from 0 to N - 1); see `quambase merge`. "
        "[default: all, or under torchrun the process's own]",
    ),
    device_option,
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Of the forward pass on CUDA; the CPU's is float32. [default: float16]",
    ),
)
"""What is run over which text, and what is stored of it."""


@click.command(cls=Command)
@collect_options
def collect(model: str, keep_tokens: str, shard: str | None, db: Path, **given: Any) -> None:
    """Run a model over calibration texts and store the exact distribution of its activations.

    A killed run resumes when the same command is given again. Under torchrun every process takes a shard, and the
    last one to finish merges them.

    \b
    Example:
      quambase collect --model mamba-5m --samples 128
      torchrun --nproc-per-node 2 $(which collect) --model mamba-5m --samples 128
    """
    from quambase.model.inputs.sources import default_data, find_sources

    # Before torch is imported, which takes seconds.
    for site in given["sites"]:
        find_site(site, family="")
    find_sources(model, given["tokenizer"], [given["data"] or default_data(model)])
    from quambase.collector.block_runners import take_local_device
    from quambase.collector.collect import collect as collect_run
    from quambase.collector.collect import parse_keep
    from quambase.collector.shards import parse_shard, torchrun_shard

    launched = None if shard else torchrun_shard(os.environ)
    if launched:
        take_local_device(os.environ)
    found = collect_run(
        model,
        keep_tokens=parse_keep(keep_tokens),
        shard=parse_shard(shard) if shard else launched,
        # The bars of several processes in one terminal would overwrite each other.
        progress=launched is None or launched.index == 0,
        db=db,
        **given,
    )
    if found.shard is None:
        _describe(found)
    else:
        _describe_shard(found, db, launched=launched is not None)


def _describe_shard(found: CollectedRun, db: Path, *, launched: bool) -> None:
    """Say where a shard is; the last of the processes that torchrun ``launched`` merges all, and describes the run."""
    from quambase.collector.merge import merge_if_last

    assert found.shard is not None
    run = found.manifest.run
    note(f"{'already there' if found.existed else 'written'}: {found.folder}, shard {found.shard} of run {run}")
    if not launched:
        note(f"when all {found.shard.count} shards are complete: quambase merge --db {db} [OTHER_DB...]")
    elif merged := merge_if_last(db, run, progress=True):
        _describe(merged)
    else:
        note("the process that finishes last merges the shards")


@click.command(cls=Command, name="import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--site", required=True, help="What to call the site.")
@click.option(
    "--layer",
    default=0,
    show_default=True,
    type=click.IntRange(-1, COUNT.max),
    help="Its layer number; -1 is the head.",
)
@click.option("--tensor", help="Which tensor of a file that holds several.")
@database_option
def import_tensor(file: Path, site: str, layer: int, tensor: str | None, db: Path) -> None:
    """Make a run of one site from a saved tensor (.pt, .npy, .safetensors).

    \b
    Example:
      quambase import activations.pt --site x_proj:input --layer 3
      quambase compare --site x_proj:input --layer 3
    """
    from quambase.collector.import_tensor import import_tensor as import_file

    _describe(import_file(file, site, layer=layer, tensor=tensor, db=db))


@click.command(cls=Command)
@click.argument("sources", nargs=-1, metavar="[FROM_DB]...", type=click.Path(path_type=Path))
@click.option("--run", help="Run id or its beginning, where shards of several runs are found.")
@database_option
def merge(sources: tuple[Path, ...], run: str | None, db: Path) -> None:
    """Make a complete run of the shards that `collect --shard i/N` wrote, the same bytes as without shards.

    They are taken from --db and from every FROM_DB, a database (or run, or shard) folder of another machine, in any
    order. The model is not needed.

    \b
    Example:
      quambase collect --model mamba-5m --samples 64 --shard 0/2 --db machine-0
      quambase collect --model mamba-5m --samples 64 --shard 1/2 --db machine-1
      quambase merge machine-0 machine-1
    """
    from quambase.collector.merge import merge as merge_shards

    _describe(merge_shards(db, sources, run, progress=True))


def _describe(found: CollectedRun) -> None:
    """Describe the run on stderr: its documents, its worst outliers, its folder and the next command."""
    from quambase.schema.stored.runs import read_run_table

    manifest, data = found.manifest, found.manifest.data
    family = manifest.model.family
    rows = read_run_table(found.folder, manifest, "site_stats").to_pylist()
    broken = [row for row in rows if row["nonfinite"] and row["group_name"] == WHOLE]
    for row in broken[:MOST_WARNINGS]:
        answer(
            f"warning: {row['site']} of layer {row['layer']} holds {row['nonfinite']} values that are NaN, infinite"
            f" or too large for 16 bits ({row['overflow']}); they are in no quantile"
        )
    if len(broken) > MOST_WARNINGS:
        answer(f"warning: so do {len(broken) - MOST_WARNINGS} more sites; `quambase doctor` lists them all")
    size = sum((found.folder / name).stat().st_size for name in manifest.tables)
    skipped = [f"{getattr(data, key):,} {key}" for key in ("empty", "truncated") if getattr(data, key)]
    seconds = None if found.existed else manifest.created.get("observe_seconds")
    answer(
        f"{data.documents:,} documents of {data.name}"
        + (f" ({', '.join(skipped)})" if skipped else "")
        + f", {data.tokens:,} tokens"
    )
    rate = f" in {seconds:.3g} s, {data.tokens / seconds:,.0f} tokens/s" if seconds else ""
    answer(f"{size / 1e6:.1f} MB of statistics{rate}")
    for title, wanted in (("outliers", EVALUATED), ("states (act in decoding only)", DECODING)):
        worst = worst_site(rows, family, wanted)
        if worst is not None:
            answer(f"{title}: {outlier_line(worst)}")
    # A path stays in one piece, so that it can be copied.
    note(f"{'already there' if found.existed else 'written'}: {found.folder}")
    next_command("quambase analyze", found.folder.parent.parent)
