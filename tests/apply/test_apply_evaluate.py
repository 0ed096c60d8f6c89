# mypy: disable-error-code="func-returns-value"
"""apply and evaluate end to end on a tiny model: the stored bits, resuming, what is refused."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_int8 import CONFIG, absmax_scales, documents, tiny_weights

from quambase.apply.apply import apply
from quambase.apply.evaluation import block_scorer
from quambase.apply.evaluation import evaluate as evaluating
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.evaluation.stored import find_evaluation, list_evaluations
from quambase.apply.evaluation.tasks import TaskData
from quambase.apply.int8.build import build
from quambase.apply.int8.model_folder import load_stored, save_model
from quambase.cli.apply import apply as apply_command
from quambase.cli.evaluate import evaluate as evaluate_command
from quambase.cli.main import load_command
from quambase.cli.results import results as results_command
from quambase.model.checkpoint import load_model
from quambase.model.cuda.compiler import CompilationFailed
from quambase.model.inputs.names import SAMPLE_AUTHORS
from quambase.model.inputs.text import read_documents
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare
from quambase.model.weights import tensors_of
from quambase.schema.checksums import file_sha256
from quambase.schema.errors import CheckpointInvalid, DatabaseInvalid, DataInvalid, RunBusy, ScalesInvalid, UnknownName
from quambase.schema.scale_table import METADATA_KEY, write_scales
from quambase.schema.sites import MAMBA1, find_site
from quambase.schema.stored.int8_models import CONFIG as CONFIG_FILE
from quambase.schema.stored.int8_models import TENSORS, last_applied
from quambase.schema.stored.manifest import Manifest, TableFile
from quambase.schema.stored.model_info import ModelInfo, TextInfo
from quambase.schema.tables import DOCUMENTS, RESULTS, SCALES, write_table

WORDS = [f"w{i}" for i in range(CONFIG.vocab_size)]


def scale_rows(
    scales: dict[tuple[int, str], float], label: str, selected: bool = False, family: Any = MAMBA1
) -> list[dict]:
    blank = dict.fromkeys(SCALES.names, 0) | {
        "run": "run-a",
        "group_name": "all",
        "strategy": label,
        "params": "{}",
        "label": label,
        "granularity": "tensor",
        "component_scales": None,
        "needs_decode": False,
        "clip_safe": True,
        "selected": selected,
    }
    return [
        blank
        | {"layer": layer, "site": site, "scale": scale, "amax": 127 * scale}
        | {name: getattr(find_site(site, family), name) for name in ("consumed", "decode_only")}
        for (layer, site), scale in scales.items()
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a checkpoint, a scale table of four strategies and an evaluation text."""
    root = tmp_path_factory.mktemp("world")
    weights = tiny_weights()
    folder = root / "tiny"
    folder.mkdir()
    save_file({k: v.clone().contiguous() for k, v in tensors_of(weights).items()}, folder / "model.safetensors")
    ssm = {"layer": "Mamba1", "d_state": CONFIG.d_state, "dt_rank": CONFIG.dt_rank}
    raw = {"d_model": CONFIG.d_model, "n_layer": CONFIG.n_layer, "vocab_size": CONFIG.vocab_size, "ssm_cfg": ssm}
    (folder / "config.json").write_text(json.dumps(raw))
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.save(str(folder / "tokenizer.json"))

    loaded = load_model(str(folder))
    base = absmax_scales(prepare(weights), documents(1))
    rows = scale_rows(base, "absmax")
    rows += scale_rows({k: v * (0.5 if k[1] == "x_proj:input" else 1) for k, v in base.items()}, "quamba", True)
    rows += scale_rows({k: v * 0.6 for k, v in base.items()}, "tight")
    rows += scale_rows({k: v for k, v in base.items() if k[1] == "x_proj:input"}, "partial")
    model = {"name": "tiny", "path": str(folder), "family": "mamba1", "n_layer": CONFIG.n_layer}
    run = {"model": model, "identity": {"weights_sha256": loaded.weights_sha256}, "data": {}}
    provenance = {"format_version": 1, "quambase": "0", "granularity": "tensor", "runs": {"run-a": run}}
    write_scales(root / "scales.parquet", pa.Table.from_pylist(rows, SCALES), provenance)
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, length)) for length in (30, 0, 12, 1, 50, 8, 21, 9, 17, 33, 26, 14)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


