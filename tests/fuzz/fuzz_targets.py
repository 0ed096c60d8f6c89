"""Every reader of a file that a user can hand to us, and the real files that its inputs are changed from.

A target is a function that takes the path of the changed file, reads it as the product does, and returns what came of
it. It also asserts what the product relies on afterwards: ids within the embedding, scales above 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pyarrow as pa
import torch
from fuzz_queries import read_parameters, read_query

from quambase.apply.int8.model_folder import load_stored
from quambase.apply.upstream.import_act_scales import import_act_scales
from quambase.collector.checkpoint import load_checkpoint
from quambase.collector.import_tensor import read_tensor
from quambase.collector.layouts import site_layouts
from quambase.collector.second_moments import moment_widths, total_moments
from quambase.collector.sensitivity import total_sums
from quambase.collector.shards import load_shard, read_sums, stored_locator
from quambase.collector.statistics import SiteIndex
from quambase.model.checkpoint import load_weights
from quambase.model.inputs.text import read_documents
from quambase.model.inputs.tokenizer import load_tokenizer
from quambase.model.weights import weights_digest
from quambase.schema.scale_table import read_scales
from quambase.schema.stored.doctor import examine
from quambase.schema.stored.int8_models import last_applied, read_about
from quambase.schema.stored.manifest import Manifest, table_of
from quambase.schema.stored.results import read_evaluation, read_results
from quambase.schema.tables import LATER_COLUMNS, RESULTS, RUN_TABLES, read_table

Kinds = tuple[str, ...]


@dataclass(frozen=True)
class Seed:
    """A real file to change.

    file    path of the file
    folder  what is copied beside it, the file included; None: only the file itself
    kinds   how it is changed (`fuzz_inputs.KINDS`)
    """

    file: Path
    kinds: Kinds
    folder: Path | None = None


@dataclass(frozen=True)
class Target:
    """A reader under test.

    seeds   its real files, in the folder that `fuzz_seeds.make_seeds` filled
    read    reads the file at a path; raises QuambaseError
    memory  bytes that reading a small file may take
    share   of the inputs, beside the other targets; slow readers get fewer
    forged  a changed file gets a right checksum, as its reader would refuse it otherwise
    """

    name: str
    seeds: Callable[[Path], list[Seed]]
    read: Callable[[Path], object]
    memory: int = 256 << 20
    share: float = 1.0
    forged: bool = False


FAMILIES = ("mamba1", "mamba2")
ROWS_OF_EMBEDDING = 64


def _weights(path: Path) -> object:
    """The weights of a model folder, one of whose files was changed."""
    weights = load_weights(path.parent)
    assert torch.isfinite(weights.embedding).all() and weights.embedding.dtype == torch.float32
    return weights_digest(weights)


def _tokenizer(path: Path) -> object:
    tokenizer = load_tokenizer(path).for_rows(ROWS_OF_EMBEDDING)
    texts = ["w1 w2 w58", "w3 unknown", "", "été 😀 \x00 \n\n w0", "w" * 3000, "Aa 1 [PAD] <s> ## ▁ Ġ"]
    ids = [tokenizer.encode(text) for text in texts]
    assert ids == tokenizer.encode_batch(texts)
    assert all(0 <= i < ROWS_OF_EMBEDDING for of_text in ids for i in of_text)
    shown = tokenizer.decode_batch([*ids, list(range(ROWS_OF_EMBEDDING))]), tokenizer.decode(ids[0]), tokenizer.ids
    return ids, shown


def _text(path: Path) -> object:
    found = []
    for document in read_documents(str(path), 64):
        document.text.encode("utf-8")
        found.append((document.text, document.cluster))
    return found


def _tensor(path: Path) -> object:
    values = read_tensor(path, "x" if "two" in path.name or "named" in path.name else None)
    assert values.numel() and values.is_floating_point() and not values.requires_grad
    return values


def _act_scales(path: Path) -> object:
    out = path.parent / "out.parquet"
    import_act_scales(path, str(path.parent / "model"), out, force=True)
    return _scales(out)


def _scales(path: Path) -> object:
    found = read_scales(path)
    assert all(math.isfinite(scale) and scale > 0 for scale in found.table["scale"].to_pylist())
    return found.table, str(found.provenance)


def _scale_answers(path: Path) -> object:
    """What every command asks of a scale table after reading it."""
    found = read_scales(path)
    names = "run", "runs", "weights_sha256", "model", "labels"
    asked = [getattr(found, name) for name in names if hasattr(type(found), name)]
    return found.table, [str(one() if callable(one) else one) for one in asked]


def _manifest(path: Path) -> object:
    return str(Manifest.load(path.parent))


def _run_table(path: Path) -> object:
    """A table without its checksum, as one with a checksum made anew."""
    parts = path.relative_to(path.parents[1] if path.parent.name in RUN_TABLES else path.parent)
    name = table_of(parts.as_posix())
    return read_table(path, RUN_TABLES[name], LATER_COLUMNS.get(name))


def _evaluation(path: Path) -> object:
    return str(read_evaluation(path.parent))


def _results(path: Path) -> object:
    return read_results(path.parent)


def _part(path: Path) -> object:
    return read_table(path, RESULTS, checked=True)


def _int8(path: Path) -> object:
    found = load_stored(path.parent)
    return str(sorted(found.model.scales.items())), str(found.about)


def _last(path: Path) -> object:
    """The model applied last: the name in the file, then that folder."""
    return str(read_about(last_applied(path.parents[1])))


def _shard(path: Path) -> object:
    found = load_shard(path.parent)
    return str(found), str(found.config)


@cache
def _index(name: str) -> tuple[dict, SiteIndex]:
    """Where a shard's statistics lie."""
    path = next((SEEDS[-1] / f"{name}-shards").glob("runs/*/shards/*/shard.json"))
    found = load_shard(path.parent)
    layouts = site_layouts(found.config, found.manifest.identity["sites"], found.manifest.model.layer_groups)
    return layouts, SiteIndex(layouts)


