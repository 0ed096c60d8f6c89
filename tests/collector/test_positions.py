"""Counts by position and of the state along documents, against a recount of what the taps are shown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored_runs import stored_table
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.collector.collect import CollectedRun, collect
from quambase.collector.documents import read_document_set
from quambase.model.checkpoint import load_model
from quambase.model.language_model import floating_model
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare, reorder
from quambase.schema.errors import DataInvalid
from quambase.schema.sites import SAMPLED_STATE_SITES, STATE_BY_CHANNEL, STATE_BY_INDEX
from quambase.schema.values.distribution import Distribution
from quambase.schema.values.positions import bounds_of, bucket_of, buckets_of

EVERY, LENGTH, BLOCK = 5, 32, 4
FAMILIES = ["mamba1", "mamba2", "mamba2 sorted"]

Key = tuple[int, str, str, int]
"""Layer, site, group, most tokens of the bucket; 0: of all."""


@given(st.integers(1, 1 << 40))
def test_buckets_end_at_powers_of_two(tokens: int) -> None:
    bucket = int(bucket_of(np.array([tokens]))[0])
    low, high = bounds_of(bucket)
    assert low <= tokens <= high == max(8, 1 << (tokens - 1).bit_length())
    assert bucket == 0 or bounds_of(bucket - 1)[1] == low - 1
    assert buckets_of(tokens) == bucket + 1


class Collected:
    """A run of a tiny model, and what the taps of its blocks are shown: a list of (document, tokens read, rows of
    channels) of every site.
    """

    def __init__(self, family: str, root: Path) -> None:
        write = write_tiny_model if family == "mamba1" else write_tiny_mamba2
        model, data = write(root / "model"), write_texts(root / "texts.jsonl")
        options = {"groups": "none"} if family == "mamba2" else {}
        self.run = collect(
            str(model), 9, data=str(data), seq_len=LENGTH, db=root, batch_size=BLOCK, keep_tokens="all",
            state_every=EVERY, by_position=True, progress=False, **options,
        )  # fmt: skip
        loaded = load_model(str(model))
        layers = self.run.manifest.model.layer_groups
        weights = prepare(reorder(loaded.any_weights, layers) if layers else loaded.any_weights)
        floating = floating_model(weights, rotated=True)
        self.d_state = weights.config.d_state
        plan = read_document_set(str(data), loaded.tokenizer, 9, LENGTH)
        self.seen: dict[tuple[int, str], list[tuple[int, int, np.ndarray]]] = defaultdict(list)
        for block in plan.blocks(BLOCK):
            sizes = [document.tokens.size for document in block]

            def tap(layer: int, site: str, values: object, of: slice, sizes: list[int] = sizes) -> None:
                rows = iter(values.numpy())  # type: ignore[attr-defined]
                for size in sizes[of]:
                    for read in tokens_read(site, size):
                        row = next(rows)
                        self.seen[layer, site].append((len(self.seen), read, row.T if site == STATE_BY_INDEX else row))
                assert next(rows, None) is None

            floating.hidden(Batch.join([document.tokens for document in block], EVERY), tap)

    def slices(self) -> Iterator[tuple[Key, np.ndarray, np.ndarray]]:
        """Of every group and bucket, and of every group: its channels and their values, (channels, ...)."""
        for row in stored_table(self.run.folder, "groups").to_pylist():
            seen = self.seen[row["layer"], row["site"]]
            channels = np.array(row["channels"])
            # Of the state sites that are not by channel, the channels are state indices; those of groups are of x.
            state = row["site"].startswith("ssm_state_act")
            parts: dict[int, list[np.ndarray]] = defaultdict(list)
            for _, read, values in seen:
                mine = values[channels] if not state or row["group_name"] != "all" else values
                for most in (0, max(8, 1 << (read - 1).bit_length())):
                    parts[most].append(mine.reshape(len(mine), -1))
            for most, found in parts.items():
                yield (row["layer"], row["site"], row["group_name"], most), channels, np.concatenate(found, axis=1)


def tokens_read(site: str, tokens: int) -> list[int]:
    """How many tokens were read at each row or state that a site has of a document."""
    if site in SAMPLED_STATE_SITES:
        return sorted({*range(EVERY, tokens + 1, EVERY), tokens})
    return [tokens] if site.startswith("ssm_state_act") else list(range(1, tokens + 1))


@pytest.fixture(scope="module", params=FAMILIES)
def collected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Collected:
    return Collected(request.param, tmp_path_factory.mktemp("run"))


def stored(run: CollectedRun, name: str) -> dict[Key, list[dict]]:
    found: dict[Key, list[dict]] = defaultdict(list)
    for row in stored_table(run.folder, name).to_pylist():
        found[row["layer"], row["site"], row["group_name"], row.get("tokens_to", 0)].append(row)
    return found


def test_counts_are_those_of_the_values_shown(collected: Collected) -> None:
    tables = stored(collected.run, "counts") | stored(collected.run, "position_counts")
    for key, _, values in collected.slices():
        found = [(row["value"], row["count"]) for row in tables.pop(key)]
        wanted = Distribution.of_values(values)
        assert found == list(zip(wanted.values.tolist(), wanted.counts.tolist(), strict=True)), key
    assert not tables and len({site for site in collected.seen}) > 20


def test_positions_add_up_to_the_counts(collected: Collected) -> None:
    total: dict[tuple, int] = defaultdict(int)
    for (layer, site, group, _), rows in stored(collected.run, "position_counts").items():
        for row in rows:
            low, high = row["tokens_from"], row["tokens_to"]
            assert (low, high) in {(1, 8), (9, 16), (17, 32)}
            total[layer, site, group, row["value"]] += row["count"]
    counts = {
        (*key[:3], row["value"]): row["count"] for key, rows in stored(collected.run, "counts").items() for row in rows
    }
    assert total == counts


def test_statistics_by_position_are_those_of_the_values(collected: Collected) -> None:
    stats, channels = (stored(collected.run, f"position_{name}") for name in ("stats", "channels"))
    of_all = {key[:3] for key in stored(collected.run, "counts")}
    checked = 0
    for key, numbers, values in collected.slices():
        if not key[3]:
            continue
        if key in stats:
            (row,) = stats[key]
            rounded = np.abs(values.astype(np.float16).astype(np.float64))
            assert (row["count"], row["amax"]) == (values.size, rounded.max()), key
            assert row["q999"] == np.quantile(rounded, 0.999) and (row["nonfinite"], row["overflow"]) == (0, 0), key
        if key[1].startswith("ssm_state_act"):  # their channels are state indices, the last axis of each state
            values = np.moveaxis(values.reshape(len(values), -1, collected.d_state), 2, 0).reshape(
                collected.d_state, -1
            )
            numbers = np.arange(collected.d_state)
        found = {row["channel"]: (row["count"], row["min"], row["max"]) for row in channels.pop(key)}
        assert found == {
            number: (mine.size, mine.min(), mine.max()) for number, mine in zip(numbers.tolist(), values, strict=True)
        }, key
        checked += 1
    assert checked > 80 and not channels
    assert {(layer, site) for layer, site, _, _ in stats} == {(layer, site) for layer, site, _ in of_all}


def test_both_sites_of_the_state_have_the_same_values(collected: Collected) -> None:
    counts = stored(collected.run, "counts")
    summed: dict[tuple, int] = defaultdict(int)
    for (layer, site, _, _), rows in counts.items():
        for row in rows if site in SAMPLED_STATE_SITES else []:
            summed[layer, row["value"]] += row["count"] * (1 if site == STATE_BY_CHANNEL else -1)
    assert summed and not any(summed.values())


def test_outliers_of_the_state_say_where_they_are(collected: Collected) -> None:
    """Position, and the flat place in the state, of both sites."""
    texts = stored_table(collected.run.folder, "documents").to_pylist()
    lengths = {row["document"]: row["tokens"] for row in texts}
    order = sorted(lengths)
    checked = 0
    for key, rows in stored(collected.run, "outliers").items():
        if key[1] not in SAMPLED_STATE_SITES:
            continue
        # The states of the site, document by document.
        states = iter(collected.seen[key[:2]])
        of = {(number, read): next(states)[2] for number in order for read in tokens_read(key[1], lengths[number])}
        for row in rows:
            state = of[row["document"], row["position"] + 1]
            by_channel = state if key[1] == STATE_BY_CHANNEL else state.T
            value = by_channel.reshape(-1)[row["channel"]]
            assert np.float32(np.float16(value)) == np.float32(row["value"]), row
            checked += 1
    assert checked > 100


def test_states_along_documents_are_asked_for(tmp_path: Path) -> None:
    model, data = write_tiny_model(tmp_path / "model"), write_texts(tmp_path / "texts.jsonl")

    def run(**options: object) -> CollectedRun:
        return collect(str(model), 2, data=str(data), seq_len=8, db=tmp_path, progress=False, **options)  # type: ignore[arg-type]

    assert not {site for _, site in run().manifest.sites} & set(SAMPLED_STATE_SITES)
    one = run(sites=["x_proj:input"], state_every=3)
    assert {site for _, site in one.manifest.sites} == {"x_proj:input", *SAMPLED_STATE_SITES}
    with pytest.raises(DataInvalid, match=f"{STATE_BY_INDEX} is the state after every N tokens; say how many with"):
        run(sites=[STATE_BY_INDEX])
    with pytest.raises(DataInvalid, match="observed every 0 tokens; expected 1 or more"):
        run(state_every=0)
