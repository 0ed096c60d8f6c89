"""Runs of a tiny model: what is in them, that they resume to the same bytes, what bad input prints."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
import torch
from click.testing import CliRunner
from interrupting import interrupted
from safetensors.torch import save_file
from stored_runs import bytes_of, stored_table, table_files
from tiny_model import TEXTS, write_texts, write_tiny_model

from quambase.cli.main import quambase
from quambase.collector.collect import CollectedRun, collect, parse_keep
from quambase.collector.import_tensor import import_tensor
from quambase.collector.tables.run_folder import BLOCK_TABLES
from quambase.model.checkpoint import load_model
from quambase.model.hadamard import hadamard
from quambase.model.prepare import prepare
from quambase.schema.errors import DatabaseInvalid, DataInvalid, RunBusy, TapNeverFired, TensorFileInvalid, UnknownName
from quambase.schema.sites import layer_sites
from quambase.schema.stored.runs import list_runs
from quambase.schema.tables import RUN_TABLES
from quambase.schema.values.distribution import Distribution


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts.jsonl")


def run_tiny(model: Path, data: Path, db: Path, **options: object) -> CollectedRun:
    settings = {"samples": 9, "seq_len": 32, "batch_size": 4, "progress": False} | options
    return collect(str(model), data=str(data), db=db, **settings)


@pytest.fixture(scope="module")
def kept(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> CollectedRun:
    """A run of which every token's activations are kept, and the counts of each block and each bucket of positions."""
    options = {"keep_tokens": "all", "by_block": True, "by_position": True}
    return run_tiny(model, data, tmp_path_factory.mktemp("kept"), **options)


def table(run: CollectedRun, name: str) -> pa.Table:
    return stored_table(run.folder, name)


def rows(run: CollectedRun, name: str, layer: int, site: str, group: str | None = None) -> pa.Table:
    found = table(run, name)
    mask = [
        found["layer"][i].as_py() == layer
        and found["site"][i].as_py() == site
        and (group is None or found["group_name"][i].as_py() == group)
        for i in range(found.num_rows)
    ]
    return found.filter(pa.array(mask))


def test_manifest_describes_the_documents(kept: CollectedRun) -> None:
    data = kept.manifest.data
    assert (data.read, data.documents, data.empty, data.truncated) == (9, 7, 2, 3)
    assert data.tokens == sum(min(32, len(text.split())) for text in TEXTS)
    assert kept.manifest.sites == [(layer, site.name) for layer, site in layer_sites(2)]
    kept.manifest.verify(kept.folder)
    single = ["channels", "groups", "outliers", "position_channels", "position_stats", "site_stats"]
    empty = ["second_moments", "sensitivities"]
    folders = ["activations", "block_counts", "counts", "documents", "position_counts", *empty]
    assert sorted([*single, *folders]) == sorted(RUN_TABLES)
    names = [*folders, *(f"{name}.parquet" for name in single), "run.json"]
    assert sorted(p.name for p in kept.folder.iterdir()) == sorted(names)
    assert bytes_of(kept.folder) == {file: entry.sha256 for file, entry in kept.manifest.tables.items()}
    blocks = [f"block-0000{block}.parquet" for block in range(3)]
    for name, files in dict.fromkeys(BLOCK_TABLES, blocks).items():
        assert [path.name for path in table_files(kept.folder, name)] == files
        assert kept.manifest.files_of(name) == [f"{name}/{file}" for file in files]
    for name in RUN_TABLES:
        rows = [kept.manifest.tables[file].rows for file in kept.manifest.files_of(name)]
        assert sum(rows) == table(kept, name).num_rows and (min(rows) > 0 or name in empty)


