"""Books to token ids to training windows."""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from quambase.schema.errors import DataInvalid
from quambase.schema.files import replacing

END_OF_TEXT = "<|endoftext|>"
"""The only special token, id 0; it ends every document."""

TokenIds = npt.NDArray[np.uint16]


def paragraphs(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file (plain or .xz), newlines kept."""
    opened = lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")
    try:
        with opened as file:
            yield from file
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataInvalid(f"{path} cannot be read as UTF-8 text ({error}); expected .txt or .txt.xz") from None


def books(path: Path) -> Iterator[str]:
    """The documents of a text file: runs of lines between blank lines, inner newlines kept."""
    lines: list[str] = []
    for line in paragraphs(path):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines).rstrip("\n")
            lines = []
    if lines:
        yield "".join(lines).rstrip("\n")


def train_tokenizer(paths: Sequence[Path], destination: Path, *, vocab_size: int = 8192) -> tokenizers.Tokenizer:
    """Byte-level BPE of ``vocab_size`` tokens (GPT-2's splitting, no prefix space), written to ``destination``."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for path in paths for line in paragraphs(path)), trainer)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with replacing(destination) as temporary:
        tokenizer.save(str(temporary))
    return tokenizer


def tokenize_books(tokenizer: tokenizers.Tokenizer, path: Path, *, at_once: int = 64) -> list[TokenIds]:
    """Token ids of each document of ``path``, each ended by `END_OF_TEXT`."""
    if tokenizer.get_vocab_size() > 2**16:
        raise DataInvalid(f"the tokenizer has {tokenizer.get_vocab_size()} tokens; training data hold at most 65536")
    found: list[TokenIds] = []
    end = tokenizer.token_to_id(END_OF_TEXT)
    texts = list(books(path))
    for first in range(0, len(texts), at_once):
        for encoding in tokenizer.encode_batch_fast(texts[first : first + at_once]):
            found.append(np.array([*encoding.ids, end], np.uint16))
    return found


def write_tokens(tokenizer: tokenizers.Tokenizer, path: Path, destination: Path) -> int:
    """Tokenize ``path`` into one .npy array of uint16; returns its length."""
    ids = np.concatenate(tokenize_books(tokenizer, path))
    destination.parent.mkdir(parents=True, exist_ok=True)
    with replacing(destination) as temporary, temporary.open("wb") as file:
        np.save(file, ids)
    return len(ids)


def read_tokens(paths: Sequence[Path]) -> TokenIds:
    """The arrays of `write_tokens`, one after another."""
    return np.concatenate([np.load(path) for path in paths])


class Windows:
    """Which windows of ``length`` tokens make up each batch: a pure function of (seed, step), so training resumes.

    An epoch cuts the ``total`` tokens into adjoining windows at a random offset and shuffles them: every token is
    seen once an epoch (but for less than two windows at the ends), and windows differ between epochs.
    """

    def __init__(self, total: int, length: int, batch: int, seed: int) -> None:
        self.length, self.batch, self.seed = length, batch, seed
        self.per_epoch = total // length - 1  # leaves room for the offset and for the last target
        if self.per_epoch < 1:
            raise DataInvalid(f"{total} training tokens are less than two windows of {length}; give more text")
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def starts(self, step: int) -> npt.NDArray[np.int64]:
        """First positions of the windows of batch ``step``, shape (batch,); a window has length + 1 tokens."""
        index = np.arange(step * self.batch, (step + 1) * self.batch)
        return np.array([self._epoch_order(int(i) // self.per_epoch)[i % self.per_epoch] for i in index])

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            offset = rng.integers(self.length)
            self._order = offset + self.length * rng.permutation(self.per_epoch)
            self._epoch = epoch
        return self._order
