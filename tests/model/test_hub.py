"""Models, tokenizers and data sets by their hub names, through the real client, against a hub on the loopback."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hub_server import Hub, serving
from safetensors.torch import load_file
from stored_runs import stored_table
from tiny_model import TEXTS, write_tiny_model

from quambase.model.checkpoint import load_model
from quambase.schema.errors import ModelNotFound

MODEL = "models/state-spaces/mamba-130m"
CHUNK = 10 << 20
"""What the client writes at a time: less than that is not kept of a connection that ends."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A tiny model under mamba-130m's name, its tokenizer under GPT-NeoX's, texts under the three data sets' names."""
    tiny = write_tiny_model(tmp_path / "tiny")
    weights = io.BytesIO()
    torch.save(load_file(tiny / "model.safetensors"), weights)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    table = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"text": TEXTS}), table)
    big = lines + b"".join(json.dumps({"text": "w1 " * 350_000}).encode() + b"\n" for _ in range(12))
    with serving() as found:
        found.repositories |= {
            MODEL: {"config.json": (tiny / "config.json").read_bytes(), "pytorch_model.bin": weights.getvalue()},
            "models/EleutherAI/gpt-neox-20b": {"tokenizer.json": (tiny / "tokenizer.json").read_bytes(), "x.bin": b"x"},
            "datasets/monology/pile-uncopyrighted": {"val.jsonl.zst": pa.compress(lines, "zstd", asbytes=True)},
            "datasets/Salesforce/wikitext": {"wikitext-2-raw-v1/test-00000-of-00001.parquet": table.getvalue()},
            "datasets/EleutherAI/lambada_openai": {"data/lambada_test_en.jsonl": lines, "big.jsonl": big},
        }
        yield found


@dataclass
class Done:
    code: int
    stderr: str

    @property
    def error(self) -> str:
        """The one line of the error; the client's progress and warnings come before it."""
        assert self.code == 1, self.stderr
        (line,) = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert self.stderr.rstrip().endswith(line) and "Traceback" not in self.stderr
        return line


SCRIPT = """
import json, sys
from click.testing import CliRunner
from quambase.cli.main import quambase
done = [CliRunner().invoke(quambase, ["collect", *command]) for command in json.loads(sys.argv[1])]
print(json.dumps([[d.exit_code, d.stderr + (repr(d.exception) if d.exit_code > 1 else "")] for d in done]))
"""


def collect(hub: Hub, folder: Path, *commands: list[str], **environment: str) -> list[Done]:
    """Run ``collect`` with each command's options in one new process: the client reads its settings on import."""
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "cache"), "NO_PROXY": "127.0.0.1"} | environment
    few = ["--samples", "5", "--site", "x_proj:input", "--db", str(folder / "db")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([[*command, *few] for command in commands])],
        env={key: value for key, value in os.environ.items() if not key.startswith("HF_")} | settings,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The client's warnings go to the process's own stderr.
    return [Done(code, stderr) for code, stderr in json.loads(done.stdout.splitlines()[-1])]


BY_NAME = [["--model", "mamba-130m", "--data", name] for name in ("lambada", "wikitext2")] + [["--model", "mamba-130m"]]


def test_downloaded_once_then_without_a_network(hub: Hub, tmp_path: Path) -> None:
    for done in collect(hub, tmp_path, *BY_NAME):
        assert done.code == 0, done.stderr
    wanted = [path for method, path, _ in hub.requests if method == "GET" and not path.startswith("api/")]
    assert len(wanted) == len(set(wanted)) == 6, "each file once, and only those asked for"
    assert any("val.jsonl.zst" in path for path in wanted), "a hub model's own text is the Pile's"
    hub.requests.clear()
    again = collect(hub, tmp_path, *BY_NAME, HF_HUB_OFFLINE="1")
    assert all(done.code == 0 and "already there" in done.stderr for done in again)
    assert hub.requests == []
    # One run: the three data sets hold the same documents, and only those count.
    (run,) = (tmp_path / "db" / "runs").iterdir()
    assert run.name.startswith("mamba-130m-") and (run / "run.json").exists()


