"""A collection as it runs on a device, on the CPU in plain PyTorch: the model, the recorder, the observer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from counted import counted
from device_cases import assert_same
from device_models import DOCUMENTS, plain_model, shown, tiny_weights

from quambase.cli.main import quambase
from quambase.collector.block_runners import (
    NO_OUTPUTS,
    BlockOutputs,
    BlockRunner,
    CudaBlockRunner,
    HostBlockRunner,
    choose_placement,
)
from quambase.collector.checkpoint import USED
from quambase.collector.documents import TokenizedDocument
from quambase.collector.layouts import site_layouts
from quambase.collector.statistics import ENCODINGS, RunStatistics
from quambase.collector.tables.table_rows import BlockCounter
from quambase.collector.taps import KeptTokens
from quambase.model.language_model import floating_model
from quambase.schema.errors import DataInvalid, TapNeverFired, UnknownName
from quambase.schema.sites import FAMILIES
from quambase.schema.values.positions import buckets_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["mamba1", "mamba2", "mamba2 of one group"])
def test_a_models_sites_are_the_hosts(family: str) -> None:
    """float32 on both sides, documents packed: other orders of the same sums."""
    weights = tiny_weights(family)
    wanted = shown(floating_model(weights, rotated=True), DOCUMENTS)
    found = shown(plain_model(weights, torch.float32, rotated=True), DOCUMENTS)
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert found[key].shape == values.shape, key
        # Two small float32 layers: some hundred ulps of the site's range.
        assert (found[key] - values).abs().max() <= 300 * 2.0**-24 * max(1, values.abs().max()), key


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_float16_is_the_same_model_rounded(family: str) -> None:
    weights = tiny_weights(family)
    wanted = shown(plain_model(weights, torch.float32, rotated=True), DOCUMENTS)
    found = shown(plain_model(weights, torch.float16, rotated=True), DOCUMENTS)
    for key, values in wanted.items():
        error = (found[key] - values).norm() / values.norm()
        # Each of some ten roundings in a row is at most 2^-11; nowhere is it zero, but in no site a wrong formula's.
        assert error < 20 * 2.0**-11, (key, error)


def test_documents_of_a_batch_are_as_if_alone() -> None:
    for family in ("mamba1", "mamba2"):
        model = plain_model(tiny_weights(family), torch.float32, rotated=True)
        together = shown(model, DOCUMENTS)
        alone = [shown(model, [document]) for document in DOCUMENTS]
        for key, values in together.items():
            apart = torch.cat([sites[key] for sites in alone])
            assert (apart - values).abs().max() <= 300 * 2.0**-24 * max(1, values.abs().max()), key


# ---------------------------------------------------------------- the observer

Tables = list[tuple[int, pa.Table, pa.Table]]


def planned(first: int) -> list[TokenizedDocument]:
    """A block, whose documents' numbers leave some out."""
    return [TokenizedDocument(first + 2 * i, f"{i:064}", np.array(d, np.int32)) for i, d in enumerate(DOCUMENTS)]


def observed(observer: BlockRunner, after: Callable[[int], None] = lambda number: None) -> None:
    with observer:
        # The last block has fewer.
        for number, documents in enumerate((planned(3), planned(40), planned(80)[:2])):
            observer.observe(number, documents)
            after(number)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("everything", [False, True])
