"""Evaluate INT8 models against the floating-point one, document by document, resumably.

`results/<evaluation id>/`: one part per block while it runs, then `results.parquet` and, last,
`evaluation.json`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from quambase.apply.evaluation.candidates import Candidates, from_folder, from_model, from_scales
from quambase.apply.evaluation.scoring import (
    FLOAT,
    LAST_WORD,
    PERPLEXITY,
    Cost,
    Item,
    LanguageModel,
    Score,
    blocks,
    last_word_items,
    perplexity_items,
    score,
)
from quambase.apply.evaluation.summary import summarize
from quambase.apply.int8.build import int8_on_cuda
from quambase.apply.int8.model_folder import last_applied
from quambase.model.checkpoint import LoadedModel
from quambase.model.cuda.compiler import CompilationFailed
from quambase.model.language_model import floating_model
from quambase.model.names import BUNDLED_DATA, SAMPLE_AUTHORS, data_name
from quambase.model.operators.choice import choose_device
from quambase.model.sources import find_given, is_bundled
from quambase.model.text import read_documents
from quambase.schema import FORMAT_VERSION
from quambase.schema.answer import PrintsAsTable
from quambase.schema.errors import DatabaseInvalid, DataInvalid, RunBusy, UnknownName
from quambase.schema.files import file_sha256, local_folder, locked, remove_strays, replacing
from quambase.schema.progress import Progress, Shown, remark
from quambase.schema.results import (
    EVALUATION,
    RESULTS_FILE,
    finished_evaluations,
    next_number,
    read_evaluation,
    read_results,
)
from quambase.schema.scale_table import Scale
from quambase.schema.sites import find_site
from quambase.schema.tables import DOCUMENTS, RESULTS, read_table, write_table

BLOCK_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Tokens of one forward pass; part of the evaluation id, since float32 rows depend on the batch."""

PARTS = "parts"
"""Folder, inside an unfinished evaluation, of the rows of each finished block."""

BUNDLED_TASKS = (
    (PERPLEXITY, "sample:evaluation"),
    (PERPLEXITY, "python-docs:evaluation"),
    (LAST_WORD, "sample:last-word"),
)
"""A bundled model's texts by default: its own, real text beside it, its own last-word set."""


@dataclass(frozen=True)
class TaskData:
    """One task's documents; how many had nothing to predict and how many the calibration run held."""

    task: str
    data: str
    items: list[Item]
    skipped: int
    calibrated: int | None

    def notes(self, model: str) -> Iterator[str]:
        """What a reader of the figures must know."""
        if self.skipped:
            yield f"{self.data}: {self.skipped} documents without a target were skipped"
        if self.calibrated:
            yield (
                f"warning: {self.data}: {self.calibrated} of {len(self.items)} documents were in the "
                "calibration run; figures on them flatter the scales"
            )
        if self.data in BUNDLED_DATA and self.task == PERPLEXITY:
            authors = " and ".join(SAMPLE_AUTHORS)
            if model in SAMPLE_AUTHORS:
                yield f"{self.data} was written by {authors}: perplexity there is low by construction"
            else:
                yield f"{self.data} was written by the models {authors}: no measure of {model} on real text"


@dataclass(frozen=True, repr=False)
class Evaluation(PrintsAsTable):
    """A finished evaluation: ``results`` has the columns of tables.RESULTS."""

    id: str
    folder: Path
    results: pa.Table
    about: dict[str, Any]
    notes: list[str]

    def shown(self) -> pa.Table:
        """Each strategy on each text in one row, with KL and perplexity and their 95 % intervals."""
        columns = ["data", "task", "strategy", "documents"]
        figures = [f"{name}{end}" for name in ("kl", "perplexity") for end in ("", "_low", "_high")]
        return summarize(self.results).select([*columns, *figures])


