"""The channel statistics from which a Mamba-2's groups are formed: of a first pass over some documents, or of another
run.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from quambase.collector.block_runners import Placement, new_block_runner
from quambase.collector.clustering import VARIANTS, Variant, layer_groups
from quambase.collector.documents import DocumentSet
from quambase.collector.layouts import site_layouts
from quambase.collector.statistics import RunStatistics
from quambase.model.checkpoint import LoadedModel
from quambase.model.prepare import prepare
from quambase.schema.errors import DatabaseInvalid, DataInvalid, UnknownName
from quambase.schema.groups import LayerGroups
from quambase.schema.progress import SILENT, Progress
from quambase.schema.sites import MAMBA2
from quambase.schema.stored.manifest import Manifest
from quambase.schema.stored.runs import read_run_table
from quambase.schema.values.arrays import Float64

SITE = "x_conv_out:input"
"""The site whose channels are sorted: x, the input of the scan."""

NONE = "none"
CHOICES = (*VARIANTS, NONE)

FIXED_DOCUMENTS = 64
"""Documents of the first pass; the variant ``quamba2`` reads all, as upstream does."""


@dataclass(frozen=True)
class Grouping:
    """How a run's groups are found: ``documents`` of a first pass, or the run ``source``."""

    variant: Variant
    documents: int
    source: str | None

    def identity(self) -> dict[str, Any]:
        """What determines the groups, besides the run's other settings."""
        origin = {"run": self.source} if self.source else {"documents": self.documents}
        return {"variant": self.variant, **origin, "scikit_learn": version("scikit-learn")}


def choose_grouping(
    family: str, groups: str | None, group_samples: int | None, groups_from: str | None, documents: int
) -> Grouping | None:
    """The grouping that the options name, for a model of ``family`` and this many ``documents``; None: no groups.

    UnknownName: ``groups`` is not one of CHOICES; DataInvalid: contradictory options.
    """
    if groups is not None and groups not in CHOICES:
        raise UnknownName.of("grouping", groups, CHOICES)
    if family != MAMBA2 or groups == NONE:
        if groups_from or group_samples or groups not in (None, NONE):
            what = "heads to group" if family != MAMBA2 else "groups, as --groups none says,"
            raise DataInvalid(f"there are no {what} in this run; leave out --groups, --group-samples and --groups-from")
        return None
    if groups_from and group_samples:
        raise DataInvalid("--groups-from needs no first pass; leave out --group-samples")
    variant: Variant = "quamba2" if groups == "quamba2" else "fixed"
    wanted = group_samples or (documents if variant == "quamba2" else FIXED_DOCUMENTS)
    return Grouping(variant, min(wanted, documents), groups_from)


def find_groups(
    loaded: LoadedModel,
    plan: DocumentSet,
    grouping: Grouping,
    block: int,
    db: Path,
    where: Placement,
    *,
    progress: Progress = SILENT,
) -> list[LayerGroups]:
    """The groups of every layer; errors as `statistics_of_run`'s."""
    layout = loaded.any_weights.config.head_layout
    assert layout is not None
    if grouping.source:
        statistics = statistics_of_run(db / "runs" / grouping.source, loaded.weights_sha256)
    else:
        statistics = first_pass(loaded, plan, grouping.documents, block, where, progress=progress)
    return [layer_groups(layer, layout.headdim, layout.ssd_groups, grouping.variant) for layer in statistics]


def first_pass(
    loaded: LoadedModel, plan: DocumentSet, documents: int, block: int, where: Placement, *, progress: Progress = SILENT
) -> list[Float64]:
    """(e,) per layer: the largest mean absolute x of the first ``documents`` documents, as in a run without groups.

    The model is the run's, folded and rotated. Upstream computes the statistics before rotation; x differs only by
    float16's rounding of the weights.
    """
    layouts = site_layouts(loaded.any_weights.config, [SITE])
    runner = new_block_runner(prepare(loaded.any_weights), where, RunStatistics.empty(layouts, 1))
    some = DocumentSet(plan.documents[:documents], documents, 0, 0)
    progress.start("first pass, for the groups", documents, some.tokens)
    with runner:
        for number, members in enumerate(some.blocks(block)):
            with progress.piece(len(members), sum(document.tokens.size for document in members)):
                runner.observe(number, members)
        statistics = runner.statistics()
    means = statistics.moments.named()["mean_abs_max"].numpy()
    return [means[channels] for channels in statistics.index.channels.values()]


def statistics_of_run(folder: Path, weights_sha256: str) -> list[Float64]:
    """(e,) per layer: ``mean_abs_max`` of x in a stored run, in the order of the model as loaded.

    DatabaseInvalid: the run is missing, unfinished, of other weights, or without the site.
    """
    if not folder.is_dir():
        raise DatabaseInvalid(f"the database has no run {folder.name}; `quambase stats --help` lists the runs")
    manifest = Manifest.load(folder)
    if manifest.identity.get("weights_sha256") != weights_sha256:
        raise DatabaseInvalid(f"run {folder.name} is of other weights; name a run of the model that is collected")
    layers = range(manifest.model.n_layer)
    if any((layer, SITE) not in manifest.sites for layer in layers):
        raise DatabaseInvalid(f"run {folder.name} lacks {SITE}; name a run that was collected with that site")
    table = read_run_table(folder, manifest, "channels")
    table = table.filter(pc.equal(table["site"], SITE)).sort_by([("layer", "ascending"), ("channel", "ascending")])
    stored = table["mean_abs_max"].to_numpy().reshape(len(layers), -1)
    groups = manifest.model.layer_groups
    if groups is None:
        return list(stored)
    found = np.empty_like(stored)
    for layer, order in enumerate(groups):
        found[layer, list(order.channel_index)] = stored[layer]
    return list(found)
