"""An evaluation is what its id says, a killed one can be finished, and no command takes what is not its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.analyzer.adopt import adopt
from quambase.analyzer.analyze import analyze
from quambase.apply.apply import apply
from quambase.apply.evaluation import candidates as candidates_module
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.evaluation.stored import find_evaluation, list_evaluations
from quambase.apply.int8.model_folder import load_stored
from quambase.cli.main import load_command
from quambase.collector.collect import collect
from quambase.schema.checksums import file_sha256
from quambase.schema.errors import (
    CheckpointInvalid,
    DatabaseInvalid,
    ModelNotFound,
    OutputRefused,
    QuambaseError,
    ScalesInvalid,
)
from quambase.schema.json_files import write_json
from quambase.schema.scale_table import ScaleTable, read_scales, write_scales
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.int8_models import CONFIG, LAST, SCALES, TENSORS, TOKENIZER, last_applied, read_about

KINDS = {"mamba1": write_tiny_model, "mamba2": write_tiny_mamba2}


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a text, a database of one run and its scale table; not to be written to."""
    root = tmp_path_factory.mktemp(request.param)
    KINDS[request.param](root / "tiny")
    write_texts(root / "text.jsonl")
    collect(str(root / "tiny"), data=str(root / "text.jsonl"), db=root / "db", progress=False)
    analyze(root / "db", strategies=["absmax", "quamba", "mse"], out=root / "scales.parquet")
    return root


def run(world: Path, db: Path, **options: Any) -> Any:
    options = {"strategies": ["mse"], "task": "perplexity", "data": world / "text.jsonl"} | options
    if "folder" not in options and not options.get("floating"):
        options["scales"] = options.get("scales", world / "scales.parquet")
    return evaluate(options.pop("folder", None), db=db, **options)


def write_scaled(path: Path, table: ScaleTable, factors: dict[str, float]) -> Path:
    """The scale table with the scales of some labels multiplied."""
    labels, scales = (table.table[name].to_pylist() for name in ("label", "scale"))
    changed = [scale * factors.get(label, 1) for label, scale in zip(labels, scales, strict=True)]
    place = table.table.schema.get_field_index("scale")
    write_scales(path, table.table.set_column(place, "scale", pa.array(changed, pa.float32())), table.provenance)
    return path


def another_tokenizer(world: Path, tmp_path: Path) -> Path:
    """The model with two words' ids exchanged."""
    model = shutil.copytree(world / "tiny", tmp_path / "other")
    text = (model / "tokenizer.json").read_text()
    swapped = text.replace('"w1": 1,', '"w1": ?,').replace('"w2": 2,', '"w2": 1,').replace('"w1": ?,', '"w1": 2,')
    assert swapped != text or '"w1":1' in text
    if swapped == text:
        swapped = text.replace('"w1":1,', '"w1":?,').replace('"w2":2,', '"w2":1,').replace('"w1":?,', '"w1":2,')
    (model / "tokenizer.json").write_text(swapped)
    return model