def evaluate(
    folder: str | Path | None = None,
    *,
    scales: str | Path | None = None,
    strategies: Sequence[str] = ("all",),
    granularities: Sequence[str] = (),
    floating: bool = False,
    data: str | Path | Sequence[str | Path] = (),
    samples: int | None = None,
    task: str = "both",
    window: int = 2048,
    quantize_lm_head: bool = False,
    quantize_embedding: bool = False,
    compat: str | None = None,
    db: str | Path = Path("quambase-db"),
    model: str | Path | None = None,
    device: str = "auto",
    progress: Shown = False,
) -> Evaluation:
    """Score an applied model (``folder``, default the one applied last) or every strategy of a scale table.

    strategies  labels of ``scales``, "selected", or "all"
    granularities  with ``scales``, of a Mamba-2: how finely scales divide its sites, each of these; "all" for every one
                the table has; none for its finest
    floating    score nothing but the floating-point ``model``
    data        texts (`quambase.model.text`); default: the bundled evaluation texts, for a bundled model
    samples     the first so many documents of each
    task        "perplexity", "last-word" or "both"
    window      tokens; longer documents are cut in non-overlapping windows
    device      "auto" (CUDA if there is any), "cpu" or "cuda"; results of either are kept apart
    progress    shown on stderr, or a function that is called with (documents done, documents in all)
    A killed evaluation resumes: the same call finds its finished blocks.
    Errors: ScalesInvalid, UnknownName, CheckpointInvalid, ModelNotFound, DataInvalid, RunBusy.
    """
    db = local_folder(db)
    model = None if model is None else str(model)
    texts = [str(data)] if isinstance(data, str | Path) else [str(text) for text in data]
    find_given(model, texts)
    where = choose_device(device)
    with Progress(progress) as shown:
        shown.say("loading the model")
        if floating:
            if model is None:
                raise DataInvalid("no model is named; say which floating-point model to evaluate: --float --model NAME")
            if not texts and not is_bundled(model):
                raise _no_text(model)
            candidates = from_model(model)
        elif scales is None:
            candidates = from_folder(Path(folder) if folder else last_applied(db), model)
        else:
            candidates = from_scales(
                Path(scales),
                strategies,
                model,
                quantize_lm_head,
                quantize_embedding=quantize_embedding,
                compat=compat,
                granularities=granularities,
                db=db,
            )
        with _enough_memory():
            models = _Models.on(where, candidates, required=device != "auto")
        shown.say("tokenizing")
        known, unknown = _calibration_hashes(db, candidates.run)
        labels = _labels(texts)
        tasks = [
            read_task(name, text, labels.get(text, text), candidates.source, samples, window, known)
            for name, text in plan_tasks(candidates.source, task, texts)
        ]
        identity = {
            **candidates.identity(),
            "tasks": [[t.task, t.data, [item.sha256 for item in t.items]] for t in tasks],
            "window": window,
            "block_tokens": BLOCK_TOKENS[models.device.type],
            "device": models.device.type,
            "format_version": FORMAT_VERSION,
        }
        evaluation = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        target = db / "results" / evaluation
        named = [f"scales of run {candidates.run}"] if candidates.run else []
        notes = [
            *named,
            *candidates.notes,
            *unknown,
            *(note for t in tasks for note in t.notes(candidates.source.name)),
        ]
        if models.device.type == "cuda":
            notes.append(f"run on {torch.cuda.get_device_name(models.device)}; the CPU's results are kept apart")
        if candidates.skipped:
            notes.append(f"not loadable as one INT8 scale per site, left out: {', '.join(candidates.skipped)}")
        about = _about(evaluation, candidates, tasks, models.device, window, notes)
        if not (target / EVALUATION).exists():
            with locked(target, f"evaluation {evaluation}"):
                _run_blocks(target, _Runner(candidates, models, evaluation), tasks, shown)
                _finish(target, about | {"number": next_number(db)})
        _clear(target)
        return Evaluation(evaluation, target, read_results(target), about, notes)


def _finish(target: Path, about: dict[str, Any]) -> None:
    """Write evaluation.json, which makes the evaluation finished."""
    content = about | {"results_sha256": file_sha256(target / RESULTS_FILE)}
    with replacing(target / EVALUATION) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _clear(target: Path) -> None:
    """Remove what only an unfinished evaluation needs, also where a process was killed before it did."""
    if (target / PARTS).exists() or (target / ".lock").exists():
        with suppress(RunBusy, OSError), locked(target):
            shutil.rmtree(target / PARTS, ignore_errors=True)
            remove_strays(target)


def _about(
    evaluation: str,
    candidates: Candidates,
    tasks: Sequence[TaskData],
    device: torch.device,
    window: int,
    notes: list[str],
) -> dict[str, Any]:
    """What evaluation.json says."""
    return {
        "format_version": FORMAT_VERSION,
        "evaluation": evaluation,
        "model": candidates.source.name,
        "weights_sha256": candidates.source.weights_sha256,
        "scales": candidates.scales,
        "run": candidates.run,
        "strategies": list(candidates.models),
        "device": device.type,
        "window": window,
        "tasks": [
            {
                "task": t.task,
                "data": t.data,
                "documents": len(t.items),
                "skipped": t.skipped,
                "in_calibration_run": t.calibrated,
                "self_generated": t.data in BUNDLED_DATA,
            }
            for t in tasks
        ],
        "notes": notes,
    }


