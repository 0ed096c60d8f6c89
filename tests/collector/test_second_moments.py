"""Second moments: against the inputs of the products, hooked, and the run's own activations; the same bytes however."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_models import plain_model, tiny_weights
from stored_runs import bytes_of, stored_table
from test_collect import run_tiny
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

import quambase.collector.collect as run_module
from quambase.collector import second_moments
from quambase.collector.documents import TokenizedDocument
from quambase.collector.layouts import site_layouts
from quambase.collector.merge import merge
from quambase.collector.second_moments import MOMENTS, moment_widths, part_moments
from quambase.collector.shards import Shard
from quambase.model.language_model import floating_model
from quambase.schema.errors import DataInvalid
from quambase.schema.sites import FAMILIES, PRODUCT_SITES, SiteKey
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.doctor import BAD, examine

WRITE = {"mamba1": write_tiny_model, "mamba2": write_tiny_mamba2}


def check(found: np.ndarray, x: np.ndarray) -> None:
    """``found`` is the lower triangle of the sum over the rows of x (t, n) of x x^T, flat."""
    wide = x.astype(np.float64)
    wanted, size = wide.T @ wide, np.abs(wide).T @ np.abs(wide)
    triangle = np.tri(x.shape[1], dtype=bool)
    # A float32 product and each of t sums round by 2^-24 of the sum of magnitudes at most, the table once more.
    assert (np.abs(found - wanted[triangle]) <= (len(x) + 2) * 2.0**-24 * size[triangle]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_sums_are_of_what_the_products_read(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in plain PyTorch and in float16, as on a device."""
    random = np.random.default_rng(0)
    texts = [TokenizedDocument(i, "", random.integers(0, 60, n).astype(np.int32)) for i, n in enumerate((9, 1, 30, 7))]
    weights = tiny_weights(family)
    on_host = dtype == torch.float32
    model = floating_model(weights, rotated=True) if on_host else plain_model(weights, dtype, rotated=True)
    matrices: dict[int, SiteKey] = {
        getattr(block, site.removesuffix(":input")).data_ptr(): (layer, site)
        for layer, block in enumerate(model.blocks)
        for site in PRODUCT_SITES
        if hasattr(block, site.removesuffix(":input"))
    }
    seen: dict[SiteKey, list[np.ndarray]] = defaultdict(list)
    linear = torch.nn.functional.linear

    def hooked(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
        if (key := matrices.get(weight.data_ptr())) is not None:
            seen[key].append(x.float().numpy().copy())
        return linear(x, weight, *others)

    monkeypatch.setattr(torch.nn.functional, "linear", hooked)
    widths = moment_widths(site_layouts(model.config, [site.name for site in FAMILIES[family]]))
    found = part_moments(model, texts, widths, 3)
    assert found.keys() == seen.keys() == set(matrices.values())
    assert len(found) == (6 if family == "mamba1" else 4)
    for key, triangle in found.items():
        assert sum(map(len, seen[key])) == 47
        check(triangle, np.concatenate(seen[key]))


@pytest.fixture
def parts_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five documents then make three parts."""
    monkeypatch.setattr(second_moments, "PART", 2)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_the_table_is_that_of_the_activations(family: str, parts_of_two: None, tmp_path: Path) -> None:
    """Of a Mamba-2 in the order of its groups."""
    model, data = WRITE[family](tmp_path / "tiny"), write_texts(tmp_path / "texts.jsonl")
    run = run_tiny(model, data, tmp_path / "db", keep_tokens="all", second_moments=99)
    rows, tokens = stored_table(run.folder, "second_moments").to_pylist(), run.manifest.data.tokens
    assert run.manifest.identity["second_moments"] == {"documents": 7, "tokens": tokens}
    values: dict[SiteKey, list[list[float]]] = defaultdict(list)
    for row in stored_table(run.folder, "activations").to_pylist():
        if row["site"] in PRODUCT_SITES:
            values[row["layer"], row["site"]].append(row["values"])
    found: dict[SiteKey, list[list[float]]] = defaultdict(list)
    for row in rows:
        assert row["group_name"] == "all" and row["channel"] == len(found[row["layer"], row["site"]])
        found[row["layer"], row["site"]].append(row["values"])
    assert list(found) == sorted(found, key=lambda key: (key[0], PRODUCT_SITES.index(key[1])))
    assert found.keys() == values.keys()
    for key, triangle in found.items():
        assert len(values[key]) == tokens and list(map(len, triangle)) == list(range(1, len(values[key][0]) + 1))
        check(np.concatenate(triangle), np.array(values[key]))
    with StatsDB(tmp_path / "db") as database:
        asked = "select sum(values[channel + 1]) as n from second_moments where layer = 1 and site = 'out_proj:input'"
        (row,) = database.sql(asked).to_pylist()
    # A float64 sum of the same float32 numbers.
    assert row["n"] == pytest.approx(sum(each[-1] for each in found[1, "out_proj:input"]), rel=1e-12)


OPTIONS: dict[str, Any] = {"batch_size": 2, "keep_tokens": 8, "second_moments": 5}


def test_shards_merge_to_the_bytes_of_one_run(parts_of_two: None, tmp_path: Path) -> None:
    model, data = write_tiny_model(tmp_path / "tiny"), write_texts(tmp_path / "texts.jsonl")
    whole = run_tiny(model, data, tmp_path / "whole", **OPTIONS)
    assert stored_table(whole.folder, "second_moments").num_rows > 0
    for count in (1, 2, 5):
        shards = tmp_path / f"of-{count}"
        for index in reversed(range(count)):
            run_tiny(model, data, shards, shard=Shard(index, count), **OPTIONS)
        merged = merge(shards)
        assert bytes_of(merged.folder) == bytes_of(whole.folder)
        assert sorted(p.name for p in merged.folder.iterdir()) == sorted(p.name for p in whole.folder.iterdir())


def test_parts_are_added_in_their_order(parts_of_two: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many shards: sums of parts for which the order decides, 1 and twice 2^60, which swallows it."""
    model, data = write_tiny_model(tmp_path / "tiny"), write_texts(tmp_path / "texts.jsonl")
    firsts: dict[int, int] = {}

    def made_up(_: object, documents: list[TokenizedDocument], widths: dict[SiteKey, int], block: int) -> Any:
        number = firsts.setdefault(documents[0].index, len(firsts))
        return {key: np.full(n * (n + 1) // 2, [1.0, 2.0**60, -(2.0**60)][number]) for key, n in widths.items()}

    monkeypatch.setattr(second_moments, "part_moments", made_up)
    whole = run_tiny(model, data, tmp_path / "whole", **OPTIONS)
    assert {value for row in stored_table(whole.folder, "second_moments")["values"].to_pylist() for value in row} == {0}
    for index in (1, 0):
        run_tiny(model, data, tmp_path / "shards", shard=Shard(index, 2), **OPTIONS)
    assert bytes_of(merge(tmp_path / "shards").folder) == bytes_of(whole.folder)


def test_a_killed_run_goes_on_to_the_same_bytes(parts_of_two: None, tmp_path: Path) -> None:
    model, data = write_tiny_model(tmp_path / "tiny"), write_texts(tmp_path / "texts.jsonl")
    whole = run_tiny(model, data, tmp_path / "whole", **OPTIONS)
    assert not (whole.folder / MOMENTS).exists()
    db, computed = tmp_path / "killed", []

    def counted(*arguments: Any) -> Any:
        computed.append(arguments[1])
        return part_moments(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(second_moments, "part_moments", counted)
        with pytest.MonkeyPatch.context() as killing, pytest.raises(KeyboardInterrupt):

            def stop(*_: object) -> None:
                raise KeyboardInterrupt

            killing.setattr(run_module, "tables_of_parts", stop)
            run_tiny(model, data, db, **OPTIONS)
        parts = sorted(next(db.glob("runs/*")).glob(f"{MOMENTS}/*"))
        assert len(parts) == len(computed) == 3
        # One part is missing, of another a byte is wrong: both are computed again.
        parts[0].unlink()
        damaged = bytearray(parts[2].read_bytes())
        damaged[len(damaged) // 2] ^= 4
        parts[2].write_bytes(damaged)
        assert bytes_of(run_tiny(model, data, db, **OPTIONS).folder) == bytes_of(whole.folder)
    assert [len(part) for part in computed] == [2, 2, 1, 2, 1]


def test_a_damaged_shard_is_found(parts_of_two: None, tmp_path: Path) -> None:
    model, data = write_tiny_model(tmp_path / "tiny"), write_texts(tmp_path / "texts.jsonl")
    shard = run_tiny(model, data, tmp_path / "db", shard=Shard(1, 2), **OPTIONS)
    (path,) = shard.folder.glob(f"{MOMENTS}/*")
    path.write_bytes(path.read_bytes()[:-1])
    bad = [row["detail"] for row in examine(tmp_path / "db").to_pylist() if row["status"] == BAD]
    assert any(f"{path} was altered" in line for line in bad)


def test_a_run_without_is_as_before(tmp_path: Path) -> None:
    model, data = write_tiny_model(tmp_path / "tiny"), write_texts(tmp_path / "texts.jsonl")
    without = run_tiny(model, data, tmp_path / "db")
    assert "second_moments" not in without.manifest.identity
    assert stored_table(without.folder, "second_moments").num_rows == 0
    with_them = run_tiny(model, data, tmp_path / "db", second_moments=3)
    assert with_them.manifest.run != without.manifest.run
    own = {file for file in with_them.manifest.tables if file.startswith("second_moments/")}
    # The other tables differ in the run's id alone.
    for name in ("counts", "channels", "activations"):
        one, other = (stored_table(run.folder, name).drop_columns("run") for run in (without, with_them))
        assert one.equals(other)
    assert len(own) == 2


def test_what_cannot_be_summed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = write_tiny_model(tmp_path / "tiny"), write_texts(tmp_path / "texts.jsonl")
    with pytest.raises(DataInvalid, match="--second-moments needs one of in_proj:input, x_proj:input, out_proj:input"):
        run_tiny(model, data, tmp_path / "db", sites=["in_proj:output"], second_moments=3)
    monkeypatch.setattr(second_moments, "floating_model", lambda *a, **k: _broken(floating_model(*a, **k)))
    with pytest.raises(
        DataInvalid, match="second moments at layer 1 in_proj:input are NaN or infinite; collect withou"
    ):
        run_tiny(model, data, tmp_path / "db", second_moments=3)


def _broken(model: Any) -> Any:
    model.norms[1][0] = float("nan")
    return model


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_a_device_s_sums_are_the_host_s(family: str) -> None:
    weights, random = tiny_weights(family), np.random.default_rng(0)
    texts = [TokenizedDocument(i, "", random.integers(0, 60, n).astype(np.int32)) for i, n in enumerate((9, 1, 130))]
    widths = moment_widths(site_layouts(weights.config, PRODUCT_SITES))
    wanted = part_moments(floating_model(weights, rotated=True), texts, widths, 2)
    there = floating_model(weights, torch.device("cuda"), torch.float32, rotated=True)
    found, again = (part_moments(there, texts, widths, 2) for _ in range(2))
    for key, triangle in wanted.items():
        # Float32 activations of some hundred roundings, squared.
        np.testing.assert_allclose(found[key], triangle, atol=1e-3 * np.abs(triangle).max())
        assert (found[key] == again[key]).all()
