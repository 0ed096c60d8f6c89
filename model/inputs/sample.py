"""The bundled sample text: calibration, evaluation and last-word parts, written by the bundled models themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quambase.model.checkpoint import LoadedModel
from quambase.model.generate import generate
from quambase.model.inputs.names import BUNDLED_DATA
from quambase.schema.files import refuse_foreign_file, replacing
from quambase.schema.progress import Shown

OPENINGS = (
    "The", "It was", "He", "She", "When", "In the", "There", "At last", "But", "After", "My", "A", "They", "One",
    "As", "You", "I", "What", "His", "Her", "On the", "Mr", "For", "No",
)  # fmt: skip
"""First words of the documents: the models have no start token, so they need some text to continue."""

CALIBRATION_SHARE = 0.6
EMPTY = (7, 100)
"""Indices of calibration documents that are empty on purpose, since real files have some."""

_PASSAGE = re.compile(r"(?s)^(.*\s)([A-Za-z]{3,})\W*$")


def write_sample(
    models: Sequence[LoadedModel],
    folder: Path,
    *,
    tokens: int = 300_000,
    seed: int = 0,
    progress: Shown = True,
    force: bool = False,
) -> dict[str, int]:
    """Let ``models`` write about ``tokens`` tokens, a document each in turn, and save them as the three files of
    `BUNDLED_DATA` in ``folder``: lines {"text": ..., "author": the model's name}.

    Lengths are log-normal (median 300 tokens, at most 1024), a twelfth of the documents have 1 to 24 tokens.
    Calibration and evaluation have no document in common. Returns the number of documents of each file. OutputRefused:
    a file of that name exists and ``force`` is not set.
    """
    for file in BUNDLED_DATA.values():
        refuse_foreign_file(folder / file, None, "a text", force=force)
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        short = rng.random() < 1 / 12
        drawn = rng.integers(1, 25) if short else min(1024, rng.lognormal(np.log(300), 0.6))
        lengths.append(max(1, int(drawn)))
    openings = [OPENINGS[i] for i in rng.choice(len(OPENINGS), size=len(lengths))]
    texts: list[tuple[str, str]] = [("", "")] * len(lengths)
    for turn, model in enumerate(models):
        mine = range(turn, len(lengths), len(models))
        prompts = [model.tokenizer.encode(openings[i]) for i in mine]
        written = generate(
            model.floating(),
            prompts,
            [max(lengths[i], len(prompt)) for i, prompt in zip(mine, prompts, strict=True)],
            seed=seed,
            vocabulary=model.tokenizer.ids,
            progress=progress,
        )
        for i, ids in zip(mine, written, strict=True):
            texts[i] = model.tokenizer.decode(ids).strip(), model.name
    cut = int(len(texts) * CALIBRATION_SHARE)
    calibration, evaluation = texts[:cut], texts[cut:]
    for place in EMPTY:
        calibration.insert(min(place, len(calibration)), ("", ""))
    parts = {
        "sample:calibration": calibration,
        "sample:evaluation": evaluation,
        "sample:last-word": [(p, author) for text, author in evaluation for p in last_word_passages(text)],
    }
    for name, documents in parts.items():
        with replacing(folder / BUNDLED_DATA[name]) as temporary:
            lines = [json.dumps({"text": t, "author": a}, ensure_ascii=False) + "\n" for t, a in documents]
            temporary.write_text("".join(lines), encoding="utf-8")
    return {name: len(documents) for name, documents in parts.items()}


def last_word_passages(text: str, *, words: int = 70, most: int = 4) -> list[str]:
    """Passages of up to ``words`` words of ``text`` that end in a word they already contain, as LAMBADA's do.

    A passage ends where a sentence ends, without its punctuation; the last word has three letters or more.
    """
    found: list[str] = []
    sentences = re.split(r"(?<=[.!?])[\"'”’]?\s+", text)
    for end in range(2, len(sentences) + 1):
        passage = " ".join(" ".join(sentences[:end]).split()[-words:])
        match = _PASSAGE.match(passage)
        if match and re.search(rf"\b{match[2]}\b", match[1]) and len(passage.split()) >= 20:
            found.append(match[1] + match[2])
    # The last ones have the most context and overlap the least.
    return found[-most:]
