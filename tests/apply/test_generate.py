"""`quambase generate --prompt`: tokens against steps by hand, pieces against the whole text."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.analyzer.analyze import analyze
from quambase.apply.apply import apply
from quambase.apply.evaluation.candidates import from_scales
from quambase.apply.generate import Continuing, generate
from quambase.cli.main import load_command
from quambase.collector.collect import collect
from quambase.model.checkpoint import load_model
from quambase.model.generate import continued
from quambase.model.inputs.tokenizer import Tokenizer
from quambase.model.packed_batch import Batch
from quambase.schema.errors import CheckpointInvalid, DataInvalid

KINDS = {"mamba1": write_tiny_model, "mamba2": write_tiny_mamba2}
PROMPT = "w1 w2 w3 w4 w5"


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    KINDS[request.param](root / "tiny")
    write_texts(root / "text.jsonl")
    collect(str(root / "tiny"), data=str(root / "text.jsonl"), db=root / "db", progress=False)
    analyze(root / "db", strategies=["absmax", "outlier_piecewise"], out=root / "scales.parquet")
    apply(root / "scales.parquet", strategy="absmax", db=root / "db")
    return root


def test_a_float_model_continues_as_whole_passes_do(world: Path) -> None:
    loaded = load_model(str(world / "tiny"))
    model, ids = loaded.floating(), loaded.tokenizer.encode(PROMPT)
    texts = list(ids)
    for _ in range(12):
        logits = model.logits(model.hidden(Batch.pack([texts]))[-1:])
        texts.append(int(logits[0, : loaded.tokenizer.ids].argmax()))
    assert list(itertools.islice(continued(model, ids, vocabulary=loaded.tokenizer.ids), 12)) == texts[len(ids) :]


def test_an_int8_model_continues_from_the_state_of_one_pass(world: Path) -> None:
    found = from_scales(world / "scales.parquet", ["absmax"], None, False, quantize_embedding=False, compat=None)
    model, tokenizer = found.models["absmax"], found.source.tokenizer
    ids = tokenizer.encode(PROMPT)
    hidden, state = model.prefill(Batch.pack([ids]))  # type: ignore[union-attr]
    logits, expected = model.logits(hidden[-1:]), []
    for _ in range(12):
        expected.append(int(logits[0, : tokenizer.ids].argmax()))
        logits = model.step(torch.tensor(expected[-1:]), state)  # type: ignore[union-attr]
    text = "".join(generate(PROMPT, scales=world / "scales.parquet", strategy="absmax", tokens=12, device="cpu"))
    assert text == tokenizer.decode(expected)
    applied = generate(PROMPT, db=world / "db", tokens=12, device="cpu")
    assert "".join(applied) == text and "INT8 scales of absmax, on cpu: 12 tokens" in applied.says()


def test_drawn_tokens_depend_on_the_seed_alone(world: Path) -> None:
    def drawn(seed: int, **options: float) -> str:
        given = {"model": world / "tiny", "tokens": 30, "temperature": 1.0, "device": "cpu"} | options
        return "".join(generate(PROMPT, seed=seed, **given))  # type: ignore[arg-type]

    assert drawn(1) == drawn(1) != drawn(2)
    greedy = "".join(generate(PROMPT, model=world / "tiny", tokens=30, device="cpu"))
    assert drawn(1, top_p=1e-9) == drawn(2, top_p=1e-9) == greedy  # one token is left to draw from


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8; 3 ends a text."""

    end_of_text = 3

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


def test_pieces_are_whole_characters_up_to_the_end_of_the_text() -> None:
    tokens = [*"aß€".encode(), 3, *b"not this"]
    found = Continuing("m", "cpu", iter(tokens), Bytes())  # type: ignore[arg-type]
    assert list(found) == ["a", "ß", "€", ""]
    assert found.tokens == 6 and "6 tokens, where it ended the text" in found.says()
    cut = Continuing("m", "cpu", iter("aß".encode()[:2]), Bytes())  # type: ignore[arg-type]
    assert "".join(cut) == "a\N{REPLACEMENT CHARACTER}"


def test_what_cannot_be_continued(world: Path, tmp_path: Path) -> None:
    for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"tokens": 0}):
        with pytest.raises(DataInvalid, match="expected 0 or more"):
            generate(PROMPT, model=world / "tiny", **options)  # type: ignore[arg-type]
    with pytest.raises(DataInvalid, match="the prompt is empty"):
        generate("", model=world / "tiny")
    with pytest.raises(DataInvalid, match="codes of two segments"):
        generate(PROMPT, scales=world / "scales.parquet", strategy="outlier_piecewise", device="cpu")
    with pytest.raises(CheckpointInvalid, match="no model was applied"):
        generate(PROMPT, db=tmp_path)


def test_the_command_prints_the_text_and_how_fast_it_was_written(world: Path, tmp_path: Path) -> None:
    command = load_command("generate")
    arguments = ["--model", str(world / "tiny"), "--tokens", "5"]
    found = CliRunner().invoke(command, ["--prompt", "w1\x1b[2J w2", *arguments])
    assert found.exit_code == 0, found.output
    assert found.stdout.startswith(r"w1\x1b[2J w2") and "on cpu: 5 tokens" in found.stderr
    for wrong in (
        [],
        ["--prompt", "a", "--out", str(tmp_path / "o")],
        ["--prompt", "a", "--model", "m", "--model", "n"],
        ["--prompt", "a", str(world), "--strategy", "mse"],
        ["--out", str(tmp_path / "o"), "--strategy", "mse"],
    ):
        assert CliRunner().invoke(command, wrong).exit_code == 2


def test_a_tokenizer_says_which_token_ends_a_text(world: Path) -> None:
    tokenizer = load_model(str(world / "tiny")).tokenizer
    assert isinstance(tokenizer, Tokenizer) and tokenizer.end_of_text is None
    assert load_model("mamba-5m").tokenizer.end_of_text == 0