def test_recounting_the_kept_activations_gives_the_counts(kept: CollectedRun) -> None:
    activations = table(kept, "activations").to_pylist()
    tally: dict[tuple, list] = {}
    for row in activations:
        tally.setdefault((row["layer"], row["site"], row["group_name"]), []).append(row["values"])
    stored: dict[tuple, list] = {}
    for row in table(kept, "counts").to_pylist():
        stored.setdefault((row["layer"], row["site"], row["group_name"]), []).append((row["value"], row["count"]))
    assert tally.keys() == stored.keys()
    assert len({(layer, site) for layer, site, _ in stored}) == 22
    for key, values in tally.items():
        found = Distribution.of_values(np.concatenate([np.array(v, np.float32) for v in values]))
        assert list(zip(found.values.tolist(), found.counts.tolist(), strict=True)) == stored[key], key


def test_each_blocks_counts_are_those_of_its_documents(kept: CollectedRun) -> None:
    tally: dict[tuple, list] = {}
    for row in table(kept, "activations").to_pylist():
        key = (row["document"] // 4, row["layer"], row["site"], row["group_name"])
        tally.setdefault(key, []).append(np.array(row["values"], np.float32))
    stored: dict[tuple, list] = {}
    for row in table(kept, "block_counts").to_pylist():
        key = (row["block"], row["layer"], row["site"], row["group_name"])
        stored.setdefault(key, []).append((row["value"], row["count"]))
    assert tally.keys() == stored.keys() and len(tally) == 3 * 28
    for key, values in tally.items():
        found = Distribution.of_values(np.concatenate(values))
        assert list(zip(found.values.tolist(), found.counts.tolist(), strict=True)) == stored[key], key
    files = [pq.read_table(path, partitioning=None) for path in table_files(kept.folder, "block_counts")]
    assert [set(file["block"].to_pylist()) for file in files] == [{0}, {1}, {2}]


DIVIDED = {"block_counts", "position_counts", "position_stats", "position_channels"}


def test_divided_counts_change_no_other_table(kept: CollectedRun, model: Path, data: Path, tmp_path: Path) -> None:
    plain = run_tiny(model, data, tmp_path, keep_tokens="all")
    assert plain.manifest.run != kept.manifest.run and not any(table(plain, name).num_rows for name in DIVIDED)
    for name in set(RUN_TABLES) - DIVIDED:
        assert table(plain, name).drop("run").equals(table(kept, name).drop("run")), name


def test_values_are_the_prepared_models_one_document_at_a_time(kept: CollectedRun, model: Path, data: Path) -> None:
    """Documents that share a forward pass and documents alone, in float64: padding and neighbours leave no trace."""
    loaded = load_model(str(model))
    weights = prepare(loaded.any_weights)
    matrix = hadamard(torch.eye(32)).numpy().astype(np.float64).T
    activations = table(kept, "activations").to_pylist()
    found: dict[tuple, dict] = {}
    for row in activations:
        key = (row["document"], f"{row['layer']}/{row['site']}", row["group_name"])
        found.setdefault(key, {})[row["position"]] = row["values"]
    slices = {"x": slice(0, 32), "z": slice(32, 64), "dt": slice(0, 1), "B": slice(1, 5), "C": slice(5, 9)}
    checked = 0
    for index, text in enumerate(TEXTS):
        tokens = loaded.tokenizer.encode(text)[:32]
        if not tokens:
            assert not any(key[0] == index for key in found)
            continue
        sites = reference.forward(weights, tokens, matrix)
        for name, true in sites.items():
            for group in {key[2] for key in found if key[0] == index and key[1] == name}:
                places = found[index, name, group]
                if "ssm_state" in name:
                    assert list(places) == [len(tokens) - 1], "one state, of the document's own last token"
                    ours, wanted = np.array(places[len(tokens) - 1]), true.reshape(-1)
                else:
                    assert sorted(places) == list(range(len(tokens)))
                    ours = np.array([places[i] for i in range(len(tokens))])
                    wanted = true[:, slices.get(group, slice(None))]
                # Two small float32 layers: some hundred ulps of the site's range.
                assert np.abs(ours - wanted).max() <= 300 * 2.0**-24 * max(1, np.abs(wanted).max())
                checked += 1
    assert checked == 7 * (2 * 13 + 2)


def test_documents_hold_each_documents_own_quantiles(kept: CollectedRun) -> None:
    activations = {
        (r["layer"], r["site"], r["group_name"], r["document"], r["position"]): r["values"]
        for r in table(kept, "activations").to_pylist()
    }
    documents = table(kept, "documents").to_pylist()
    assert len(documents) == 7 * (2 * (10 + 5) + 2)  # two divided sites of 2 and 3 groups add 5 rows
    for row in documents:
        groups = {"in_proj:output": ["x", "z"], "x_proj:output": ["dt", "B", "C"]}.get(row["site"], ["all"])
        parts = groups if row["group_name"] == "all" else [row["group_name"]]
        values = np.concatenate(
            [
                np.array(v, np.float32)
                for (layer, site, group, document, _), v in activations.items()
                if (layer, site, document) == (row["layer"], row["site"], row["document"]) and group in parts
            ]
        )
        magnitudes = torch.from_numpy(values).half().float().abs()
        assert row["amax"] == magnitudes.max().item()
        assert row["q9995"] == torch.quantile(magnitudes, 0.9995).item()
        assert row["q99"] == torch.quantile(magnitudes, 0.99).item()
        assert row["tokens"] == min(32, len(TEXTS[row["document"]].split()))


def test_outliers_name_the_text_that_made_them(kept: CollectedRun, model: Path) -> None:
    tokenizer = load_model(str(model)).tokenizer
    activations = {
        (r["layer"], r["site"], r["group_name"], r["document"], r["position"]): r["values"]
        for r in table(kept, "activations").to_pylist()
    }
    starts = {"z": 32, "B": 1, "C": 5}
    outliers = table(kept, "outliers").to_pylist()
    assert outliers
    for row in outliers:
        tokens = tokenizer.encode(TEXTS[row["document"]])[:32]
        assert row["token_id"] == tokens[row["position"]] and row["token"] == tokenizer.decode([row["token_id"]])
        # Every token of the tiny model is a word.
        words = TEXTS[row["document"]].split()[:32]
        assert row["before"].split() == words[max(0, row["position"] - 8) : row["position"]]
        assert row["after"].split() == words[row["position"] + 1 : row["position"] + 9]
        values = activations[row["layer"], row["site"], row["group_name"], row["document"], row["position"]]
        assert np.float32(np.float16(values[row["channel"] - starts.get(row["group_name"], 0)])) == row["value"]
    best = rows(kept, "outliers", 1, "out_proj:input")["value"].to_numpy()
    assert (np.diff(np.abs(best)) <= 0).all() and best.size == 64
    assert abs(best[0]) == rows(kept, "site_stats", 1, "out_proj:input")["amax"][0].as_py()


def test_site_stats_follow_from_counts(kept: CollectedRun) -> None:
    counts = rows(kept, "counts", 0, "x_proj:output")
    row = rows(kept, "site_stats", 0, "x_proj:output", "all").to_pylist()[0]
    everything = np.repeat(counts["value"].to_numpy(), counts["count"].to_numpy()).astype(np.float64)
    assert row["count"] == everything.size
    assert row["amax"] == np.abs(everything).max()
    assert row["q9995"] == np.quantile(np.abs(everything), 0.9995)
    assert row["std"] == pytest.approx(everything.std(), rel=1e-12)  # float64 sums in another order
    far = np.abs(everything - everything.mean()) > 3 * everything.std()
    assert row["beyond_3_sigma"] == far.mean()
    assert row["outlier_ratio"] == row["amax"] / row["q9995"]


def test_groups_and_channels_cover_the_site(kept: CollectedRun) -> None:
    assert rows(kept, "groups", 0, "in_proj:output", "z")["channels"][0].as_py() == list(range(32, 64))
    channels = rows(kept, "channels", 0, "in_proj:output")
    assert channels["channel"].to_pylist() == list(range(64))
    assert set(channels["count"].to_pylist()) == {kept.manifest.data.tokens}
    state = rows(kept, "channels", 1, "ssm_state_act:input")
    assert state["channel"].to_pylist() == list(range(4)) and set(state["count"].to_pylist()) == {7 * 32}


def test_a_sample_of_tokens_is_the_same_tokens_whatever_the_block(model: Path, data: Path, tmp_path: Path) -> None:
    places = []
    for block in (2, 4):
        run = run_tiny(model, data, tmp_path, keep_tokens=8, batch_size=block)
        found = rows(run, "activations", 0, "in_proj:input")
        places.append(sorted(zip(found["document"].to_pylist(), found["position"].to_pylist(), strict=True)))
        assert rows(run, "activations", 0, "ssm_state_act:input").num_rows == 8 // 4
    assert places[0] == places[1] and len(places[0]) == 8
    other = rows(run_tiny(model, data, tmp_path, keep_tokens=8, seed=1), "activations", 0, "in_proj:input")
    assert sorted(zip(other["document"].to_pylist(), other["position"].to_pylist(), strict=True)) != places[0]


def test_the_same_command_finds_its_run(model: Path, data: Path, tmp_path: Path) -> None:
    first, again = (run_tiny(model, data, tmp_path) for _ in range(2))
    assert (first.existed, again.existed) == (False, True) and first.folder == again.folder
    assert run_tiny(model, data, tmp_path, seq_len=31).folder != first.folder


def test_only_the_sites_asked_for(model: Path, data: Path, tmp_path: Path) -> None:
    run = run_tiny(model, data, tmp_path, sites=["x_proj:input"])
    assert run.manifest.sites == [(0, "x_proj:input"), (1, "x_proj:input")]
    with pytest.raises(UnknownName, match="did you mean x_proj:input"):
        run_tiny(model, data, tmp_path, sites=["x_proj:inputs"])


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    model: Path, data: Path, tmp_path: Path, after: int, checkpoint_seconds: float
) -> None:
    options = {"by_block": True, "by_position": True, "state_every": 4}
    whole = run_tiny(model, data, tmp_path / "whole", **options)
    with interrupted(after, checkpoint_seconds):
        run_tiny(model, data, tmp_path / "cut", **options)
    folder = next((tmp_path / "cut" / "runs").iterdir())
    assert not (folder / "run.json").exists()
    resumed = run_tiny(model, data, tmp_path / "cut", **options)
    assert resumed.folder.name == whole.folder.name
    assert bytes_of(resumed.folder) == bytes_of(whole.folder)
    assert resumed.manifest.tables == whole.manifest.tables