def test_a_stored_model_gives_the_same_bits(world: Any, tmp_path: Path) -> None:
    applied = apply(world / "scales.parquet", strategy="tight", db=tmp_path)
    assert applied.folder.parent == tmp_path / "models" and applied.strategy == "tight"
    stored = load_stored(applied.folder)
    base = absmax_scales(prepare(tiny_weights()), documents(1))
    built = build(prepare(tiny_weights()), {k: float(np.float32(v * 0.6)) for k, v in base.items()})
    batch = Batch.pack(documents(2))
    assert torch.equal(stored.model.logits(stored.model.hidden(batch)), built.logits(built.hidden(batch)))
    tokens = torch.tensor([1, 2, 3, 4])
    (_, a), (_, b) = stored.model.prefill(batch), built.prefill(batch)
    assert torch.equal(stored.model.step(tokens, a), built.step(tokens, b))
    tensors = load_file(applied.folder / TENSORS)
    assert tensors["layers.0.in_proj"].dtype == torch.int8
    assert (applied.folder / "tokenizer.json").read_bytes() == (world / "tiny" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("compat", [None, "upstream"])
def test_quantized_head_and_embedding_survive_storing(world: Any, tmp_path: Path, compat: str | None) -> None:
    prepared = prepare(tiny_weights())
    model = build(
        prepared, absmax_scales(prepared, documents(1)), quantize_lm_head=True, quantize_embedding=True, compat=compat
    )
    about = {"source": {"name": "tiny", "path": "tiny"}, "strategy": "absmax", "weights_sha256": ""}
    save_model(tmp_path / "m", model, about)
    stored = load_stored(tmp_path / "m").model
    batch = Batch.pack(documents(2))
    assert torch.equal(stored.logits(stored.hidden(batch)), model.logits(model.hidden(batch)))
    assert stored.compat == compat and stored.quantized_lm_head


def test_a_strategy_at_some_sites_only(world: Any, tmp_path: Path) -> None:
    mixed = load_stored(
        apply(world / "scales.parquet", strategy="tight", at=["x_proj:input"], db=tmp_path).folder
    ).model
    quamba = load_stored(apply(world / "scales.parquet", strategy="quamba", db=tmp_path).folder).model
    tight = load_stored(apply(world / "scales.parquet", strategy="tight", db=tmp_path).folder).model
    for key, scale in mixed.scales.items():
        assert scale == (tight if key[1] == "x_proj:input" else quamba).scales[key]
    selected = load_stored(apply(world / "scales.parquet", db=tmp_path).folder).model
    assert selected.scales == quamba.scales
    # The last applied model is what `evaluate` takes.
    assert load_stored(last_applied(tmp_path)).model.scales == quamba.scales


def test_apply_refuses(world: Any, tmp_path: Path) -> None:
    table = world / "scales.parquet"
    with pytest.raises(UnknownName, match="did you mean tight"):
        apply(table, strategy="tigth", db=tmp_path)
    with pytest.raises(UnknownName, match="x_proj:input"):
        apply(table, strategy="tight", at=["x_proj:inptu"], db=tmp_path)
    with pytest.raises(ScalesInvalid, match=r"no scale for layer 0 in_proj:input \(12 of 14 missing"):
        apply(table, strategy="partial", db=tmp_path)
    with pytest.raises(ScalesInvalid, match="no scale for layer 0 in_proj:input"):
        apply(table, strategy="partial", at=["in_proj:input"], db=tmp_path)  # not silently quamba's
    with pytest.raises(ScalesInvalid, match="belongs to model tiny"):
        apply(table, model="mamba-5m", db=tmp_path)
    assert not list(tmp_path.glob("models/*"))


def test_a_table_of_a_tensor_is_refused(world: Any, tmp_path: Path) -> None:
    origin = pq.read_table(world / "scales.parquet")
    provenance = json.loads(origin.schema.metadata[b"quambase"])
    provenance["runs"]["run-a"]["model"]["family"] = "tensor"
    write_scales(tmp_path / "t.parquet", origin, provenance)
    with pytest.raises(ScalesInvalid, match="no Mamba model"):
        apply(tmp_path / "t.parquet", db=tmp_path, model=str(world / "tiny"))


def test_a_damaged_model_folder_is_refused(world: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="no model was applied"):
        last_applied(tmp_path)
    folder = apply(world / "scales.parquet", db=tmp_path).folder
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointInvalid, match="altered"):
        load_stored(folder)
    (folder / TENSORS).write_bytes(content[:100])
    with pytest.raises(CheckpointInvalid, match="altered or cut short"):
        load_stored(folder)
    (folder / CONFIG_FILE).write_text('{"family": "mamba"}')
    with pytest.raises(CheckpointInvalid, match="is no INT8 model of quambase"):
        load_stored(folder)
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(CheckpointInvalid, match="no INT8 model"):
        load_stored(folder)


