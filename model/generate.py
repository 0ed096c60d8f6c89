"""Text written by a model itself: seeded sampling, many sequences at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from quambase.model.decoding_steps import DecodingSteps
from quambase.model.language_model import LanguageModel
from quambase.model.packed_batch import Batch
from quambase.schema.progress import Progress, Shown


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    seed: int,
    temperature: float = 0.9,
    top_p: float = 0.95,
    vocabulary: int | None = None,
    progress: Shown = False,
) -> list[list[int]]:
    """Continue every prompt (at least one token) to ``lengths[i]`` tokens in all, prompt included.

    Nucleus sampling (Holtzman et al. 2020): the smallest set of tokens whose probability reaches ``top_p``.
    ``vocabulary``: ids at and above it (padding rows of the embedding) are never drawn. The same model, prompts, seed
    and torch version give the same text.
    """
    generator = torch.Generator().manual_seed(seed)
    # Longest first, so that the sequences still being written are always the first rows.
    order = sorted(range(len(prompts)), key=lambda i: -lengths[i])
    texts = [list(prompts[i]) for i in order]
    wanted = [lengths[i] for i in order]
    steps = DecodingSteps(model.step, model.new_state(len(order)))
    current = torch.tensor([text[0] for text in texts])
    with Progress(progress) as shown:
        shown.start("generate", sum(wanted), sum(wanted), unit="tokens")
        for position in range(1, wanted[0]):
            active = sum(length > position for length in wanted)
            with shown.piece(active, active):
                logits = steps.step(current[:active])[:, :vocabulary] / temperature
                for text, token in zip(texts, _draw(logits, top_p, generator).tolist(), strict=False):
                    if position >= len(text):
                        text.append(token)
            current = torch.tensor([text[position] for text in texts[:active]])
    written = {i: text[:length] for i, text, length in zip(order, texts, wanted, strict=True)}
    return [written[i] for i in range(len(order))]


class Steps(Protocol):
    """A model that takes token after token, floating-point or INT8."""

    def prefill(self, batch: Batch) -> tuple[torch.Tensor, Any]: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def step(self, tokens: torch.Tensor, state: Any) -> torch.Tensor: ...


def continued(
    model: Steps,
    prompt: Sequence[int],
    *,
    vocabulary: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens with which ``model`` continues ``prompt`` (at least one token), without end.

    temperature  0: each is the most likely one; otherwise drawn as `generate` draws, with ``top_p`` and ``seed``
    vocabulary   ids at and above it (padding rows of the embedding) are never taken

    One sequence at a time, so that an INT8 model, whose rounding depends on how many there are, always answers alike.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, state = model.prefill(Batch.pack([prompt]))
    logits = model.logits(hidden[-1:])
    steps = DecodingSteps(model.step, state)
    while True:
        if temperature == 0:
            token = int(logits[0, :vocabulary].argmax())
        else:
            token = int(_draw(logits[:, :vocabulary].float().cpu() / temperature, top_p, generator))
        yield token
        logits = steps.step(torch.tensor([token]))


def _draw(logits: torch.Tensor, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """One token per row of logits (b, v): (b,)."""
    ordered, ids = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered[before >= top_p] = 0
    choice = torch.multinomial(ordered, 1, generator=generator)
    return ids.gather(1, choice).squeeze(1)
