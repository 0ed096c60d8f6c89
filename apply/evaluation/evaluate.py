"""Evaluate INT8 models against the floating-point one, document by document, resumably.

`results/<evaluation id>/`: one part per block while it runs, then `results.parquet` and, last,
`evaluation.json`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from quambase.apply.evaluation.block_scorer import BlockScorer, PlacedModels
from quambase.apply.evaluation.candidates import Candidates, from_folder, from_model, from_scales
from quambase.apply.evaluation.harness import require_lm_eval
from quambase.apply.evaluation.scoring import BLOCK_TOKENS, DECODED_TOKENS, blocks
from quambase.apply.evaluation.stored import Evaluation
from quambase.apply.evaluation.tasks import TaskData, read_tasks
from quambase.model.inputs.sources import find_given
from quambase.model.operators.choice import choose_device
from quambase.schema import FORMAT_VERSION
from quambase.schema.checksums import file_sha256
from quambase.schema.errors import DatabaseInvalid, DataInvalid, RunBusy, UnknownName
from quambase.schema.files import local_folder, locked, remove_lock, remove_strays
from quambase.schema.json_files import write_json
from quambase.schema.progress import Progress, Shown
from quambase.schema.stored.int8_models import last_applied
from quambase.schema.stored.results import (
    DECODE,
    EVALUATION,
    PREFILL,
    PROMPT_TOKENS,
    RESULTS_FILE,
    WINDOW,
    next_number,
    read_results,
)
from quambase.schema.tables import RESULTS, read_table, write_table

if TYPE_CHECKING:
    from quambase.apply.evaluation.harness.tasks import LmEvalTasks

PARTS = "parts"
"""Folder, inside an unfinished evaluation, of the rows of each finished block."""


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
    window: int = WINDOW,
    mode: str = PREFILL,
    prompt_tokens: int = PROMPT_TOKENS,
    states: Sequence[str] = (),
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    quantize_lm_head: bool = False,
    quantize_embedding: bool = False,
    compat: str | None = None,
    weight_bits: int = 8,
    gptq: bool = False,
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
    data        texts (`quambase.model.inputs.text`); default: the bundled evaluation texts, for a bundled model
    samples     the first so many documents of each
    task        "perplexity", "last-word" or "both"
    window      tokens; longer documents are cut in non-overlapping windows
    mode        "prefill": every text in one forward pass; "decode": what follows a prompt of ``prompt_tokens`` token by
                token, each prediction from the cached state, and, to compare, in one forward pass
    states      with ``mode="decode"``: each strategy also with the cached state in each of these formats
                (`quambase.apply.int8.state_formats`), simulated
    tasks       names of lm-eval's tasks, in place of ``data`` and ``task``; ``include_path``: a folder of more tasks
    weight_bits, gptq  with ``scales``, as of `quambase.apply.apply.apply`
    device      "auto" (CUDA if there is any), "cpu" or "cuda"; results of either are kept apart
    progress    shown on stderr, or a function that is called with (documents done, documents in all)
    A killed evaluation resumes: the same call finds its finished blocks.
    Errors: ScalesInvalid, UnknownName, CheckpointInvalid, ModelNotFound, DataInvalid, RunBusy.
    """
    db, model = local_folder(db), None if model is None else str(model)
    texts = [str(data)] if isinstance(data, str | Path) else [str(text) for text in data]
    find_given(model, texts)
    where = choose_device(device)
    with Progress(progress) as shown:
        task = _task_of(mode, task, prompt_tokens, tasks, states)
        asked = _lm_eval_tasks(tasks, include_path, samples, texts, task, shown) if tasks else None
        shown.say("loading the model")
        switches = {"quantize_lm_head": quantize_lm_head, "quantize_embedding": quantize_embedding, "compat": compat}
        rounding = {"weight_bits": weight_bits, "gptq_from": db if gptq else None}
        of_scales = {"strategies": strategies, "granularities": granularities, **rounding, **switches}
        needs_text = not texts and asked is None
        candidates = _candidates(folder, scales, model, db, of_scales, floating=floating, needs_text=needs_text)
        candidates = candidates.with_states(states)
        models = PlacedModels.on(where, candidates, required=device != "auto")
        shown.say("tokenizing")
        if asked is not None:
            requests = asked.requests(candidates.source.tokenizer, window)
            judge = partial(asked.document_rows, requests=requests, window=window, progress=shown)
            return _finished(candidates, models, requests, window, [], db, shown, judge)
        prompt = prompt_tokens if mode == DECODE else None
        read, notes = read_tasks(task, texts, candidates.source, samples, window, db, candidates.run, prompt)
        if mode == DECODE:
            notes += [
                f"{label} is scored by prefill alone: no kernel decodes codes of two segments"
                for label in models.int8
                if models.steps(label) is None
            ]
        return _finished(candidates, models, read, window, notes, db, shown)


