"""`quambase diff`: two results of the same documents, compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from quambase.cli.terminal.console import PEOPLE, SEED, Command, answer, database_option, output_options, wrapped
from quambase.cli.terminal.formats import emit
from quambase.schema.errors import DataInvalid, QuambaseError

if TYPE_CHECKING:
    from quambase.apply.evaluation.diff.figures import Compared

EXPECTED = (
    "expected two sample logs of lm-eval (samples_*.jsonl, written with --log_samples) or the ids of two stored "
    "evaluations (`quambase results --list`)"
)


@click.command(cls=Command)
@click.argument("a")
@click.argument("b")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the sign flips.")
@database_option
@output_options
def diff(a: str, b: str, seed: int, db: Path, format_: str, output: Path | None) -> None:
    """Is B worse than A? Two lm-eval sample logs, or two stored evaluations, paired document by document.

    A and B are files samples_*.jsonl that lm-eval wrote with --log_samples, of any model, or ids of evaluations in --db
    (or their beginnings). McNemar's exact test where answers are right or wrong, else sign flips of documents.

    \b
    Example:
      quambase diff samples_a.jsonl samples_b.jsonl
    """
    from quambase.apply.evaluation.diff.words import sentences, short_table

    found = _compared(a, b, db, seed)
    shown = format_ in PEOPLE and not output
    for line in sentences(found.table):
        click.echo(wrapped(line), err=not shown)
    if shown:
        click.echo()
    emit(short_table(found.table) if shown else found.table, format_, output)
    answer(f"A: {found.a}")
    answer(f"B: {found.b}")
    answer(*found.notes)


def _compared(a: str, b: str, db: Path, seed: int) -> Compared:
    """The comparison of two logs, or of two evaluations. DataInvalid: neither, or one of each."""
    logs = [Path(name).exists() for name in (a, b)]
    if all(logs):
        from quambase.apply.evaluation.diff.logs import compare_logs

        return compare_logs(Path(a), Path(b), seed)
    if any(logs) or not db.exists():
        missing = [name for name, there in zip((a, b), logs, strict=True) if not there]
        raise DataInvalid(f"there is no file {' or '.join(missing)}; {EXPECTED}")
    from quambase.apply.evaluation.diff.evaluations import compare_evaluations
    from quambase.apply.evaluation.stored import find_evaluation

    try:
        first, second = find_evaluation(db, a), find_evaluation(db, b)
    except QuambaseError as error:
        raise DataInvalid(f"{error}; {EXPECTED}") from None
    return compare_evaluations(first, second, seed)
