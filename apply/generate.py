"""Continues a text with a floating-point or an INT8 model."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from quambase.apply.evaluation.block_scorer import PlacedModels
from quambase.apply.evaluation.candidates import from_folder, from_model, from_scales
from quambase.model.generate import Steps, continued
from quambase.model.inputs.tokenizer import Tokenizer
from quambase.model.operators.choice import choose_device
from quambase.schema.errors import DataInvalid
from quambase.schema.files import local_folder
from quambase.schema.progress import Progress, Shown
from quambase.schema.scale_table import SELECTED
from quambase.schema.stored.int8_models import last_applied
from quambase.schema.stored.results import FLOAT

_HALF = "�"
"""Ends a text whose last character is not complete yet."""


@dataclass
class Continuing:
    """A text that is being continued: an iterator over its pieces, some characters each.

    name    of the model and strategy
    device  where it runs: "cpu" or "cuda"
    tokens   how many were written so far
    seconds  since the second of them: the prompt and the first step, which may compile kernels, are not counted
    """

    name: str
    device: str
    written: Iterator[int]
    tokenizer: Tokenizer
    tokens: int = 0
    seconds: float = 0.0
    ended: bool = field(default=False)

    def __iter__(self) -> Iterator[str]:
        end, ids, shown = self.tokenizer.end_of_text, list[int](), ""
        started: float | None = None
        for token in self.written:
            if len(ids) == 1:
                started = time.monotonic()
            if token == end:
                self.ended = True
                break
            ids.append(token)
            self.tokens, self.seconds = len(ids), 0.0 if started is None else time.monotonic() - started
            text = self.tokenizer.decode(ids)
            if not text.endswith(_HALF):
                yield text[len(shown) :]
                shown = text
        yield self.tokenizer.decode(ids)[len(shown) :]

    def says(self) -> str:
        """What wrote how much, and how fast."""
        speed = f", {(self.tokens - 2) / self.seconds:,.3g} tokens/s" if self.tokens > 2 and self.seconds else ""
        stopped = ", where it ended the text" if self.ended else ""
        return f"{self.name} on {self.device}: {self.tokens:,} tokens{stopped}{speed}"


def generate(
    prompt: str,
    folder: str | Path | None = None,
    *,
    model: str | Path | None = None,
    scales: str | Path | None = None,
    strategy: str | None = None,
    tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 0.95,
    seed: int = 0,
    db: str | Path = Path("quambase-db"),
    device: str = "auto",
    progress: Shown = False,
) -> Continuing:
    """Continue ``prompt`` by up to ``tokens`` tokens: iterate over the result for its pieces.

    folder       an applied INT8 model; by default the one applied last in ``db``
    model        the floating-point model, unless ``scales`` are given: then where that of the scales is, if it moved
    scales, strategy  build the INT8 model of a scale table's strategy (``selected`` by default)
    temperature  0: the most likely token each time; otherwise tokens are drawn, from those likeliest ones whose
                 probability together reaches ``top_p``, by ``seed``
    An INT8 model reads the prompt in one pass, then rounds its cached state after every token.
    Errors: ScalesInvalid, UnknownName, CheckpointInvalid, ModelNotFound; DataInvalid: an empty prompt,
    a number out of range, a strategy that cannot be decoded.

    >>> "".join(quambase.generate("The old man", model="mamba-5m", tokens=4))
    ', who was a'
    """
    if temperature < 0 or not 0 < top_p <= 1 or tokens < 1:
        raise DataInvalid(
            f"temperature is {temperature}, top_p {top_p}, tokens {tokens}; expected 0 or more, above 0 and up to 1, "
            "and 1 or more"
        )
    db, name = local_folder(db), None if model is None else str(model)
    with Progress(progress) as shown:
        shown.say("loading the model")
        if scales is not None:
            labels = [strategy or SELECTED]
            candidates = from_scales(Path(scales), labels, name, False, quantize_embedding=False, compat=None)
        elif folder is not None or model is None:
            candidates = from_folder(Path(folder) if folder is not None else last_applied(db), name)
        else:
            candidates = from_model(name)
        models = PlacedModels.on(choose_device(device), candidates, required=device != "auto")
    label = next(iter(candidates.models), FLOAT)
    steps: Steps | None = models.steps(label)
    if steps is None:
        raise DataInvalid(f"{label} has codes of two segments, which no decoding kernel reads; take another strategy")
    tokenizer = candidates.source.tokenizer
    ids = tokenizer.encode(prompt)
    if not ids:
        raise DataInvalid("the prompt is empty; expected some text to continue")
    after = continued(steps, ids, vocabulary=tokenizer.ids, temperature=temperature, top_p=top_p, seed=seed)
    what = candidates.source.name if label == FLOAT else f"{candidates.source.name}, INT8 scales of {label},"
    return Continuing(what, models.device.type, itertools.islice(after, tokens), tokenizer)