SEEDS: list[Path] = []
"""The folder of real files that this process uses, last."""


def _name_of(path: Path) -> str:
    return next(name for name in FAMILIES if any(part.startswith(name) for part in path.parts))


def _checkpoint(path: Path) -> object:
    layouts, _ = _index(_name_of(path))
    found = load_checkpoint(path.parent, layouts, 64)
    moments = vars(found.statistics.moments).values()
    counts = found.statistics.counts
    return counts[counts != 0], found.statistics.top, list(moments), found.blocks, str(found.files)


def _sensitivity(path: Path) -> object:
    _, index = _index(_name_of(path))
    return list(total_sums(index, [path]))


def _moments(path: Path) -> object:
    layouts, _ = _index(_name_of(path))
    return list(total_moments(moment_widths(layouts), [path]).values())


def _places(path: Path) -> object:
    stored_locator([path.parent])
    return None


def _sums(path: Path) -> object:
    return torch.from_numpy(read_sums(path.parents[1], 0))


def _doctor(path: Path) -> object:
    """Every check of a database in which one file was changed; a damaged one is a row."""
    db = next(parent for parent in path.parents if (parent / "runs").is_dir())
    return [row for row in examine(db).to_pylist() if row["check"] != "version"]


def _query(path: Path) -> object:
    return read_query(path, SEEDS[-1] / "mamba1-db")


def _parameters(path: Path) -> object:
    return read_parameters(path, SEEDS[-1] / "mamba1-db")


def _models(names: tuple[str, ...], file: str, *kinds: str) -> Callable[[Path], list[Seed]]:
    return lambda made: [Seed(made / name / file, kinds, made / name) for name in names]


def _files(pattern: str, *kinds: str) -> Callable[[Path], list[Seed]]:
    """Files that are read alone."""
    return lambda made: [Seed(path, kinds) for path in sorted(made.glob(pattern))]


def _within(folder: str, pattern: str, *kinds: str) -> Callable[[Path], list[Seed]]:
    """Files within a folder that is copied whole; both are patterns."""
    return lambda made: [
        Seed(path, kinds, place) for place in sorted(made.glob(folder)) for path in sorted(place.glob(pattern))
    ]


def _texts(*names: str) -> Callable[[Path], list[Seed]]:
    kinds = {
        ".txt": ("bytes",),
        ".jsonl": ("json lines", "bytes"),
        ".json": ("json", "bytes"),
        ".csv": ("bytes",),
        ".parquet": ("table", "footer", "bytes", "parquet bombs"),
    }

    def seeds(made: Path) -> list[Seed]:
        found = [path for path in sorted((made / "texts").iterdir()) if path.suffix in names]
        packed = {path: path.suffix in (".gz", ".xz", ".zst") for path in found}
        plain = {path: kinds[path.suffixes[0]] for path in found}
        return [Seed(path, ("packed", "bytes", "text bomb") if packed[path] else plain[path]) for path in found]

    return seeds