def _task_of(mode: str, task: str, prompt_tokens: int, tasks: Sequence[str], states: Sequence[str]) -> str:
    """``task``, or DECODE in that mode. UnknownName, DataInvalid: parameters of `evaluate` that do not go together."""
    if mode not in (PREFILL, DECODE):
        raise UnknownName.of("mode", mode, (PREFILL, DECODE))
    if prompt_tokens < 1:
        raise DataInvalid(f"prompt_tokens is {prompt_tokens}; expected 1 or more")
    if mode == PREFILL:
        if states:
            raise DataInvalid("formats of the state act in decoding only: say --mode decode, or leave out --state")
        return task
    if tasks or task != "both":
        raise DataInvalid("--mode decode scores all that follows a prompt; leave out --task and --tasks")
    return DECODE


def _lm_eval_tasks(
    names: Sequence[str],
    include_path: str | Path | None,
    limit: int | None,
    texts: Sequence[str],
    task: str,
    progress: Progress,
) -> LmEvalTasks:
    """The tasks of lm-eval by these names. DataInvalid: lm-eval is not installed, or a text or a task is given, too."""
    if texts or task != "both":
        raise DataInvalid("lm-eval's tasks bring their own text; leave out --data and --task, or --tasks")
    require_lm_eval()
    from quambase.apply.evaluation.harness.tasks import LmEvalTasks

    progress.say("reading lm-eval's tasks")
    return LmEvalTasks(names, None if include_path is None else Path(include_path), limit)


def _candidates(
    folder: str | Path | None,
    scales: str | Path | None,
    model: str | None,
    db: Path,
    of_scales: dict[str, Any],
    *,
    floating: bool,
    needs_text: bool,
) -> Candidates:
    """The models to compare: as the parameters of `evaluate` say; ``needs_text``: no text was named."""
    if floating:
        return from_model(model, needs_text=needs_text)
    if scales is None:
        return from_folder(Path(folder) if folder else last_applied(db), model)
    return from_scales(Path(scales), model=model, **of_scales)


Judge = Callable[[BlockScorer, pa.Table], pa.Table]
"""Makes the rows of documents of the rows of their requests."""


def _finished(
    candidates: Candidates,
    models: PlacedModels,
    tasks: Sequence[TaskData],
    window: int,
    notes: Sequence[str],
    db: Path,
    progress: Progress,
    judge: Judge | None = None,
) -> Evaluation:
    """The finished evaluation, or what is missing of it is scored first; ``judge``: what is scored are requests."""
    about = _about(candidates, tasks, models.device, window, notes)
    target = db / "results" / str(about["evaluation"])
    if not (target / EVALUATION).exists():
        with locked(target, f"evaluation {target.name}"):
            scorer = BlockScorer(candidates, models, target.name)
            rows = _run_blocks(target, scorer, tasks, progress)
            rows = rows if judge is None else judge(scorer, rows)
            write_table(target / RESULTS_FILE, "results", rows, RESULTS)
            _finish(target, about)
    _clear(target)
    return Evaluation(target.name, target, read_results(target), about, about["notes"])


