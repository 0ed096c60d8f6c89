"""`doctor` finds damage in every kind of file that is read again, and says what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from fabricate import make_run

from quambase.analyzer.analyze import analyze
from quambase.schema.checksums import file_sha256
from quambase.schema.json_files import write_json
from quambase.schema.stored.doctor import BAD, examine
from quambase.schema.stored.int8_models import CONFIG, LAST, TENSORS, remember
from quambase.schema.stored.results import EVALUATION, RESULTS_FILE
from quambase.schema.tables import RESULTS, write_table


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A run, a scale table, a finished and an unfinished evaluation, an INT8 model (of any bytes)."""
    db = tmp_path / "db"
    make_run(db, "run-a")
    analyze(db, strategies=["mse"], out=db / "scales.parquet")
    rows = pa.Table.from_pylist([dict.fromkeys(RESULTS.names) | {"evaluation": "e1"}], schema=RESULTS)
    done, begun, model = db / "results" / "e1", db / "results" / "e2" / "parts", db / "models" / "m1"
    write_table(done / RESULTS_FILE, "results", rows, RESULTS)
    about = {"model": "m", "scales": "", "strategies": [], "tasks": [], "notes": []}
    digest = file_sha256(done / RESULTS_FILE)
    write_json(done / EVALUATION, {"format_version": 2, "evaluation": "e1", "results_sha256": digest} | about)
    write_table(begun / "000000.parquet", "results", rows, RESULTS)
    model.mkdir(parents=True)
    (model / TENSORS).write_bytes(b"tensors")
    settings = {
        "source": {"name": "m", "path": "/m"},
        "strategy": "mse",
        "weights_sha256": "w",
        "quantize_lm_head": False,
        "quantize_embedding": False,
        "tensors_sha256": file_sha256(model / TENSORS),
    }
    write_json(model / CONFIG, {"format_version": 2, "family": "quamba1-w8a8"} | settings)
    remember(db, model)
    return db


def found(db: Path) -> dict[tuple[str, str], tuple[str, str]]:
    with contextlib.chdir(db.parent):  # where no scale table is
        rows = examine(db).to_pylist()
    return {(row["check"], row["subject"]): (row["status"], row["detail"]) for row in rows if row["check"] != "version"}


def test_a_sound_database(database: Path) -> None:
    rows = found(database)
    assert not [key for key, (status, _) in rows.items() if status == BAD]
    assert {check for check, _ in rows} == {"run", "values", "evaluation", "scales", "model"}
    assert "checksums right" in rows["run", "run-a"][1] and rows["evaluation", "e1"][0] == "ok"
    assert rows["evaluation", "e2"] == ("note", "unfinished, 1 blocks done; run the same command again to resume it")
    assert rows["model", "m1"] == ("ok", "checksums right, strategy mse")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "key", "advice"),
    [
        ("runs/run-a/run.json", ("run", "run-a"), "collect again"),
        ("runs/run-a/site_stats.parquet", ("run", "run-a"), "collect again"),
        ("results/e1/evaluation.json", ("evaluation", "e1"), "evaluate again"),
        ("results/e1/results.parquet", ("evaluation", "e1"), "evaluate again"),
        ("scales.parquet", ("scales", "scales.parquet"), "run `analyze` again"),
        ("models/m1/config.json", ("model", "m1"), "run `apply` again"),
        ("models/m1/model.safetensors", ("model", "m1"), "run `apply` again"),
        ("models/last.txt", ("model", LAST), "run `apply`"),
    ],
)
@pytest.mark.parametrize("harm", [flip, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_damage_is_found(
    database: Path, file: str, key: tuple[str, str], advice: str, harm: Callable[[Path], object]
) -> None:
    harm(database / file)
    bad = {name: detail for name, (status, detail) in found(database).items() if status == BAD}
    ((check, subject), detail), *others = bad.items()
    assert check == key[0] and subject.endswith(key[1]) and advice in detail, bad
    assert {name for (name, _), _ in others} <= {"run"}  # a database without a sound run says so, too


def test_a_damaged_block_of_an_unfinished_evaluation(database: Path) -> None:
    flip(database / "results" / "e2" / "parts" / "000000.parquet")
    status, detail = found(database)["evaluation", "e2"]
    assert status == "note" and "1 blocks done, of which 1 are damaged and will be scored again" in detail


def test_a_model_that_is_gone(database: Path) -> None:
    (database / "models" / "m1").rename(database / "models" / "m2")
    status, detail = found(database)["model", LAST]
    assert status == "note" and "is gone; run `apply` again" in detail