def plan_tasks(source: LoadedModel, task: str, data: Sequence[str]) -> list[tuple[str, str]]:
    """(task, data) pairs to evaluate. DataInvalid: no ``data`` for a model that brings none."""
    names = (PERPLEXITY, LAST_WORD) if task == "both" else (task,)
    if data:
        return [(name, text) for text in data for name in names]
    if not source.bundled:
        raise _no_text(source.name)
    return [(name, text) for name, text in BUNDLED_TASKS if name in names]


def _no_text(model: str) -> DataInvalid:
    return DataInvalid(f"no evaluation text for {model}; name one with --data (.jsonl, .txt, .parquet, .csv)")


def _labels(texts: Sequence[str]) -> dict[str, str]:
    """What results call each text: its file's name, or the whole path where two files have one name."""
    names = [data_name(text) for text in texts]
    paths = {name: {path for other, path in names if other == name} for name, _ in names}
    return {t: str(path) if len(paths[name]) > 1 else name for t, (name, path) in zip(texts, names, strict=True)}


def read_task(
    task: str,
    data: str,
    label: str,
    source: LoadedModel,
    samples: int | None,
    window: int,
    known: frozenset[str] | None,
) -> TaskData:
    """Read and tokenize one task's documents. DataInvalid: nothing to predict in any of them."""
    documents = list(read_documents(data, samples))
    make = last_word_items if task == LAST_WORD else perplexity_items
    items = make(documents, source.tokenizer, window)
    if not items:
        raise DataInvalid(f"{data}: none of its {len(documents)} documents has a target for {task}")
    calibrated = None if known is None else sum(item.sha256 in known for item in items)
    return TaskData(task, label, items, len(documents) - len(items), calibrated)


def _calibration_hashes(db: Path, run: str | None) -> tuple[frozenset[str] | None, list[str]]:
    """Hashes of the calibration run's documents, None where they are not known, and a line if they should be."""
    path = db / "runs" / str(run) / "documents.parquet"
    if run is None or not path.exists():
        return None, []
    try:
        documents = read_table(path, DOCUMENTS)
    except DatabaseInvalid as error:
        return None, [f"warning: whether the calibration run held these documents is not known: {error}"]
    return frozenset(str(digest) for digest in pc.unique(documents["sha256"]).to_pylist()), []


def _run_blocks(target: Path, runner: _Runner, tasks: Sequence[TaskData], progress: Progress) -> None:
    """Score every block that has no part yet, then write the parts' rows as one table."""
    size = BLOCK_TOKENS[runner.models.device.type]
    planned = [(t, block) for t in tasks for block in blocks(t.items, size)]
    paths = [target / PARTS / f"{number:06d}.parquet" for number in range(len(planned))]
    there = [path.exists() for path in paths]
    works = [runner.work(block) for _, block in planned]
    progress.start(
        "evaluate",
        sum(len(block) for _, block in planned),
        sum(works),
        done=(
            sum(len(block) for (_, block), done in zip(planned, there, strict=True) if done),
            sum(work for work, done in zip(works, there, strict=True) if done),
        ),
    )
    for path, done, (task, block) in zip(paths, there, planned, strict=True):
        if not done:
            with _enough_memory():
                scored = runner.score(task, block, progress)
            write_table(path, "results", scored, RESULTS)
    parts = [read_table(path, RESULTS) for path in paths]
    write_table(target / RESULTS_FILE, "results", pa.concat_tables(parts), RESULTS)


