"""`collect` on the CPU beside the plain forward pass of the same tokens, and its memory at growing numbers of samples.

python benchmarks/bench_collect.py [bundled | 130m]
python benchmarks/bench_collect.py along [SAMPLES]

along: of a bundled model of each family, what `--by-position`, `--state-every 64` and both add.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timing import table

from quambase.collector.collect import CollectedRun, collect
from quambase.collector.documents import read_document_set
from quambase.model.checkpoint import load_model
from quambase.model.inputs.names import BUNDLED, bundled_models
from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.mamba1 import MambaConfig
from quambase.model.mamba2 import Mamba2Config
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare
from quambase.model.weights import random_weights, tensors_of

SEQ_LEN, BLOCK, EVERY = 512, 32, 64

ALONG: dict[str, dict[str, Any]] = {
    "collect": {},
    "collect --by-position": {"by_position": True},
    f"collect --state-every {EVERY}": {"state_every": EVERY},
    "both": {"by_position": True, "state_every": EVERY},
}
"""What is asked of `collect`, by what the row is called."""


def write_130m(folder: Path, *, mamba2: bool = False) -> Path:
    """A model of mamba-130m's shape, or of mamba2-130m's, with random weights and the bundled tokenizer."""
    ssm, multiple = ({"layer": "Mamba2"}, 16) if mamba2 else ({}, 8)
    raw = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": ssm, "pad_vocab_size_multiple": multiple}
    weights = random_weights((Mamba2Config if mamba2 else MambaConfig).from_mamba_ssm(raw))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({k: v.contiguous().clone() for k, v in tensors_of(weights).items()}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_bytes((BUNDLED / bundled_models()[0] / "tokenizer.json").read_bytes())
    return folder


def plain_forward(model: LanguageModel, batches: list[Batch]) -> None:
    """Hidden states and all logits, chunk by chunk, nothing kept."""
    for batch in batches:
        hidden = model.hidden(batch)
        for documents in batch.chunks(model.operators.head_rows):
            model.logits(hidden[int(batch.offsets[documents.start]) : int(batch.offsets[documents.stop])])


def memory(model: str, samples: int, folder: str) -> float:
    """Peak resident memory, in MB, of a process that collects ``samples`` documents."""
    script = (
        "import re, sys; from pathlib import Path; from quambase.collector.collect import collect;"
        "collect(sys.argv[1], int(sys.argv[2]), db=Path(sys.argv[3]), data=sys.argv[4], progress=False);"
        # Not ru_maxrss: that starts at what the parent had.
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024)"
    )
    arguments = [sys.executable, "-c", script, model, str(samples), folder, "sample:calibration"]
    return float(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)


def collect_seconds(run: CollectedRun) -> float:
    """What `collect` took, its model already read."""
    created = run.manifest.created
    return float(sum(created[part] for part in ("prepare_seconds", "observe_seconds", "write_seconds")))


def along(samples: int) -> None:
    """Print a table for each family's bundled model: the rows of ALONG beside the plain forward pass."""
    for model in bundled_models():
        with tempfile.TemporaryDirectory() as name:
            loaded = load_model(model)
            plan = read_document_set("sample:calibration", loaded.tokenizer, samples, SEQ_LEN)
            batches = [Batch.pack([d.tokens.tolist() for d in block]) for block in plan.blocks(BLOCK)]
            float_model = floating_model(prepare(loaded.any_weights), rotated=True)
            plain_forward(float_model, batches[:1])
            seconds: dict[str, list[float]] = {}
            for turn in ("warm", "first", "second"):
                start = time.perf_counter()
                plain_forward(float_model, batches)
                found = {"plain forward": time.perf_counter() - start}
                for place, (row, asked) in enumerate(ALONG.items()):
                    number = 2 if turn == "warm" else samples
                    db = Path(name) / f"{turn}{place}"
                    run = collect(
                        model, number, data="sample:calibration", db=db, batch_size=BLOCK, progress=False, **asked
                    )
                    found[row] = collect_seconds(run)
                if turn != "warm":
                    for row, taken in found.items():
                        seconds.setdefault(row, []).append(taken)
            print(f"\n{plan.tokens:,} tokens of {len(plan.documents)} documents")
            table(f"collect, {loaded.name}", "seconds", {k: min(v) for k, v in seconds.items()}, "plain forward")


def main(which: str) -> None:
    """Print the table of one model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = 64 if which == "130m" else 512
        model = str(write_130m(folder / "mamba-130m-shape")) if which == "130m" else bundled_models()[0]
        loaded = load_model(model)
        plan = read_document_set("sample:calibration", loaded.tokenizer, samples, SEQ_LEN)
        batches = [Batch.pack([d.tokens.tolist() for d in block]) for block in plan.blocks(BLOCK)]
        float_model = floating_model(prepare(loaded.any_weights), rotated=True)
        plain_forward(float_model, batches[:1])
        collect(model, 2, data="sample:calibration", db=folder / "warm", progress=False)
        seconds: dict[str, list[float]] = {"plain forward": [], "collect": []}
        for turn in range(2):
            start = time.perf_counter()
            plain_forward(float_model, batches)
            seconds["plain forward"].append(time.perf_counter() - start)
            run = collect(
                model, samples, data="sample:calibration", db=folder / f"db{turn}", batch_size=BLOCK, progress=False
            )
            seconds["collect"].append(collect_seconds(run))
        size = sum((run.folder / file).stat().st_size for file in run.manifest.tables)
        without = size - sum((run.folder / file).stat().st_size for file in run.manifest.files_of("activations"))
        counted = sum(run.manifest.tables[file].rows for file in run.manifest.files_of("counts"))
        peaks = {
            n: memory(model, n, str(folder / f"memory{n}")) for n in ((32, 128, 512) if which != "130m" else (64,))
        }
        print(f"\n{plan.tokens:,} tokens of {len(plan.documents)} documents; database {size / 1e6:.1f} MB,")
        print(f"{without / 1e6:.1f} MB without activations; {counted:,} count rows")
        for count, peak in peaks.items():
            print(f"peak memory at {count} samples: {peak:,.0f} MB")
        table(f"collect, {loaded.name}", "seconds", {k: min(v) for k, v in seconds.items()}, "plain forward")


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1:2] == ["along"]:
        along(int(sys.argv[2]) if len(sys.argv) > 2 else 512)
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else "bundled")
