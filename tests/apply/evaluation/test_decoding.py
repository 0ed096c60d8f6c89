"""Evaluation by decoding: hidden states against steps one by one, figures by position against the definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.analyzer.analyze import analyze
from quambase.apply.evaluation.candidates import from_scales
from quambase.apply.evaluation.decode_summary import BY_POSITION, by_position, sentences, table
from quambase.apply.evaluation.decoding import Decoding
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.evaluation.positions import by_position as rows_by_position
from quambase.apply.evaluation.positions import decoded_bounds, decoded_bucket
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.cli.main import load_command
from quambase.collector.collect import collect
from quambase.model.packed_batch import Batch
from quambase.schema.errors import DataInvalid, UnknownName
from quambase.schema.progress import Progress
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.results import DECODE, FLOAT, PREFILL
from quambase.schema.tables import RESULTS

KINDS = {"mamba1": write_tiny_model, "mamba2": write_tiny_mamba2}
WORDS = [f"w{number % 17}" for number in range(200)]
TEXTS = [" ".join(WORDS[start : start + length]) for start, length in enumerate((40, 7, 33, 33, 3, 21, 12, 40, 9, 18))]


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a text of documents of different lengths, a run's database and its scale table."""
    root = tmp_path_factory.mktemp(request.param)
    KINDS[request.param](root / "tiny")
    write_texts(root / "text.jsonl", TEXTS)
    collect(str(root / "tiny"), data=str(root / "text.jsonl"), db=root / "db", progress=False)
    analyze(root / "db", strategies=["absmax", "quamba", "outlier_piecewise"], out=root / "scales.parquet")
    return root


def run(world: Path, db: Path, **options: Any) -> Any:
    given = {"strategies": ["absmax", "quamba"], "data": world / "text.jsonl", "mode": DECODE, "prompt_tokens": 4}
    return evaluate(scales=world / "scales.parquet", db=db, device="cpu", **(given | options))


def int8_model(world: Path) -> Int8LanguageModel:
    found = from_scales(world / "scales.parquet", ["quamba"], None, False, quantize_embedding=False, compat=None)
    model = found.models["quamba"]
    assert isinstance(model, Int8LanguageModel)
    return model


@pytest.mark.parametrize("prompt", [1, 5, 30])
def test_hidden_states_are_those_of_steps(world: Path, prompt: int) -> None:
    """Equal bits: every sequence that goes on is fed its next token beside the others."""
    model = int8_model(world)
    generator = torch.Generator().manual_seed(prompt)
    lengths = [9, 31, 2, 17, 33, 5]
    sequences = [torch.randint(0, 20, (length,), generator=generator).tolist() for length in lengths]
    batch = Batch.pack(sequences)
    found = model.logits(Decoding(model, prompt).hidden(batch))

    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    hidden, state = model.prefill(Batch.pack([sequences[i][:prompt] for i in order]))
    expected = {}
    row = 0
    for i in order:
        for place in range(min(prompt, lengths[i])):
            expected[i, place] = model.logits(hidden[row : row + 1])[0]
            row += 1
    for place in range(prompt, max(lengths)):
        going = [i for i in order if lengths[i] > place]
        state = [of_block.first(len(going)) for of_block in state]
        logits = model.step(torch.tensor([sequences[i][place] for i in going]), state)
        expected |= {(i, place): logits[row] for row, i in enumerate(going)}
    rows = [expected[i, place] for i, length in enumerate(lengths) for place in range(length)]
    # Rows of a product of other heights may differ in the last bits of their float32 sums.
    assert torch.allclose(found, torch.stack(rows), rtol=0, atol=1e-4)
    # A state that is not rounded gives others: prefill's.
    if prompt < 30:
        assert not torch.allclose(found, model.logits(model.hidden(batch)), rtol=0, atol=1e-4)