@pytest.mark.parametrize("name", ["documents", "activations"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_file_of_an_unfinished_run_is_named_with_what_to_do(
    model: Path, data: Path, tmp_path: Path, damage: str, name: str
) -> None:
    with interrupted():
        run_tiny(model, data, tmp_path)
    (path,) = tmp_path.glob(f"runs/*/{name}/block-00000.parquet")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    what = "is missing" if damage == "missing" else "was altered or cut short"
    with pytest.raises(DatabaseInvalid, match=rf"{name}/block-00000.parquet {what}.*remove .*collect again"):
        run_tiny(model, data, tmp_path)


@pytest.mark.parametrize(
    ("name", "call", "before"),
    [
        ("collect.save_checkpoint", 1, False),
        ("run_folder.write_table", 1, False),  # of six files of blocks; their checksums are not known yet
        ("run_folder.write_table", 4, True),
        ("run_folder.write_table", 9, False),  # of the tables made at the end
        ("run_folder.Manifest.save", 1, True),
        ("run_folder.Manifest.save", 1, False),
    ],
)
def test_a_process_killed_in_the_middle_resumes_to_the_same_bytes(
    model: Path, data: Path, tmp_path: Path, name: str, call: int, before: bool
) -> None:
    """Killed before or after the call of a function with that number."""
    whole = run_tiny(model, data, tmp_path / "whole")
    script = (
        "import os, sys; from pathlib import Path\n"
        "from quambase.collector import collect; from quambase.collector.tables import run_folder\n"
        "collect.CHECKPOINT_SECONDS = 0\n"
        f"owner, name = {name.rpartition('.')[0]}, {name.rpartition('.')[2]!r}\n"
        "whole, calls = getattr(owner, name), []\n"
        "def die(*a):\n"
        " calls.append(a)\n"
        " number = len(calls)\n"
        f" if number == {call} and {before}: os.kill(os.getpid(), 9)\n"
        " whole(*a)\n"
        f" if number == {call}: os.kill(os.getpid(), 9)\n"
        "setattr(owner, name, die)\n"
        "collect.collect(sys.argv[1], 9, data=sys.argv[2], db=Path(sys.argv[3]), seq_len=32, batch_size=4, "
        "progress=False)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(model), str(data), str(tmp_path / "cut")], check=False)
    assert killed.returncode == -9
    assert len(list_runs(tmp_path / "cut")[0]) == (name.endswith("save") and not before)
    resumed = run_tiny(model, data, tmp_path / "cut")
    assert bytes_of(resumed.folder) == bytes_of(whole.folder)
    assert sorted(path.name for path in resumed.folder.rglob("*")) == sorted(
        path.name for path in whole.folder.rglob("*")
    )


def test_two_processes_do_not_write_one_run(model: Path, data: Path, tmp_path: Path) -> None:
    folder = run_tiny(model, data, tmp_path).folder
    (folder / "run.json").unlink()
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunBusy, match="another process is writing run tiny-"):
            run_tiny(model, data, tmp_path)


def test_a_tap_that_never_fires_is_an_error(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quambase.model.language_model import LanguageModel

    hidden = LanguageModel.hidden

    def deaf(self: LanguageModel, batch: object, tap: object = None) -> torch.Tensor:
        return hidden(self, batch, lambda layer, site, *rest: site == "dt_proj:output" or tap(layer, site, *rest))

    monkeypatch.setattr(LanguageModel, "hidden", deaf)
    with pytest.raises(TapNeverFired, match="dt_proj:output of layer 0 saw 0 of 3 documents"):
        run_tiny(model, data, tmp_path)


def test_nothing_but_empty_documents(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match=r"holds no document with a token \(2 read\)"):
        run_tiny(model, write_texts(tmp_path / "e.jsonl", ["", ""]), tmp_path)


@pytest.mark.parametrize(("text", "value"), [("all", "all"), ("12", 12), ("0", 0)])
def test_keep_tokens_is_read(text: str, value: object) -> None:
    assert parse_keep(text) == value


def test_keep_tokens_is_refused() -> None:
    with pytest.raises(DataInvalid, match="--keep-tokens is 'some'; expected a number of tokens or the word all"):
        parse_keep("some")


# ---------------------------------------------------------------- imported tensors


def save(path: Path, x: torch.Tensor) -> Path:
    if path.suffix == ".npy":
        np.save(path, x.numpy())
    elif path.suffix == ".safetensors":
        save_file({"x": x}, path)
    else:
        torch.save(x, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_an_imported_tensor_is_counted(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    run = import_tensor(save(tmp_path / f"act{suffix}", x), "mine", layer=2, db=tmp_path)
    found, expected = table(run, "counts"), Distribution.of_values(x.float().half().numpy())
    assert found["value"].to_numpy().tolist() == expected.values.tolist()
    assert found["count"].to_pylist() == expected.counts.tolist()
    assert set(found["layer"].to_pylist()) == {2} and set(found["site"].to_pylist()) == {"mine"}
    assert table(run, "documents")["tokens"].to_pylist() == [50, 50, 50]
    assert import_tensor(tmp_path / f"act{suffix}", "mine", layer=2, db=tmp_path).existed


def test_bfloat16_is_counted_without_loss(tmp_path: Path) -> None:
    x = torch.tensor([[1e30, -1e-30, 1.0078125, 3.0]], dtype=torch.bfloat16)
    run = import_tensor(save(tmp_path / "b.safetensors", x), "mine", db=tmp_path)
    assert table(run, "counts")["value"].to_pylist() == sorted(x.float().flatten().tolist())


def test_overflow_and_nan_are_reported_not_dropped(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, 1e6, float("nan"), float("-inf")]] * 2)
    run = import_tensor(save(tmp_path / "x.pt", x), "mine", db=tmp_path)
    stats = table(run, "site_stats").to_pylist()[0]
    assert (stats["count"], stats["nonfinite"], stats["overflow"]) == (2, 6, 2)
    result = CliRunner().invoke(quambase, ["import", str(tmp_path / "x.pt"), "--site", "mine", "--db", str(tmp_path)])
    assert result.exit_code == 0
    assert "warning: mine of layer 0 holds 6 values that are NaN, infinite or too large" in result.stderr


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this ran",)


def test_files_that_are_not_plain_tensors_are_refused(tmp_path: Path) -> None:
    def message(name: str, tensor: str | None = None) -> str:
        with pytest.raises(TensorFileInvalid) as error:
            import_tensor(tmp_path / name, "mine", tensor=tensor, db=tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    torch.save(Malicious(), tmp_path / "evil.pt")
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    torch.save(torch.arange(3), tmp_path / "int.pt")
    torch.save({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(torch.ones(0, 3), tmp_path / "empty.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    (tmp_path / "a.txt").write_text("x")
    assert "more than tensors" in message("evil.pt")
    assert "cannot be read as a tensor" in message("object.npy")
    assert "holds torch.int64; expected a plain tensor of float16" in message("int.pt")
    assert "holds the tensors a, b; name one with --tensor" in message("two.pt")
    assert "holds the tensors a, b" in message("two.pt", "c")
    assert "holds list" in message("list.pt")
    assert "empty tensor of shape (0, 3)" in message("empty.pt")
    assert "cannot be read (" in message("cut.safetensors")
    assert "unknown kind" in message("a.txt")
    assert "does not exist" in message("missing.pt")
    tables = import_tensor(tmp_path / "two.pt", "mine", tensor="b", db=tmp_path).manifest.tables
    assert tables["counts/part-000.parquet"].rows == 1


# ---------------------------------------------------------------- the command


def test_the_command_reports_what_it_did(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["collect", "--model", str(model), "--data", str(data), "--samples", "9", "--db", str(tmp_path / "db")]
    result = CliRunner().invoke(quambase, arguments)
    assert result.exit_code == 0, result.output
    assert "written: " in result.stderr and "7 documents" in result.stderr and "2 empty" in result.stderr
    lines = result.stderr.splitlines()
    assert result.stdout == "" and lines[-1] == f"next: quambase analyze --db {tmp_path / 'db'}"
    assert any(line.startswith("outliers: mild: ") for line in lines), lines
    assert any(line.startswith("states (act in decoding only): ") for line in lines)
    assert "already there: " in CliRunner().invoke(quambase, arguments).stderr
    manifest = json.loads(next((tmp_path / "db" / "runs").glob("*/run.json")).read_text())
    assert manifest["model"]["name"] == "tiny" and manifest["created"]["observe_seconds"] >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "error: unknown model 'nothing'"),
        (["--model", "mamba-5m", "--data", "nothing.txt"], "error: no file nothing.txt here"),
        (["--model", "mamba-5m", "--site", "x"], "error: unknown site 'x'"),
        (["--model", "mamba-5m", "--keep-tokens", "x"], "error: --keep-tokens is 'x'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(quambase, ["collect", *arguments, "--db", str(tmp_path)])
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith(message)


def test_usage_errors_exit_with_2_and_name_the_nearest_command() -> None:
    assert CliRunner().invoke(quambase, ["collect"]).exit_code == 2
    result = CliRunner().invoke(quambase, ["colect"])
    assert result.exit_code == 2 and "did you mean collect" in result.stderr
