"""Parts of a calibration text: random subsamples of its documents or blocks, and what a scale group is on each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from quambase.analyzer.scale_groups import ScaleGroup
from quambase.schema.sql.database import DocumentSeries
from quambase.schema.values.arrays import Int64
from quambase.schema.values.distribution import BlockCounts, Distribution

DOCUMENTS, BLOCKS = "documents", "blocks"
"""The two kinds of units of which a calibration text consists."""


@dataclass(frozen=True)
class Subsamples:
    """Subsamples without replacement of ``count`` units of one kind, DOCUMENTS or BLOCKS.

    documents  how many documents the units are together
    chosen     number of units to the subsamples of so many: (r, n) units, ascending
    """

    kind: str
    count: int
    documents: int
    chosen: dict[int, Int64]

    @classmethod
    def draw(cls, kind: str, count: int, documents: int, most: int, seed: int) -> Subsamples:
        """At most ``most`` subsamples of each of the `sizes` of ``count`` units."""
        random = np.random.default_rng([seed, count])
        return cls(kind, count, documents, {n: subsets(count, n, most, random) for n in sizes(count)})

    def documents_of(self, units: int) -> int:
        """The average number of documents in ``units`` units: blocks with empty documents are smaller."""
        return round(units * self.documents / self.count)


def sizes(count: int) -> list[int]:
    """1, 2, 4, ... and half of ``count``, rounded down; none of a single unit. A larger subsample shares most of its
    units with the whole, and is near it for that reason.
    """
    half = count // 2
    return [*(1 << k for k in range(half.bit_length()) if 1 << k < half), *([half] if half else [])]


def subsets(count: int, n: int, most: int, random: np.random.Generator) -> Int64:
    """Distinct subsets of ``n`` of ``count`` units, (r, n) ascending: every one if there are at most ``most``, else
    ``most`` random ones.
    """
    every = math.comb(count, n) <= most
    found: dict[tuple[int, ...], None] = {}
    while len(found) < (math.comb(count, n) if every else most):
        found.setdefault(tuple(np.sort(random.choice(count, n, replace=False)).tolist()))
    return np.array(sorted(found) if every else list(found), np.int64)


def part_of_documents(group: ScaleGroup, units: Int64) -> ScaleGroup:
    """``group`` on some of its documents, (n,) their places in the series, for strategies that follow from the
    statistics of documents: its distribution is their largest values alone.
    """
    whole = group.documents
    documents = DocumentSeries(
        whole.documents[units], whole.amax[units], {name: values[units] for name, values in whole.quantiles.items()}
    )
    return replace(group, documents=documents, distribution=Distribution.of_values(documents.amax))


def part_of_blocks(group: ScaleGroup, counts: BlockCounts, units: Int64) -> ScaleGroup:
    """``group`` on some of its blocks, (n,) their numbers. Its statistics of documents stay those of all."""
    return replace(group, distribution=counts.together(units))
