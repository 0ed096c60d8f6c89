"""A tokenizer.json and its hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from quambase.model.hub import HubError, fetch_file, mend
from quambase.schema.errors import CheckpointInvalid, ModelNotFound


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers` tokenizer; nothing (no BOS) is added to a text. ``size`` counts its tokens."""

    path: Path
    sha256: str
    inner: tokenizers.Tokenizer

    @property
    def size(self) -> int:
        """How many tokens it knows, added ones included."""
        return int(self.inner.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        return list(self.inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [list(e.ids) for e in self.inner.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.inner.decode(ids))


def load_tokenizer(folder: Path, *, name: str | None = None, family: str | None = None) -> Tokenizer:
    """The tokenizer called ``name`` (a file, a folder, a hub id); without one ``folder/tokenizer.json``, and where
    there is no such file the hub id ``family``. ModelNotFound says what to do where there is none.
    """
    beside = folder / "tokenizer.json"
    if name is not None and Path(name).exists():
        path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    elif name is not None:
        path = _from_hub(name)
    elif beside.exists():
        path = beside
    elif family is not None:
        path = _from_hub(family)
    else:
        raise ModelNotFound(f"{folder} holds no tokenizer.json; name one with --tokenizer FILE (or a hub id)")
    try:
        content = path.read_bytes()
        inner = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the tokenizers library raises bare Exception
        first = str(error).splitlines()[0]
        raise CheckpointInvalid(f"{path} is not a readable tokenizer.json ({first}); {mend(path)}") from None
    inner.no_padding()
    inner.no_truncation()
    return Tokenizer(path, hashlib.sha256(content).hexdigest(), inner)


def _from_hub(repository: str) -> Path:
    try:
        return fetch_file(repository, "tokenizer.json")
    except HubError as error:
        raise ModelNotFound(
            f"tokenizer {repository} is not in the local hub cache and could not be fetched ({error}); or pass the "
            "file: --tokenizer tokenizer.json"
        ) from None