def _finish(target: Path, about: dict[str, Any]) -> None:
    """Write evaluation.json, which makes the evaluation finished and numbers it, one process at a time: no two
    evaluations of a database that finish at once have the same number.
    """
    about = about | {"results_sha256": file_sha256(target / RESULTS_FILE)}
    with locked(target.parent, wait=True):
        write_json(target / EVALUATION, about | {"number": next_number(target.parent.parent)})


def _clear(target: Path) -> None:
    """Remove what only an unfinished evaluation needs, also where a process was killed before it did."""
    remove_lock(target.parent)
    if (target / PARTS).exists() or (target / ".lock").exists():
        with suppress(RunBusy, OSError), locked(target):
            shutil.rmtree(target / PARTS, ignore_errors=True)
            remove_strays(target)


def _about(
    candidates: Candidates,
    tasks: Sequence[TaskData],
    device: torch.device,
    window: int,
    notes: Sequence[str],
) -> dict[str, Any]:
    """What evaluation.json says; ``notes``: what is to be told before the notes of each text."""
    return {
        "format_version": FORMAT_VERSION,
        "evaluation": _id(candidates, tasks, device, window),
        "model": candidates.source.name,
        "weights_sha256": candidates.source.weights_sha256,
        "scales": candidates.scales,
        "run": candidates.run,
        "strategies": list(candidates.models),
        "device": device.type,
        "window": window,
        "tasks": [t.about() for t in tasks],
        "notes": _notes(candidates, tasks, device, notes),
    }


def _id(candidates: Candidates, tasks: Sequence[TaskData], device: torch.device, window: int) -> str:
    """The evaluation's id: a hash of all that determines its rows."""
    identity = {
        **candidates.identity(),
        "tasks": [t.identity() for t in tasks],
        "window": window,
        "block_tokens": [*dict.fromkeys(_block_tokens(t, device) for t in tasks)],
        "device": device.type,
        "format_version": FORMAT_VERSION,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _notes(candidates: Candidates, tasks: Sequence[TaskData], device: torch.device, notes: Sequence[str]) -> list[str]:
    """Notes for whoever reads the figures, a line each."""
    found = [f"scales of run {candidates.run}"] if candidates.run else []
    found += [*candidates.notes, *notes]
    found += dict.fromkeys(note for t in tasks for note in t.notes(candidates.source.name))
    if device.type == "cuda":
        found.append(f"run on {torch.cuda.get_device_name(device)}; the CPU's results are kept apart")
    if candidates.skipped:
        found.append(f"not loadable as one INT8 scale per site, left out: {', '.join(candidates.skipped)}")
    return found


def _is_sound(part: Path) -> bool:
    """Whether a block's rows are there as they were written; if not, the block is scored again."""
    try:
        read_table(part, RESULTS, checked=True)
    except DatabaseInvalid:
        return False
    return True


def _block_tokens(task: TaskData, device: torch.device) -> int:
    return (DECODED_TOKENS if task.decodes else BLOCK_TOKENS)[device.type]


def _run_blocks(target: Path, scorer: BlockScorer, tasks: Sequence[TaskData], progress: Progress) -> pa.Table:
    """Score every block that has no part yet; the rows (RESULTS) of all parts."""
    planned = [(t, block) for t in tasks for block in blocks(t.items, _block_tokens(t, scorer.models.device))]
    paths = [target / PARTS / f"{number:06d}.parquet" for number in range(len(planned))]
    there = [_is_sound(path) for path in paths]
    works = [scorer.work(t, block) for t, block in planned]
    progress.start(
        "evaluate",
        sum(len(block) for _, block in planned),
        sum(works),
        unit=tasks[0].unit,
        done=(
            sum(len(block) for (_, block), done in zip(planned, there, strict=True) if done),
            sum(work for work, done in zip(works, there, strict=True) if done),
        ),
    )
    for path, done, (task, block) in zip(paths, there, planned, strict=True):
        if not done:
            write_table(path, "results", scorer.score(task, block, progress), RESULTS)
    return pa.concat_tables([RESULTS.empty_table(), *(read_table(path, RESULTS, checked=True) for path in paths)])
