"""`collect`: a model and its calibration texts to one run of the database."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from quambase.collector.block_runners import BlockRunner, KeptTokens, Placement, choose_placement, new_block_runner
from quambase.collector.checkpoint import load_checkpoint, save_checkpoint
from quambase.collector.documents import (
    DocumentSet,
    Keep,
    TokenizedDocument,
    read_document_set,
    run_id,
    sampled_states,
    sampled_tokens,
)
from quambase.collector.first_pass import Grouping, choose_grouping, find_groups
from quambase.collector.layouts import site_layouts
from quambase.collector.run_folder import (
    BlockFiles,
    clear_leftovers,
    every_table,
    finish_run,
    versions,
    write_statistics,
)
from quambase.collector.shards import (
    SHARD,
    Shard,
    finish_shard,
    load_shard,
    refuse_beside_shards,
    shard_folder,
    write_places,
    write_sums,
)
from quambase.collector.statistics import ENCODINGS, SiteLayout
from quambase.collector.table_rows import Int64, Locate, Places
from quambase.model.checkpoint import LoadedModel, load_model
from quambase.model.names import data_name
from quambase.model.prepare import prepare, reorder
from quambase.model.sources import default_data, find_sources
from quambase.schema import RUN_FORMAT_VERSION
from quambase.schema.answer import PrintsAsTable
from quambase.schema.errors import DataInvalid
from quambase.schema.files import local_folder, locked
from quambase.schema.groups import LayerGroups
from quambase.schema.manifest import MANIFEST, Manifest
from quambase.schema.model_info import SIZES, ModelInfo, SortedGroups, TextInfo
from quambase.schema.progress import Progress, Shown
from quambase.schema.runs import describe_run
from quambase.schema.sites import FAMILIES, find_site

CHECKPOINT_SECONDS = 10.0
"""A killed run loses at most about this much work, besides the block it was in."""

OUTLIERS = 64
"""Largest values kept per group."""


@dataclass(frozen=True, repr=False)
class CollectedRun(PrintsAsTable):
    """A complete run, or one ``shard`` of it: its folder and manifest, and whether it was there already."""

    folder: Path
    manifest: Manifest
    existed: bool
    shard: Shard | None = None

    def shown(self) -> pa.Table:
        """The run in one row."""
        return describe_run(self.manifest, self.folder)


def existing_run(folder: Path) -> CollectedRun:
    """The complete run in ``folder``, which what a killed process left there is cleared from. DatabaseInvalid."""
    clear_leftovers(folder)
    return CollectedRun(folder, Manifest.load(folder), existed=True)


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
    shard: Shard | None = None,
    device: str = "auto",
    dtype: str | None = None,
    progress: Shown = True,
) -> CollectedRun:
    """Run ``model`` over the first ``samples`` documents of ``data`` and write a run into ``db``.

    Documents are taken in file order, cut at ``seq_len`` tokens, not packed, without a start token; ``batch_size``
    consecutive ones (a block) share a forward pass. ``keep_tokens`` tokens' raw activations are kept (``"all"``: every
    one). ``sites``: only these (default all). The same arguments find their own run: complete, or to be resumed.
    ``groups``: ``fixed`` (of a Mamba-2 the default) or ``quamba2`` sorts heads and channels of a Mamba-2 into groups,
    observes the model so reordered, and stores the order in the run; ``none`` does not. Channel statistics come from a
    first pass over ``group_samples`` documents (default 64, of ``quamba2`` all) or from the run ``groups_from`` of db.
    ``shard``: only its blocks; `quambase.collector.merge.merge` makes the run of all shards, each of which makes the
    first pass on its own.
    ``device``: cpu, cuda, or auto (cuda if there is any). On the CPU the model runs in float32; on CUDA in ``dtype``,
    float16 by default, which is the model as upstream runs it and whose activations are counted without any rounding.
    ``progress``: shown on stderr, or a function that is called with (documents done, documents in all).
    Errors: ModelNotFound, CheckpointInvalid, DataInvalid, DatabaseInvalid, UnknownName, RunBusy, TapNeverFired.
    """
    db = local_folder(db)
    where = choose_placement(device, dtype)
    for name in sites:
        find_site(name, family="")  # any model's, so that a slip is told before the slow part
    with Progress(progress) as shown:
        source = str(data) if data else default_data(str(model))
        shown.say(f"looking for {model} and {source}")
        find_sources(str(model), tokenizer, [source])
        shown.say(f"loading {model}")
        loaded = load_model(str(model), tokenizer=tokenizer)
        for name in sites:
            find_site(name, loaded.family)
        plan = read_document_set(source, loaded.tokenizer, samples, seq_len, progress=shown)
        observed = [site.name for site in FAMILIES[loaded.family] if not sites or site.name in sites]
        grouping = choose_grouping(loaded.family, groups, group_samples, groups_from, len(plan.documents))
        identity = _identity(
            loaded,
            plan,
            grouping,
            where,
            samples=samples,
            seq_len=seq_len,
            block=batch_size,
            sites=observed,
            keep_tokens=keep_tokens,
            seed=seed,
        )
        run = run_id(loaded.name, identity)
        folder = db / "runs" / run
        if (folder / MANIFEST).exists():
            return existing_run(folder)
        if shard is None:
            refuse_beside_shards(folder)
        else:
            folder = shard_folder(folder, shard)
            if (folder / SHARD).exists():
                return CollectedRun(folder, load_shard(folder).manifest, existed=True, shard=shard)
        with locked(folder, None if shard is None else f"shard {shard} of run {run}"):
            clock = _Clock()
            layers = None
            shown.say(f"preparing {loaded.name}")
            if grouping:
                layers = find_groups(loaded, plan, grouping, batch_size, db, where, progress=shown)
                clock.lap("group")
            layouts = site_layouts(loaded.any_weights.config, observed, layers)
            weights = prepare(reorder(loaded.any_weights, layers) if layers else loaded.any_weights)
            done, statistics, there = load_checkpoint(folder, layouts, OUTLIERS)
            keep = _kept(loaded, plan, keep_tokens, seed)
            blocks = plan.blocks(batch_size)
            mine = range(len(blocks)) if shard is None else shard.blocks(len(blocks))
            with BlockFiles(folder, there) as files:
                observer = new_block_runner(
                    weights,
                    where,
                    statistics,
                    OUTLIERS,
                    run=run,
                    kept=keep,
                    write=files.add,
                    sums=partial(write_sums, folder) if shard else None,
                )
                clock.lap("prepare")
                with observer:
                    _observe(observer, blocks, mine, done, folder, files, shown)
                    statistics = observer.statistics()
                    clock.lap("observe")
                    shown.say("writing the run")
                    locate = _locator(plan, loaded)
                    if shard is None:  # while the last blocks' files are written
                        made = write_statistics(folder, run, statistics, ENCODINGS["float16"], locate)
                    observer.settle()
                    tables = files.written()
                    if shard is None:
                        tables = every_table(folder, tables | made)
                    else:
                        save_checkpoint(folder, len(mine), statistics, tables)
                        write_places(folder, statistics, locate)
                clock.lap("write")
            manifest = Manifest(
                run=run,
                identity=identity,
                model=_model(loaded, identity, layers),
                data=_text(source, plan),
                tables=tables,
                sites=list(layouts),
                created={**clock.described(), **where.described(), **versions()},
            )
            if shard is None:
                manifest = finish_run(folder, manifest)
            else:
                finish_shard(folder, shard, manifest, loaded.any_weights.config, len(blocks))
        return CollectedRun(folder, manifest, existed=False, shard=shard)


class _Clock:
    """When a run began, and what its parts took one after another."""

    def __init__(self) -> None:
        self._started = self._last = time.time()
        self._seconds: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """A part ends here."""
        now = time.time()
        self._seconds[f"{part}_seconds"] = round(now - self._last, 3)
        self._last = now

    def described(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)), **self._seconds}


def _text(source: str, plan: DocumentSet) -> TextInfo:
    """What the manifest says of the text."""
    name, path = data_name(source)
    documents = len(plan.documents)
    return TextInfo(name, documents, plan.tokens, path, plan.read, plan.empty, plan.truncated)


def _identity(
    loaded: LoadedModel,
    plan: DocumentSet,
    grouping: Grouping | None,
    where: Placement,
    **settings: Any,
) -> dict[str, Any]:
    """Everything that determines the bytes of the run's tables, ``settings`` among it; its hash is the run id."""
    return {
        "format_version": RUN_FORMAT_VERSION,
        "weights_sha256": loaded.weights_sha256,
        "tokenizer_sha256": loaded.tokenizer_sha256,
        "documents": plan.digest(),
        **settings,
        "activation_dtype": "float16",
        "outliers": OUTLIERS,
        **where.identity(),
        "torch": version("torch"),
        **({"groups": grouping.identity()} if grouping else {}),
    }


