"""Evaluate INT8 models against the floating-point one, document by document, resumably.

`results/<evaluation id>/`: one part per block while it runs, then `results.parquet` and, last,
`evaluation.json`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from quambase.apply.candidates import Candidates, from_folder, from_model, from_scales
from quambase.apply.device import int8_on_cuda
from quambase.apply.scoring import (
    FLOAT,
    LAST_WORD,
    PERPLEXITY,
    Item,
    LanguageModel,
    Score,
    blocks,
    last_word_items,
    perplexity_items,
    score,
)
from quambase.apply.store import last_applied
from quambase.model.cuda import CompilationFailed
from quambase.model.device import choose_device, device_model
from quambase.model.load import LoadedModel
from quambase.model.text import BUNDLED_DATA, SAMPLE_AUTHORS, read_documents
from quambase.schema import FORMAT_VERSION
from quambase.schema.errors import DatabaseInvalid, DataInvalid, RunBusy, UnknownName
from quambase.schema.scales import Scale
from quambase.schema.sites import find_site
from quambase.schema.tables import RESULTS, read_table, replacing, write_table

EVALUATION, RESULTS_FILE = "evaluation.json", "results.parquet"

BLOCK_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Tokens of one forward pass; part of the evaluation id, since float32 rows depend on the batch."""

TASKS = (PERPLEXITY, LAST_WORD, "both")

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


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: ``results`` has the columns of tables.RESULTS."""

    id: str
    folder: Path
    results: pa.Table
    about: dict[str, Any]
    notes: list[str]


def evaluate(
    folder: Path | None = None,
    *,
    scales: Path | None = None,
    strategies: Sequence[str] = ("all",),
    granularities: Sequence[str] = (),
    floating: bool = False,
    data: Sequence[str] = (),
    samples: int | None = None,
    task: str = "both",
    window: int = 2048,
    quantize_lm_head: bool = False,
    quantize_embedding: bool = False,
    compat: str | None = None,
    db: Path = Path("quambase-db"),
    model: str | None = None,
    device: str = "auto",
    progress: bool = False,
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
    A killed evaluation resumes: the same call finds its finished blocks.
    Errors: ScalesInvalid, UnknownName, CheckpointInvalid, ModelNotFound, DataInvalid, RunBusy.
    """
    where = choose_device(device)
    if floating:
        if model is None:
            raise DataInvalid("no model is named; say which floating-point model to evaluate: --float --model NAME")
        candidates = from_model(model)
    elif scales is None:
        candidates = from_folder(folder or last_applied(db), model)
    else:
        candidates = from_scales(
            scales,
            strategies,
            model,
            quantize_lm_head,
            quantize_embedding=quantize_embedding,
            compat=compat,
            granularities=granularities,
        )
    with _enough_memory():
        models = _Models.on(where, candidates, required=device != "auto")
    known = _calibration_hashes(db, candidates.run)
    tasks = [
        read_task(name, text, candidates.source, samples, window, known)
        for name, text in plan_tasks(candidates.source, task, data)
    ]
    identity = {
        **candidates.identity,
        "tasks": [[t.task, t.data, [item.sha256 for item in t.items]] for t in tasks],
        "samples": samples,
        "window": window,
        "block_tokens": BLOCK_TOKENS[models.device.type],
        "format_version": FORMAT_VERSION,
        **({} if models.device.type == "cpu" else {"device": models.device.type}),
    }
    evaluation = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    target = db / "results" / evaluation
    results = _run_blocks(target, _Runner(candidates, models, evaluation), tasks, progress)
    notes = [note for t in tasks for note in t.notes(candidates.source.name)]
    if models.device.type == "cuda":
        notes.append(f"run on {torch.cuda.get_device_name(models.device)}; the CPU's results are kept apart")
    if candidates.skipped:
        notes.append(f"not loadable as one INT8 scale per site, left out: {', '.join(candidates.skipped)}")
    about = _about(evaluation, candidates, tasks, models.device, window, notes)
    with replacing(target / EVALUATION) as temporary:
        temporary.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Evaluation(evaluation, target, results, about, notes)


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
        raise DataInvalid(f"no evaluation text for {source.name}; name one with --data (.jsonl, .txt, .parquet, .csv)")
    return [(name, text) for name, text in BUNDLED_TASKS if name in names]