def run(world: Any, db: Any, device: torch.device = "cpu", **settings: Any) -> Any:
    texts = [str(world / "text.jsonl")]
    return evaluate(scales=world / "scales.parquet", data=texts, window=16, db=db, device=device, **settings)


def test_evaluate_all_strategies(world: Any, tmp_path: Path) -> None:
    found = run(world, tmp_path)
    assert found.results.schema.names == RESULTS.names
    rows = found.results.to_pylist()
    assert {row["strategy"] for row in rows} == {"float", "absmax", "quamba", "tight", "selected"}
    ten = [i for i in range(12) if i not in (1, 3)]
    for task in ("perplexity", "last-word"):
        for label in ("float", "tight"):
            own = [row for row in rows if (row["task"], row["strategy"]) == (task, label)]
            assert [row["document"] for row in own] == ten
            assert all((row["correct"] is None) == (task == "perplexity") for row in own)
    # 50 tokens in windows of 16: 15 + 15 + 15 + 1 predictions.
    assert next(row["tokens"] for row in rows if row["document"] == 4) == 46
    kl = {
        s: sum(r["kl"] for r in rows if r["strategy"] == s) for s in ("float", "absmax", "quamba", "tight", "selected")
    }
    assert 0 == kl["float"] < kl["absmax"] < kl["tight"]
    assert kl["selected"] == kl["quamba"]
    assert sorted(path.name for path in found.folder.iterdir()) == ["evaluation.json", "results.parquet"]
    assert any("partial" in note for note in found.notes)
    assert any("2 documents without a target" in note for note in found.notes)


class Killed(Exception):
    pass