def test_a_device_observes_what_the_host_does(family: str, everything: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tensors through both observers: equal tables, equal statistics but for the order of float64 sums. The
    head's come document by document.
    """
    weights = tiny_weights(family)
    model = plain_model(weights, torch.float32, rotated=True)
    monkeypatch.setattr(model.operators, "head_rows", 1)
    layouts = site_layouts(weights.config, [site.name for site in FAMILIES[family]], state_every=7)
    kept = KeptTokens(None, None) if everything else KeptTokens({3: np.array([0, 2]), 44: np.array([17])}, {44, 42})

    def run(make: Callable[..., BlockRunner]) -> tuple[RunStatistics, Tables, list[pa.Table]]:
        tables: Tables = []
        outputs = BlockOutputs("run", kept, lambda *table: tables.append(table))
        statistics, by_block = RunStatistics.empty(layouts, 5, buckets_of(40)), []
        observer = make(model, statistics, outputs)
        counter = BlockCounter("run", statistics.counts.numpy(), ENCODINGS["float16"])
        observed(observer, lambda number: by_block.append(counter.rows(number, observer.statistics())))
        return observer.statistics(), tables, by_block

    host, host_tables, host_counts = run(HostBlockRunner)
    device, device_tables, device_counts = run(CudaBlockRunner)
    assert device_counts == host_counts and [len(set(rows["block"].to_pylist())) for rows in host_counts] == [1, 1, 1]
    assert sorted(device_tables, key=lambda part: part[0]) == host_tables and len(host_tables) == 3
    assert host_tables[0][2].num_rows > 0
    nothing = np.zeros(1)
    for key in layouts:
        assert_same((counted(device, key), nothing), (counted(host, key), nothing), "float16")
        for there, here in zip(device.buckets, host.buckets, strict=True):
            assert torch.equal(there.site(key).counts, here.site(key).counts)
            assert all(
                torch.equal(getattr(there.site(key).moments, name), getattr(here.site(key).moments, name))
                for name in USED
            )
    assert len(host.buckets) == 4 and all(bucket.counts.any() for bucket in host.buckets)
    assert device.index.shared == host.index.shared and host.index.shared


def test_a_site_that_is_not_reached_and_a_failing_writer_are_told() -> None:
    weights = tiny_weights("mamba1")
    model = plain_model(weights, torch.float32, rotated=True)
    layouts = site_layouts(weights.config, ["x_proj:input"])

    def observer(layers: int, write: Callable[..., None] | None) -> CudaBlockRunner:
        statistics = RunStatistics.empty({(i, "x_proj:input"): layouts[0, "x_proj:input"] for i in range(layers)}, 5)
        return CudaBlockRunner(model, statistics, BlockOutputs("run", write=write))

    with pytest.raises(TapNeverFired, match="x_proj:input of layer 2 saw 0 of 5 documents"):
        observed(observer(3, None))

    def fail(*_: object) -> None:
        raise OSError("no space left")

    failing = observer(2, fail)
    with pytest.raises(OSError, match="no space left"), failing:
        failing.observe(0, planned(0))
        failing.statistics()


def test_the_garbage_collector_passes_over_what_is_there_until_the_end_however_it_comes() -> None:
    weights = tiny_weights("mamba1")
    layouts = site_layouts(weights.config, ["in_proj:input"])
    statistics = RunStatistics.empty(layouts, 5)
    for error in (None, KeyboardInterrupt):
        observer = CudaBlockRunner(plain_model(weights, torch.float32), statistics, NO_OUTPUTS)
        with suppress(KeyboardInterrupt), observer:
            assert gc.get_freeze_count() > 0
            if error:
                raise error
        assert gc.get_freeze_count() == 0


# ---------------------------------------------------------------- the options


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_options_that_do_not_fit_the_machine_are_refused(tmp_path: Path) -> None:
    assert choose_placement().identity() == {"device": "cpu"}
    assert choose_placement("cpu", "float32") == choose_placement("auto")
    with pytest.raises(DataInvalid, match="finds no CUDA device here"):
        choose_placement("cuda")
    with pytest.raises(DataInvalid, match="the CPU runs the model in float32"):
        choose_placement("auto", "float16")
    with pytest.raises(UnknownName, match="unknown device 'gpu'"):
        choose_placement("gpu")
    with pytest.raises(UnknownName, match="unknown dtype 'half'"):
        choose_placement("cpu", "half")
    result = CliRunner().invoke(quambase, ["collect", "--model", "mamba-5m", "--device", "cuda", "--db", str(tmp_path)])
    assert result.exit_code == 1 and result.stderr.startswith("error: torch ")
