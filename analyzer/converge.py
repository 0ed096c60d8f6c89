"""Is the calibration set large enough? Each strategy's scales from a part of it, against those from all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from quambase.analyzer.by_group import of_each, work_of
from quambase.analyzer.convergence import Measured, next_step, sizes_table, strategies_table, summarize
from quambase.analyzer.scale_groups import ScaleGroup, default_granularity, scale_groups
from quambase.analyzer.site.one_site import one_run
from quambase.analyzer.strategies import Choice, Scale, parse_labels
from quambase.analyzer.subsamples import BLOCKS, DOCUMENTS, Subsamples, part_of_blocks, part_of_documents
from quambase.schema.errors import DatabaseInvalid, DataInvalid, UnknownName
from quambase.schema.files import refuse_foreign_picture
from quambase.schema.progress import Progress, Shown
from quambase.schema.sites import WHOLE
from quambase.schema.sql.answer import PrintsAsTable
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.manifest import Manifest
from quambase.schema.values.arrays import Float64, Int64
from quambase.schema.values.distribution import BlockCounts
from quambase.schema.values.number_format import multipliers

RESAMPLES = 20
"""Subsamples of each size. A band from 5 % to 95 % of them then leaves out the least and the largest."""


MOST_SCALES = 48
"""Scales that are measured at most. A Mamba-2 has several hundred, most with a search for a zero point, and fewer
tell their median.
"""


@dataclass(frozen=True, repr=False)
class Convergence(PrintsAsTable):
    """What `converge` found.

    title       the run, and how many scales
    strategies  a row per strategy, the first to converge first (`quambase.analyzer.convergence.STRATEGIES`)
    sizes       a row per strategy and number of documents (`quambase.analyzer.convergence.SIZES`)
    summary     a sentence per strategy, then how that was judged, then whether the documents are enough
    command     what to do next
    picture     the file saved, None if none was
    notes       which run it is, and what else a user should know
    """

    title: str
    strategies: pa.Table
    sizes: pa.Table
    summary: list[str]
    command: str
    picture: Path | None
    notes: list[str]

    def shown(self) -> pa.Table:
        """Each strategy in one row."""
        return self.strategies


def converge(
    db: str | Path = Path("quambase-db"),
    run: str | None = None,
    site: str | None = None,
    layer: int | None = None,
    strategies: Sequence[str] | None = None,
    picture: str | Path | None = None,
    resamples: int = RESAMPLES,
    most_scales: int = MOST_SCALES,
    seed: int = 0,
    progress: Shown = False,
    force: bool = False,
) -> Convergence:
    """Compare the scales from 1, 2, 4, ... documents, up to half of them, with the scales from all documents of a run.

    site, layer  only these scales; None: every scale that a forward pass of the INT8 model reads
    strategies   labels; None: the default ones
    picture      file to save a picture to (its suffix says the format); None saves none
    resamples    subsamples without replacement of each size (at least 2), from ``seed``; all where there are fewer
    most_scales  of more scales only so many are looked at, drawn from ``seed``: a scale takes a second or more
    progress     shown on stderr, or a function that is called with (scales done, scales in all)
    force        replace ``picture`` even if it is no picture of quambase's

    Strategies that follow from the statistics of each document are computed from any documents, the others from
    blocks of documents, of which `collect` stores the counts with ``by_block``. Of a run without they are left out, and
    so are those that need sensitivities, which are stored as one sum; `Convergence.summary` says so.

    For each subsample, ``change`` is |scale / scale from all - 1| (of two segments the larger one; a zero point is not
    in it), and the scale's error on all documents is compared with the error of the scale from all. Columns are
    medians over the subsamples, with the band from 5 % to 95 % of them. From half to all a scale moves about as far as
    one from all is from that of many more documents: the subsamples of half are the delete-half jackknife, whose
    variance needs no factor (Shao and Wu 1989, A general theory for jackknife variance estimation). That holds for
    averages and quantiles, not for a maximum, which only grows.

    Errors: UnknownName, OutputRefused, DataInvalid (too small a number); DatabaseInvalid: fewer than two documents, or
    no strategy is left.
    """
    _check(resamples, most_scales)
    if picture is not None:
        refuse_foreign_picture(picture := Path(picture), force=force)
    choices = parse_labels(list(strategies) if strategies else None)
    with Progress(progress) as shown, StatsDB(db, run) as database:
        shown.say("reading the distributions")
        manifest = one_run(database, "converge")
        every = _chosen(scale_groups(database, manifest.run), manifest, site, layer)
        groups = _drawn(every, most_scales, seed)
        plan = _Plan.of(choices, groups, manifest, resamples, seed)
        measured = plan.measure(database, groups, shown)
    sizes = sizes_table(measured)
    table = strategies_table(measured)
    title = f"{_where(groups, every, site, layer)} of run {manifest.run}, {plan.documents} documents"
    words, command = next_step(table, manifest, plan.left_out)
    summary = [*summarize(table, manifest, plan.left_out, resamples, seed), words]
    if picture is not None:
        from quambase.analyzer.pictures.convergence import convergence_figure  # matplotlib takes half a second
        from quambase.schema.pictures import save_picture

        save_picture(convergence_figure(title, sizes), picture)
    return Convergence(title, table, sizes, summary, command, picture, database.notes)


def _check(resamples: int, most_scales: int) -> None:
    """DataInvalid where one of the two is too small."""
    for name, given, least, usual in (
        ("resamples", resamples, 2, RESAMPLES),
        ("most_scales", most_scales, 1, MOST_SCALES),
    ):
        if given < least:
            raise DataInvalid(f"{name} is {given}; expected at least {least}, such as {usual}")


def _chosen(groups: list[ScaleGroup], manifest: Manifest, site: str | None, layer: int | None) -> list[ScaleGroup]:
    """The scale groups to look at, without those that have no value. UnknownName: there is no such site or layer."""
    for kind, asked, known in (
        ("site", site, [group.site for group in groups]),
        ("layer", layer, [group.layer for group in groups]),
    ):
        if asked is not None and asked not in known:
            names = list(dict.fromkeys(map(str, known)))
            raise UnknownName.of(kind, str(asked), names, where=f"run {manifest.run}")
    here = [g for g in groups if site in (None, g.site) and layer in (None, g.layer) and g.distribution.total]
    read = [group for group in here if group.consumed and (site is not None or not group.point.decode_only)]
    found = read or [group for group in here if group.group_name == WHOLE]
    if not found:
        raise UnknownName(f"run {manifest.run} holds no values of site '{site}' in layer {layer}; see `quambase stats`")
    return found


def _drawn(groups: list[ScaleGroup], most: int, seed: int) -> list[ScaleGroup]:
    """At most ``most`` of ``groups``, drawn from ``seed``, in their order."""
    if len(groups) <= most:
        return groups
    places = np.random.default_rng(seed).choice(len(groups), most, replace=False)
    return [groups[place] for place in np.sort(places)]


def _where(groups: list[ScaleGroup], every: list[ScaleGroup], site: str | None, layer: int | None) -> str:
    """The chosen scales in words; ``every``: those from which they were drawn."""
    parts = [*([] if layer is None else [f"layer {layer}"]), *([] if site is None else [site])]
    drawn = f" drawn from {len(every)}" if len(groups) < len(every) else ""
    scales = ("one scale" if len(groups) == 1 else f"the median of {len(groups)} scales") + drawn
    return " ".join([*parts, scales]) if not parts else f"{' '.join(parts)}: {scales}"


ByUnits = dict[int, Float64]
"""Number of units to (subsamples, `quambase.analyzer.convergence.QUANTITIES`)."""


@dataclass(frozen=True)
class _Plan:
    """Which strategies are computed on which subsamples.

    subsamples  by kind of unit
    choices     the strategies of each kind
    left_out    labels that cannot be computed on a part of this run, and why
    documents   with a token
    """

    subsamples: dict[str, Subsamples]
    choices: dict[str, list[Choice]]
    left_out: dict[str, list[str]]
    documents: int

    @classmethod
    def of(
        cls, choices: list[Choice], groups: list[ScaleGroup], manifest: Manifest, resamples: int, seed: int
    ) -> _Plan:
        """DatabaseInvalid: fewer than two documents, or every strategy is left out."""
        numbers = groups[0].documents.documents
        if numbers.size < 2:
            raise DatabaseInvalid(
                f"run {manifest.run} holds {numbers.size} document; expected several, of which parts can be compared"
            )
        stored = bool(manifest.identity.get("by_block"))
        blocks = int(np.unique(numbers // int(manifest.identity["block"])).size) if stored else 0
        of_documents = [choice for choice in choices if choice.strategy.from_documents]
        sensitive = [choice.label for choice in choices if choice.strategy.needs_sensitivity]
        of_counts = [c for c in choices if not c.strategy.from_documents and not c.strategy.needs_sensitivity]
        left_out: dict[str, list[str]] = {}
        if blocks < 2 and of_counts:
            left_out["counts"] = [choice.label for choice in of_counts]
        if sensitive:
            left_out["sensitivities"] = sensitive
        found = {DOCUMENTS: of_documents, BLOCKS: of_counts if blocks >= 2 else []}
        if not any(found.values()):
            raise DatabaseInvalid(_nothing_left(manifest, left_out))
        counts = {DOCUMENTS: numbers.size, BLOCKS: blocks}
        subsamples = {
            kind: Subsamples.draw(kind, counts[kind], numbers.size, resamples, seed)
            for kind, mine in found.items()
            if mine
        }
        return cls(subsamples, found, left_out, numbers.size)

    def measure(self, database: StatsDB, groups: list[ScaleGroup], shown: Progress) -> list[Measured]:
        """Every strategy on every subsample at every one of ``groups``; the counts of one layer at a time are read."""
        (manifest,) = database.runs
        level = default_granularity(manifest.model.family)
        shown.start("converge", len(groups), work_of(groups), unit="scales")
        found: dict[str, list[ByUnits | None]] = {}
        for layer, members in groupby(groups, key=lambda group: group.layer):
            counts: dict[tuple[str, str], BlockCounts] = {}
            if BLOCKS in self.subsamples:
                counts = database.block_counts(manifest.run, layer, self.subsamples[BLOCKS].count, level)
            of_layer = list(members)
            for _, values in of_each(partial(self._at, counts), of_layer, shown, len(of_layer)):
                for label, of_label in values.items():
                    found.setdefault(label, []).append(of_label)
        return [
            Measured.of(choice.label, self.subsamples[kind], groups, found[choice.label])
            for kind, mine in self.choices.items()
            for choice in mine
        ]

    def _at(self, of_layer: dict[tuple[str, str], BlockCounts], group: ScaleGroup) -> dict[str, ByUnits | None]:
        """What is measured at one scale group of a layer with these counts, by label; None where a strategy has no
        scale there.
        """
        counts = of_layer.get((group.site, group.group_name))
        losses = _Losses(group)
        found: dict[str, ByUnits | None] = {choice.label: None for mine in self.choices.values() for choice in mine}
        for kind, subsamples in self.subsamples.items():
            mine = [choice for choice in self.choices[kind] if choice.fits(group)]
            whole = {choice.label: choice.scale(group) for choice in mine}
            of_kind: dict[str, ByUnits] = {choice.label: {} for choice in mine}
            for n, chosen in subsamples.chosen.items():
                parts = [_part(group, kind, counts, units) for units in chosen]
                for choice in mine:
                    rows = [losses.compare(choice.scale(part), whole[choice.label]) for part in parts]
                    of_kind[choice.label][n] = np.array(rows)
            found |= of_kind
        return found


def _part(group: ScaleGroup, kind: str, counts: BlockCounts | None, units: Int64) -> ScaleGroup:
    """``group`` on some units of ``kind``."""
    if kind == DOCUMENTS:
        return part_of_documents(group, units)
    assert counts is not None
    return part_of_blocks(group, counts, units)


class _Losses:
    """The errors of scales on all values of a group, each computed once."""

    def __init__(self, group: ScaleGroup) -> None:
        self._group = group
        self._known: dict[Scale, tuple[float, float]] = {}

    def compare(self, scale: Scale, whole: Scale) -> tuple[float, ...]:
        """`quambase.analyzer.convergence.QUANTITIES` of ``scale``; ``whole``: the scale from all documents."""
        (error, kl), (error_of_all, kl_of_all) = self._of(scale), self._of(whole)
        none = 1.0 if error == 0 else np.inf
        return change(scale, whole), error / error_of_all if error_of_all > 0 else none, kl, kl_of_all

    def _of(self, scale: Scale) -> tuple[float, float]:
        if scale not in self._known:
            kl = self._group.predicted_kl(scale)
            self._known[scale] = self._group.figures(scale).squared_error, np.nan if kl is None else kl
        return self._known[scale]


def change(scale: Scale, whole: Scale) -> float:
    """|scale / whole - 1|; of two segments the larger one. Zero points are not compared."""
    pairs = zip(multipliers(scale), multipliers(whole), strict=True)
    return max(abs(one / other - 1) for one, other in pairs)


def _nothing_left(manifest: Manifest, left_out: dict[str, list[str]]) -> str:
    """Why no strategy can be computed on a part of the run."""
    if "counts" in left_out:
        return (
            f"run {manifest.run} holds no counts of several blocks, which {', '.join(left_out['counts'])} would need; "
            "collect again with --by-block and a small --batch-size, or ask for absmax, quamba or ema_percentile"
        )
    return (
        f"{', '.join(left_out['sensitivities'])} cannot be judged: a run stores its sensitivities as one sum over "
        "their documents; ask for other strategies"
    )
