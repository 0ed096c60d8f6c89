"""Second moments of what in_proj, x_proj and out_proj read, from which GPTQ rounds their weights to 4 bits.

For each of these sites the sum over tokens of x x^T. A few evenly spaced documents of the run go through a forward pass
of the model as it is observed (prepared, so out_proj's input is rotated), PART at a time. The sums of each part are a
file of the unfinished run, so a killed run resumes after the last one. They are added in the order of the parts,
whether one process collected them or several shards.

A forward pass's products are float32, as the model's own. They are added in float64: then the order of the documents
decides nothing but the last bits, and the sum's error does not grow with the number of passes. The table holds float32,
half as large: GPTQ adds a hundredth of the mean square to the diagonal, beside which a rounding of 2^-24 is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from quambase.collector.block_runners import DTYPES, Placement
from quambase.collector.cuda.transfer import copied_to_host
from quambase.collector.documents import DocumentSet, TokenizedDocument
from quambase.collector.few_documents import FewDocuments, count_parts, in_parts
from quambase.collector.statistics import SiteLayout
from quambase.collector.tables.table_rows import many_keyed_rows
from quambase.model.inputs.array_files import read_npz
from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.packed_batch import Batch
from quambase.model.weights import ModelWeights
from quambase.schema.errors import DataInvalid
from quambase.schema.files import replacing
from quambase.schema.progress import Progress
from quambase.schema.sites import PRODUCT_SITES, WHOLE, SiteKey
from quambase.schema.tables import SECOND_MOMENTS
from quambase.schema.values.arrays import Float64

PART = 32
"""Documents whose sums are a file."""

Widths = Mapping[SiteKey, int]
"""The channels of each site whose second moments are summed, in the order of the tables."""

Sums = Mapping[SiteKey, Float64]
"""Of each site the lower triangle of its matrix, flat, row by row."""


@dataclass(frozen=True)
class SecondMomentsPlan(FewDocuments):
    """The documents that are summed, PART of them at a time; ``block`` of them share a forward pass."""

    block: int

    @classmethod
    def of(cls, documents: DocumentSet, wanted: int, sites: Sequence[str], block: int) -> SecondMomentsPlan:
        """``wanted`` evenly spaced documents, all if there are fewer. DataInvalid: no such site is observed."""
        if not set(sites) & set(PRODUCT_SITES):
            raise DataInvalid(f"--second-moments needs one of {', '.join(PRODUCT_SITES)}; --site leaves none")
        return cls(in_parts(documents, wanted, PART), block)


def moment_widths(layouts: Mapping[SiteKey, SiteLayout]) -> dict[SiteKey, int]:
    """The sites among ``layouts`` whose second moments are summed."""
    return {key: layout.channels for key, layout in layouts.items() if key[1] in PRODUCT_SITES}


def moment_parts_of(identity: Mapping[str, Any]) -> int:
    """How many parts a run of this ``identity`` has; 0 without second moments."""
    return count_parts(identity, "second_moments", PART)


MOMENTS = "moments"
"""Folder of the parts' files, in an unfinished run or a shard."""


def moments_file(part: int) -> str:
    """The file of a part's sums, as a path in the folder of the run or shard."""
    return f"{MOMENTS}/part-{part:05d}.npz"


def collect_second_moments(
    weights: ModelWeights,
    where: Placement,
    plan: SecondMomentsPlan,
    widths: Widths,
    parts: range,
    folder: Path,
    progress: Progress,
) -> None:
    """Write the sums of the parts ``parts`` of ``plan`` to ``folder``, except those that exist; ``weights`` are
    prepared. DataInvalid: they are not finite.
    """
    missing = [part for part in parts if _read(folder / moments_file(part), widths) is None]
    if not missing:
        return
    plan.start(progress, "second moments", parts, missing)
    model = floating_model(weights, where.device, DTYPES[where.dtype], rotated=True)
    for part in missing:
        with progress.piece(len(plan.parts[part]), plan.tokens(part)):
            _write(folder / moments_file(part), part_moments(model, plan.parts[part], widths, plan.block))


def part_moments(model: LanguageModel, documents: Sequence[TokenizedDocument], widths: Widths, block: int) -> Sums:
    """The sums over ``documents``, of which ``block`` share a forward pass. DataInvalid: they are not finite."""
    sums = {key: torch.zeros(width, width, dtype=torch.float64, device=model.device) for key, width in widths.items()}

    def add(layer: int, site: str, values: torch.Tensor) -> torch.Tensor:
        if (total := sums.get((layer, site))) is not None:
            x = values.to(torch.float32)
            total += x.T @ x
        return values

    for start in range(0, len(documents), block):
        # Not by a tap, for which the logits would be computed, too.
        model.hidden(Batch.join([document.tokens for document in documents[start : start + block]]), change=add)
    triangles = [total[torch.ones_like(total, dtype=torch.bool).tril_()] for total in sums.values()]
    found = {key: flat.numpy() for key, flat in zip(widths, copied_to_host(*triangles), strict=True)}
    for (layer, site), flat in found.items():
        if not np.isfinite(flat).all():
            raise DataInvalid(
                f"second moments at layer {layer} {site} are NaN or infinite; collect without --second-moments, or "
                "with other texts"
            )
    return found


def _write(path: Path, sums: Sums) -> None:
    """Store sums. A zip file's members have checksums, which are compared on reading."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **{f"{layer} {site}": flat for (layer, site), flat in sums.items()})


def _read(path: Path, widths: Widths) -> Sums | None:
    """What `_write` stored; None if it is not there or damaged."""
    try:
        arrays = read_npz(path)
        found = {(layer, site): arrays[f"{layer} {site}"] for layer, site in widths}
    except (OSError, ValueError, KeyError):
        return None
    sound = all(
        found[key].dtype == np.float64 and found[key].shape == (width * (width + 1) // 2,)
        for key, width in widths.items()
    )
    return found if sound else None


def total_moments(widths: Widths, paths: Sequence[Path]) -> Sums:
    """The sums of all parts, whose files are ``paths``, added from 0 in their order. DataInvalid: one is damaged."""
    total = {key: np.zeros(width * (width + 1) // 2) for key, width in widths.items()}
    for path in paths:
        found = _read(path, widths)
        if found is None:
            raise DataInvalid(f"{path} is missing or damaged; delete it and run the same collect command again")
        for key, flat in found.items():
            total[key] += flat
    return total


def stored_second_moments(run: str, widths: Widths, paths: Sequence[Path]) -> list[Callable[[], pa.Table]]:
    """Functions that make the rows of `second_moments` from the parts' files, one for each layer; their results in
    order are the table. Empty without files. DataInvalid: one is damaged.
    """
    if not paths:
        return []
    sums = total_moments(widths, paths)

    def rows(layer: int) -> pa.Table:
        keys = [key for key in widths if key[0] == layer]
        channels = np.concatenate([np.arange(widths[key], dtype=np.int32) for key in keys])
        ends = np.cumsum([0, *(channels + 1)], dtype=np.int32)
        values = np.concatenate([sums[key].astype(np.float32) for key in keys])
        columns: dict[str, object] = {"channel": channels, "values": pa.ListArray.from_arrays(ends, values)}
        return many_keyed_rows(
            run, [(key, WHOLE) for key in keys], [widths[key] for key in keys], columns, SECOND_MOMENTS
        )

    return [partial(rows, layer) for layer in sorted({layer for layer, _ in widths})]