TENSORS, ARCHIVE = ("safetensors", "safetensors", "bytes"), ("zip", "zip", "bytes", "zip bomb")
TABLE = ("table", "table", "footer", "bytes")
TARGETS = {
    target.name: target
    for target in (
        Target(
            "config",
            _models(("mamba1", "mamba2", "mamba1-hf", "mamba2-hf"), "config.json", "json", "json", "bytes"),
            _weights,
        ),
        Target("index", _models(("mamba1-parts",), "model.safetensors.index.json", "json", "json", "bytes"), _weights),
        Target("safetensors", _models(("mamba1", "mamba2"), "model.safetensors", *TENSORS), _weights),
        Target(
            "pytorch", _models(("mamba1-bin", "mamba1-old-bin"), "pytorch_model.bin", *ARCHIVE), _weights, share=0.6
        ),
        Target("tokenizer", _models(("mamba1",), "tokenizer.json", "tokenizer", "json", "bytes"), _tokenizer),
        Target("text", _texts(".txt"), _text),
        Target("text csv", _texts(".csv"), _text),
        Target("text json", _texts(".json", ".jsonl"), _text),
        Target("text parquet", _texts(".parquet"), _text, memory=700 << 20),
        Target("text packed", _texts(".gz", ".xz", ".zst"), _text, memory=700 << 20),
        Target("tensor pt", _files("tensors/*.pt*", *ARCHIVE), _tensor, share=0.6),
        Target("tensor npy", _files("tensors/*.npy", "npy", "npy", "bytes"), _tensor),
        Target("tensor safetensors", _files("tensors/*.safetensors", *TENSORS), _tensor),
        Target("act_scales", _within("act-*", "*.pt", *ARCHIVE), _act_scales, share=0.2),
        Target("scales", _files("mamba*.parquet", *TABLE), _scales, share=0.3),
        Target("scale answers", _files("mamba*.parquet", *TABLE), _scale_answers, share=0.2),
        Target("run.json", _within("*-db/runs/*", "run.json", "json", "json", "bytes"), _manifest),
        Target("run tables", _within("*-db/runs/*", "**/*.parquet", *TABLE), _run_table, share=0.3),
        Target("evaluation", _within("*-db/results/*", "evaluation.json", "json", "json", "bytes"), _evaluation),
        Target("results", _within("*-db/results/*", "results.parquet", *TABLE), _results),
        Target("evaluation part", _files("*-db/results/*/results.parquet", *TABLE), _part, share=0.3),
        Target("int8 config", _within("*-int8", "config.json", "json", "json", "bytes"), _int8),
        Target("int8 tensors", _within("*-int8", "model.safetensors", *TENSORS), _int8, share=0.6),
        Target("int8 scales", _within("*-int8", "scales.parquet", *TABLE), _scales, share=0.3),
        Target("last.txt", _within("*-db", "models/last.txt", "bytes"), _last),
        Target("shard.json", _within("*-shards", "runs/*/shards/*/shard.json", "json", "json", "bytes"), _shard),
        Target(
            "checkpoint",
            _within("*-shards", "runs/*/shards/*/checkpoint.npz", "zip", "zip", "bytes", "npz bomb"),
            _checkpoint,
            share=0.3,
        ),
        Target(
            "sensitivity",
            _within("*-shards", "runs/*/shards/*/sensitivity/*.npz", "zip", "zip", "bytes"),
            _sensitivity,
            share=0.3,
        ),
        Target(
            "moments",
            _within("mamba1-shards", "runs/*/shards/*/moments/*.npz", "zip", "zip", "bytes"),
            _moments,
            share=0.3,
        ),
        Target("places", _within("*-shards", "runs/*/shards/*/places.parquet", *TABLE), _places, share=0.2),
        Target("sums", _within("*-shards", "runs/*/shards/*/sums/*.npy", "npy", "npy", "bytes"), _sums),
        Target("query", _within("queries", "[mrs]*.sql", "query", "bytes"), _query, memory=700 << 20, share=0.1),
        Target("parameters", _within("queries", "*.set", "parameters", "parameters"), _parameters, share=0.1),
        Target("doctor", _within("*-db", "r*/**/*.*", "bytes"), _doctor, share=0.005),
    )
}

CHECKED = (
    *("scales", "run.json", "evaluation", "evaluation part", "int8 config", "int8 scales", "last.txt", "shard.json"),
    *("places", "sums"),
)
"""Targets whose files carry their own checksum."""

TARGETS |= {f"{name}, forged": replace(TARGETS[name], name=f"{name}, forged", forged=True) for name in CHECKED}


def fingerprint(value: object) -> object:
    """A value that is equal for equal content, with which another reading can be compared."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, pa.Table):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema) as writer:
            writer.write_table(value)
        return sink.getvalue().to_pybytes()
    if isinstance(value, list | tuple):
        return [fingerprint(one) for one in value]
    return repr(value)