@contextmanager
def _enough_memory() -> Iterator[None]:
    """DataInvalid where a CUDA device has too little."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        raise DataInvalid(f"the CUDA device has too little memory for this model ({first}); say --device cpu") from None


@dataclass(frozen=True)
class _Models:
    """What is run, on one device: the float32 model and, by label, the INT8 ones."""

    device: torch.device
    reference: LanguageModel
    int8: Mapping[str, LanguageModel]

    @classmethod
    def on(cls, device: torch.device, candidates: Candidates, *, required: bool) -> _Models:
        """The CPU's models, with a warning, where the INT8 kernels cannot be compiled for ``device``; DataInvalid if it
        is ``required``.
        """
        source = candidates.source
        if device.type == "cuda":
            try:
                int8 = int8_on_cuda(candidates.models, device)
                return cls(device, floating_model(source.any_weights, device), int8)
            except CompilationFailed as error:
                if required:
                    raise DataInvalid(f"INT8 does not run on this CUDA device: {error}; say --device cpu") from None
                remark(f"warning: evaluating on the CPU: {error}")
        return cls(torch.device("cpu"), source.floating(), candidates.models)


class _Runner:
    """Scores blocks; strategies whose scales differ only where prefill does not read them are run once."""

    def __init__(self, candidates: Candidates, models: _Models, evaluation: str) -> None:
        self.candidates = candidates
        self.models = models
        self.evaluation = evaluation
        self.same: dict[tuple[Scale, ...], list[str]] = {}
        family = candidates.source.family
        for label, model in candidates.models.items():
            scales = model.scales.items()
            read = tuple(scale for (_, site), scale in scales if not find_site(site, family).decode_only)
            self.same.setdefault(read, []).append(label)

        weights = candidates.source.any_weights
        layers = sum(tensor.numel() for layer in weights.layers for tensor in vars(layer).values())
        self.cost = Cost(layers, weights.lm_head.numel())

    def work(self, items: Sequence[Item]) -> float:
        """What a block costs, in the measure of `Cost`."""
        return self.cost.of(items) * (1 + len(self.same))

    def score(self, task: TaskData, items: Sequence[Item], progress: Progress) -> pa.Table:
        distinct = {labels[0]: self.models.int8[labels[0]] for labels in self.same.values()}
        scores = score(self.models.reference, distinct, items, self.cost, progress)
        tables = [self._table(FLOAT, scores[FLOAT], task, items)]
        representative = {label: labels[0] for labels in self.same.values() for label in labels}
        for label in self.candidates.models:
            tables.append(self._table(label, scores[representative[label]], task, items))
        return pa.concat_tables(tables)

    def _table(self, label: str, scored: Score, task: TaskData, items: Sequence[Item]) -> pa.Table:
        model = self.candidates.models.get(label)  # none: the floating-point one
        count = len(items)
        constant: dict[str, Any] = {
            "evaluation": self.evaluation,
            "model": self.candidates.source.name,
            "scales": self.candidates.scales,
            "strategy": label,
            "task": task.task,
            "data": task.data,
            "quantize_lm_head": model is not None and model.quantized_lm_head,
            "quantize_embedding": model is not None and model.weights.embedding_scales is not None,
            "compat_upstream": model is not None and model.compat is not None,
        }
        columns = {name: [value] * count for name, value in constant.items()} | {
            "document": [item.document for item in items],
            "sha256": [item.sha256 for item in items],
            "tokens": [item.targets for item in items],
            "nll": scored.nll,
            "kl": scored.kl,
            "top1_agreement": scored.top1,
            "top1_right": scored.right,
            "correct": scored.correct if task.task == LAST_WORD else [None] * count,
        }
        return pa.table({f.name: pa.array(columns[f.name], f.type) for f in RESULTS}, schema=RESULTS)


def find_evaluation(db: str | Path, evaluation: str | None = None) -> Evaluation:
    """A stored evaluation by (the beginning of) its id, else the newest. UnknownName, DatabaseInvalid."""
    db = Path(db)
    if evaluation is None:
        found, notes = finished_evaluations(db)
        if not found:
            raise DatabaseInvalid(notes[0] if notes else f"{db} holds no finished evaluation; run `evaluate`")
        about = found[-1]
    else:
        names = [path.parent.name for path in (db / "results").glob(f"*/{EVALUATION}")]
        matching = [name for name in names if name.startswith(evaluation)]
        if len(matching) != 1:
            raise UnknownName.of("evaluation", evaluation, names, where=str(db))
        about, notes = read_evaluation(db / "results" / matching[0]), []
    folder = db / "results" / str(about["evaluation"])
    return Evaluation(folder.name, folder, read_results(folder), about, [*about["notes"], *notes])


def list_evaluations(db: str | Path) -> tuple[pa.Table, list[str]]:
    """One row per finished evaluation, oldest first: evaluation, model, strategies, texts, scales. Then a line for each
    that is damaged. DatabaseInvalid if there is none.
    """
    found, notes = finished_evaluations(Path(db))
    if not found:
        raise DatabaseInvalid(notes[0] if notes else f"{db} holds no finished evaluation; run `evaluate`")
    rows = [
        {
            "evaluation": about["evaluation"],
            "model": about["model"],
            "strategies": ", ".join(map(str, about["strategies"])),
            "texts": ", ".join(f"{t['data']} ({t['task']}, {t['documents']} documents)" for t in about["tasks"]),
            "scales": about["scales"],
        }
        for about in found
    ]
    return pa.Table.from_pylist(rows), notes
