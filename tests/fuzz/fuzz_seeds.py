"""Makes the real files that inputs are changed from: models, texts, tensors, a run, its scales, its evaluation."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fuzz_containers import packed
from fuzz_queries import LYING_ABOUT, PARAMETERS, QUERIES
from safetensors.torch import load_file, save_file
from tiny_model import TEXTS, write_texts, write_tiny_mamba2, write_tiny_model

from quambase.analyzer.analyze import analyze
from quambase.apply.apply import apply
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.upstream.act_scales import export_act_scales
from quambase.collector.collect import collect
from quambase.collector.shards import Shard
from quambase.schema.checksums import CHECKSUM
from quambase.schema.json_files import write_json

ROWS = [{"text": text, "topic": f"t{i % 3}"} for i, text in enumerate([*TEXTS, "été 😀\nzwei", 'a "quoted", text'])]

ALONG: dict[str, Any] = {"by_position": True, "state_every": 8}
"""Counts by position, and the state along the documents."""


def make_seeds(folder: Path) -> Path:
    """Fill a new folder; `fuzz_targets` knows what lies where. Takes some seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    _models(folder)
    _texts(folder / "texts")
    _tensors(folder / "tensors")
    for name in ("mamba1", "mamba2"):
        _database(folder, name)
    _queries(folder / "queries")
    return folder


def _save(content: Any, path: Path, *, old: bool = False) -> None:
    """As torch.save, without the path in the file; ``old``: not as an archive."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not old)
    path.write_bytes(buffer.getvalue())


def _models(folder: Path) -> None:
    """Each family in mamba-ssm's layout; the first also in transformers', as PyTorch's file, and in two files."""
    first = write_tiny_model(folder / "mamba1")
    write_tiny_mamba2(folder / "mamba2")
    tensors = load_file(first / "model.safetensors")
    raw = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4}
    raw |= {
        "conv_kernel": 4,
        "intermediate_size": 32,
        "time_step_rank": 1,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
    }
    other = folder / "mamba1-hf"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(raw))
    named = {name.replace("embedding.", "embeddings."): tensor for name, tensor in tensors.items()}
    save_file(named, other / "model.safetensors")
    second = folder / "mamba2-hf"
    second.mkdir()
    about: dict[str, Any] = {"model_type": "mamba2", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64}
    about |= {"state_size": 4, "expand": 2, "head_dim": 8, "num_heads": 4, "n_groups": 2, "tie_word_embeddings": True}
    (second / "config.json").write_text(json.dumps(about))
    shutil.copy(folder / "mamba2" / "model.safetensors", second)
    for name, old in (("mamba1-bin", False), ("mamba1-old-bin", True)):
        (folder / name).mkdir()
        shutil.copy(first / "config.json", folder / name)
        _save(tensors, folder / name / "pytorch_model.bin", old=old)
    parted = folder / "mamba1-parts"
    parted.mkdir()
    shutil.copy(first / "config.json", parted)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(files.values())):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, parted / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (parted / "model.safetensors.index.json").write_text(json.dumps(index))


def _texts(folder: Path) -> None:
    folder.mkdir()
    write_texts(folder / "plain.jsonl")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (folder / "rows.txt").write_text("\n\n".join(f"{row['text']}\nmore {row['topic']}" for row in ROWS))
    lines = ['"' + row["text"].replace('"', '""') + f'",{row["topic"]}' for row in ROWS]
    (folder / "rows.csv").write_text("text,topic\n" + "\n".join(lines) + "\n")
    (folder / "bars.csv").write_text("text|n\na b|1\nc d|2\n")
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    words = pa.table(
        {"text": pa.array(["a b", None, "c", "a b"]).dictionary_encode(), "n": [1.5, 2.0, None, float("nan")]}
    )
    pq.write_table(words, folder / "words.parquet", compression="snappy")
    for ending in (".gz", ".xz", ".zst"):
        for name in ("rows.jsonl", "rows.txt", "rows.csv"):
            file = f"{name}{ending}"
            (folder / file).write_bytes(packed(file, (folder / name).read_bytes()))


def _tensors(folder: Path) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 5, 6, generator=generator)
    np.save(folder / "values.npy", values.numpy())
    np.save(folder / "half.npy", values.numpy().astype(np.float16).T)
    save_file({"x": values, "y": values.to(torch.bfloat16)}, folder / "two.safetensors")
    save_file({"x": values.to(torch.float16)}, folder / "one.safetensors")
    _save(values, folder / "values.pt")
    _save(values.to(torch.bfloat16), folder / "old.pth", old=True)
    _save({"x": values.t() if values.dim() == 2 else values.transpose(0, 1), 3: values[0]}, folder / "named.pt")
    _save(torch.nn.Parameter(values), folder / "parameter.pt")


def _database(folder: Path, name: str) -> None:
    """A run, its scale table, upstream's form of it, the INT8 model and an evaluation; and a shard of the same run."""
    db, texts, model = folder / f"{name}-db", str(folder / "texts" / "plain.jsonl"), str(folder / name)
    options: dict[str, Any] = {"data": texts, "seq_len": 32, "batch_size": 2, "keep_tokens": 4, "progress": False}
    found = collect(model, 4, db=db, sensitivity=2, by_block=True, **ALONG, **options)
    _settle(found.folder / "run.json")
    scales = folder / f"{name}.parquet"
    analyze(db, strategies=["quamba", "absmax", "mse"], out=scales, select="mse")
    upstreams = folder / f"act-{name}"
    shutil.copytree(model, upstreams / "model")
    export_act_scales(scales, upstreams / "scales.pt", strategy="absmax")
    applied = folder / f"{name}-int8"
    apply(scales, strategy="mse", db=db, out=applied, model=model)
    evaluate(applied, data=texts, samples=3, db=db)
    for path in (db / "results").glob("*/evaluation.json"):
        _settle(path)
    shards = folder / f"{name}-shards"
    # One site: reading a checkpoint fills an array of 65,536 counts for each group of each site.
    site = "x_proj:input" if name == "mamba1" else "x_conv_out:input"
    moments = 2 if name == "mamba1" else None  # of x_proj:input
    collect(
        model, 4, db=shards, sensitivity=2, second_moments=moments, shard=Shard(0, 2), sites=[site], **ALONG, **options
    )
    for path in shards.glob("runs/*/shards/*/shard.json"):
        _settle(path)


def _queries(folder: Path) -> None:
    folder.mkdir()
    for name, text in {**QUERIES, **PARAMETERS, **LYING_ABOUT}.items():
        (folder / name).write_text(text)


def _settle(path: Path) -> None:
    """Replace what differs between two equal collections (times, the host's name), so that seeds are equal."""
    raw = json.loads(path.read_text())
    for holder in (raw, raw.get("manifest", {})):
        if isinstance(holder.get("created"), dict):
            created = holder["created"]
            holder["created"] = {key: value for key, value in created.items() if isinstance(value, int)}
            holder["created"] |= {"started": "2026-01-01T00:00:00Z"}
    raw.pop(CHECKSUM)
    write_json(path, raw)
