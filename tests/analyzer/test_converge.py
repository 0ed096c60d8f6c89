"""How scales depend on the number of documents, against recomputing every scale from the raw values of each subset."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
import torch
from click.testing import CliRunner
from fabricate import half
from tiny_model import WORDS, write_texts, write_tiny_mamba2, write_tiny_model

import quambase as api
from quambase.analyzer.converge import Convergence, change, converge
from quambase.analyzer.convergence import (
    CONVERGED,
    LEAST_UNITS,
    MOVING,
    NOT_JUDGED,
    SIZES,
    STRATEGIES,
    Measured,
    next_step,
    strategies_table,
)
from quambase.analyzer.scale_groups import group_of_values
from quambase.analyzer.subsamples import BLOCKS, DOCUMENTS, Subsamples, sizes, subsets
from quambase.cli.main import quambase
from quambase.collector.collect import collect
from quambase.collector.import_tensor import import_tensor
from quambase.schema.errors import DatabaseInvalid, DataInvalid, UnknownName
from quambase.schema.sites import layer_sites
from quambase.schema.sql.database import StatsDB
from quambase.schema.values.number_format import Affine

LENGTHS = (5, 9, 0, 0, 30, 0, 12, 0, 25, 7, 18, 2)
"""Tokens of the documents: of six blocks of two, one has no document and two have one."""

NUMBERS = [number for number, length in enumerate(LENGTHS) if length]
BLOCK_OF = [sorted({number // 2 for number in NUMBERS}).index(number // 2) for number in NUMBERS]
LABELS = ["absmax", "quamba", "ema_percentile:0.99,0.3", "percentile:0.9", "sigma", "outlier_piecewise:0.9"]


def some_texts() -> list[str]:
    random = np.random.default_rng(3)
    return [" ".join(WORDS[i] for i in random.integers(0, len(WORDS), length)) for length in LENGTHS]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight documents in five blocks, with every activation and sensitivities."""
    folder = tmp_path_factory.mktemp("converge")
    model, data = write_tiny_model(folder / "tiny"), write_texts(folder / "texts.jsonl", some_texts())
    options = {"data": str(data), "db": folder / "db", "batch_size": 2, "progress": False}
    collect(str(model), 12, keep_tokens="all", sensitivity=4, by_block=True, **options)
    return folder / "db"


@pytest.fixture(scope="module")
def found(database: Path) -> Convergence:
    """Every subset of every size: the largest number of them is 70, the halves of eight documents."""
    return converge(database, strategies=LABELS, resamples=70)


Values = dict[tuple[int, str], list[np.ndarray]]
"""The values of each site that the INT8 model's forward pass reads, by document."""


def raw_values(database: Path) -> Values:
    read = {site.name for _, site in layer_sites(1) if site.acts}
    with StatsDB(database) as opened:
        rows = opened.sql("select layer, site, document, values from activations").to_pylist()
    values: dict[tuple[int, str], dict[int, list[list[float]]]] = {}
    for row in rows:
        if row["site"] in read:
            values.setdefault((row["layer"], row["site"]), {}).setdefault(row["document"], []).append(row["values"])
    return {
        key: [half(np.concatenate([np.array(v, np.float32) for v in of_site[number]])) for number in NUMBERS]
        for key, of_site in values.items()
    }


def twin_scale(label: str, documents: list[np.ndarray], site: str) -> tuple[float, ...]:
    """The scale of a list of documents, from its definition."""
    joined = np.abs(np.concatenate(documents)).astype(np.float64)
    if label == "absmax":
        scales = [joined.max() / 127]
    elif label == "sigma":
        scales = [5 * np.concatenate(documents).astype(np.float64).std() / 127]
    elif label == "percentile:0.9":
        scales = [np.quantile(joined, 0.9) / 127]
    elif label == "outlier_piecewise:0.9":
        inner = max(np.quantile(joined, 0.9) / 120, 1e-6)
        scales = [inner, (joined.max() - 120 * inner) / 7]
    elif label == "quamba" and site != "x_proj:input":
        scales = [np.float16(np.float16(joined.max()) * (np.float32(1) / np.float32(127)))]
    else:
        alpha, sigma = (0.9995, 0.01) if label == "quamba" else (0.99, 0.3)
        observed = [torch.quantile(torch.from_numpy(np.abs(values)), alpha).numpy() for values in documents]
        average = observed[0]
        for current in observed[1:]:
            average = average + np.float32(sigma) * (current - average)
        scales = [average * (np.float32(1) / np.float32(127))]
    return tuple(float(max(np.float32(scale), np.float32(1e-6))) for scale in scales)


