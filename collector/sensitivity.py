"""How much the output depends on each value: gradients of the log-likelihood, squared and summed by distinct value.

Sensitivity of the model's output distribution to an error e in its activations, to second order: KL(model || disturbed)
is half of the expected square of the sum of g e over all activations, g being the gradient of the log-likelihood of
labels drawn from the model's own distribution (Fisher information). The errors of different activations are taken to be
unrelated, so that half of the sum of g^2 e^2 remains. A scale's error depends on the value only, so the sum of g^2
over the occurrences of each distinct value is enough to predict the KL of any scale of a site.

A few evenly spaced documents of the run go through a forward and a backward pass in float32, TOGETHER at a time. The
sums of every PART documents are a file of the unfinished run, so a killed run resumes after the last one. They are
added in the order of the parts, whether one process collected them or several shards.

The state is rounded after every token of decoding, so its errors at all tokens add up. Where the run has the states
along its documents, their gradients are weighted so that the sum over these stands for that over all tokens
(`quambase.model.operators.sampled_states`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from quambase.collector.block_runners import Placement
from quambase.collector.cuda.squares import choose_squares
from quambase.collector.cuda.transfer import copied_to_host
from quambase.collector.documents import DocumentSet, TokenizedDocument
from quambase.collector.few_documents import FewDocuments, count_parts, in_parts
from quambase.collector.host.kernels import PATTERNS, add_gradients
from quambase.collector.statistics import ENCODINGS, SiteIndex, SiteLayout, counted_rows
from quambase.collector.tables.table_rows import COUNTED, TableGroup, many_keyed_rows, table_groups
from quambase.model.inputs.array_files import read_npz
from quambase.model.language_model import LanguageModel, without_tf32
from quambase.model.operators.choice import choose_differentiable_operators
from quambase.model.operators.differentiable import on_gradient
from quambase.model.operators.torch import CPU
from quambase.model.packed_batch import Batch
from quambase.model.weights import ModelWeights
from quambase.schema.errors import DataInvalid
from quambase.schema.files import replacing
from quambase.schema.progress import SILENT, Progress
from quambase.schema.sites import STATE_BY_CHANNEL, SiteKey, find_site
from quambase.schema.tables import SENSITIVITIES
from quambase.schema.values.arrays import Float32, Float64, Int64

TOGETHER = 4
"""Documents that share a forward and a backward pass: the activations of all layers are in memory at once."""

PART = 8
"""Documents whose sums are a file. The file of twice as many is hardly larger, and a GPU waits for files."""

WRITERS = 3
"""Parts that are written to the disk while the next is computed, which a GPU does sooner than one is flushed."""


class SensitivitySums(NamedTuple):
    """What is summed, for every group of the observed sites and every float16 pattern, on the host or on a device.

    counts       (groups, PATTERNS) int64: occurrences
    gradient_sq  (groups, PATTERNS) float64: the sum over them of the squared gradient, nats^2 over the value's unit^2
    """

    counts: torch.Tensor
    gradient_sq: torch.Tensor

    @classmethod
    def zeros(cls, groups: int, device: torch.device = CPU) -> SensitivitySums:
        """Of no values."""
        shape = groups, PATTERNS
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for dtype in (torch.int64, torch.float64)))

    def of(self, rows: slice) -> SensitivitySums:
        """Those of some groups, as views."""
        return SensitivitySums(self.counts[rows], self.gradient_sq[rows])


class PresentSums(NamedTuple):
    """`SensitivitySums` of the patterns that occur, on the host: their places in the flat arrays, counts and sums."""

    places: Int64
    counts: Int64
    gradient_sq: Float64

    @classmethod
    def of(cls, sums: SensitivitySums) -> PresentSums:
        """Those of ``sums``."""
        counts, gradient_sq = (values.view(-1) for values in sums)
        places = torch.nonzero(counts)[:, 0]
        return cls(*(part.numpy() for part in copied_to_host(places, counts[places], gradient_sq[places])))


@dataclass(frozen=True)
class SensitivityPlan(FewDocuments):
    """The documents that are differentiated; ``seed``: of the drawn labels."""

    seed: int

    @classmethod
    def of(cls, documents: DocumentSet, wanted: int, sites: Sequence[str], family: str, seed: int) -> SensitivityPlan:
        """``wanted`` evenly spaced documents, all if there are fewer. DataInvalid: no site's scale acts in a forward
        pass.
        """
        if not any(_differentiated(name, family) for name in sites):
            raise DataInvalid(
                "--sensitivity needs a site whose scale the INT8 model reads in a forward pass; --site leaves none"
            )
        return cls(in_parts(documents, wanted, PART), seed)


def acting_sites(layouts: Mapping[SiteKey, SiteLayout], family: str) -> SiteIndex:
    """The sites whose scales a forward pass of the INT8 model reads; and the state along documents by channel, whose
    scale decoding reads.
    """
    return SiteIndex({key: layout for key, layout in layouts.items() if _differentiated(key[1], family)})


def _differentiated(site: str, family: str) -> bool:
    return site == STATE_BY_CHANNEL or find_site(site, family).acts


SENSITIVITY = "sensitivity"
"""Folder of the parts' files, in an unfinished run or a shard; and what a run's identity calls them."""


def sensitivity_parts_of(identity: Mapping[str, Any]) -> int:
    """How many parts a run of this ``identity`` has; 0 without sensitivities."""
    return count_parts(identity, SENSITIVITY, PART)


def sensitivity_file(part: int) -> str:
    """The file of a part's sums, as a path in the folder of the run or shard; it names the parts' size."""
    return f"{SENSITIVITY}/part-{part:05d}-of-{PART}.npz"


def collect_sensitivity(
    weights: ModelWeights,
    where: Placement,
    plan: SensitivityPlan,
    index: SiteIndex,
    parts: range,
    folder: Path,
    progress: Progress,
) -> None:
    """Write the sums of the parts ``parts`` of ``plan`` to ``folder``, except those that exist; ``weights`` are
    prepared. DataInvalid: gradients that are not finite.
    """
    missing = [part for part in parts if _read(folder / sensitivity_file(part), index) is None]
    if not missing:
        return
    plan.start(progress, "sensitivity", parts, missing)
    operators = choose_differentiable_operators(weights.config.operator_sizes, where.device)
    model = LanguageModel(weights, operators, rotated=True)
    with ThreadPoolExecutor(WRITERS) as writers:
        written: list[Future[None]] = []
        for part in missing:
            sums = PresentSums.of(part_sums(model, plan.parts[part], index, plan.seed, progress))
            if len(written) >= WRITERS:
                written[-WRITERS].result()
            written.append(writers.submit(write_sums, folder / sensitivity_file(part), sums))
        for each in written:
            each.result()


def write_sums(path: Path, sums: PresentSums) -> None:
    """Store sums. A zip file's members have checksums, which are compared on reading."""
    places, counts, gradient_sq = sums
    narrow = [values.astype(np.min_scalar_type(int(values.max(initial=0)))) for values in (places, counts)]
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, places=narrow[0], counts=narrow[1], gradient_sq=gradient_sq)