def test_what_decides_the_numbers_decides_the_id(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole kind: each way in which two evaluations can differ gives another id, and the same one the same."""
    first = run(world, tmp_path)
    assert run(world, tmp_path).id == first.id
    ids = {"as it is": first.id}
    ids["compat"] = run(world, tmp_path, compat="upstream").id
    ids["embedding"] = run(world, tmp_path, quantize_embedding=True).id
    ids["head"] = run(world, tmp_path, quantize_lm_head=True).id
    ids["strategy"] = run(world, tmp_path, strategies=["absmax"]).id
    ids["strategies"] = run(world, tmp_path, strategies=["mse", "absmax"]).id
    ids["window"] = run(world, tmp_path, window=16).id
    ids["samples"] = run(world, tmp_path, samples=4).id
    ids["task"] = run(world, tmp_path, task="both").id
    twice = write_scaled(tmp_path / "twice.parquet", read_scales(world / "scales.parquet"), {"mse": 2})
    ids["scales"] = run(world, tmp_path, scales=twice).id
    ids["tokenizer"] = run(world, tmp_path, model=another_tokenizer(world, tmp_path)).id
    ids["float"] = run(world, tmp_path, floating=True, model=world / "tiny").id
    real = candidates_module.version
    for package in ("quambase", "torch"):
        monkeypatch.setattr(candidates_module, "version", lambda name, p=package: "9" if name == p else real(name))
        ids[package] = run(world, tmp_path).id
    monkeypatch.setattr(candidates_module, "version", real)
    assert len(set(ids.values())) == len(ids), ids
    # The path of a table decides nothing.
    shutil.copyfile(world / "scales.parquet", tmp_path / "copy.parquet")
    assert run(world, tmp_path, scales=tmp_path / "copy.parquet").id == first.id


def test_the_reference_of_a_folder_is_part_of_it(world: Path, tmp_path: Path) -> None:
    applied = apply(world / "scales.parquet", strategy="mse", db=tmp_path)
    first = run(world, tmp_path, folder=applied.folder)
    scales = write_scaled(applied.folder / SCALES, read_scales(applied.folder / SCALES), {"quamba": 4})
    with pytest.raises(CheckpointInvalid, match=r"scales\.parquet was altered"):
        run(world, tmp_path, folder=applied.folder)
    about = read_about(applied.folder)
    about["files"][SCALES] = file_sha256(scales)
    write_json(applied.folder / CONFIG, about)
    second = run(world, tmp_path, folder=applied.folder)
    assert second.id != first.id

    def kl(found: Any, label: str) -> float:
        return sum(row["kl"] for row in found.results.to_pylist() if row["strategy"] == label)

    assert kl(second, "mse") == kl(first, "mse") and kl(second, "quamba") != kl(first, "quamba")
    fresh = run(world, tmp_path / "fresh", folder=applied.folder)
    assert fresh.id == second.id and fresh.results.equals(second.results)


def test_clusters_are_stored_and_decide_the_id(world: Path, tmp_path: Path) -> None:
    texts = ["w1 w2 w3 w4", "w5 w6 w7", "w8 w9 w1 w2"]
    ids = {}
    for name, books in (("none", [None] * 3), ("two", ["a", "a", "b"]), ("three", ["a", "b", "c"])):
        lines = [json.dumps({"text": text, "book": book}) for text, book in zip(texts, books, strict=True)]
        (tmp_path / "t.jsonl").write_text("\n".join(lines))
        for task in ("perplexity", "last-word"):
            found = run(world, tmp_path, data=tmp_path / "t.jsonl", task=task)
            ids[name, task] = found.id
            assert [row["cluster"] for row in found.results.to_pylist() if row["strategy"] == "mse"] == books
    assert len(set(ids.values())) == 6


def test_another_text_of_the_same_name_is_kept_apart(world: Path, tmp_path: Path) -> None:
    for name, texts in (("a", ["w1 w2 w3 w4"] * 3), ("b", ["w5 w6 w7 w8 w9"] * 3)):
        (tmp_path / name).mkdir()
        write_texts(tmp_path / name / "t.jsonl", texts)
    both = run(world, tmp_path, data=[tmp_path / "a" / "t.jsonl", str(tmp_path / "b" / "t.jsonl")])
    found = {row["data"]: row["tokens"] for row in both.results.to_pylist()}
    assert found == {str(tmp_path / "a" / "t.jsonl"): 3, str(tmp_path / "b" / "t.jsonl"): 4}


def test_relative_or_absolute_gives_the_same_bytes_from_any_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "tiny", tmp_path / "here" / "m")
    shutil.copyfile(world / "text.jsonl", tmp_path / "here" / "text.jsonl")
    monkeypatch.chdir(tmp_path / "here")
    tables, results = [], []
    absolute = tmp_path / "here" / "m", tmp_path / "here" / "text.jsonl"
    for number, (model, text) in enumerate([("m", "text.jsonl"), absolute]):
        collect(model, data=text, db=f"db{number}", progress=False)
        analyze(f"db{number}", strategies=["mse", "quamba"], out=f"{number}.parquet")
        tables.append(Path(f"{number}.parquet").read_bytes())
        results.append(run(world, Path(f"db{number}"), scales=f"{number}.parquet", data=text).id)
    assert tables[0] == tables[1] and results[0] == results[1]
    monkeypatch.chdir(world)
    assert apply(tmp_path / "here" / "0.parquet", strategy="mse", db=tmp_path / "other").folder.is_dir()
    # The database can be moved: what it holds itself is found from there.
    shutil.move(tmp_path / "other", tmp_path / "moved")
    assert load_stored(last_applied(tmp_path / "moved")).about["strategy"] == "mse"
    shutil.move(tmp_path / "here" / "m", tmp_path / "here" / "n")
    with pytest.raises(ModelNotFound, match=r"the model m was at .*/here/m when it was collected, .* with --model"):
        apply(tmp_path / "here" / "0.parquet", strategy="mse", db=tmp_path / "moved")
    apply(tmp_path / "here" / "0.parquet", strategy="mse", db=tmp_path / "moved", model=tmp_path / "here" / "n")


# Killed -------------------------------------------------------------------------------------------

KILL = """
import os, signal, sys
from pathlib import Path
from quambase.schema import files
calls, at = 0, int(sys.argv[1])
real = {"replace": Path.replace, "fsync": os.fsync, "mkdtemp": files.tempfile.mkdtemp, "rmtree": files.shutil.rmtree,
        "unlink": Path.unlink}
def counted(name):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*arguments, **options)
    return call
