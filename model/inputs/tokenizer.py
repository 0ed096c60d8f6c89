"""A tokenizer.json and its hash."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers

from quambase.model.inputs.files import check_file
from quambase.model.inputs.hub import mend
from quambase.model.inputs.settings import shown
from quambase.schema.errors import CheckpointInvalid, DataInvalid, first_line

LARGEST_FILE = 256 << 20
"""Bytes of a tokenizer.json at most: those of the largest vocabularies have 35 million."""


END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
"""Names of the token that ends a text, in the order in which a vocabulary is searched for them."""


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers` tokenizer that adds nothing (no BOS) to a text. ``rows``: of the embedding, if known; a text with
    a token beyond them is an error.
    """

    path: Path
    sha256: str
    inner: tokenizers.Tokenizer
    rows: int = 2**31

    @property
    def ids(self) -> int:
        """One more than the largest token id that has a row."""
        vocabulary = self.inner.get_vocab(with_added_tokens=True).values()
        return 1 + max((i for i in vocabulary if i < self.rows), default=-1)

    @property
    def end_of_text(self) -> int | None:
        """The token that ends a text; None: it has none of END_OF_TEXT."""
        found = (self.inner.token_to_id(name) for name in END_OF_TEXT)
        return next((int(token) for token in found if token is not None), None)

    def for_rows(self, rows: int) -> Tokenizer:
        """The same tokenizer for an embedding of ``rows`` rows. CheckpointInvalid: the vocabulary has larger ids.

        Added tokens may have larger ids: a padding token is often added without a row, since no text contains it.
        """
        vocabulary = self.inner.get_vocab(with_added_tokens=False)
        largest = max(vocabulary.values(), default=-1)
        if largest >= rows:
            raise CheckpointInvalid(
                f"tokenizer {self.path} has {len(vocabulary)} tokens with ids up to {largest}, the model's embedding "
                f"{rows} rows; name the right one with --tokenizer"
            )
        return replace(self, rows=rows)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``. DataInvalid if it cannot be encoded or holds a token without a row."""
        return self._checked([text], lambda: [self.inner.encode(text, add_special_tokens=False)])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; errors as `encode`'s."""
        return self._checked(texts, lambda: self.inner.encode_batch(texts, add_special_tokens=False))

    def _checked(self, texts: list[str], encode: Callable[[], list[tokenizers.Encoding]]) -> list[list[int]]:
        try:
            found = [list(encoding.ids) for encoding in encode()]
        except BaseException as error:  # the library raises bare Exceptions, and panics that are not even those
            raise_if_stopped(error)
            raise DataInvalid(f"tokenizer {self.path} cannot encode a text ({first_line(error)})") from None
        for text, ids in zip(texts, found, strict=True):
            if ids and max(ids) >= self.rows:
                token = shown(self.inner.id_to_token(max(ids)))
                raise DataInvalid(
                    f"the text that begins {shown(text)} holds the token {token} of id {max(ids)}, and the model's "
                    f"embedding has {self.rows} rows; take the token out of the text, or give the model a row for it"
                )
        return found

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.inner.decode(ids))

    def decode_batch(self, texts: list[list[int]]) -> list[str]:
        """The text of each list of token ids, as `decode`."""
        return [str(text) for text in self.inner.decode_batch(texts)]


MOST_GROWTH = 64
"""Times that the replacements of a tokenizer.json may lengthen a text; those in use do so threefold at most."""


def _growth(raw: object) -> int:
    """How many times longer the replacements of a tokenizer.json can make a text: a product over all of them."""
    product = 1
    waiting = [raw]
    while waiting and product <= MOST_GROWTH:
        step = waiting.pop()
        if isinstance(step, list):
            waiting += step
        elif isinstance(step, dict):
            waiting += [step[key] for key in ("normalizer", "decoder", *_SEQUENCES) if key in step]
            if step.get("type") == "Replace" and isinstance(content := step.get("content"), str):
                pattern = step.get("pattern")
                fixed = pattern.get("String") if isinstance(pattern, dict) else None
                # An expression, or nothing, may match at every character and leave it.
                product *= max(1, -(-len(content) // len(fixed))) if fixed else 1 + len(content)
    return product


_SEQUENCES = ("normalizers", "decoders")


def _check_maps(raw: object) -> None:
    """ValueError where a precompiled map of characters states a table larger than the map: the library asks for memory
    of the stated size. Its first four bytes are that size.
    """
    waiting = [raw]
    while waiting:
        step = waiting.pop()
        if isinstance(step, dict):
            waiting += step.values()
            if isinstance(packed := step.get("precompiled_charsmap"), str):
                content = base64.b64decode(packed)
                if int.from_bytes(content[:4], "little") > max(0, len(content) - 4):
                    raise ValueError("a precompiled_charsmap states a table larger than itself")
        elif isinstance(step, list):
            waiting += [one for one in step if isinstance(one, dict | list)]


def raise_if_stopped(error: BaseException) -> None:
    """Raise Ctrl-C and exits again, in a handler that catches everything."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json. CheckpointInvalid."""
    check_file(path, CheckpointInvalid, LARGEST_FILE)
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
        raw = json.loads(text)
        _check_maps(raw)
        if _growth(raw) > MOST_GROWTH:
            raise ValueError(f"its replacements make a text more than {MOST_GROWTH} times as long")
        inner = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the library raises bare Exceptions, and panics that are not even those
        raise_if_stopped(error)
        raise CheckpointInvalid(
            f"{path} is not a readable tokenizer.json ({first_line(error)}); {mend(path)}"
        ) from None
    inner.no_padding()
    inner.no_truncation()
    return Tokenizer(path, hashlib.sha256(content).hexdigest(), inner)
