"""`quambase demo`: the whole pipeline on the bundled models and texts, command by command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from quambase.cli.terminal.console import FOLDER, Command, fail
from quambase.schema.errors import OutputRefused

MARK = ".quambase-demo"
"""A file that marks a folder as the demo's."""


@click.command(cls=Command)
@click.option(
    "--out",
    type=FOLDER,
    default=Path("quambase-demo"),
    show_default=True,
    help="Folder to work in: a new one, or that of an earlier demo, which goes on where it was.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=4),
    default=24,
    show_default=True,
    help="Documents to calibrate with; a quarter as many evaluate.",
)
def demo(out: Path, samples: int) -> None:
    """Show the whole pipeline on the bundled models and texts: about a minute on two cores, no network.

    Prints every command as you would type it, and runs it in a new folder.

    \b
    Example:
      quambase demo
    """
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise OutputRefused(f"{out} holds files that are not the demo's; name a new folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    started = time.monotonic()
    for title, commands in steps(samples):
        click.secho(f"\n{title}", bold=True)
        for command in commands:
            _run(command, out)
    click.secho(f"\nDone in {time.monotonic() - started:.0f} s. In {out}:", bold=True)
    click.echo(ENDING)


def steps(samples: int) -> Iterator[tuple[str, list[str]]]:
    """Titles, and the commands under each."""
    few = max(2, samples // 4)
    yield (
        f"1. Run a Mamba-1 over {samples} texts and keep the exact distribution of every activation, and over "
        f"{samples // 2} of them backwards: how much each error matters to the output.",
        [f"quambase collect --model mamba-5m --samples {samples} --sensitivity {samples // 2}"],
    )
    yield (
        "2. Which sites that an INT8 model reads have outliers?",
        [
            'quambase sql "select layer, site, amax, q9995, amax / q9995 as ratio from site_stats '
            "where group_name = 'all' and site not like 'ssm_state%' order by ratio desc limit 5\""
        ],
    )
    yield (
        "3. Every strategy at every site, without the model; then one site in detail, with a picture.",
        ["quambase analyze", "quambase compare --site x_proj:input --layer 3 --value 2 --value 4.5"],
    )
    yield "4. Build the INT8 model with the scales that are predicted to cost least.", ["quambase apply"]
    yield (
        "5. Which strategy wins? Each against the floating-point model and upstream's, on the same texts.",
        [
            "quambase evaluate --strategy selected --strategy mse --strategy quamba "
            f"--data sample:evaluation --samples {few} --task perplexity"
        ],
    )
    yield "6. One page of the run, to look at and to send: it needs no network.", ["quambase report"]
    yield (
        "7. A Mamba-2, at its scan's input: heads and channels sorted into groups, and what a scale for each buys.",
        [
            f"quambase collect --model mamba2-8m --samples {few} --site x_conv_out:input --db mamba2-db",
            "quambase analyze --db mamba2-db --strategy mse --strategy quamba --out mamba2.parquet",
            'quambase sql --db mamba2-db --scales mamba2.parquet "select granularity, label, '
            "sum(groups)::int as scales, "
            "avg(gain_db) as gain_db from granularity_gain "
            "where site = 'x_conv_out:input' group by all order by all\"",
        ],
    )


ENDING = """\
  quambase-db/runs/*/       the database: plain Parquet and run.json
  scales.parquet            every scale of every strategy at every site, with its exact error
  compare.png               one site: original against reconstruction, error by magnitude
  quambase-db/models/*/     the INT8 model: safetensors, config, the scales it holds
  quambase-db/results/*/    every document's result: compare strategies again without running them
  report.html               the answer, every site in pictures, the tables: open it in a browser
  mamba2-db/, mamba2.parquet    the same of a Mamba-2
Next, there:
  quambase evaluate --strategy all    every strategy on every bundled text; some minutes on two cores
  quambase                            what the folder holds, and what can be done with it"""


def _run(command: str, folder: Path) -> None:
    """Print a command and run it in the demo's folder, without the network."""
    click.secho(f"$ {command}", bold=True)
    sys.stdout.flush()
    program = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(program, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    if done.returncode:
        fail(f"the demo ended with this command; once it is mended, `quambase demo --out {folder}` goes on")
