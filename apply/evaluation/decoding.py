"""Teacher-forced decoding: an INT8 model reads a text token by token after a prompt, from its cached state."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.model.decoding_steps import DecodingSteps
from quambase.model.packed_batch import Batch
from quambase.schema.progress import tell


@dataclass(frozen=True)
class Decoding:
    """An INT8 model with the interface of one that reads whole texts, whose hidden states come from decoding.

    The first ``prompt`` tokens of every sequence are prefilled. Every later one is fed as
    `Int8LanguageModel.step` does, so its prediction rests on the state in codes. Sequences of a batch are decoded side
    by side.
    """

    model: Int8LanguageModel
    prompt: int

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> torch.Tensor:
        """As `Int8LanguageModel.hidden`."""
        lengths = batch.offsets.diff()
        # Longest first, so that the sequences that go on are always the first rows of the state.
        order = torch.argsort(lengths, descending=True, stable=True)
        lengths, starts = lengths[order], batch.offsets[:-1][order]
        heads = [torch.arange(int(s), int(s + min(n, self.prompt))) for s, n in zip(starts, lengths, strict=True)]
        ends = torch.tensor([0, *map(len, heads)]).cumsum(0)
        rows = torch.cat(heads)
        prefilled, state = self.model.prefill(Batch(batch.tokens[rows], ends))
        out = torch.empty(len(batch.tokens), *prefilled.shape[1:], dtype=prefilled.dtype, device=prefilled.device)
        out[rows.to(out.device)] = prefilled
        steps = DecodingSteps(self.model.step_hidden, state)
        tokens, starts = batch.tokens.to(out.device), starts.to(out.device)
        longest = int(lengths[0]) if len(lengths) else 0
        for position in range(self.prompt, longest):
            now = starts[: int((lengths > position).sum())] + position
            out[now] = steps.step(tokens[now])
            tell((position + 1) / longest)
        return out

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `Int8LanguageModel.logits`."""
        return self.model.logits(hidden)
