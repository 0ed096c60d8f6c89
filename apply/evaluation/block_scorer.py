"""Scores the blocks of an evaluation on one device: the floating-point model and each distinct INT8 model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch

from quambase.apply.evaluation.candidates import Candidates
from quambase.apply.evaluation.decoding import Decoding
from quambase.apply.evaluation.scoring import Cost, Item, LanguageModel, Score, score
from quambase.apply.evaluation.tasks import TaskData
from quambase.apply.int8.build import int8_on_cuda
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.model.cuda.compiler import CompilationFailed
from quambase.model.generate import Steps
from quambase.model.language_model import LanguageModel as FloatingModel
from quambase.model.language_model import floating_model
from quambase.schema.errors import DataInvalid
from quambase.schema.progress import Progress, remark
from quambase.schema.scale_table import Operator, Scale
from quambase.schema.sites import find_site
from quambase.schema.stored.results import FLOAT
from quambase.schema.tables import RESULTS

DECODING_COST = 4.0
"""Of a token that is decoded, in those of one forward pass, for the estimate of time left: 3.7 to 5.4
were measured on mamba-5m, two cores."""


@contextmanager
def _enough_memory() -> Iterator[None]:
    """DataInvalid where a CUDA device has too little."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        raise DataInvalid(f"the CUDA device has too little memory for this model ({first}); say --device cpu") from None


@dataclass(frozen=True)
class PlacedModels:
    """The models on one device: the float32 one and, by label, the INT8 ones."""

    device: torch.device
    reference: FloatingModel
    int8: Mapping[str, LanguageModel]

    @classmethod
    def on(cls, device: torch.device, candidates: Candidates, *, required: bool) -> PlacedModels:
        """The CPU's models, with a warning, where the INT8 kernels cannot be compiled for ``device``; DataInvalid if it
        is ``required``.
        """
        source = candidates.source
        if device.type == "cuda":
            try:
                with _enough_memory():
                    int8 = int8_on_cuda(candidates.models, device)
                    return cls(device, floating_model(source.any_weights, device), int8)
            except CompilationFailed as error:
                if required:
                    raise DataInvalid(f"INT8 does not run on this CUDA device: {error}; say --device cpu") from None
                remark(f"warning: evaluating on the CPU: {error}")
        return cls(torch.device("cpu"), source.floating(), candidates.models)

    def steps(self, label: str) -> Steps | None:
        """The model of ``label`` for decoding; None for one that cannot: codes of two segments."""
        if label == FLOAT:
            return self.reference
        model = self.int8[label]
        return model if isinstance(model, Int8LanguageModel) else None


class BlockScorer:
    """Scores blocks; strategies whose scales differ only where prefill does not read them are run once."""

    def __init__(self, candidates: Candidates, models: PlacedModels, evaluation: str) -> None:
        self.candidates = candidates
        self.models = models
        self.evaluation = evaluation
        self.same: dict[tuple[frozenset[Operator], tuple[Scale, ...]], list[str]] = {}
        family = candidates.source.family
        for label, model in candidates.models.items():
            if model.state_format is not None:  # acts in decoding only
                continue
            scales = model.scales.items()
            read = tuple(scale for (_, site), scale in scales if not find_site(site, family).decode_only)
            self.same.setdefault((model.in_16_bit, read), []).append(label)

        self.decoding = [label for label, model in candidates.models.items() if isinstance(model, Int8LanguageModel)]
        weights = candidates.source.any_weights
        layers = sum(tensor.numel() for layer in weights.layers for tensor in vars(layer).values())
        self.cost = Cost(layers, weights.lm_head.numel())

    def work(self, task: TaskData, items: Sequence[Item]) -> float:
        """What a block costs, in the measure of `Cost`."""
        return self._cost(task).of(items, len(self.decoding if task.decodes else self.same))

    def _cost(self, task: TaskData) -> Cost:
        return replace(self.cost, steps=DECODING_COST) if task.decodes else self.cost

    def score(self, task: TaskData, items: Sequence[Item], progress: Progress) -> pa.Table:
        """The rows (RESULTS) of one block of a text: the floating-point model's, then each strategy's.

        DataInvalid where a CUDA device has too little memory.
        """
        if task.decodes:
            assert task.prompt is not None
            distinct: dict[str, LanguageModel] = {
                label: Decoding(model, task.prompt)
                for label, model in self.models.int8.items()
                if isinstance(model, Int8LanguageModel)
            }
            same = {label: label for label in distinct}
        else:
            same = {label: labels[0] for labels in self.same.values() for label in labels}
            distinct = {label: self.models.int8[label] for label in dict.fromkeys(same.values())}
        with _enough_memory():
            scores = score(self.models.reference, distinct, items, self._cost(task), progress)
        tables = [self._table(FLOAT, scores[FLOAT], task, items)]
        tables += [
            self._table(label, scores[same[label]], task, items) for label in self.candidates.models if label in same
        ]
        return pa.concat_tables(tables)

    def _table(self, label: str, scored: Score, task: TaskData, items: Sequence[Item]) -> pa.Table:
        columns: dict[str, Sequence[Any]] = {
            "document": [item.document for item in items],
            "sha256": [item.sha256 for item in items],
            "cluster": [item.cluster for item in items],
            "tokens": [item.targets for item in items],
            "nll": scored.nll.tolist(),
            "kl": scored.kl.tolist(),
            "top1_agreement": scored.top1.tolist(),
            "top1_right": scored.right.tolist(),
            "correct": scored.correct.tolist() if task.answered else [None] * len(items),
        }
        if task.prompt is not None:
            columns["positions"] = scored.positions
        return self.table(label, task.task, task.data, columns)

    def table(self, label: str, task: str, data: str, columns: Mapping[str, Sequence[Any]]) -> pa.Table:
        """Rows (RESULTS) of one strategy on one text: ``columns`` are those that differ from row to row."""
        model = self.candidates.models.get(label)  # none: the floating-point one
        constant: dict[str, Any] = {
            "evaluation": self.evaluation,
            "model": self.candidates.source.name,
            "scales": self.candidates.scales,
            "strategy": label,
            "task": task,
            "data": data,
            "quantize_lm_head": model is not None and model.quantized_lm_head,
            "quantize_embedding": model is not None and model.weights.embedding_scales is not None,
            "weight_bits": None if model is None else model.weights.weight_bits,
            "gptq": model is not None and model.weights.gptq,
            "compat_upstream": model is not None and model.compat is not None,
            "positions": None,
        }
        count = len(columns["document"])
        whole = {name: [value] * count for name, value in constant.items()} | dict(columns)
        return pa.table({f.name: pa.array(whole[f.name], f.type) for f in RESULTS}, schema=RESULTS)
