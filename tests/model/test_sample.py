"""The bundled sample text: who wrote what, in which file, and how a last word is chosen."""

from __future__ import annotations

import json
import re
from pathlib import Path

from click.testing import CliRunner
from tiny_model import write_tiny_mamba2, write_tiny_model

from quambase.cli.generate import generate as generate_command
from quambase.model.checkpoint import load_model
from quambase.model.inputs.names import BUNDLED_DATA, SAMPLE, SAMPLE_AUTHORS, bundled_models
from quambase.model.inputs.sample import EMPTY, last_word_passages, write_sample
from quambase.model.inputs.text import read_documents


def lines(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / BUNDLED_DATA[name]).read_text(encoding="utf-8").splitlines()]


def test_models_write_a_document_each_in_turn(tmp_path: Path) -> None:
    models = [write_tiny_model(tmp_path / "one"), write_tiny_mamba2(tmp_path / "two")]
    loaded = [load_model(str(path)) for path in models]
    counts = write_sample(loaded, tmp_path / "a", tokens=4000, progress=False)
    calibration, evaluation = (lines(tmp_path / "a", f"sample:{name}") for name in ("calibration", "evaluation"))
    written = [line for line in calibration if line["author"]] + evaluation
    assert [line["author"] for line in written] == ["one", "two"] * (len(written) // 2) + ["one"] * (len(written) % 2)
    empty = [place for place, line in enumerate(calibration) if not line["author"]]
    assert len(empty) == len(EMPTY) and all(calibration[place]["text"] == "" for place in empty)
    assert counts["sample:calibration"] == len(calibration) and counts["sample:evaluation"] == len(evaluation)
    assert not {line["text"] for line in calibration} & {line["text"] for line in evaluation} - {""}

    command = [f"--model={path}" for path in models] + ["--out", str(tmp_path / "b"), "--tokens", "4000"]
    assert CliRunner().invoke(generate_command, command).exit_code == 0
    assert all(lines(tmp_path / "a", name) == lines(tmp_path / "b", name) for name in BUNDLED_DATA)
    # The second model's documents do not depend on the first one's.
    alone = write_sample([loaded[1]] * 2, tmp_path / "c", tokens=4000, progress=False)
    assert alone.keys() == counts.keys()
    other = lines(tmp_path / "c", "sample:evaluation")
    mine = [(a["text"], b["text"]) for a, b in zip(evaluation, other, strict=True) if a["author"] == "two"]
    assert mine and all(a == b for a, b in mine)


def test_a_last_word_stands_in_its_passage_and_ends_it() -> None:
    text = (
        "The old man saw the river. "
        + "He walked on and on in the rain and thought of home, " * 2
        + "to the river. No!"
    )
    passages = last_word_passages(text)
    assert passages
    for passage in passages:
        *before, last = passage.split()
        assert last == "river" and last in {re.sub(r"\W", "", word) for word in before}
    assert last_word_passages("One word here. And other ones there.") == []


def test_the_bundled_text_is_by_the_bundled_models() -> None:
    assert set(SAMPLE_AUTHORS) == set(bundled_models())
    for name in BUNDLED_DATA:
        documents = list(read_documents(name))
        authors = [line["author"] for line in lines(SAMPLE, name)]
        assert len(authors) == len(documents)
        assert {author for author in authors if author} == set(SAMPLE_AUTHORS)
        assert all(bool(author) == bool(document.text) for author, document in zip(authors, documents, strict=True))
