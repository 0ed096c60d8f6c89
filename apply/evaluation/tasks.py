"""The texts of an evaluation: which ones, their tokens, and how many the calibration run held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from quambase.apply.evaluation.scoring import Item, last_word_items, perplexity_items
from quambase.model.checkpoint import LoadedModel
from quambase.model.inputs.names import BUNDLED_DATA, SAMPLE_AUTHORS, data_name
from quambase.model.inputs.text import read_documents
from quambase.schema.errors import DatabaseInvalid, DataInvalid
from quambase.schema.stored.manifest import MANIFEST, Manifest
from quambase.schema.stored.results import DECODE, LAST_WORD, PERPLEXITY, PREFILL
from quambase.schema.stored.runs import read_run_table

BUNDLED_TASKS = (
    (PERPLEXITY, "sample:evaluation"),
    (PERPLEXITY, "python-docs:evaluation"),
    (LAST_WORD, "sample:last-word"),
)
"""A bundled model's texts by default: its own, real text beside it, its own last-word set."""


@dataclass(frozen=True)
class TaskData:
    """One task's documents; how many had nothing to predict and how many the calibration run held.

    prompt  the tokens of a sequence that are not predicted, if figures are kept by position after them
    """

    task: str
    data: str
    items: list[Item]
    skipped: int
    calibrated: int | None
    prompt: int | None = field(default=None, kw_only=True)

    @property
    def answered(self) -> bool:
        """Whether a document, or a request, is right or wrong as a whole."""
        return self.task not in (PERPLEXITY, PREFILL, DECODE)

    @property
    def decodes(self) -> bool:
        """Whether INT8 models take what follows the prompt token by token."""
        return self.task == DECODE

    @property
    def unit(self) -> str:
        """What its items are."""
        return "documents"

    def about(self) -> dict[str, Any]:
        """What evaluation.json says of it."""
        return {
            "task": self.task,
            "data": self.data,
            "documents": len(self.items),
            "skipped": self.skipped,
            "in_calibration_run": self.calibrated,
            "self_generated": self.data in BUNDLED_DATA,
        } | ({} if self.prompt is None else {"prompt": self.prompt})

    def identity(self) -> list[Any]:
        """All that determines its rows besides the models, as JSON."""
        about = [self.task, self.data, [[item.sha256, item.cluster] for item in self.items]]
        return about if self.prompt is None else [*about, self.prompt]

    def notes(self, model: str) -> Iterator[str]:
        """Notes for whoever reads the figures, a line each."""
        if self.skipped:
            yield f"{self.data}: {self.skipped} documents without a target were skipped"
        if self.calibrated:
            yield (
                f"warning: {self.data}: {self.calibrated} of {len(self.items)} documents were in the "
                "calibration run; figures on them flatter the scales"
            )
        if self.data in BUNDLED_DATA and not self.answered:
            authors = " and ".join(SAMPLE_AUTHORS)
            if model in SAMPLE_AUTHORS:
                yield f"{self.data} was written by {authors}: perplexity there is low by construction"
            else:
                yield f"{self.data} was written by the models {authors}: no measure of {model} on real text"


def read_tasks(
    task: str,
    texts: Sequence[str],
    source: LoadedModel,
    samples: int | None,
    window: int,
    db: Path,
    run: str | None,
    prompt: int | None = None,
) -> tuple[list[TaskData], list[str]]:
    """Read and tokenize the documents of every task; then what a user should know, a line each.

    run  the calibration run in ``db`` whose documents the texts may share
    prompt  tokens of each prompt; None: nothing is decoded
    The other parameters are those of `quambase.apply.evaluation.evaluate.evaluate`.

    DataInvalid: no ``texts`` for a model that brings none, or nothing to predict in any document of one.
    """
    known, notes = _calibration_hashes(db, run)
    labels = _labels(texts)
    found = []
    for name, text in _plan(source, task, texts):
        documents = list(read_documents(text, samples))
        if name == LAST_WORD:
            items = last_word_items(documents, source.tokenizer, window)
        else:
            items = perplexity_items(documents, source.tokenizer, window, prompt or 1)
        if not items:
            after = "" if prompt is None else f" after a prompt of {prompt} tokens (--prompt-tokens)"
            raise DataInvalid(f"{text}: none of its {len(documents)} documents has a target for {name}{after}")
        calibrated = None if known is None else sum(item.sha256 in known for item in items)
        found.append(
            TaskData(name, labels.get(text, text), items, len(documents) - len(items), calibrated, prompt=prompt)
        )
    return found, notes


def _calibration_hashes(db: Path, run: str | None) -> tuple[frozenset[str] | None, list[str]]:
    """SHA-256 of each document of ``run``, None where they are not known, and a line if they should be."""
    folder = db / "runs" / str(run)
    if run is None or not (folder / MANIFEST).exists():
        return None, []
    try:
        documents = read_run_table(folder, Manifest.load(folder), "documents")
    except DatabaseInvalid as error:
        return None, [f"warning: whether the calibration run held these documents is not known: {error}"]
    return frozenset(map(str, pc.unique(documents["sha256"]).to_pylist())), []


def _plan(source: LoadedModel, task: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """(task, text) pairs to evaluate."""
    if texts or source.bundled:
        of_texts = [(name, text) for text in texts for name in (PERPLEXITY, LAST_WORD)] or BUNDLED_TASKS
        if task == DECODE:
            unscored = [text for name, text in of_texts if name == PERPLEXITY]
            return [(name, text) for text in unscored for name in (DECODE, PREFILL)]
        return [(name, text) for name, text in of_texts if task in ("both", name)]
    raise no_text(source.name)


def no_text(model: str) -> DataInvalid:
    """The error for a model that has no text of its own, when none was named."""
    return DataInvalid(f"no evaluation text for {model}; name one with --data (.jsonl, .txt, .parquet, .csv)")


def _labels(texts: Sequence[str]) -> dict[str, str]:
    """The name of each text in results: its file's name, or its whole path if two files have the same name."""
    names = [data_name(text) for text in texts]
    paths = {name: {path for other, path in names if other == name} for name, _ in names}
    return {t: str(path) if len(paths[name]) > 1 else name for t, (name, path) in zip(texts, names, strict=True)}
