"""What is measured on one document: likelihood, divergence from the float model, agreement, last word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from quambase.apply.evaluation.likelihood import compare, log_probabilities
from quambase.apply.evaluation.positions import by_position
from quambase.model.inputs.text import Document
from quambase.model.inputs.tokenizer import Tokenizer
from quambase.model.packed_batch import Batch
from quambase.schema.progress import SILENT, Progress, tell
from quambase.schema.stored.results import FLOAT

BLOCK_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Tokens of one forward pass; part of the evaluation id, since float32 rows depend on the batch."""

DECODED_TOKENS = {"cpu": 32768, "cuda": 262144}
"""The same where texts are decoded: a step reads all weights, so many sequences are fed side by side."""

LOGIT_CELLS = 16_000_000
"""Logits held at once (64 MB of float32), whatever the vocabulary."""

DEVICE_LOGIT_CELLS = 8 * LOGIT_CELLS
"""On a device, where several such tensors are held: 0.5 GB each."""


class LanguageModel(Protocol):
    """What the float model and the INT8 model share."""

    def hidden(self, batch: Batch) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Item:
    """One document to score.

    sequences   token lists that share no state
    first       the first predicted place of every sequence (1, after a prompt, or where the last word begins)
    cluster     the book, topic or file that the document is a part of, if known
    """

    document: int
    sha256: str
    sequences: tuple[list[int], ...]
    first: int = 1
    cluster: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens fed to the model."""
        return sum(map(len, self.sequences))

    @property
    def targets(self) -> int:
        """Tokens predicted."""
        return sum(len(sequence) - self.first for sequence in self.sequences)


@dataclass(frozen=True)
class Score:
    """Per document, in the order of the items: sums over its predicted tokens.

    nll, kl   (documents,) float64, nats
    top1      (documents,) int64: predictions whose most likely token is the floating-point model's
    right     (documents,) int64: predictions whose most likely token is the one that follows
    correct   (documents,) bool: every predicted token was the most likely one
    positions  for each document rows of `quambase.schema.tables.POSITION`, counted from the item's first prediction
    """

    nll: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]
    top1: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    correct: npt.NDArray[np.bool_]
    positions: list[list[dict[str, float]]]


def perplexity_items(documents: Sequence[Document], tokenizer: Tokenizer, window: int, first: int = 1) -> list[Item]:
    """Every document cut in non-overlapping windows of ``window`` tokens, whose ``first`` first tokens are not
    predicted.

    Windows, and documents, that leave nothing to predict are left out.
    """
    items = []
    encoded = tokenizer.encode_batch([document.text for document in documents])
    for document, tokens in zip(documents, encoded, strict=True):
        pieces = (tokens[start : start + window] for start in range(0, len(tokens), window))
        sequences = tuple(piece for piece in pieces if len(piece) > first)
        if sequences:
            items.append(Item(document.index, document.sha256, sequences, first, document.cluster))
    return items


def split_last_word(text: str) -> tuple[str, str] | None:
    """Context and whole text, both without trailing space; None where there is no context or no word.

    The continuation is what follows the context: the space and the last word, as lm-eval's lambada_openai has
    it once its `_encode_pair` has moved the context's trailing spaces there.
    """
    whole = text.rstrip()
    words = whole.split()
    if len(words) < 2:
        return None
    return whole[: len(whole) - len(words[-1])].rstrip(), whole


def last_word_items(documents: Sequence[Document], tokenizer: Tokenizer, window: int) -> list[Item]:
    """Context and last word of every document, the context cut from the left to ``window`` tokens in all.

    The last word's tokens are those that the whole text has beyond the context's (lm-eval's rule). Documents
    without a last word after a context are left out.
    """
    items = []
    for document in documents:
        split = split_last_word(document.text)
        if split is None:
            continue
        context, whole = map(tokenizer.encode, split)
        target = len(whole) - len(context)
        kept = whole[-(window + 1) :]
        if context and 0 < target < len(kept):
            items.append(Item(document.index, document.sha256, (kept,), len(kept) - target, document.cluster))
    return items


@dataclass(frozen=True)
class Cost:
    """What models cost, for the estimate of time left: the weights of the layers count for every token, those of the
    head for every predicted token. ``steps``: the layers of a model that decodes, in those of one forward pass.
    """

    layers: float = 1.0
    head: float = 1.0
    steps: float = 1.0

    def of(self, items: Sequence[Item], models: int) -> float:
        """The cost of the floating-point model and ``models`` others on these items."""
        targets = sum(item.targets for item in items)
        return self.of_layers(items) * (1 + self.steps * models) + self.head * targets * (1 + models)

    def of_layers(self, items: Sequence[Item]) -> float:
        """The cost of the layers of one model in a forward pass."""
        return self.layers * sum(item.tokens for item in items)


def score(
    reference: LanguageModel,
    models: Mapping[str, LanguageModel],
    items: Sequence[Item],
    cost: Cost = Cost(),
    progress: Progress = SILENT,
) -> dict[str, Score]:
    """Score every item by the floating-point model (label `FLOAT`) and by each model; one forward pass each.

    All models are on one device.

    Softmax and cross-entropy are float32, natural logarithm; sums over a document are float64.
    """
    sequences = [sequence for item in items for sequence in item.sequences]
    batch = Batch.pack(sequences)
    first = [item.first for item in items for _ in item.sequences]
    rows = torch.cat(
        [
            torch.arange(int(start) + skip - 1, int(end) - 1)
            for start, end, skip in zip(batch.offsets[:-1], batch.offsets[1:], first, strict=True)
        ]
    )
    following = batch.tokens[rows + 1]
    owner = np.repeat(np.arange(len(items)), [item.targets for item in items])
    after = np.concatenate([np.arange(len(sequence) - item.first) for item in items for sequence in item.sequences])

    runs = len(models) + 1
    units = len(items) / cost.of(items, len(models))
    of_layers = cost.of_layers(items)
    with progress.piece(of_layers * units, of_layers, "float pass"):
        expected = reference.hidden(batch)
    device = expected.device
    rows, targets = rows.to(device), following.to(device)
    expected = expected[rows]
    hidden = {}
    for i, (label, model) in enumerate(models.items(), 1):
        work = cost.steps * of_layers
        with progress.piece(work * units, work, f"strategy {i} of {len(models)}: {label}"):
            hidden[label] = model.hidden(batch)[rows]
    shape = (runs, len(rows))
    nll, kl = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
    top = torch.zeros(shape, dtype=torch.int64, device=device)
    cells = LOGIT_CELLS if device.type == "cpu" else DEVICE_LOGIT_CELLS
    step = max(1, cells // reference.logits(expected[:1]).shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        work = cost.head * len(targets[part]) * runs
        with progress.piece(work * units, work, "comparing predictions"):
            logp, top[0, part] = log_probabilities(reference.logits(expected[part]))
            nll[0, part] = -logp.gather(1, targets[part, None])[:, 0].double()
            for i, (label, model) in enumerate(models.items(), 1):
                tell(i / runs)
                found = compare(logp, model.logits(hidden[label][part]), targets[part])
                nll[i, part], kl[i, part], top[i, part] = found
    nlls, kls, tops = (figures.cpu().numpy() for figures in (nll, kl, top))
    right = following.numpy()
    return {
        label: _per_document(nlls[i], kls[i], tops[i] == tops[0], tops[i] == right, owner, after, len(items))
        for i, label in enumerate([FLOAT, *models])
    }


def _per_document(
    nll: npt.NDArray[np.float64],
    kl: npt.NDArray[np.float64],
    agrees: npt.NDArray[np.bool_],
    right: npt.NDArray[np.bool_],
    owner: npt.NDArray[np.int64],
    after: npt.NDArray[np.int64],
    documents: int,
) -> Score:
    return Score(
        np.bincount(owner, nll, documents).astype(np.float64),
        np.bincount(owner, kl, documents).astype(np.float64),
        np.bincount(owner[agrees], minlength=documents),
        np.bincount(owner[right], minlength=documents),
        np.bincount(owner[~right], minlength=documents) == 0,
        by_position(nll, kl, agrees, owner, after, documents),
    )


def blocks(items: Sequence[Item], tokens: int) -> list[Sequence[Item]]:
    """Runs of consecutive items of about ``tokens`` tokens: the unit of forward pass and resume."""
    found: list[Sequence[Item]] = []
    start = total = 0
    for place, item in enumerate(items):
        total += item.tokens
        if total >= tokens or place == len(items) - 1:
            found.append(items[start : place + 1])
            start, total = place + 1, 0
    return found
