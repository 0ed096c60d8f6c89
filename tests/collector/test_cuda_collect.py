"""Runs of tiny models on CUDA: recounted, resumed to the same bytes, near the CPU's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from interrupting import interrupted
from stored_runs import bytes_of, stored_table
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.collector.collect import CollectedRun, collect
from quambase.schema.values.distribution import Distribution

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FAMILIES = ["mamba1", "mamba2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"mamba1": write_tiny_model(folder / "m1"), "mamba2": write_tiny_mamba2(folder / "m2", d_model=40)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts.jsonl")


def run_tiny(model: Path, data: Path, db: Path, **options: object) -> CollectedRun:
    settings = {"samples": 9, "seq_len": 32, "batch_size": 4, "progress": False} | options
    return collect(str(model), data=str(data), db=db, **settings)


def table(run: CollectedRun, name: str) -> pa.Table:
    return stored_table(run.folder, name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_recounting_the_kept_activations_gives_the_counts(
    family: str, dtype: str, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    options = {"by_block": True, "by_position": True}
    run = run_tiny(models[family], data, tmp_path, keep_tokens="all", dtype=dtype, **options)
    assert run.manifest.identity["device"] == "cuda" and run.manifest.identity["forward_dtype"] == dtype
    tally: dict[tuple, list] = {}
    for row in table(run, "activations").to_pylist():
        values = np.array(row["values"], np.float32)
        for part in (None, row["document"] // 4, ("to", max(8, 1 << row["position"].bit_length()))):
            tally.setdefault((part, row["layer"], row["site"], row["group_name"]), []).append(values)
        if dtype == "float16" and "ssm_state" not in row["site"]:
            assert (values.astype(np.float16).astype(np.float32) == values).all(), "16-bit activations, nothing rounded"
    stored: dict[tuple, list] = {}
    for row in [row for name in ("counts", "block_counts", "position_counts") for row in table(run, name).to_pylist()]:
        part = ("to", row["tokens_to"]) if "tokens_to" in row else row.get("block")
        key = part, row["layer"], row["site"], row["group_name"]
        stored.setdefault(key, []).append((row["value"], row["count"]))
    assert tally.keys() == stored.keys()
    for key, values in tally.items():
        found = Distribution.of_values(np.concatenate(values))
        assert list(zip(found.values.tolist(), found.counts.tolist(), strict=True)) == stored[key], key


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_runs_are_near_the_cpus(family: str, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    runs = [
        run_tiny(models[family], data, tmp_path, device="cuda", dtype="float32", groups="none"),
        run_tiny(models[family], data, tmp_path, device="cpu", groups="none"),
    ]
    for name, columns in (("channels", ["min", "max", "mean_abs_max"]), ("documents", ["amax", "q99", "q9995"])):
        mine, theirs = (table(run, name) for run in runs)
        for column in ("layer", "site", "group_name"):
            assert mine[column].equals(theirs[column])
        for column in columns:
            ours, true = mine[column].to_numpy(), theirs[column].to_numpy()
            # Activations differ in their last bits, documents' quantiles by a rounding to float16 at most.
            np.testing.assert_allclose(ours, true, rtol=2.0**-9, atol=1e-5, err_msg=f"{name} {column}")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    family: str, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    options = {"by_block": True, "by_position": True, "state_every": 5}
    whole = run_tiny(models[family], data, tmp_path / "whole", **options)
    with interrupted():
        run_tiny(models[family], data, tmp_path / "cut", **options)
    resumed = run_tiny(models[family], data, tmp_path / "cut", **options)
    assert bytes_of(resumed.folder) == bytes_of(whole.folder)
