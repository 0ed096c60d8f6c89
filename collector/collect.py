"""`collect`: a model and its calibration texts to one run of the database."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from quambase.collector.block_runners import BlockOutputs, BlockRunner, Placement, choose_placement, new_block_runner
from quambase.collector.checkpoint import load_checkpoint, position_buckets, save_checkpoint
from quambase.collector.documents import (
    DocumentSet,
    Keep,
    TextAround,
    TokenizedDocument,
    read_document_set,
    run_id,
    sampled_states,
    sampled_tokens,
)
from quambase.collector.first_pass import Grouping, choose_grouping, find_groups
from quambase.collector.layouts import site_layouts
from quambase.collector.second_moments import SecondMomentsPlan, collect_second_moments, moment_widths
from quambase.collector.sensitivity import SensitivityPlan, acting_sites, collect_sensitivity
from quambase.collector.shards import (
    SHARD,
    Shard,
    finish_shard,
    load_shard,
    refuse_beside_shards,
    shard_folder,
    verify_shard,
    write_places,
    write_sums,
)
from quambase.collector.statistics import ENCODINGS, SiteLayout
from quambase.collector.tables.run_folder import (
    BlockFiles,
    clear_leftovers,
    clear_shard,
    every_table,
    finish_run,
    tables_of_parts,
    versions,
    write_statistics,
)
from quambase.collector.tables.table_rows import BlockCounter, Locate, Places
from quambase.collector.taps import KeptTokens
from quambase.model.checkpoint import LoadedModel, load_model
from quambase.model.inputs.names import data_name
from quambase.model.inputs.sources import default_data, find_sources
from quambase.model.prepare import prepare, reorder
from quambase.schema import RUN_FORMAT_VERSION
from quambase.schema.errors import DataInvalid
from quambase.schema.files import local_folder, locked
from quambase.schema.groups import LayerGroups
from quambase.schema.progress import Progress, Shown
from quambase.schema.sites import FAMILIES, SAMPLED_STATE_SITES, find_site
from quambase.schema.sql.answer import PrintsAsTable
from quambase.schema.stored.manifest import MANIFEST, Manifest
from quambase.schema.stored.model_info import SIZES, ModelInfo, SortedGroups, TextInfo
from quambase.schema.stored.runs import describe_run
from quambase.schema.values.arrays import Int64

CHECKPOINT_SECONDS = 10.0
"""A killed run loses about this much work at most, and the current block."""

OUTLIERS = 64
"""Largest values stored per group."""

COUNTED_AS = ENCODINGS["float16"]
"""The 16-bit type of the values that are counted."""


@dataclass(frozen=True, repr=False)
class CollectedRun(PrintsAsTable):
    """A complete run, or one ``shard`` of it: its folder and manifest, and whether it existed before."""

    folder: Path
    manifest: Manifest
    existed: bool
    shard: Shard | None = None

    def shown(self) -> pa.Table:
        """The run in one row."""
        return describe_run(self.manifest, self.folder)


def existing_run(folder: Path) -> CollectedRun:
    """The complete run in ``folder``, after removing what a killed process left there. DatabaseInvalid: a file is
    missing, was cut short or altered.
    """
    clear_leftovers(folder)
    manifest = Manifest.load(folder)
    manifest.verify(folder)
    return CollectedRun(folder, manifest, existed=True)


def collect(
    model: str | Path,
    samples: int = 512,
    *,
    data: str | Path | None = None,
    seq_len: int = 512,
    db: str | Path = Path("quambase-db"),
    batch_size: int = 32,
    keep_tokens: Keep = 64,
    sites: Sequence[str] = (),
    seed: int = 0,
    tokenizer: str | None = None,
    groups: str | None = None,
    group_samples: int | None = None,
    groups_from: str | None = None,
    sensitivity: int | None = None,
    second_moments: int | None = None,
    state_every: int | None = None,
    by_position: bool = False,
    by_block: bool = False,
    shard: Shard | None = None,
    device: str = "auto",
    dtype: str | None = None,
    progress: Shown = True,
) -> CollectedRun:
    """Run ``model`` over the first ``samples`` documents of ``data`` and write a run into ``db``.

    Documents are read in file order, truncated to ``seq_len`` tokens, not packed, without a start token; ``batch_size``
    consecutive ones (a block) share a forward pass. The raw activations of ``keep_tokens`` tokens are stored
    (``"all"``: of all). ``sites``: only these (default all). The same arguments find their run: complete, or to resume.
    ``groups``: ``fixed`` (a Mamba-2's default) or ``quamba2`` sorts a Mamba-2's heads and channels into groups,
    observes the reordered model, and stores the order in the run; ``none`` does not. The channel statistics are those
    of a first pass over ``group_samples`` documents (default 64, for ``quamba2`` all) or of the run ``groups_from``.
    ``sensitivity``: this many evenly spaced documents also go through a backward pass, and the table `sensitivities`
    tells how much the output depends on each value.
    ``second_moments``: of this many, the table `second_moments` has the matrices that 4-bit weights by GPTQ need.
    ``state_every``: the sites ssm_state_seq have the state after every so many tokens. ``by_position``: the tables
    `position_counts`, `position_stats` and `position_channels` divide every site by how many tokens were read.
    ``by_block``: `block_counts` has the counts of each block.
    ``shard``: only its blocks; `quambase.collector.merge.merge` combines all shards. Each repeats the first pass.
    ``device``: cpu, cuda, or auto (cuda if there is one). The CPU runs the model in float32, CUDA in ``dtype``, by
    default float16, as upstream does; those activations are counted without rounding.
    ``progress``: shown on stderr, or a function that is called with (documents done, documents in all).
    Errors: ModelNotFound, CheckpointInvalid, DataInvalid, DatabaseInvalid, UnknownName, RunBusy, TapNeverFired.
    """
    db, where = local_folder(db), choose_placement(device, dtype)
    for name in sites:
        find_site(name, family="")  # of any family, so that a wrong name is reported before the slow part
    source = str(data) if data else default_data(str(model))
    with Progress(progress) as shown:
        # 1. The arguments determine the run.
        loaded = _load(str(model), tokenizer, source, sites, shown)
        plan = read_document_set(source, loaded.tokenizer, samples, seq_len, progress=shown)
        grouping = choose_grouping(loaded.family, groups, group_samples, groups_from, len(plan.documents))
        observed = _observed_sites(loaded.family, sites, state_every)
        settings = _Settings(samples, seq_len, batch_size, observed, keep_tokens, seed)
        backward = SensitivityPlan.of(plan, sensitivity, observed, loaded.family, seed) if sensitivity else None
        moments = SecondMomentsPlan.of(plan, second_moments, observed, batch_size) if second_moments else None
        extra = _Extra(state_every, by_position, by_block)
        request = _Request(loaded, source, plan, grouping, backward, moments, extra, where, settings)
        # 2. The run, or this shard of it, may exist.
        if (found := _existing(folder := db / "runs" / request.run, shard)) is not None:
            return found
        # 3. Otherwise collect it.
        if shard is not None:
            folder = shard_folder(folder, shard)
        with locked(folder, None if shard is None else f"shard {shard} of run {request.run}"):
            manifest = _collect(request, folder, shard, db, shown)
        return CollectedRun(folder, manifest, existed=False, shard=shard)


def _load(model: str, tokenizer: str | None, source: str, sites: Sequence[str], shown: Progress) -> LoadedModel:
    """Load the model and check that it has the sites. Its text is found first, before the slow part."""
    shown.say(f"looking for {model} and {source}")
    find_sources(model, tokenizer, [source])
    shown.say(f"loading {model}")
    loaded = load_model(model, tokenizer=tokenizer)
    for name in sites:
        find_site(name, loaded.family)
    return loaded


def _observed_sites(family: str, sites: Sequence[str], state_every: int | None) -> list[str]:
    """The names of the sites to observe, in order. DataInvalid: a state along the documents, but not how often."""
    if state_every is not None and state_every < 1:
        raise DataInvalid(f"the state is observed every {state_every} tokens; expected 1 or more")
    sampled = [site for site in sites if site in SAMPLED_STATE_SITES]
    if sampled and state_every is None:
        raise DataInvalid(f"{sampled[0]} is the state after every N tokens; say how many with --state-every N")
    return [
        site.name
        for site in FAMILIES[family]
        if ((state_every is not None) if site.sampled else (not sites or site.name in sites))
    ]


def _existing(folder: Path, shard: Shard | None) -> CollectedRun | None:
    """The complete run in ``folder``, or its complete ``shard``. DatabaseInvalid: ``shard`` is None, but shards of the
    run were begun.
    """
    if (folder / MANIFEST).exists():
        return existing_run(folder)
    if shard is None:
        refuse_beside_shards(folder)
        return None
    of_shard = shard_folder(folder, shard)
    if not (of_shard / SHARD).exists():
        return None
    found = load_shard(of_shard)
    verify_shard(of_shard, found)
    clear_shard(of_shard)
    return CollectedRun(of_shard, found.manifest, existed=True, shard=shard)


@dataclass(frozen=True)
class _Settings:
    """The user's settings, named as in the identity: ``block`` documents share a forward pass."""

    samples: int
    seq_len: int
    block: int
    sites: list[str]
    keep_tokens: Keep
    seed: int


@dataclass(frozen=True)
class _Extra:
    """What is counted besides, named as in the identity."""

    state_every: int | None
    by_position: bool
    by_block: bool


@dataclass(frozen=True)
class _Request:
    """A requested run: a model on the documents of the text ``source``."""

    loaded: LoadedModel
    source: str
    plan: DocumentSet
    grouping: Grouping | None
    sensitivity: SensitivityPlan | None
    second_moments: SecondMomentsPlan | None
    extra: _Extra
    where: Placement
    settings: _Settings

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the bytes of the run's tables."""
        return {
            "format_version": RUN_FORMAT_VERSION,
            "weights_sha256": self.loaded.weights_sha256,
            "tokenizer_sha256": self.loaded.tokenizer_sha256,
            "documents": self.plan.digest(),
            **vars(self.settings),
            "activation_dtype": COUNTED_AS.name,
            "outliers": OUTLIERS,
            **self.where.identity(),
            "torch": version("torch"),
            **({"groups": self.grouping.identity()} if self.grouping else {}),
            **({"sensitivity": self.sensitivity.identity()} if self.sensitivity else {}),
            **({"second_moments": self.second_moments.identity()} if self.second_moments else {}),
            **{name: value for name, value in vars(self.extra).items() if value},  # of a run without, nothing
        }

    @cached_property
    def run(self) -> str:
        """The run id."""
        return run_id(self.loaded.name, self.identity)

    def model(self, layers: list[LayerGroups] | None) -> ModelInfo:
        """What the manifest says of the model; ``layers``: the order of a sorted Mamba-2."""
        loaded = self.loaded
        sizes = loaded.any_weights.config
        return ModelInfo(
            loaded.name,
            loaded.family,
            loaded.name if loaded.bundled else str(loaded.path.resolve()),
            {key: getattr(sizes, key) for key in SIZES if hasattr(sizes, key)},
            SortedGroups(self.identity["groups"], tuple(layers)) if layers else None,
        )

    def text(self) -> TextInfo:
        """What the manifest says of the text."""
        name, path = data_name(self.source)
        plan = self.plan
        return TextInfo(name, len(plan.documents), plan.tokens, path, plan.read, plan.empty, plan.truncated)

    def kept(self) -> KeptTokens:
        """Which tokens' activations, and which documents' final states, the run keeps."""
        keep, seed = self.settings.keep_tokens, self.settings.seed
        if keep == "all":
            return KeptTokens(None, None)
        # A state has d_state values for every channel of a token.
        states = sampled_states(self.plan, keep // self.loaded.any_weights.config.d_state, seed)
        return KeptTokens(sampled_tokens(self.plan, keep, seed), states)


def _collect(request: _Request, folder: Path, shard: Shard | None, db: Path, shown: Progress) -> Manifest:
    """Collect the run, or a shard of it, into ``folder``, from its last checkpoint on; returns the manifest."""
    loaded, clock = request.loaded, _Clock()
    # 1. The model as it is observed: reordered into groups, folded and rotated.
    shown.say(f"preparing {loaded.name}")
    layers = None
    if request.grouping:
        block = request.settings.block
        layers = find_groups(loaded, request.plan, request.grouping, block, db, request.where, progress=shown)
        clock.lap("group")
    layouts = site_layouts(loaded.any_weights.config, request.settings.sites, layers, request.extra.state_every or 0)
    weights = prepare(reorder(loaded.any_weights, layers) if layers else loaded.any_weights)
    # 2. Every block after the checkpoint.
    done, statistics, there = load_checkpoint(folder, layouts, OUTLIERS, position_buckets(request.identity))
    blocks = request.plan.blocks(request.settings.block)
    own = (shard or Shard(0, 1)).blocks  # which of so many blocks or parts are this process's
    mine = own(len(blocks))
    with BlockFiles(folder, there) as files:
        outputs = BlockOutputs(request.run, request.kept(), files.add, partial(write_sums, folder) if shard else None)
        runner = new_block_runner(weights, request.where, statistics, outputs)
        clock.lap("prepare")
        with runner:
            counter = (
                BlockCounter(request.run, statistics.counts.numpy(), COUNTED_AS) if request.extra.by_block else None
            )
            _observe(runner, blocks, mine, done, folder, files, counter, shown)
            statistics = runner.statistics()
            clock.lap("observe")
            if backward := request.sensitivity:
                index, parts = acting_sites(layouts, loaded.family), own(len(backward.parts))
                collect_sensitivity(weights, request.where, backward, index, parts, folder, shown)
                clock.lap("sensitivity")
            if moments := request.second_moments:
                widths, parts = moment_widths(layouts), own(len(moments.parts))
                collect_second_moments(weights, request.where, moments, widths, parts, folder, shown)
                clock.lap("second_moments")
            # 3. The tables of the run, or a shard's files, from which a merge makes them.
            shown.say("writing the run")
            locate = _locator(request.plan, loaded)
            if shard is None:
                others = tables_of_parts(request.run, request.identity, loaded.family, layouts, lambda _: folder)
                # While the rows of the last blocks are still being written.
                made = write_statistics(folder, request.run, statistics, COUNTED_AS, locate, others)
                runner.settle()
                tables = every_table(folder, files.written() | made)
            else:
                runner.settle()
                tables = files.written()
                save_checkpoint(folder, len(mine), statistics, tables)
                write_places(folder, statistics, locate)
        clock.lap("write")
    # 4. The manifest, which completes it.
    created = {**clock.described(), **request.where.described(), **versions()}
    described = request.model(layers), request.text()
    manifest = Manifest(request.run, request.identity, *described, tables, list(layouts), created)
    if shard is None:
        return finish_run(folder, manifest)
    finish_shard(folder, shard, manifest, loaded.any_weights.config, len(blocks))
    return manifest


def _observe(
    runner: BlockRunner,
    blocks: list[list[TokenizedDocument]],
    numbers: range,
    done: int,
    folder: Path,
    files: BlockFiles,
    counter: BlockCounter | None,
    progress: Progress,
) -> None:
    """Run the blocks ``numbers``, except the first ``done`` of them, which the checkpoint contains."""
    tokens = [sum(document.tokens.size for document in blocks[number]) for number in numbers]
    documents = [len(blocks[number]) for number in numbers]
    saved = time.monotonic()
    progress.start("collect", sum(documents), sum(tokens), done=(sum(documents[:done]), sum(tokens[:done])))
    for place in range(done, len(numbers)):
        with progress.piece(documents[place], tokens[place]):
            runner.observe(numbers[place], blocks[numbers[place]])
            if counter is not None:
                files.add_counts(numbers[place], counter.rows(numbers[place], runner.statistics()))
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            runner.settle()
            save_checkpoint(folder, place + 1, runner.statistics(), files.written())
            saved = time.monotonic()


def _locator(plan: DocumentSet, loaded: LoadedModel) -> Locate:
    """Returns the function that finds the place of a value of `outliers` and the text around it: a state's row and
    column are one flat channel of the last token.
    """
    tokens = np.concatenate([document.tokens for document in plan.documents])
    sizes, firsts = np.zeros((2, plan.documents[-1].index + 1), np.int64)
    for document in plan.documents:
        sizes[document.index] = document.tokens.size
    firsts[1:] = np.cumsum(sizes)[:-1]
    states, inner = loaded.any_weights.config.d_state, loaded.any_weights.config.d_inner
    decoded = cache(lambda token: loaded.tokenizer.decode([token]))
    texts = TextAround(plan, loaded.tokenizer)

    def locate(layout: SiteLayout, documents: Int64, rows: Int64, channels: Int64) -> Places:
        positions, columns = rows, channels
        if layout.state:
            length = states if layout.rows_are_indices else inner
            number, rows = rows // length, rows % length  # of the state in the document, and the row in it
            ends = sizes[documents]
            positions = (np.minimum((number + 1) * layout.every, ends) if layout.every else ends) - 1
            columns = channels * states + rows if layout.rows_are_indices else rows * states + channels
        found = tokens[firsts[documents] + positions].tolist()
        before, after = texts.of(documents, positions)
        return Places(positions, found, [decoded(token) for token in found], before, after, columns)

    return locate


class _Clock:
    """When a run began, and how long each of its consecutive parts took, by a clock that cannot be set."""

    def __init__(self) -> None:
        self._started, self._last = time.time(), time.monotonic()
        self._seconds: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """End the current part, which was ``part``."""
        now = time.monotonic()
        self._seconds[f"{part}_seconds"] = round(now - self._last, 3)
        self._last = now

    def described(self) -> dict[str, Any]:
        """Entries of the manifest."""
        return {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)), **self._seconds}


def parse_keep(text: str) -> Keep:
    """``--keep-tokens``: a count or the word all; DataInvalid otherwise."""
    if text == "all":
        return "all"
    if not (text.isascii() and text.isdigit() and int(text) < 2**31):
        raise DataInvalid(f"--keep-tokens is '{text}'; expected a number of tokens or the word all")
    return int(text)
