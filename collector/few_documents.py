"""A few documents of a run that go through passes of their own: for sensitivities, for second moments.

They are divided into parts. The sums of each part are a file of the unfinished run or shard, so a killed run resumes
after the last one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from quambase.collector.documents import DocumentSet, TokenizedDocument
from quambase.schema.progress import Progress

Parts = list[list[TokenizedDocument]]


@dataclass(frozen=True)
class FewDocuments:
    """``parts``: the documents of each part."""

    parts: Parts

    def identity(self) -> dict[str, int]:
        """What determines the sums, besides the run's other settings."""
        return {"documents": sum(map(len, self.parts)), "tokens": sum(map(self.tokens, range(len(self.parts))))}

    def tokens(self, part: int) -> int:
        """How many tokens a part has."""
        return sum(document.tokens.size for document in self.parts[part])

    def start(self, progress: Progress, stage: str, own: range, missing: Collection[int]) -> None:
        """Begin a stage of the parts ``own``, of which those that are not ``missing`` were done before."""
        before = [part for part in own if part not in missing]
        whole, done = (
            (sum(len(self.parts[part]) for part in some), sum(map(self.tokens, some))) for some in (own, before)
        )
        progress.start(stage, *whole, done=done)


def in_parts(documents: DocumentSet, wanted: int, size: int) -> Parts:
    """``wanted`` documents at equal distances, all if there are fewer, ``size`` of them a part."""
    every = documents.documents
    count = min(wanted, len(every))
    chosen = [every[(2 * i + 1) * len(every) // (2 * count)] for i in range(count)]
    return [chosen[i : i + size] for i in range(0, count, size)]


def count_parts(identity: Mapping[str, Any], name: str, size: int) -> int:
    """How many parts of ``size`` documents a run of this ``identity`` has; 0 if it says nothing of ``name``."""
    return -(-int(identity.get(name, {}).get("documents", 0)) // size)