def _read(path: Path, index: SiteIndex) -> PresentSums | None:
    """What `write_sums` stored; None if it is not there or damaged."""
    try:
        arrays = read_npz(path)
        places, counts, gradient_sq = (arrays[name] for name in PresentSums._fields)
    except (OSError, ValueError, KeyError):
        return None
    sound = places.shape == counts.shape == gradient_sq.shape and places.dtype.kind == counts.dtype.kind == "u"
    sound = sound and gradient_sq.dtype == np.float64 and places.ndim == 1
    if not sound or not (places < index.group_count * PATTERNS).all():
        return None
    return PresentSums(places.astype(np.int64), counts.astype(np.int64), gradient_sq)


def total_sums(index: SiteIndex, paths: Sequence[Path]) -> SensitivitySums:
    """The sums of all parts, whose files are ``paths``, added from 0 in their order. DataInvalid: one is damaged."""
    total = SensitivitySums.zeros(index.group_count)
    counts, gradient_sq = (values.view(-1).numpy() for values in total)
    for path in paths:
        found = _read(path, index)
        if found is None:
            raise DataInvalid(f"{path} is missing or damaged; delete it and run the same collect command again")
        counts[found.places] += found.counts
        gradient_sq[found.places] += found.gradient_sq
    return total


def part_sums(
    model: LanguageModel,
    documents: Sequence[TokenizedDocument],
    index: SiteIndex,
    seed: int,
    progress: Progress = SILENT,
) -> SensitivitySums:
    """The sums of ``documents``, of which TOGETHER share a pass; ``model`` has `DifferentiableOperators`.

    DataInvalid: gradients that are not finite.
    """
    sums = SensitivitySums.zeros(index.group_count, model.device)
    groups = [torch.from_numpy(_group_of(layout)) for layout in index.layouts.values()]
    together = torch.cat(groups).to(model.device)  # one copy, since the host waits for each
    groups_of = dict(zip(index.layouts, torch.split(together, [len(part) for part in groups]), strict=True))
    for start in range(0, len(documents), TOGETHER):
        some = documents[start : start + TOGETHER]
        with progress.piece(len(some), sum(document.tokens.size for document in some)):
            _add_pass(sums, model, some, index, groups_of, seed)
    finite = sums.gradient_sq.sum(1).isfinite().cpu()  # once: the host waits for the device
    for key, rows in index.groups.items():
        if not finite[rows].all():
            raise DataInvalid(
                f"gradients at layer {key[0]} {key[1]} are NaN or infinite; collect without --sensitivity, or with "
                "other texts"
            )
    return sums