def read_task(
    task: str, data: str, source: LoadedModel, samples: int | None, window: int, known: frozenset[str] | None
) -> TaskData:
    """Read and tokenize one task's documents. DataInvalid: nothing to predict in any of them."""
    documents = list(read_documents(data, samples))
    make = last_word_items if task == LAST_WORD else perplexity_items
    items = make(documents, source.tokenizer, window)
    if not items:
        raise DataInvalid(f"{data}: none of its {len(documents)} documents has a target for {task}")
    calibrated = None if known is None else sum(item.sha256 in known for item in items)
    return TaskData(task, data, items, len(documents) - len(items), calibrated)


def _calibration_hashes(db: Path, run: str | None) -> frozenset[str] | None:
    """Hashes of the calibration run's documents; None where the run is not in this database."""
    path = db / "runs" / str(run) / "documents.parquet"
    if run is None or not path.exists():
        return None
    column = pq.read_table(path, columns=["sha256"], partitioning=None)["sha256"]
    return frozenset(str(digest) for digest in pc.unique(column).to_pylist())


def _run_blocks(target: Path, runner: _Runner, tasks: Sequence[TaskData], progress: bool) -> pa.Table:
    if (target / EVALUATION).exists():
        return read_table(target / RESULTS_FILE, RESULTS)
    with _locked(target):
        size = BLOCK_TOKENS[runner.models.device.type]
        planned = [(t, block) for t in tasks for block in blocks(t.items, size)]
        total = sum(item.tokens for _, block in planned for item in block)
        parts = []
        with tqdm(total=total, unit="tok", unit_scale=True, disable=not progress, desc="evaluate") as bar:
            for number, (task, block) in enumerate(planned):
                path = target / "parts" / f"{number:06d}.parquet"
                if not path.exists():
                    with _enough_memory():
                        scored = runner.score(task, block)
                    write_table(path, "results", scored, RESULTS)
                parts.append(read_table(path, RESULTS))
                bar.update(sum(item.tokens for item in block))
        results = pa.concat_tables(parts)
        write_table(target / RESULTS_FILE, "results", results, RESULTS)
        for number in range(len(planned)):
            (target / "parts" / f"{number:06d}.parquet").unlink()
        (target / "parts").rmdir()
    return results


@contextmanager
def _enough_memory() -> Iterator[None]:
    """DataInvalid where a CUDA device has too little."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        raise DataInvalid(f"the CUDA device has too little memory for this model ({first}); say --device cpu") from None


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """RunBusy if another process is at this evaluation."""
    target.mkdir(parents=True, exist_ok=True)
    with (target / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunBusy(f"another process is writing {target}; wait for it, or stop it") from None
        yield


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
                return cls(device, device_model(source.any_weights, device, torch.float32), int8)
            except CompilationFailed as error:
                if required:
                    raise DataInvalid(f"INT8 does not run on this CUDA device: {error}; say --device cpu") from None
                print(f"warning: evaluating on the CPU: {error}", file=sys.stderr)
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

    def score(self, task: TaskData, items: Sequence[Item]) -> pa.Table:
        distinct = {labels[0]: self.models.int8[labels[0]] for labels in self.same.values()}
        scores = score(self.models.reference, distinct, items)
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


def _finished(db: Path) -> list[Path]:
    """Folders of the finished evaluations, oldest first; DatabaseInvalid if there is none."""
    found = sorted((db / "results").glob(f"*/{EVALUATION}"), key=lambda path: (path.stat().st_mtime, path))
    if not found:
        raise DatabaseInvalid(f"{db} holds no finished evaluation; run `evaluate`")
    return [path.parent for path in found]


def find_evaluation(db: Path, evaluation: str | None = None) -> Evaluation:
    """A stored evaluation by (the beginning of) its id, else the newest. UnknownName, DatabaseInvalid."""
    folders = _finished(db)
    if evaluation is not None:
        matching = [folder for folder in folders if folder.name.startswith(evaluation)]
        if len(matching) != 1:
            raise UnknownName.of("evaluation", evaluation, [folder.name for folder in folders])
        folders = matching
    folder = folders[-1]
    about = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    return Evaluation(folder.name, folder, read_table(folder / RESULTS_FILE, RESULTS), about, about["notes"])


def list_evaluations(db: Path) -> pa.Table:
    """One row per finished evaluation, oldest first: evaluation, model, strategies, texts, scales."""
    rows = []
    for folder in _finished(db):
        about = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        texts = ", ".join(f"{t['data']} ({t['task']}, {t['documents']} documents)" for t in about["tasks"])
        strategies = ", ".join(about["strategies"])
        rows.append(
            {
                "evaluation": folder.name,
                "model": about["model"],
                "strategies": strategies,
                "texts": texts,
                "scales": about["scales"],
            }
        )
    return pa.Table.from_pylist(rows)