def test_the_pieces_of_progress_add_up_to_the_work_announced(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of decoding and of prefill, in documents and in work, so that 100 % is reached when all is done."""
    announced, pieces = [], []
    start, piece = Progress.start, Progress.piece

    def starts(self: Progress, stage: str, units: float, work: float, **options: Any) -> None:
        announced.append((units, work))
        start(self, stage, units, work, **options)

    def of_piece(self: Progress, units: float, work: float, detail: str = "") -> Any:
        pieces.append((units, work))
        return piece(self, units, work, detail)

    monkeypatch.setattr(Progress, "start", starts)
    monkeypatch.setattr(Progress, "piece", of_piece)
    run(world, tmp_path, states=["int8:channel"])
    (whole,) = announced
    assert np.allclose(np.sum(pieces, axis=0), whole, rtol=1e-9)


@given(st.lists(st.integers(0, 70_000), max_size=60))
@settings(deadline=None)
def test_buckets_are_powers_of_two(decoded: list[int]) -> None:
    found = decoded_bucket(np.array(decoded, np.int64))
    for tokens, bucket in zip(decoded, found.tolist(), strict=True):
        low, high = decoded_bounds(bucket)
        assert low <= tokens <= high
        assert (bucket == 0) == (tokens == 0) and (high == 0 or math.log2(high / 8) == bucket - 1)
    assert [decoded_bounds(bucket) for bucket in range(4)] == [(0, 0), (1, 8), (9, 16), (17, 32)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.booleans()), max_size=50))
@settings(deadline=None)
def test_sums_by_position_are_those_of_the_definition(drawn: list[tuple[int, int, bool]]) -> None:
    owner, decoded = (np.array([row[i] for row in drawn], np.int64) for i in (0, 1))
    agrees = np.array([row[2] for row in drawn], bool)
    nll, kl = np.arange(len(drawn)) + 1.0, 2.0 ** -np.arange(len(drawn))
    found = rows_by_position(nll, kl, agrees, owner, decoded, 4)
    for document, rows in enumerate(found):
        mine = [i for i, row in enumerate(drawn) if row[0] == document]
        assert sum(row["tokens"] for row in rows) == len(mine)
        for row in rows:
            inside = [i for i in mine if row["decoded_from"] <= drawn[i][1] <= row["decoded_to"]]
            assert row["tokens"] == len(inside) and row["nll"] == sum(nll[i] for i in inside)
            # Sums of at most 50 float64 values of at most 1 in another order.
            assert row["kl"] == pytest.approx(sum(kl[i] for i in inside), abs=50 * 2**-52)
            assert row["top1_agreement"] == sum(agrees[i] for i in inside)


def test_an_evaluation_by_decoding(world: Path, tmp_path: Path) -> None:
    found = run(world, tmp_path / "db")
    rows = found.results.to_pylist()
    # Two documents have no token after a prompt of four.
    assert {row["document"] for row in rows} == {i for i, text in enumerate(TEXTS) if len(text.split()) > 4}
    assert {(row["task"], row["strategy"]) for row in rows} == {
        (task, label) for task in (DECODE, PREFILL) for label in (FLOAT, "absmax", "quamba")
    }
    for row in rows:
        assert row["tokens"] == len(TEXTS[row["document"]].split()) - 4
        for name in ("tokens", "nll", "kl", "top1_agreement"):
            total = sum(position[name] for position in row["positions"])
            assert total == pytest.approx(row[name], rel=1e-12)  # float64 sums in another order
        assert [p["decoded_from"] for p in row["positions"]] == [0, 1, 9, 17, 33][: len(row["positions"])]
    kept = {(row["task"], row["strategy"], row["document"]): row["kl"] for row in rows}
    for _, label, document in kept:
        assert kept[DECODE, FLOAT, document] == kept[PREFILL, FLOAT, document] == 0
        if label != FLOAT:
            assert kept[DECODE, label, document] != kept[PREFILL, label, document]
    # The first prediction after the prompt is prefill's.
    for label in ("absmax", "quamba"):
        first = {(row["task"], row["document"]): row["positions"][0]["nll"] for row in rows if row["strategy"] == label}
        for _, document in first:
            # Other rows beside it in a product: float32 sums in another order.
            assert first[DECODE, document] == pytest.approx(first[PREFILL, document], abs=1e-4)
    assert run(world, tmp_path / "db").id == found.id
    assert run(world, tmp_path / "db", prompt_tokens=5).id != found.id


def test_prefill_after_one_token_is_the_ordinary_evaluation(world: Path, tmp_path: Path) -> None:
    one = run(world, tmp_path / "db", prompt_tokens=1).results
    ordinary = run(world, tmp_path / "db", mode=PREFILL, task="perplexity").results
    mine = [row for row in one.to_pylist() if row["task"] == PREFILL]
    same = ("strategy", "document", "tokens", "nll", "kl", "top1_agreement", "top1_right")
    assert [[row[name] for name in same] for row in mine] == [[row[n] for n in same] for row in ordinary.to_pylist()]
    assert set(ordinary["positions"].to_pylist()) == {None}


def test_what_cannot_be_decoded(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match=r"none of its .* has a target for decode after a prompt of 50 tokens"):
        run(world, tmp_path / "db", prompt_tokens=50)
    with pytest.raises(DataInvalid, match="leave out --task"):
        run(world, tmp_path / "db", task="perplexity")
    with pytest.raises(UnknownName, match="did you mean decode"):
        run(world, tmp_path / "db", mode="decod")
    with pytest.raises(DataInvalid, match="prompt_tokens is 0; expected 1 or more"):
        run(world, tmp_path / "db", prompt_tokens=0)
    # Codes of two segments have no decoding kernel.
    both = run(world, tmp_path / "db", strategies=["absmax", "outlier_piecewise"])
    assert {(row["task"], row["strategy"]) for row in both.results.to_pylist()} == {
        (DECODE, FLOAT), (DECODE, "absmax"), (PREFILL, FLOAT), (PREFILL, "absmax"), (PREFILL, "outlier_piecewise")
    }  # fmt: skip
    assert any("outlier_piecewise is scored by prefill alone" in note for note in both.notes)


def test_the_view_by_position(world: Path, tmp_path: Path) -> None:
    collect(str(world / "tiny"), data=str(world / "text.jsonl"), db=tmp_path / "db", progress=False)
    found = run(world, tmp_path / "db").results.to_pylist()
    with StatsDB(tmp_path / "db") as database:
        rows = database.sql("select * from results_by_position").to_pylist()
    expected = [{**position, "strategy": row["strategy"]} for row in found for position in row["positions"]]
    assert [{name: row[name] for name in expected[0]} for row in rows] == expected


# The summary --------------------------------------------------------------------------------------


def results(kl: dict[str, list[list[float]]]) -> pa.Table:
    """RESULTS of one strategy: by task, the KL of each document at 0, 1 to 8 and 9 to 16 tokens, 4 tokens each."""
    rows = []
    for task, documents in kl.items():
        for label in (FLOAT, "mse"):
            for number, sums in enumerate(documents):
                positions = [
                    {"decoded_from": low, "decoded_to": high, "tokens": 4, "nll": 8.0, "kl": value, "top1_agreement": 3}
                    for (low, high), value in zip([(0, 0), (1, 8), (9, 16)], sums, strict=False)
                ]
                whole = {name: sum(p[name] for p in positions) for name in ("tokens", "nll", "kl", "top1_agreement")}
                place = {"task": task, "strategy": label, "document": number, "data": "t", "positions": positions}
                rows.append(dict.fromkeys(RESULTS.names) | place | whole)
    return pa.Table.from_pylist(rows, RESULTS)


def test_the_summary_is_paired_over_documents() -> None:
    generator = np.random.default_rng(0)
    prefill = generator.uniform(1, 2, (12, 3))
    added = np.array([0.0, 1.0, 4.0]) + generator.uniform(-0.1, 0.1, (12, 3))
    rows = by_position(results({DECODE: (prefill + added).tolist(), PREFILL: prefill.tolist()}))
    assert rows.schema == BY_POSITION and rows["decoded_to"].to_pylist() == [None, 0, 8, 16]
    of_all, _, first, last = rows.to_pylist()
    assert of_all["documents"] == 12 and of_all["tokens"] == 144 and first["tokens"] == 48
    assert of_all["added"] == pytest.approx(added.sum() / 144) and of_all["flips"] == 0.25
    assert of_all["perplexity"] == pytest.approx(math.exp(2))
    # Equal tokens in every document: the ratio is a mean, its interval Student's.
    for row, column in ((first, added[:, 1]), (last, added[:, 2])):
        reach = 2.200985160 * column.std(ddof=1) / math.sqrt(12)  # t of 0.975 with 11 degrees of freedom
        assert row["added_low"] == pytest.approx((column.mean() - reach) / 4)
        assert row["added_high"] == pytest.approx((column.mean() + reach) / 4)
    said = sentences(rows.to_pylist())
    assert "it grows with length" in said[1] and "at 9 to 16" in said[1]
    lines = table(rows.to_pylist()).to_pylist()
    assert [(line["KL x1000"], line["strategy"]) for line in lines] == [("prefill", "mse"), ("decode", "mse")]
    assert lines[0]["8"] == f"{1000 * prefill[:, 1].sum() / 48:.3g}"


def test_few_documents_give_no_interval() -> None:
    rows = by_position(results({DECODE: [[1.0, 2.0, 3.0]] * 3, PREFILL: [[1.0, 1.0, 1.0]] * 3})).to_pylist()
    assert all(row["added_low"] is None for row in rows)
    assert "too few documents to say whether it grows" in sentences(rows)[1]
    assert by_position(results({PREFILL: [[1.0]]})).num_rows == 0 and sentences([]) == []


# The command --------------------------------------------------------------------------------------


def test_the_command_says_what_decoding_adds(world: Path, tmp_path: Path) -> None:
    arguments = ["--scales", world / "scales.parquet", "--data", world / "text.jsonl", "--db", tmp_path / "db"]
    command = [*map(str, arguments), "--strategy", "quamba", "--mode", "decode", "--prompt-tokens", "2"]
    found = CliRunner().invoke(load_command("evaluate"), command)
    assert found.exit_code == 0, found.output
    assert "decoding with quamba has a KL of" in found.output and "prefill   quamba" in found.output
    assert max(map(len, found.stdout.splitlines())) <= 100
    again = CliRunner().invoke(load_command("results"), ["--db", str(tmp_path / "db")])
    assert "prefill   quamba" in again.output
    wrong = CliRunner().invoke(load_command("evaluate"), [*command, "--task", "both", "--float"])
    assert wrong.exit_code == 2
