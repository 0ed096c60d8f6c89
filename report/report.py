"""`report`: one run as an HTML page that needs no network and no other file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quambase.apply.evaluation.summary_text import rank
from quambase.report.answer import answer
from quambase.report.contents import gather
from quambase.report.page import render
from quambase.schema.files import MARK, refuse_foreign_file, replacing
from quambase.schema.progress import Shown

OUT = Path("report.html")


@dataclass(frozen=True)
class Report:
    """A page that was written.

    path     of the file
    size     in bytes
    run      the run that it shows
    sites    how many sites have a page
    summary  the answer that it opens on, a sentence each
    command  what to do next
    notes    what is left out, and which run was opened
    """

    path: Path
    size: int
    run: str
    sites: int
    summary: list[str]
    command: str
    notes: list[str]


def report(
    db: str | Path = Path("quambase-db"),
    run: str | None = None,
    scales: str | Path | None = None,
    out: str | Path = OUT,
    evaluation: str | None = None,
    converge: bool | None = None,
    progress: Shown = False,
    force: bool = False,
) -> Report:
    """Write the page of a run.

    db          database folder
    run         None for the newest complete run, or a run id
    scales      scale table; None: the database's or this folder's ``scales.parquet``, where it is of the run
    out         file to write, whole or not at all
    evaluation  a stored evaluation, by its id; None: the newest of the run
    converge    also judge whether the documents are enough, which takes as long as `converge`; None: where the run was
                collected with ``by_block``
    progress    shown on stderr, or a function that is called with (scales done, scales in all)
    force       replace ``out`` even if it is no report of quambase's

    The same run, scale table and evaluation give the same bytes.
    Errors: OutputRefused; ScalesInvalid; UnknownName (also: several runs); DatabaseInvalid (no run, a damaged file).
    """
    out = Path(out)
    refuse_foreign_file(out, _ours, "report", force=force)
    given = None if scales is None else Path(scales)
    contents = gather(Path(db), run, given, evaluation, converge, progress)
    ranked = [] if contents.summary is None else rank(contents.summary)
    found = answer(contents, ranked)
    page = render(contents, ranked, found).encode("utf-8", "replace")
    with replacing(out) as temporary:
        temporary.write_bytes(page)
    said = [*found.measured, *([found.missing] if found.missing else [])] or found.predicted
    return Report(out, len(page), contents.manifest.run, len(contents.pages), said, found.command, contents.notes)


def _ours(path: Path) -> bool:
    """Whether a file is a page of ours: its generator is named at its beginning."""
    with path.open("rb") as file:
        return f'<meta name="generator" content="{MARK}">'.encode() in file.read(1 << 16)