def test_a_killed_evaluation_resumes_to_the_same_rows(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(evaluating.BLOCK_TOKENS, "cpu", 40)
    whole = run(world, tmp_path / "a", strategies=["tight"], task="perplexity")
    assert run(world, tmp_path / "a", strategies=["tight"], task="perplexity").results.equals(whole.results)
    scored = []
    original = block_scorer.score

    def dies(*arguments: Any) -> Any:
        if len(scored) == 2:
            raise Killed
        scored.append(1)
        return original(*arguments)

    monkeypatch.setattr(block_scorer, "score", dies)
    with pytest.raises(Killed):
        run(world, tmp_path / "b", strategies=["tight"], task="perplexity")
    with pytest.raises(DatabaseInvalid, match="no finished evaluation"):
        find_evaluation(tmp_path / "b")
    left = []
    monkeypatch.setattr(block_scorer, "score", lambda *arguments: left.append(1) or original(*arguments))
    resumed = run(world, tmp_path / "b", strategies=["tight"], task="perplexity")
    assert resumed.id == whole.id and resumed.results.equals(whole.results)
    assert len(left) >= 2 and len(left) == whole_blocks(whole) - 2


def whole_blocks(evaluation: Any) -> int:
    """Blocks of about 40 tokens of the documents with a target, counted by hand from their lengths."""
    lengths, blocks, total = (30, 12, 50, 8, 21, 9, 17, 33, 26, 14), 0, 0
    for length in lengths:
        # In windows of 16; a last window of one token is dropped.
        total += length - (length % 16 == 1)
        if total >= 40:
            blocks, total = blocks + 1, 0
    return blocks + (total > 0)


def test_two_processes_on_one_evaluation(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = block_scorer.score

    def second_process(*arguments: Any) -> Any:
        with pytest.raises(RunBusy, match="another process"):
            run(world, tmp_path, strategies=["tight"])
        return original(*arguments)

    monkeypatch.setattr(block_scorer, "score", second_process)
    run(world, tmp_path, strategies=["tight"])


def test_where_the_int8_kernels_do_not_compile(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`auto` says so and takes the CPU, with the CPU's results; asked for CUDA, evaluation stops with what to do."""

    def refuses(models: Any, device: torch.device) -> None:
        raise CompilationFailed("gemm.cu does not compile: error: needs compute capability 8.0")

    wanted = run(world, tmp_path, strategies=["tight"], task="perplexity", device="cpu")
    monkeypatch.setattr(evaluating, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(block_scorer, "int8_on_cuda", refuses)
    found = run(world, tmp_path, strategies=["tight"], task="perplexity", device="auto")
    assert found.id == wanted.id and found.about["device"] == "cpu"
    assert capsys.readouterr().err == (
        "warning: evaluating on the CPU: gemm.cu does not compile: error: needs compute capability 8.0\n"
    )
    with pytest.raises(DataInvalid, match=r"compute capability 8\.0; say --device cpu$"):
        run(world, tmp_path, strategies=["tight"], task="perplexity", device="cuda")


def test_a_device_without_enough_memory(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation")

    monkeypatch.setattr(block_scorer, "score", too_much)
    with pytest.raises(DataInvalid, match=r"\(CUDA out of memory\. Tried .* GiB\.\); say --device cpu$"):
        run(world, tmp_path, strategies=["tight"], task="perplexity")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_cannot_be_asked_for(world: Any, tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="finds no CUDA device here; leave out --device, or use cpu"):
        run(world, tmp_path, strategies=["tight"], device="cuda")


def test_documents_of_the_calibration_run_are_warned_of(world: Any, tmp_path: Path) -> None:
    hashes = [document.sha256 for document in read_documents(str(world / "text.jsonl"))]
    rows = [dict.fromkeys(DOCUMENTS.names) | {"run": "run-a", "layer": 0, "site": "s", "group_name": "all", "sha256": h}
            for h in (hashes[0], hashes[1], hashes[4], hashes[4])]  # fmt: skip
    folder = tmp_path / "runs" / "run-a"
    tables = {}
    for i, mine in enumerate((rows[:3], rows[3:])):
        path = folder / "documents" / f"block-{i:05d}.parquet"
        write_table(path, "documents", pa.Table.from_pylist(mine, DOCUMENTS), DOCUMENTS)
        tables[f"documents/{path.name}"] = TableFile(len(mine), file_sha256(path))
    Manifest("run-a", {}, ModelInfo("m", "mamba1"), TextInfo("t", 5, 5), tables, []).save(folder)
    found = run(world, tmp_path, strategies=["tight"], task="perplexity")
    assert any("2 of 10 documents were in the calibration run" in note for note in found.notes)
    assert found.about["tasks"][0]["in_calibration_run"] == 2


def test_evaluating_an_applied_model_compares_with_quamba(world: Any, tmp_path: Path) -> None:
    apply(world / "scales.parquet", strategy="tight", db=tmp_path)
    found = evaluate(data=[str(world / "text.jsonl")], window=16, db=tmp_path, task="perplexity", device="cpu")
    every = run(world, tmp_path, task="perplexity").results
    for label in ("float", "tight", "quamba"):
        here, there = (
            [row["nll"] for row in table.to_pylist() if row["strategy"] == label] for table in (found.results, every)
        )
        assert here == there
    listed, notes = list_evaluations(tmp_path)
    assert not notes
    assert listed["evaluation"].to_pylist()[0] == found.id and listed.num_rows == 2
    assert find_evaluation(tmp_path, found.id[:8]).results.equals(found.results)
    with pytest.raises(UnknownName):
        find_evaluation(tmp_path, "zzz")


def test_evaluate_refuses(world: Any, tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="no evaluation text for tiny"):
        evaluate(scales=world / "scales.parquet", db=tmp_path)
    (tmp_path / "one.jsonl").write_text('{"text": "w1"}\n{"text": ""}\n')
    with pytest.raises(DataInvalid, match="none of its 2 documents has a target"):
        evaluate(scales=world / "scales.parquet", data=[str(tmp_path / "one.jsonl")], db=tmp_path)


def invoke(command: Any, *arguments: Any) -> Any:
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_commands(world: Any, tmp_path: Path) -> None:
    db, table = tmp_path / "db", world / "scales.parquet"
    code, out, err = invoke(
        *(apply_command, "--scales", table, "--strategy", "tight", "--db", db),
        *("--at", "x_proj:input", "--at", "in_proj:input"),
    )
    assert (code, out.strip()) == (0, str(last_applied(db))) and "tight@x_proj:input,in_proj:input/quamba" in err
    options = ("--data", world / "text.jsonl", "--db", db, "--bootstrap", 100, "--window", 16)
    code, out, err = invoke(evaluate_command, *options)
    assert code == 0 and re.search(r"KL x1000.*perplexity", out) and "to quamba" in out and "tight@" in out
    assert "stored" in err and "stored" not in out
    code, again, _ = invoke(results_command, "--db", db, "--bootstrap", 100)
    assert (code, again) == (0, out)
    code, out, _ = invoke(
        evaluate_command,
        *("--scales", table, "--strategy", "tight", "--strategy", "quamba"),
        *options,
        *("--format", "json"),
    )
    rows = json.loads(out)
    assert [row["strategy"] for row in rows] == ["float", "tight", "quamba"] * 2
    assert rows[1]["vs_quamba_low"] <= rows[1]["vs_quamba"] <= rows[1]["vs_quamba_high"]


@pytest.mark.parametrize(
    ("command", "option", "hint"),
    [
        ("evaluate", ("--strategy", "mse,quamba"), "--strategy mse --strategy quamba"),
        ("evaluate", ("--strategy", "percentile:0.99,percentile:0.999"), "--strategy percentile:0.99 --strategy per"),
        ("evaluate", ("--strategy", "outlier_aware:0.95,120,mse"), "--strategy outlier_aware:0.95,120 --strategy mse"),
        ("analyze", ("--strategy", "mse, quamba"), "--strategy mse --strategy quamba"),
        ("compare", ("--strategy", "mse,quamba"), "--strategy mse --strategy quamba"),
        ("apply", ("--at", "x_proj:input,in_proj:input"), "--at x_proj:input --at in_proj:input"),
        ("collect", ("--model", "mamba-5m", "--site", "x_proj:input,in_proj:input"), "--site x_proj:input --site in_"),
    ],
)
def test_a_list_in_one_option_is_refused_with_the_right_form(command: str, option: Any, hint: str) -> None:
    code, _, err = invoke(load_command(command), *option)
    assert code == 2 and f"is a list; give the option once for each: {hint}" in " ".join(err.split())


def test_a_label_with_a_comma_reaches_the_evaluation(world: Any, tmp_path: Path) -> None:
    """`outlier_aware:0.95,120` is one label; without --scales the table in the folder is taken, never ignored."""
    label = "outlier_aware:0.95,120"
    table = pq.read_table(world / "scales.parquet")
    names = pa.array([label if name == "tight" else name for name in table["label"].to_pylist()], pa.string())
    (tmp_path / "here").mkdir()
    renamed = table.set_column(table.schema.get_field_index("label"), "label", names)
    write_scales(tmp_path / "here" / "scales.parquet", renamed, json.loads(table.schema.metadata[METADATA_KEY]))
    options = ("--data", str(world / "text.jsonl"), "--task", "perplexity", "--format", "json")
    with contextlib.chdir(tmp_path / "here"):
        apply("scales.parquet", strategy="absmax")
        code, out, err = invoke(evaluate_command, "--strategy", label, "--strategy", "quamba", *options)
        assert code == 0, err
        assert [row["strategy"] for row in json.loads(out)] == ["float", label, "quamba"]
        assert invoke(evaluate_command, last_applied(Path("quambase-db")), "--strategy", "mse")[0] == 2
        (tmp_path / "here" / "scales.parquet").unlink()
        code, _, err = invoke(evaluate_command, "--strategy", "all", *options)
        assert code == 1 and "scales.parquet does not exist; run `analyze`" in err


def test_upstreams_wrapping_is_warned_of(world: Any, tmp_path: Path) -> None:
    origin = pq.read_table(world / "scales.parquet")
    rows = zip(origin["amax"].to_pylist(), origin["site"].to_pylist(), strict=True)
    amax = [1e6 if site == "out_proj:input" else value for value, site in rows]
    table = origin.set_column(origin.schema.get_field_index("amax"), "amax", pa.array(amax, pa.float32()))
    write_scales(tmp_path / "clip.parquet", table, json.loads(origin.schema.metadata[b"quambase"]))
    code, _, err = invoke(
        apply_command, "--scales", tmp_path / "clip.parquet", "--compat", "upstream", "--db", tmp_path
    )
    assert code == 0 and "2 scales clip where upstream's kernel wraps" in err
    code, _, err = invoke(apply_command, "--scales", tmp_path / "clip.parquet", "--db", tmp_path)
    assert code == 0 and "wraps" not in err


def test_errors_are_one_line(world: Any, tmp_path: Path) -> None:
    code, out, err = invoke(apply_command, "--scales", tmp_path / "none.parquet", "--db", tmp_path)
    assert (code, out) == (1, "") and err.startswith("error: ") and len(err.splitlines()) == 1
    code, _, err = invoke(evaluate_command, "--db", tmp_path)
    assert code == 1 and "run `apply`" in err
    code, _, err = invoke(results_command, "--db", tmp_path)
    assert code == 1 and "run `evaluate`" in err
    code, _, _ = invoke(evaluate_command, tmp_path, "--scales", world / "scales.parquet")
    assert code == 2


def test_notes_say_who_wrote_a_bundled_text() -> None:
    of = lambda name, model: list(TaskData("perplexity", name, [], 0, None).notes(model))  # noqa: E731
    for author in SAMPLE_AUTHORS:
        assert of("sample:evaluation", author) == [
            f"sample:evaluation was written by {' and '.join(SAMPLE_AUTHORS)}: perplexity there is low by construction"
        ]
    assert "no measure of tiny on real text" in of("sample:evaluation", "tiny")[0]
    assert of("python-docs:evaluation", SAMPLE_AUTHORS[0]) == []
