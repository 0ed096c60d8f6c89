"""Tasks of lm-eval as texts of an evaluation: what they ask, scored by our scorer, and what lm-eval makes of it.

A task is read twice. First its log-likelihood requests are collected and scored block by block, all models at once, as
any other text. Then lm-eval evaluates the task once for each strategy, with the answers looked up, and says of every
document whether it is right. Only text that a model generates is made while lm-eval evaluates.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from lm_eval import evaluator
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from quambase.apply.evaluation.block_scorer import BlockScorer
from quambase.apply.evaluation.harness.language_model import Answer, Answers, ItemModel, Key
from quambase.apply.evaluation.scoring import Item
from quambase.apply.evaluation.tasks import TaskData
from quambase.model.inputs.tokenizer import Tokenizer
from quambase.schema.errors import DataInvalid, UnknownName
from quambase.schema.progress import Progress, remark
from quambase.schema.stored.results import FLOAT, LM_EVAL

UNFILTERED = "none"
"""lm-eval's name of the filter that leaves an answer as it is."""

Sample = Mapping[str, Any]
"""What lm-eval logs of one document."""


@dataclass(frozen=True)
class RequestData(TaskData):
    """The log-likelihood requests of one task: ``items[i]`` is what ``keys[i]`` asks.

    documents   how many documents they belong to
    definition  a hash of the task's settings and documents
    """

    keys: list[Key]
    documents: int
    definition: str

    @property
    def unit(self) -> str:
        """As `TaskData.unit`."""
        return "requests"

    def about(self) -> dict[str, Any]:
        """As `TaskData.about`."""
        return super().about() | {"documents": self.documents}

    def identity(self) -> list[Any]:
        """As `TaskData.identity`."""
        return [*super().identity(), self.definition, version("lm_eval")]


class Figures(NamedTuple):
    """What the scorer found for one or more requests; columns of RESULTS."""

    tokens: int
    nll: float
    kl: float
    top1_agreement: int
    top1_right: int


LIKELIHOODS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
"""Kinds of tasks (output_type) whose answers are log-likelihoods."""


class LmEvalTasks:
    """Tasks by name, of those that lm-eval brings or of the folder ``include_path``; a group's name stands for all of
    its tasks. ``limit``: the first so many documents of each.

    UnknownName; DataInvalid: a data set that is not here and cannot be fetched, a task that needs more than text.
    """

    def __init__(self, names: Sequence[str], include_path: Path | None, limit: int | None) -> None:
        self.limit = limit
        manager = _manager(names, include_path)
        for name in names:
            if name not in manager.all_tasks:
                raise UnknownName.of("lm-eval task", name, manager.all_tasks)
        with _quiet():
            self.loaded = _load(manager, names)
        for name, task in self.loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise DataInvalid(f"task {name} runs code or needs images; quambase evaluates tasks of text alone")

    def requests(self, tokenizer: Tokenizer, window: int) -> list[RequestData]:
        """What each task asks, in ``window`` tokens at most."""
        return [self._requests_of(name, task, tokenizer, window) for name, task in self.loaded["tasks"].items()]

    def _requests_of(self, name: str, task: Any, tokenizer: Tokenizer, window: int) -> RequestData:
        found: dict[Key, Item] = {}

        def collect(items: Mapping[Key, Item]) -> dict[Key, Answer]:
            found.update(items)
            return dict.fromkeys(items, (0.0, False))

        model = ItemModel(tokenizer, window, collect, None)
        with _quiet():
            self._seed()
            task.build_all_requests(limit=self.limit)
            for kind in ("loglikelihood", "loglikelihood_rolling"):
                if asked := [instance for instance in task.instances if instance.request_type == kind]:
                    getattr(model, kind)(asked)
        items = [
            Item(number, _digest(key), item.sequences, item.first) for number, (key, item) in enumerate(found.items())
        ]
        documents = {instance.doc_id: instance.doc for instance in task.instances}
        definition = _digest([name, task.dump_config(), list(documents.values())])
        return RequestData(LM_EVAL, name, items, 0, None, list(found), len(documents), definition)

    def _seed(self) -> None:
        """Set every generator as lm-eval's command line does, so that all strategies get the same examples."""
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002 - the one that tasks draw from
        torch.manual_seed(DEFAULT_OTHER_SEED)
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)

    def document_rows(
        self, scorer: BlockScorer, scored: pa.Table, *, requests: Sequence[RequestData], window: int, progress: Progress
    ) -> pa.Table:
        """The rows (RESULTS) of every document, strategy and task; ``scored``: those of the requests.

        DataInvalid: nothing about a task can be stored.
        """
        samples: dict[str, Mapping[str, Sequence[Sample]]] = {}
        figures: dict[str, dict[Key, Figures]] = {}
        candidates = scorer.candidates
        for label in (FLOAT, *candidates.models):
            own = scored.filter(pc.equal(scored["strategy"], label))
            figures[label], answers = _found(own, requests)
            steps = scorer.models.steps(label)
            model = ItemModel(candidates.source.tokenizer, window, _looked_up(answers), steps)
            progress.say(f"lm-eval: {label}")
            with _quiet():
                self._seed()
                samples[label] = evaluator.evaluate(
                    lm=model, task_dict=self.loaded, limit=self.limit, bootstrap_iters=0, log_samples=True
                )["samples"]
        tables = [
            table
            for name, task in self.loaded["tasks"].items()
            for table in _task_tables(name, task, scorer, {label: s[name] for label, s in samples.items()}, figures)
        ]
        return pa.concat_tables(tables)