def rebuilt(values: np.ndarray, scale: tuple[float, ...]) -> np.ndarray:
    if len(scale) == 1:
        return np.clip(np.rint(values / np.float32(scale[0])), -128, 127).astype(np.float64) * scale[0]
    inner, outer = scale
    magnitude = np.abs(values.astype(np.float64))
    low = np.minimum(np.rint(magnitude / inner), 120) * inner
    high = 120 * inner + np.minimum(np.rint((magnitude - 120 * inner) / outer), 7) * outer
    return np.sign(values) * np.where(magnitude <= 120 * inner, low, high)


def error(values: np.ndarray, scale: tuple[float, ...]) -> float:
    return float(((values - rebuilt(values, scale)) ** 2).sum())


def twin_rows(label: str, unit_of: list[int], values: Values, gradients: dict[Any, Any]) -> list[dict[str, Any]]:
    """The rows of SIZES of one strategy: each subset of units by itself, one site after another."""
    units, rows = max(unit_of) + 1, []
    whole = {key: twin_scale(label, documents, key[1]) for key, documents in values.items()}
    joined = {key: np.concatenate(documents) for key, documents in values.items()}

    def kl(scales: dict[Any, tuple[float, ...]]) -> float:
        tokens, of_values = gradients["tokens"], gradients["values"]
        parts = [
            (squares * (found - rebuilt(found, scales[key])) ** 2).sum()
            for key, (found, squares) in of_values.items()
            if key[0] >= 0
        ]
        return 0.5 * float(sum(parts)) / tokens

    for n in [size for size in (1, 2, 4) if size <= units // 2]:
        moves, ratios, losses = [], [], []
        for chosen in combinations(range(units), n):
            scales = {
                key: twin_scale(
                    label, [d for d, unit in zip(documents, unit_of, strict=True) if unit in chosen], key[1]
                )
                for key, documents in values.items()
            }
            pairs = [(scales[key], whole[key]) for key in values]
            moves.append(np.median([max(abs(a / b - 1) for a, b in zip(*pair, strict=True)) for pair in pairs]))
            ratios.append(np.median([error(joined[k], scales[k]) / error(joined[k], whole[k]) for k in values]))
            losses.append(kl(scales))
        row: dict[str, Any] = {"units": n, "subsamples": math.comb(units, n), "predicted_kl_of_all": kl(whole)}
        for name, measured in (("change", moves), ("mse_ratio", ratios), ("predicted_kl", losses)):
            ends = np.quantile(measured, [0.5, 0.05, 0.95])
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
        rows.append(row)
    return rows


@pytest.mark.parametrize("label", LABELS)
def test_every_subset_recomputed_from_the_raw_values(found: Convergence, database: Path, label: str) -> None:
    values = raw_values(database)
    gradients: dict[str, Any] = {"values": {}}
    with StatsDB(database) as opened:
        run = opened.runs[0]
        gradients["tokens"] = run.identity["sensitivity"]["tokens"]
        for (layer, site, _), each in opened.sensitivities(run.run).items():
            gradients["values"][layer, site] = each.values, each.gradient_sq
    unit_of = BLOCK_OF if label in LABELS[3:] else list(range(len(NUMBERS)))
    assert len(values) == 2 * 6 + 1 and gradients["values"].keys() == values.keys()
    rows = [row for row in found.sizes.to_pylist() if row["strategy"] == label]
    expected = twin_rows(label, unit_of, values, gradients)
    assert [row["units"] for row in rows] == [row["units"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row["documents"] == round(row["units"] * 8 / (max(unit_of) + 1)) and row["scales"] == len(values)
        for name, value in wanted.items():
            # A scale may differ by one float32 rounding (2^-24 of it), where the two compute it in another order, and
            # changes are differences of two of them.
            assert row[name] == pytest.approx(value, rel=1e-5, abs=2.0**-22), (name, row["units"])


def test_columns_and_order(found: Convergence) -> None:
    assert found.sizes.schema.equals(SIZES) and found.strategies.schema.equals(STRATEGIES)
    rows = found.strategies.to_pylist()
    assert {row["strategy"] for row in rows} == set(LABELS)
    for row in rows:
        sized = [size for size in found.sizes.to_pylist() if size["strategy"] == row["strategy"]]
        assert (row["half"], row["change_high"]) == (sized[-1]["documents"], sized[-1]["change_high"])
        assert row["verdict"] == (NOT_JUDGED if row["unit"] == BLOCKS else row["verdict"])
    assert any("cannot be judged: 5 blocks, at least 8 are needed" in line for line in found.summary)
    assert found.command.startswith("quambase collect --model ") and "--by-block --batch-size 1" in found.command
    assert repr(found).split()[:2] == ["strategy", "verdict"]


def test_the_worst_scale_is_the_one_whose_own_band_reaches_furthest(found: Convergence, database: Path) -> None:
    (row,) = [row for row in found.strategies.to_pylist() if row["strategy"] == "absmax"]
    ends = {}
    for key, documents in raw_values(database).items():
        largest = [np.abs(values).max() for values in documents]
        moves = [1 - max(chosen) / max(largest) for chosen in combinations(largest, 4)]
        ends[key] = np.quantile(moves, 0.95)
    worst = max(ends, key=ends.__getitem__)
    assert (row["worst_layer"], row["worst_site"]) == worst
    assert row["worst_change"] == pytest.approx(ends[worst], rel=1e-6)  # float32 scales


def test_one_site_of_one_layer(database: Path) -> None:
    one = converge(database, site="x_proj:input", layer=1, strategies=["absmax"])
    assert set(one.sizes["scales"].to_pylist()) == {1} and one.title.startswith(
        "layer 1 x_proj:input: one scale of run"
    )
    # Not one that the model reads, and one that acts in decoding only.
    for site in ("dt_proj:input", "ssm_state_act:input"):
        assert set(converge(database, site=site, strategies=["absmax"]).sizes["scales"].to_pylist()) == {2}
    with pytest.raises(UnknownName, match="did you mean x_proj:input"):
        converge(database, site="x_proj:inputs")
    with pytest.raises(UnknownName, match="layer"):
        converge(database, layer=7)


def test_the_same_seed_gives_the_same_subsamples(database: Path) -> None:
    one, same, other = (converge(database, strategies=["absmax"], resamples=5, seed=s).sizes for s in (1, 1, 2))
    assert one.equals(same) and not one.equals(other)
    assert one["subsamples"].to_pylist() == [5, 5, 5]


def test_a_run_without_counts_by_block(tmp_path: Path) -> None:
    model, data = write_tiny_model(tmp_path / "tiny"), write_texts(tmp_path / "t.jsonl", some_texts())
    collect(str(model), 20, data=str(data), db=tmp_path / "db", progress=False)
    found = converge(tmp_path / "db", strategies=["mse", "absmax", "effect"])
    assert found.strategies["strategy"].to_pylist() == ["absmax"]
    assert "not judged: mse; they need counts of several blocks: collect with --by-block" in found.summary
    assert any(line.startswith("not judged: effect; a run stores sensitivities as one sum") for line in found.summary)
    with pytest.raises(DatabaseInvalid, match="holds no counts of several blocks, which mse would need; collect again"):
        converge(tmp_path / "db", strategies=["mse"])
    with pytest.raises(DatabaseInvalid, match="effect cannot be judged"):
        converge(tmp_path / "db", strategies=["effect"])
    with pytest.raises(DataInvalid, match="resamples is 1; expected at least 2"):
        converge(tmp_path / "db", resamples=1)
    with pytest.raises(DataInvalid, match="most_scales is 0; expected at least 1"):
        converge(tmp_path / "db", most_scales=0)
    several = converge(tmp_path / "db", strategies=["absmax"], most_scales=4, seed=5)
    assert several.title.startswith("the median of 4 scales drawn from 13 of run ")
    assert several.sizes["scales"].to_pylist() == [4, 4, 4]
    others = [converge(tmp_path / "db", strategies=["absmax"], most_scales=4, seed=seed).sizes for seed in (5, 6)]
    assert others[0].equals(several.sizes) and not others[1].equals(several.sizes)


def test_a_run_of_one_document(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.float32))
    import_tensor(tmp_path / "x.npy", "x_proj:input", db=tmp_path / "db")
    with pytest.raises(DatabaseInvalid, match="holds 1 document; expected several"):
        converge(tmp_path / "db")


def test_a_mamba2_in_groups(tmp_path: Path) -> None:
    """A scale for each group; a strategy without a scale at some of them is judged at the others."""
    model, data = write_tiny_mamba2(tmp_path / "tiny"), write_texts(tmp_path / "t.jsonl", some_texts())
    options = {"data": str(data), "db": tmp_path / "db", "batch_size": 1, "progress": False}
    run = collect(str(model), 12, by_block=True, **options)
    found = converge(tmp_path / "db", strategies=["percentile:0.9", "mse_affine", "ema_percentile"], resamples=3)
    with StatsDB(tmp_path / "db") as opened:
        groups = [key for *key, _ in opened.distributions(run.manifest.run, "group") if key[1] == "x_conv_out:input"]
        (counts,) = [
            opened.block_counts(run.manifest.run, 0, 8, "group")["x_conv_out:input", key[2]] for key in groups[:1]
        ]
    assert len(groups) > 4 and counts.counts.shape[0] == 8
    scales = dict(zip(found.strategies["strategy"].to_pylist(), found.strategies["scales"].to_pylist(), strict=True))
    assert scales["percentile:0.9"] == scales["mse_affine"] > 2 * 8
    assert set(found.strategies["units"].to_pylist()) == {8}


# The subsamples.


def test_sizes_end_with_half() -> None:
    assert [sizes(count) for count in (1, 2, 3, 9, 16, 31)] == [[], [1], [1], [1, 2, 4], [1, 2, 4, 8], [1, 2, 4, 8, 15]]


@pytest.mark.parametrize(("count", "n"), [(5, 2), (6, 3), (4, 1)])
def test_all_subsets_where_there_are_few(count: int, n: int) -> None:
    expected = list(combinations(range(count), n))
    for most in (len(expected), len(expected) + 7):
        assert list(map(tuple, subsets(count, n, most, np.random.default_rng(0)).tolist())) == expected


def test_random_subsets_are_distinct_and_every_one_is_as_likely() -> None:
    random, times, tally = np.random.default_rng(1), 400, Counter[tuple[int, ...]]()
    for _ in range(times):
        drawn = list(map(tuple, subsets(6, 3, 5, random).tolist()))
        assert len(set(drawn)) == 5 and all(a < b < c for a, b, c in drawn)
        tally.update(drawn)
    assert len(tally) == math.comb(6, 3)
    # Five of 20 without repetition vary less than independent ones: the test is on the safe side.
    assert scipy.stats.chisquare(list(tally.values())).pvalue > 1e-3


# The verdicts.


def measured(label: str, changes: dict[int, float], count: int = 16, kind: str = BLOCKS) -> Measured:
    """One strategy at one scale, whose 20 subsamples of each size all move as far."""
    group = group_of_values(np.array([1.0, 2.0]), "x_proj:input")
    values = {n: np.tile([move, 1 + move, np.nan, np.nan], (20, 1, 1)) for n, move in changes.items()}
    return Measured(label, Subsamples(kind, count, 4 * count, {}), [group], values)


def test_verdicts() -> None:
    cases = [
        measured("moves", {1: 0.5, 2: 0.001, 4: 0.1, 8: 0.01}),
        measured("late", {1: 0.5, 2: 0.001, 4: 0.1, 8: 0.009}),
        measured("early", {1: 0.5, 2: 0.009, 4: 0.0, 8: 0.003}),
        measured("few", {1: 0.0, 2: 0.0}, count=LEAST_UNITS - 1),
        measured("more", {1: 0.5, 8: 0.02}),
    ]
    rows = strategies_table(cases).to_pylist()
    assert [(row["strategy"], row["verdict"], row["converged_at"]) for row in rows] == [
        ("early", CONVERGED, 8),
        ("late", CONVERGED, 32),
        ("moves", MOVING, None),
        ("more", MOVING, None),
        ("few", NOT_JUDGED, None),
    ]
    assert rows[0]["predicted_kl"] is None and rows[0]["mse_ratio_high"] == 1.003


def test_a_band_is_of_medians_over_the_scales() -> None:
    random = np.random.default_rng(2)
    values = random.random((20, 5, 4))
    groups = [group_of_values(np.array([1.0]), "dt_proj:input")] * 5
    row = Measured("any", Subsamples(DOCUMENTS, 16, 16, {}), groups, {8: values}).bands(8)
    for place, name in enumerate(("change", "mse_ratio")):
        medians = sorted(sorted(values[i, :, place])[2] for i in range(20))
        for end, p in (("", 0.5), ("_low", 0.05), ("_high", 0.95)):
            low = int(p * 19)
            expected = medians[low] + (p * 19 - low) * (medians[low + 1] - medians[low])
            assert row[name + end] == pytest.approx(expected, rel=1e-14)  # two roundings
    assert row["predicted_kl"] is None, "no scale here acts in evaluation"


def test_changes() -> None:
    assert change(0.9, 1.0) == pytest.approx(0.1) and change(1.5, 1.0) == 0.5
    assert change((1.0, 3.0), (2.0, 2.0)) == 0.5 and change((1.0, 2.0), (1.0, 2.0)) == 0
    assert change(Affine(2.0, 5), Affine(4.0, -7)) == 0.5 == change(2.0, Affine(4.0, 3))


@pytest.mark.parametrize(
    ("moves", "left_out", "read", "words", "command"),
    [
        ([0.0], {}, 64, "64 documents are enough for s0", "quambase analyze"),
        ([0.0, 0.5], {}, 64, "64 documents are enough for s0; more are needed for s1", "--samples 128 --by-block"),
        ([0.5], {}, 60, "more are needed for s0; the text was read to its end", "--data FILE --samples 64"),
        (
            [0.0],
            {"counts": ["mse"]},
            64,
            "enough for s0; counts by block tell of the others",
            "--samples 64 --by-block",
        ),
    ],
)
def test_what_to_do_next(
    database: Path, moves: list[float], left_out: dict[str, list[str]], read: int, words: str, command: str
) -> None:
    from dataclasses import replace

    with StatsDB(database) as opened:
        run = opened.runs[0]
    asked = {**run.identity, "samples": 64, "block": 4, "seq_len": 512}
    asked.pop("sensitivity")
    run = replace(run, identity=asked, data=replace(run.data, documents=64, read=read))
    rows: pa.Table = strategies_table([measured(f"s{i}", {1: 1.0, 8: move}) for i, move in enumerate(moves)])
    said, found = next_step(rows, run, left_out)
    assert words in said and command in found


# The command.


def test_the_command(database: Path, tmp_path: Path) -> None:
    arguments = ["converge", "--db", str(database), "--strategy", "absmax", "--strategy", "percentile:0.9"]
    done = CliRunner().invoke(quambase, [*arguments, "--picture", str(tmp_path / "c.svg")])
    assert done.exit_code == 0, done.output
    tables, said = done.stdout, done.stderr
    assert "the median of 13 scales of run" in tables and "the 95 % end of the move" in tables
    assert max(map(len, tables.splitlines())) <= 100
    assert "absmax has not converged at 8 documents (from 4 to all: " in said
    assert "next: quambase collect --model" in said and f"--db {database}" in said.splitlines()[-1]
    assert (tmp_path / "c.svg").stat().st_size > 10_000
    for table in ("sizes", "strategies"):
        options = ["--no-picture", "--table", table, "--format", "json"]
        done = CliRunner().invoke(quambase, [*arguments, *options])
        stored = getattr(converge(database, strategies=["absmax", "percentile:0.9"]), table)
        assert pa.Table.from_pylist(json.loads(done.stdout), stored.schema).equals(stored)


def test_the_function_of_the_api() -> None:
    assert api.converge is converge
