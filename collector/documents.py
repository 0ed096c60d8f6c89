"""The documents of a run: read before its first forward pass, sampled tokens, the run id, the text around a token."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from quambase.model.inputs.text import read_documents
from quambase.model.inputs.tokenizer import Tokenizer
from quambase.schema.errors import DataInvalid
from quambase.schema.progress import SILENT, Progress
from quambase.schema.values.arrays import Int32, Int64

Keep = int | Literal["all"]
"""The number of tokens whose raw activations are stored."""


@dataclass(frozen=True)
class TokenizedDocument:
    """A document of at least one token: index in the file, hash of its text, token ids (truncated to the sequence
    length).
    """

    index: int
    sha256: str
    tokens: Int32


@dataclass(frozen=True)
class DocumentSet:
    """Documents of a run in file order; ``read`` counts all, ``empty`` those without tokens, ``truncated`` the
    shortened ones.
    """

    documents: tuple[TokenizedDocument, ...]
    read: int
    empty: int
    truncated: int

    @property
    def tokens(self) -> int:
        """Tokens of all documents together."""
        return sum(document.tokens.size for document in self.documents)

    def blocks(self, size: int) -> list[list[TokenizedDocument]]:
        """Runs of ``size`` consecutive documents of the file, without the empty ones."""
        blocks: dict[int, list[TokenizedDocument]] = {}
        for document in self.documents:
            blocks.setdefault(document.index // size, []).append(document)
        return list(blocks.values())

    def digest(self) -> str:
        """SHA-256 over the documents' numbers, text hashes and token ids, in order."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(f"{document.index}:{document.sha256}:{document.tokens.size};".encode())
            digest.update(document.tokens.tobytes())
        return digest.hexdigest()


def read_document_set(
    data: str, tokenizer: Tokenizer, samples: int, seq_len: int, *, progress: Progress = SILENT
) -> DocumentSet:
    """Read and tokenize the first ``samples`` documents, each truncated to ``seq_len`` tokens, without added tokens.

    DataInvalid if no document has a token.
    """
    documents: list[TokenizedDocument] = []
    read = truncated = 0
    for document in read_documents(data, samples):
        read += 1
        if read % 64 == 1:
            progress.say(f"tokenizing document {read}")
        ids = tokenizer.encode(document.text)
        truncated += len(ids) > seq_len
        if ids:
            tokens = np.array(ids[:seq_len], np.int32)
            documents.append(TokenizedDocument(document.index, document.sha256, tokens))
    if not documents:
        raise DataInvalid(f"{data} holds no document with a token ({read} read); expected at least one text")
    return DocumentSet(tuple(documents), read, read - len(documents), truncated)


def token_hash(seed: int, document: npt.NDArray[np.uint64], position: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of (seed, document, position): splitmix64's finalizer (Steele, Lea, Flood 2014), applied twice."""

    def mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    with np.errstate(over="ignore"):
        start = mix(document + np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15))
        return mix(start + (position + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def sampled_tokens(plan: DocumentSet, keep: int, seed: int) -> dict[int, Int64]:
    """The ``keep`` tokens of smallest hash: document number to its sampled positions, ascending."""
    documents = np.concatenate([np.full(d.tokens.size, d.index, np.uint64) for d in plan.documents])
    positions = np.concatenate([np.arange(d.tokens.size, dtype=np.uint64) for d in plan.documents])
    chosen = np.argsort(token_hash(seed, documents, positions), kind="stable")[:keep]
    found: dict[int, list[int]] = {}
    for document, position in sorted(zip(documents[chosen].tolist(), positions[chosen].tolist(), strict=True)):
        found.setdefault(int(document), []).append(int(position))
    return {document: np.array(places, np.int64) for document, places in found.items()}


def sampled_states(plan: DocumentSet, keep: int, seed: int) -> set[int]:
    """The ``keep`` documents whose last token has the smallest hash: their final states are stored."""
    documents = np.array([d.index for d in plan.documents], np.uint64)
    last = np.array([d.tokens.size - 1 for d in plan.documents], np.uint64)
    chosen = np.argsort(token_hash(seed, documents, last), kind="stable")[:keep]
    return {int(document) for document in documents[chosen]}


def run_id(name: str, identity: dict[str, Any]) -> str:
    """``name`` and the first 12 digits of the SHA-256 of ``identity`` as canonical JSON."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    safe = "".join(c if c.isalnum() or c in "-." else "-" for c in name.split("/")[-1])
    return f"{safe}-{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"


AROUND = 8
"""Words before and after a token in the table `outliers`."""


class TextAround:
    """The words before and after tokens of the calibration documents."""

    def __init__(self, plan: DocumentSet, tokenizer: Tokenizer) -> None:
        self._tokens = {document.index: document.tokens for document in plan.documents}
        self._tokenizer = tokenizer
        self._known: dict[tuple[int, int], tuple[str, str]] = {}

    def of(self, documents: Int64, positions: Int64) -> tuple[list[str], list[str]]:
        """Text before and after the tokens at ``positions`` (n,) of ``documents`` (n,)."""
        asked = list(zip(documents.tolist(), positions.tolist(), strict=True))
        missing = list(dict.fromkeys(place for place in asked if place not in self._known))
        # A word may be several tokens; four are enough for all but code and names.
        span = 4 * AROUND
        parts = []
        for document, position in missing:
            tokens = self._tokens[document]
            parts += [tokens[max(0, position - span) : position], tokens[position + 1 : position + 1 + span]]
        decoded = self._tokenizer.decode_batch([part.tolist() for part in parts])
        for number, place in enumerate(missing):
            before, after = (_words(text) for text in decoded[2 * number : 2 * number + 2])
            self._known[place] = "".join(before[-AROUND:]), "".join(after[:AROUND])
        return [self._known[place][0] for place in asked], [self._known[place][1] for place in asked]


def _words(text: str) -> list[str]:
    """``text`` cut before each word."""
    return re.split(r"(?<=\s)(?=\S)", text)