def _manager(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """lm-eval's index of tasks. Its own 14,000 are read only if the folder lacks a name: that takes seven seconds."""
    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _load(manager: TaskManager, names: Sequence[str]) -> Any:
    try:
        return manager.load(list(names))
    except Exception as error:  # of Jinja, YAML, datasets, the hub's client: whatever a task's files lead to
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataInvalid(
            f"lm-eval cannot load {', '.join(names)} ({what}); a task fetches its data set from the hub unless that is "
            "in the cache or in a local file: run it once with a network, or name a task of your own files with "
            "--include-path"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, lm-eval's progress bars are left out, and each of its warnings is one remark."""
    told: set[str] = set()

    class Remarks(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = f"lm-eval: {record.getMessage().strip()}"
            if message not in told:
                told.add(message)
                remark(message)

    logger, handler = logging.getLogger("lm_eval"), Remarks(logging.WARNING)
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def _digest(content: object) -> str:
    """SHA-256 of anything, as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _found(scored: pa.Table, requests: Sequence[RequestData]) -> tuple[dict[Key, Figures], dict[Key, Answer]]:
    """What one strategy's rows say of each request: its figures and its answer."""
    figures: dict[Key, Figures] = {}
    answers: dict[Key, Answer] = {}
    for task in requests:
        rows = scored.filter(pc.equal(scored["data"], task.data)).select([*Figures._fields, "correct"])
        for key, row in zip(task.keys, rows.to_pylist(), strict=True):
            if key not in figures:  # two tasks may ask the same
                answers[key] = -row["nll"], row.pop("correct")
                figures[key] = Figures(**row)
    return figures, answers


def _looked_up(answers: Mapping[Key, Answer]) -> Answers:
    """Answers that are known already."""
    return lambda items: answers


def _task_tables(
    name: str,
    task: Any,
    scorer: BlockScorer,
    samples: Mapping[str, Sequence[Sample]],
    figures: Mapping[str, Mapping[Key, Figures]],
) -> Iterator[pa.Table]:
    """The rows of one task by strategy, for each of its filters and metrics that tell right from wrong."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples[FLOAT]))
    judged = {
        chosen: _right_or_wrong([sample for own in samples.values() for sample in own if sample["filter"] == chosen])
        for chosen in filters
    }
    wanted: list[tuple[str, str | None]] = [(chosen, metric) for chosen in filters for metric in judged[chosen]]
    known = task.OUTPUT_TYPE in LIKELIHOODS and all(_of_document(task, s, figures[FLOAT]) for s in samples[FLOAT])
    if not wanted and not known:
        raise DataInvalid(
            f"task {name} has no metric that is 0 or 1 for each document ({', '.join(samples[FLOAT][0]['metrics'])}), "
            "and no log-likelihoods of right answers: nothing about it can be stored; leave it out"
        )
    for chosen, metric in wanted or [(filters[0], None)]:
        parts = [chosen] if len(filters) > 1 and chosen != UNFILTERED else []
        parts += [metric] if metric is not None and len(judged[chosen]) > 1 else []
        for label, own in samples.items():
            rows = sorted((s for s in own if s["filter"] == chosen), key=lambda sample: int(sample["doc_id"]))
            found = [_of_document(task, sample, figures[label]) if known else None for sample in rows]
            columns = {field: [one and getattr(one, field) for one in found] for field in Figures._fields} | {
                "document": [int(sample["doc_id"]) for sample in rows],
                "sha256": [sample["doc_hash"] for sample in rows],
                "cluster": [None] * len(rows),
                "correct": [None if metric is None else bool(sample[metric]) for sample in rows],
            }
            yield scorer.table(label, LM_EVAL, ":".join([name, *parts]), columns)


def _right_or_wrong(samples: Sequence[Sample]) -> list[str]:
    """The metrics that are 0 or 1 for every document of every strategy."""
    return [name for name in samples[0]["metrics"] if all(_is_binary(sample.get(name)) for sample in samples)]


def _is_binary(value: object) -> bool:
    return isinstance(value, bool | int | float | np.generic) and value in (0, 1)


def _of_document(task: Any, sample: Sample, figures: Mapping[Key, Figures]) -> Figures | None:
    """The figures of a document: of its continuation, of the right one of several, of all windows of a text.

    None where it is not known which continuation is right.
    """
    asked = sample["arguments"]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        (text,) = asked[0]
        windows: list[Figures] = []
        while (text, len(windows)) in figures:
            windows.append(figures[text, len(windows)])
        return Figures(*(sum(values) for values in zip(*windows, strict=True)))
    right: object = 0
    if len(asked) > 1:
        right = task.doc_to_text(sample["doc"]) if getattr(task, "multiple_input", 0) else sample["target"]
        if isinstance(right, str) and right in (choices := task.doc_to_choice(sample["doc"])):
            right = choices.index(right)
    if not isinstance(right, int) or not 0 <= right < len(asked):
        return None
    return figures[tuple(asked[right])]