def test_without_a_network_everything_that_is_missing_is_told_at_once(hub: Hub, tmp_path: Path) -> None:
    commands = [["--model", "mamba-130m"], ["--model", "mamba-5m", "--data", "pile-val"]]
    everything = (
        r"3 things are not in the local hub cache \S+/cache/hub and could not be fetched \(%s\): "
        r"the model state-spaces/mamba-130m \(--model FOLDER, with its config.json and weights\), "
        r"tokenizer.json of EleutherAI/gpt-neox-20b \(--tokenizer FILE\), "
        r"hf:monology/pile-uncopyrighted:val.jsonl.zst \(--data FILE\); or download them on a machine with a network "
        r"and pass each by its option. What works without a network: --model mamba-5m, --data python-docs:calibration$"
    )
    text = (
        r"hf:monology/pile-uncopyrighted:val.jsonl.zst is not in the local hub cache \S+ and could not be fetched "
        r"\(%s\); or download .* pass it: --data FILE. What works without a network: --data python-docs:calibration$"
    )
    for settings, reason in (
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set: unset it"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    ):
        model, data = collect(hub, tmp_path, *commands, **settings)
        assert re.search(everything % reason, model.error), model.error
        assert re.search(text % reason, data.error), data.error
    assert hub.requests == [] and not (tmp_path / "db").exists()


def script(folder: Path, *arguments: str, endpoint: str, without: str = "") -> tuple[float, str]:
    """Seconds that ``collect`` took and all it printed, in a process of its own; ``without``: a module that may not be
    imported.
    """
    code = f"import sys; sys.modules[{without!r}] = None\nfrom quambase.cli.main import collect; collect()"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--db", str(folder / "db")],
        env={key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    return time.monotonic() - started, done.stdout + done.stderr


@pytest.mark.parametrize("silent", [False, True])
def test_a_local_model_without_a_text_does_not_wait_for_the_network(tmp_path: Path, silent: bool) -> None:
    """Nothing listens, or what listens never answers: one line, soon, before torch is imported, and none of the hub
    client's own.
    """
    folder = write_tiny_model(tmp_path / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1] if silent else 9
        for model in (str(folder), "mamba-130m"):
            seconds, printed = script(tmp_path, "--model", model, endpoint=f"http://127.0.0.1:{port}", without="torch")
            assert printed.startswith("error: ") and printed.count("\n") == 1, printed
            assert f"http://127.0.0.1:{port} cannot be reached" in printed and "--data FILE" in printed
            server.settimeout(0.1)
            connections = 0
            with suppress(TimeoutError):
                while True:
                    server.accept()[0].close()
                    connections += 1
            assert connections == silent, "one question, and none of the client's own"
            # The limit of the one question is 5 s; starting Python and the hub's client takes the rest.
            assert seconds < 10


def test_what_is_in_the_cache_is_taken_without_a_network(hub: Hub, tmp_path: Path) -> None:
    command = ["--model", "mamba-130m", "--data", "lambada"]
    (first,) = collect(hub, tmp_path, command)
    assert first.code == 0, first.stderr
    (again,) = collect(hub, tmp_path, command, HF_ENDPOINT="http://127.0.0.1:9")
    assert again.code == 0 and "already there" in again.stderr, again.stderr


def test_a_model_without_a_tokenizer_is_told_before_its_weights_are_read(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").write_bytes(b"no weights")
    arguments = ["--model", str(folder), "--data", "python-docs:calibration"]
    _, printed = script(tmp_path, *arguments, endpoint="http://127.0.0.1:9", without="torch")
    assert printed == f"error: {folder} holds no tokenizer.json; name one with --tokenizer FILE (or a hub id)\n"
    with pytest.raises(ModelNotFound, match=r"holds no tokenizer.json"):
        load_model(str(folder))


def test_what_the_hub_refuses(hub: Hub, tmp_path: Path) -> None:
    hub.gated = {"models/some/gated", "datasets/some/gated"}
    hub.repositories["models/some/empty"] = {"README.md": b""}
    named = {
        "no such": ["--model", "state-spaces/mamba-9b"],
        "gated": ["--model", "some/gated"],
        "empty": ["--model", "some/empty"],
        "tokenizer": ["--model", "mamba-130m", "--tokenizer", "some/gated"],
        "data": ["--model", "mamba-5m", "--data", "hf:some/gated:a.jsonl"],
        "file": ["--model", "mamba-5m", "--data", "hf:EleutherAI/lambada_openai:nothing.jsonl"],
        "name": ["--model", "mamba-5m", "--data", "hf:not a name:a.jsonl"],
    }
    done = dict(zip(named, collect(hub, tmp_path, *named.values()), strict=True))
    unknown = "the hub knows no such repository, or it is private: check the name, or set HF_TOKEN"
    terms = "its authors ask to accept terms first: do so on its page and set HF_TOKEN"
    where = f"not in the local hub cache {tmp_path}/cache/hub and could not be fetched"
    assert f"error: the model state-spaces/mamba-9b is {where} ({unknown}); or download" in done["no such"].error
    assert f"error: the model some/gated is {where} ({terms}); or download" in done["gated"].error
    assert all("works without a network" not in each.error for each in done.values())
    assert "config.json is missing; expected a model folder" in done["empty"].error
    assert re.search(r"tokenizer.json of some/gated is not in .* pass it: --tokenizer FILE$", done["tokenizer"].error)
    assert f"({terms}); or download it" in done["data"].error
    assert "(the repository has no such file); or download it" in done["file"].error
    assert re.search(r"hf:not a name:a.jsonl is not in .*\(Repo id must", done["name"].error)
    assert "repeat the command" not in done["name"].error


def test_a_connection_that_ends_half_way(hub: Hub, tmp_path: Path) -> None:
    command = ["--model", "mamba-130m", "--data", "hf:EleutherAI/lambada_openai:big.jsonl"]
    hub.cuts = {"big.jsonl": (CHUNK + 1000, 1), "pytorch_model.bin": (1000, 1)}
    (done,) = collect(hub, tmp_path, command)
    assert done.code == 0, done.stderr
    ranges = [range_ for method, path, range_ in hub.requests if method == "GET" and path.endswith("big.jsonl")]
    assert ranges == [None, f"bytes={CHUNK}-"], "what had arrived is not fetched again"


def test_connections_that_always_end_half_way(hub: Hub, tmp_path: Path) -> None:
    command = ["--model", "mamba-130m", "--data", "hf:EleutherAI/lambada_openai:big.jsonl"]
    hub.cuts = {"big.jsonl": (1000, 99)}
    (cut,) = collect(hub, tmp_path, command)
    assert re.search(
        r"big.jsonl is not in .* could not be fetched \(peer closed connection .*; repeat the command: complete files "
        r"are reused\); or download",
        cut.error,
    )
    assert not (tmp_path / "db").exists()
    hub.cuts = {}
    hub.requests.clear()
    (done,) = collect(hub, tmp_path, command)
    assert done.code == 0, done.stderr
    fetched = [path.split("/")[-1] for method, path, _ in hub.requests if method == "GET" and "api/" not in path]
    assert fetched == ["big.jsonl"]


def test_a_file_that_arrived_damaged(hub: Hub, tmp_path: Path) -> None:
    """It is in the cache for good, so the message says what to delete; then the same command mends it."""
    files = hub.repositories[MODEL]
    good = files["pytorch_model.bin"]
    files["pytorch_model.bin"] = bytes(len(good))
    (damaged,) = collect(hub, tmp_path, ["--model", "mamba-130m"])
    found = re.search(r"pytorch_model.bin .*delete (\S+) and repeat the command$", damaged.error)
    assert found is not None, damaged.error
    files["pytorch_model.bin"] = good
    assert Path(found[1]).is_relative_to(tmp_path / "cache")
    Path(found[1]).unlink()
    (done,) = collect(hub, tmp_path, ["--model", "mamba-130m"])
    assert done.code == 0, done.stderr


def test_pytorch_shards_are_fetched_where_there_are_no_safetensors(hub: Hub, tmp_path: Path) -> None:
    tiny = tmp_path / "tiny"
    beside = {name: (tiny / name).read_bytes() for name in ("config.json", "tokenizer.json")}
    tensors = load_file(tiny / "model.safetensors")
    shards: dict[str, bytes] = {}
    for i, keys in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        content = io.BytesIO()
        torch.save({key: tensors[key] for key in keys}, content)
        shards[f"pytorch_model-{i:05d}-of-00002.bin"] = content.getvalue()
    places = {key: list(shards)[i % 2] for i, key in enumerate(sorted(tensors))}
    shards["pytorch_model.bin.index.json"] = json.dumps({"weight_map": places}).encode()
    hub.repositories["models/some/shards"] = beside | shards
    hub.repositories["models/some/both"] = (
        beside | shards | {"model.safetensors": (tiny / "model.safetensors").read_bytes()}
    )
    data = ["--data", "lambada"]
    for done in collect(hub, tmp_path, ["--model", "some/shards", *data], ["--model", "some/both", *data]):
        assert done.code == 0, done.stderr
    fetched = {path for method, path, _ in hub.requests if method == "GET"}
    assert any("some/shards" in path and path.endswith("2-of-00002.bin") for path in fetched)
    assert not any("some/both" in path and "pytorch_model" in path for path in fetched)
    # The same weights, tokenizer and texts: the same counts, whatever the files were.
    first, second = (
        stored_table(run, "counts").select(["layer", "value", "count"])
        for run in sorted((tmp_path / "db" / "runs").iterdir())
    )
    assert first.num_rows > 100 and first.equals(second)