def _add_pass(
    sums: SensitivitySums,
    model: LanguageModel,
    documents: Sequence[TokenizedDocument],
    index: SiteIndex,
    groups_of: Mapping[SiteKey, torch.Tensor],
    seed: int,
) -> None:
    """Add what one forward and one backward pass over ``documents`` gives; ``groups_of``: (channels,) the number of
    each channel's group.
    """

    def observe(layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        key = layer, site
        if key not in groups_of:
            return
        layout, part = index.layouts[key], sums.of(index.groups[key])
        seen = counted_rows(layout, values.detach())
        on_gradient(values, lambda g: add_squares(part, seen, counted_rows(layout, g), groups_of[key]))

    every = max(layout.every for layout in index.layouts.values())
    batch = Batch.join([document.tokens for document in documents], every)
    uniform = torch.from_numpy(np.concatenate([_uniform(seed, document) for document in documents])).to(model.device)
    hidden = model.differentiable_hidden(batch, observe)
    gradient = loss_gradient(model, hidden.detach(), uniform)
    with without_tf32():
        torch.autograd.backward(hidden, gradient)


def _group_of(layout: SiteLayout) -> Int64:
    """(channels,) the number of each channel's group."""
    found = np.empty(layout.channels, np.int64)
    for g in range(len(layout.names)):
        found[layout.members(g)] = g
    return found


def _uniform(seed: int, document: TokenizedDocument) -> Float64:
    """A number in [0, 1) for each token, independent of the other documents."""
    return np.random.default_rng([seed, document.index]).random(document.tokens.size)


def loss_gradient(model: LanguageModel, hidden: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The gradient of minus the log-likelihood at the head's input ``hidden`` (t, d), for a label drawn at each token:
    the first whose cumulative probability exceeds ``uniform`` (t,), on the model's device.
    """
    found = torch.empty_like(hidden)
    with torch.no_grad(), without_tf32():
        for start in range(0, len(hidden), model.operators.head_rows):
            rows = slice(start, start + model.operators.head_rows)
            logits = model.logits(hidden[rows])
            shares = torch.softmax(logits.double(), -1)
            reached = shares.cumsum(-1)
            wanted = uniform[rows, None] * reached[:, -1:]
            label = torch.searchsorted(reached, wanted, right=True).clamp_(max=logits.shape[1] - 1)
            shares.scatter_add_(1, label, torch.full_like(label, -1, dtype=shares.dtype))
            found[rows] = shares.float() @ model.lm_head
    return found


def add_squares(sums: SensitivitySums, values: torch.Tensor, gradient: torch.Tensor, group_of: torch.Tensor) -> None:
    """Add a site's values (t, c) and their gradients (t, c) to its groups' sums; group_of (c,). All on one device."""
    if compiled := choose_squares(values.device):
        compiled.add(sums.counts, sums.gradient_sq, values, gradient, group_of)
        return
    half = values.to(torch.float16).contiguous()
    if values.device.type == "cpu":
        patterns = half.numpy().view(np.uint16)
        added = (sums.counts.numpy(), sums.gradient_sq.numpy())
        add_gradients(patterns, gradient.contiguous().numpy(), group_of.numpy(), *added)
        return
    counts, squares = fixed_point_sums(half, gradient, group_of, len(sums.counts))
    sums.counts.add_(counts)
    sums.gradient_sq.add_(squares)


def fixed_point_sums(
    half: torch.Tensor, gradient: torch.Tensor, group_of: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(groups, PATTERNS) counts int64 and sums of squares float64 of float16 values and their gradients, (t, c) each.

    A device adds in any order. So squares are added as int64, in units of a power of two for which their sum stays
    below 2^62: each is rounded by less than 2^-61 of the largest square times their number.
    """
    places = ((half.view(torch.int16).long() & (PATTERNS - 1)) + group_of * PATTERNS).flatten()
    counts = torch.bincount(places, minlength=groups * PATTERNS).view(groups, PATTERNS)
    squares = gradient.double().square().flatten()
    # Two to the power that is above all of them together. Computed there, so that nothing waits for the device.
    units = torch.exp2(62.0 - torch.frexp(squares.max() * squares.numel()).exponent.double())
    whole = torch.zeros(groups * PATTERNS, dtype=torch.int64, device=half.device)
    whole.index_add_(0, places, torch.round(squares * units).long())
    total = whole.view(groups, PATTERNS).double() / units
    return counts, torch.where(squares.sum().isfinite(), total, torch.nan)


@cache
def _ascending() -> tuple[Float32, Int64]:
    """The finite float16 values, ascending, and their patterns; zero once."""
    values = ENCODINGS["float16"].values()
    patterns = np.flatnonzero(np.isfinite(values))
    patterns = patterns[patterns != PATTERNS // 2]
    order = np.argsort(values[patterns], kind="stable")
    return values[patterns][order], patterns[order]


def distinct_values(sums: SensitivitySums, group: int) -> tuple[Float32, Int64, Float64]:
    """The finite values of a group that occur, ascending; their counts; their sums of squares. -0 joins 0."""
    values, order = _ascending()
    counts, gradient_sq = (values[group].numpy().copy() for values in sums)
    for array in (counts, gradient_sq):
        array[0] += array[PATTERNS // 2]
    counts, gradient_sq = counts[order], gradient_sq[order]
    present = counts > 0
    return values[present], counts[present], gradient_sq[present]


def stored_sensitivities(run: str, index: SiteIndex, paths: Sequence[Path]) -> list[Callable[[], pa.Table]]:
    """Functions that make the rows of `sensitivities` from the parts' files, each for some groups; their results in
    order are the table. Empty without files. DataInvalid: one is damaged.
    """
    if not paths:
        return []
    sums = total_sums(index, paths)

    def part(groups: Sequence[TableGroup]) -> pa.Table:
        found = [distinct_values(sums, group.row) for group in groups]
        values, counts, squares = map(np.concatenate, zip(*found, strict=True))
        columns: dict[str, object] = {"value": values, "count": counts, "gradient_sq": squares}
        keys = [(group.key, group.name) for group in groups]
        return many_keyed_rows(run, keys, [each[0].size for each in found], columns, SENSITIVITIES)

    groups = table_groups(index)
    return [partial(part, groups[start : start + COUNTED]) for start in range(0, len(groups), COUNTED)]