def _model(loaded: LoadedModel, identity: dict[str, Any], layers: list[LayerGroups] | None) -> ModelInfo:
    """What the manifest says of the model."""
    sizes = loaded.any_weights.config
    return ModelInfo(
        loaded.name,
        loaded.family,
        loaded.name if loaded.bundled else str(loaded.path.resolve()),
        {key: getattr(sizes, key) for key in SIZES if hasattr(sizes, key)},
        SortedGroups(identity["groups"], tuple(layers)) if layers else None,
    )


def _kept(loaded: LoadedModel, plan: DocumentSet, keep: Keep, seed: int) -> KeptTokens:
    """Which tokens' activations, and which documents' final states, a run of ``keep`` tokens keeps."""
    if keep == "all":
        return KeptTokens(None, None)
    # A state has d_state values for every channel of a token.
    states = sampled_states(plan, keep // loaded.any_weights.config.d_state, seed)
    return KeptTokens(sampled_tokens(plan, keep, seed), states)


def _observe(
    observer: BlockRunner,
    blocks: list[list[TokenizedDocument]],
    numbers: range,
    done: int,
    folder: Path,
    files: BlockFiles,
    progress: Progress,
) -> None:
    """Run the blocks ``numbers`` after the first ``done`` of them, those of the checkpoint."""
    tokens = [sum(document.tokens.size for document in blocks[number]) for number in numbers]
    documents = [len(blocks[number]) for number in numbers]
    saved = time.monotonic()
    progress.start("collect", sum(documents), sum(tokens), done=(sum(documents[:done]), sum(tokens[:done])))
    for place in range(done, len(numbers)):
        with progress.piece(documents[place], tokens[place]):
            observer.observe(numbers[place], blocks[numbers[place]])
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            observer.settle()
            save_checkpoint(folder, place + 1, observer.statistics(), files.written())
            saved = time.monotonic()


def _locator(plan: DocumentSet, loaded: LoadedModel) -> Locate:
    """How `outliers` names a value's place: a state's row and column are one flat channel of the last token."""
    tokens = np.concatenate([document.tokens for document in plan.documents])
    sizes, firsts = np.zeros((2, plan.documents[-1].index + 1), np.int64)
    for document in plan.documents:
        sizes[document.index] = document.tokens.size
    firsts[1:] = np.cumsum(sizes)[:-1]
    states = loaded.any_weights.config.d_state
    decoded = cache(lambda token: loaded.tokenizer.decode([token]))

    def locate(layout: SiteLayout, documents: Int64, rows: Int64, channels: Int64) -> Places:
        positions, columns = rows, channels
        if layout.state:
            positions = sizes[documents] - 1
            columns = channels * states + rows if layout.d_state else rows * states + channels
        found = tokens[firsts[documents] + positions].tolist()
        return Places(positions, found, [decoded(token) for token in found], columns)

    return locate


def parse_keep(text: str) -> Keep:
    """``--keep-tokens``: a count or the word all; DataInvalid otherwise."""
    if text == "all":
        return "all"
    if not (text.isascii() and text.isdigit() and int(text) < 2**31):
        raise DataInvalid(f"--keep-tokens is '{text}'; expected a number of tokens or the word all")
    return int(text)