Path.replace, os.fsync, Path.unlink = counted("replace"), counted("fsync"), counted("unlink")
files.tempfile.mkdtemp, files.shutil.rmtree = counted("mkdtemp"), counted("rmtree")
from quambase.apply.evaluation import evaluate as module
module.BLOCK_TOKENS["cpu"] = 60
data, scales, db = sys.argv[2:]
module.evaluate(scales=scales, strategies=["mse"], task="perplexity", data=data, db=db)
"""


def test_an_evaluation_killed_at_any_file_operation_can_be_finished(world: Path, tmp_path: Path) -> None:
    """By SIGKILL before the k-th operation on files: the next run ends with the same rows and no strays."""

    def go(kill_at: int, db: Path) -> subprocess.CompletedProcess[str]:
        arguments = [str(kill_at), str(world / "text.jsonl"), str(world / "scales.parquet"), str(db)]
        return subprocess.run([sys.executable, "-c", KILL, *arguments], capture_output=True, text=True, check=False)

    assert go(0, tmp_path / "whole").returncode == 0
    expected = find_evaluation(tmp_path / "whole")
    for k in range(1, 100, 3):  # every third operation keeps the test within seconds
        db = tmp_path / str(k)
        killed = go(k, db)
        if killed.returncode == 0:
            break  # it has fewer operations
        assert killed.returncode == -signal.SIGKILL
        again = go(0, db)
        assert again.returncode == 0, again.stderr
        found = find_evaluation(db)
        assert found.id == expected.id and found.results.equals(expected.results)
        left = sorted(str(p.relative_to(db)) for p in db.rglob("*") if p.is_file() or p.name.startswith("."))
        assert left == [f"results/{found.id}/evaluation.json", f"results/{found.id}/results.parquet"], k
    assert k > 12


# One damaged file ---------------------------------------------------------------------------------


@pytest.fixture
def damaged(world: Path, tmp_path: Path) -> tuple[Path, str, str]:
    """A database of two evaluations, and their ids: the first is to be harmed."""
    shutil.copytree(world / "db" / "runs", tmp_path / "db" / "runs")
    ids = [run(world, tmp_path / "db", strategies=[label]).id for label in ("absmax", "mse")]
    return tmp_path / "db", ids[0], ids[1]


HARM = {
    "results cut": lambda f: (f / "results.parquet").write_bytes((f / "results.parquet").read_bytes()[:-50]),
    "results altered": lambda f: (f / "results.parquet").write_bytes(
        bytes(b ^ (1 if i == 200 else 0) for i, b in enumerate((f / "results.parquet").read_bytes()))
    ),
    "results gone": lambda f: (f / "results.parquet").unlink(),
    "results of another kind": lambda f: (f / "results.parquet").write_text("a,b\n"),
    "about cut": lambda f: (f / "evaluation.json").write_text((f / "evaluation.json").read_text()[:40]),
    "about binary": lambda f: (f / "evaluation.json").write_bytes(b"\xff\xfe"),
    "about empty": lambda f: (f / "evaluation.json").write_text(""),
    "about a list": lambda f: (f / "evaluation.json").write_text("[]"),
    "about deep": lambda f: (f / "evaluation.json").write_text("[" * 100_000),
    "about without notes": lambda f: (f / "evaluation.json").write_text('{"format_version": 1}'),
    "about newer": lambda f: (f / "evaluation.json").write_text('{"format_version": 99}'),
    "about with odd tasks": lambda f: (f / "evaluation.json").write_text(
        json.dumps(json.loads((f / "evaluation.json").read_text()) | {"tasks": ["x"]})
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_evaluation_disables_itself_alone(damaged: tuple[Path, str, str], harm: str, tmp_path: Path) -> None:
    db, first, second = damaged
    HARM[harm](db / "results" / first)

    def ask(name: str, *arguments: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(load_command(name), [*arguments, "--db", str(db)], catch_exceptions=False)
        return done.exit_code, done.stdout, done.stderr

    for name, *arguments in (
        ("sql", "select count(*) as n from site_stats"),
        ("stats", "--limit", "1"),
        ("analyze", "--strategy", "absmax", "--out", str(tmp_path / "s.parquet")),
        ("compare", "--no-picture"),
    ):
        code, _, err = ask(name, *arguments)
        assert code == 0 and first not in err, (name, err)
    code, out, err = ask("sql", "--format", "csv", "select distinct evaluation from results")
    assert code == 0 and second in out and first not in out and f"leaves out evaluation {first}" in err
    code, out, err = ask("doctor")
    assert code == 1 and first in out
    if harm.startswith("about"):
        table, notes = list_evaluations(db)
        assert table["evaluation"].to_pylist() == [second] and len(notes) == 1 and first in notes[0]
    assert find_evaluation(db).id == second
    with pytest.raises(QuambaseError, match=first):
        find_evaluation(db, first)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format_version": 1}', "[" * 100_000, '{"format_version": 1, "run": 5}']
)
def test_a_damaged_run_disables_itself_alone(world: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(world / "db" / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text(text)
    with StatsDB(tmp_path) as db:
        assert db.sql("select count(*) as n from site_stats")["n"].to_pylist()[0] > 0
        assert "run broken is left out" in db.notes[1]
    with pytest.raises(DatabaseInvalid, match="broken"):
        StatsDB(tmp_path, "broken")
    other = next((tmp_path / "runs").glob("tiny-*/run.json"))
    (tmp_path / "runs" / "broken" / "run.json").write_text(other.read_text())
    with StatsDB(tmp_path, "all") as db:
        assert "tells of run tiny-" in db.notes[1], "another run's manifest is not believed"


# Outputs ------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_apply_writes_into_no_folder_but_its_own(world: Path, tmp_path: Path) -> None:
    source = shutil.copytree(world / "tiny", tmp_path / "source")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for out, message in ((source, "holds files that are not an INT8"), (other, "not an INT8"), (notes, "not an INT8")):
        with pytest.raises(OutputRefused, match=message):
            apply(world / "scales.parquet", model=str(source), out=out, db=tmp_path / "db")
    with pytest.raises(OutputRefused, match="is a file; expected a folder"):
        apply(world / "scales.parquet", out=tmp_path / "file", db=tmp_path / "db")
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "empty", tmp_path / "new"):
        apply(world / "scales.parquet", strategy="mse", out=out, db=tmp_path / "db")
        assert sorted(p.name for p in out.iterdir()) == sorted([CONFIG, TENSORS, SCALES, TOKENIZER])
    # What a stopped `apply` leaves is its own, and is no model.
    (tmp_path / "new" / CONFIG).write_text(
        json.dumps({"format_version": 1, "family": "quamba1-w8a8", "unfinished": True})
    )
    with pytest.raises(CheckpointInvalid, match="is unfinished: `apply` was stopped"):
        load_stored(tmp_path / "new")
    apply(world / "scales.parquet", strategy="mse", out=tmp_path / "new", db=tmp_path / "db")
    assert load_stored(tmp_path / "new").about["strategy"] == "mse"


def test_no_other_output_takes_a_foreign_file(world: Path, tmp_path: Path) -> None:
    def ask(name: str, *arguments: str | Path) -> tuple[int, str]:
        done = CliRunner().invoke(load_command(name), [str(a) for a in arguments], catch_exceptions=False)
        return done.exit_code, done.stderr

    commands = [
        ("analyze", "--db", world / "db", "--strategy", "absmax", "--out"),
        ("compare", "--db", world / "db", "--strategy", "absmax", "--picture"),
        ("apply", "--scales", world / "scales.parquet", "--strategy", "absmax", "--export"),
        ("stats", "--db", world / "db", "--out"),
    ]
    for name, *arguments in commands:
        path = tmp_path / f"{name}.png"
        path.write_bytes(b"mine")
        code, err = ask(name, *arguments, path)
        assert code == 1 and f"{name}.png exists already" in err and "--force" in err, err
        assert path.read_bytes() == b"mine"
        assert ask(name, *arguments, path, "--force")[0] == 0 and path.read_bytes() != b"mine"
        code, err = ask(name, *arguments, path)
        assert (code == 0) == (name != "stats"), "a file of one's own is replaced where it can be told"
        code, err = ask(name, *arguments, tmp_path)
        assert code in (1, 2) and ("is a folder" in err or "is a directory" in err)
    sink = tmp_path / "pipe"
    os.mkfifo(sink)
    with subprocess.Popen(["cat", sink], stdout=subprocess.PIPE) as reader:
        assert ask("analyze", "--db", world / "db", "--strategy", "absmax", "--out", sink)[0] == 0
        table, _ = reader.communicate(timeout=30)
    assert pq.read_table(pa.BufferReader(table)).num_rows and sink.is_fifo()


def test_an_export_is_the_same_bytes_each_time(world: Path, tmp_path: Path) -> None:
    from quambase.apply.upstream.act_scales import export_act_scales

    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for path in paths:
        export_act_scales(world / "scales.parquet", path, strategy="absmax")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert "act_scales" in torch.load(paths[0], weights_only=True)


# Edited tables ------------------------------------------------------------------------------------


def test_a_table_that_another_tool_wrote_finds_its_origin_in_the_database(world: Path, tmp_path: Path) -> None:
    plain = pq.read_table(world / "scales.parquet").replace_schema_metadata(None)
    pq.write_table(plain, tmp_path / "edited.parquet")
    with pytest.raises(ScalesInvalid, match=r"names no origin, .* `quambase adopt .*edited\.parquet` checks it"):
        apply(tmp_path / "edited.parquet", strategy="mse", db=world / "db")
    adopt(tmp_path / "edited.parquet", world / "db", out=tmp_path / "adopted.parquet")
    applied = apply(tmp_path / "adopted.parquet", strategy="mse", db=world / "db", out=tmp_path / "m")
    run = pq.read_table(world / "scales.parquet")["run"][0].as_py()
    assert applied.notes == [f"scales of run {run}", "the scale table was edited: adopted from edited.parquet"]
    assert (tmp_path / "m" / TENSORS).read_bytes() == (
        apply(world / "scales.parquet", strategy="mse", db=tmp_path / "db", out=tmp_path / "n").folder / TENSORS
    ).read_bytes()


@pytest.mark.parametrize("order", [1, -1])
def test_two_rows_for_one_scale_are_refused_in_either_order(world: Path, tmp_path: Path, order: int) -> None:
    table = pq.read_table(world / "scales.parquet")
    mine = table.filter((pa.compute.field("label") == "mse") & (pa.compute.field("site") == "x_conv_out:input"))
    mine = mine if mine.num_rows else table.filter(pa.compute.field("label") == "mse")
    row = mine.slice(0, 1)
    doubled = row.set_column(row.schema.get_field_index("scale"), "scale", pa.array([9.0], pa.float32()))
    joined = pa.concat_tables([doubled, table][::order])
    write_scales(tmp_path / "double.parquet", joined, read_scales(world / "scales.parquet").provenance)
    with pytest.raises(ScalesInvalid, match=r"has 2 rows of mse for one scale, that of layer 0 "):
        read_scales(tmp_path / "double.parquet")
    with pytest.raises(ScalesInvalid, match=r"has 2 rows of mse for one scale, that of layer 0 .*; mend the table"):
        adopt(tmp_path / "double.parquet", world / "db")


def test_last_txt_of_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / LAST).write_bytes(b"\xff\xfe\n")
    with pytest.raises(CheckpointInvalid, match="holds no INT8 model"):
        load_stored(last_applied(tmp_path))
