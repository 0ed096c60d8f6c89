"""`collect` on CUDA beside the plain forward pass of the same tokens at the same batch: models of 130m's shapes.

python benchmarks/bench_cuda_collect.py [documents]
python benchmarks/bench_cuda_collect.py memory      # of 64, 512 and 4096 documents, each in a process of its own
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timing import machine

from quambase.collector.block_runners import DTYPES, BlockOutputs, choose_placement, new_block_runner
from quambase.collector.collect import OUTLIERS
from quambase.collector.documents import DocumentSet, TokenizedDocument, sampled_states, sampled_tokens
from quambase.collector.layouts import site_layouts
from quambase.collector.statistics import ENCODINGS, RunStatistics, SiteLayout
from quambase.collector.tables.run_folder import BlockFiles, every_table, write_statistics
from quambase.collector.tables.table_rows import Places
from quambase.collector.taps import KeptTokens
from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.mamba1 import MambaConfig
from quambase.model.mamba2 import Mamba2Config
from quambase.model.packed_batch import Batch
from quambase.model.weights import ModelWeights, random_weights
from quambase.schema.sites import FAMILIES, MAMBA1, MAMBA2
from quambase.schema.stored.manifest import table_of
from quambase.schema.values.arrays import Int64

SEQ_LEN, BLOCK, KEEP = 512, 32, 64
TURNS = 4
"""Of which medians are printed, after one that compiles and gets its memory."""

UPSTREAM = 33.6
"""Seconds of upstream's calibration of 512 such documents on one H100, measured before."""


def plain_forward(model: LanguageModel, batches: list[Batch]) -> float:
    """Seconds of hidden states and all logits, chunk by chunk, nothing kept."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for batch in batches:
        hidden = model.hidden(batch)
        for documents in batch.chunks(model.operators.head_rows):
            model.logits(hidden[int(batch.offsets[documents.start]) : int(batch.offsets[documents.stop])])
    torch.cuda.synchronize()
    return time.perf_counter() - start


def collecting(weights: ModelWeights, family: str, plan: DocumentSet, folder: Path) -> tuple[float, float, int, int]:
    """Seconds of observing every block and of the writing after it; bytes of the database, of `activations` in it."""
    layouts = site_layouts(weights.config, [site.name for site in FAMILIES[family] if not site.sampled])
    statistics = RunStatistics.empty(layouts, OUTLIERS)
    kept = KeptTokens(sampled_tokens(plan, KEEP, 0), sampled_states(plan, KEEP // weights.config.d_state, 0))
    blocks = plan.blocks(BLOCK)
    with BlockFiles(folder) as files:
        outputs = BlockOutputs("run", kept, files.add)
        runner = new_block_runner(weights, choose_placement("cuda"), statistics, outputs)
        torch.cuda.synchronize()
        start = time.perf_counter()
        with runner:
            for number, documents in enumerate(blocks):
                runner.observe(number, documents)
            statistics = runner.statistics()
            observed = time.perf_counter()
            made = write_statistics(folder, "run", statistics, ENCODINGS["float16"], locate)
            runner.settle()
            tables = every_table(folder, files.written() | made)
    written = time.perf_counter()
    sizes = {name: (folder / name).stat().st_size for name in tables}
    raw = sum(size for file, size in sizes.items() if table_of(file) == "activations")
    return observed - start, written - observed, sum(sizes.values()), raw


def locate(layout: SiteLayout, documents: Int64, rows: Int64, channels: Int64) -> Places:
    """Places of random tokens, which are no words."""
    texts = [""] * rows.size
    return Places(rows, [0] * rows.size, texts, texts, texts, channels)


def new_plan(documents: int) -> DocumentSet:
    """Documents of SEQ_LEN random tokens."""
    tokens = np.random.default_rng(0).integers(0, 50277, (documents, SEQ_LEN)).astype(np.int32)
    return DocumentSet(tuple(TokenizedDocument(i, f"{i:064}", row) for i, row in enumerate(tokens)), documents, 0, 0)


def upstream_forward(batches: list[Batch]) -> float | None:
    """Seconds of the same shape's forward pass in float16 by mamba-ssm; None where it is not installed."""
    try:
        from mamba_ssm.models.config_mamba import MambaConfig as UpstreamConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError:
        return None
    config = UpstreamConfig(d_model=768, n_layer=24, vocab_size=50280)
    model = MambaLMHeadModel(config, device="cuda", dtype=torch.float16).eval()
    tokens = [batch.tokens.view(batch.documents, -1).cuda() for batch in batches]
    seconds = []
    with torch.inference_mode():
        for _ in range(-1, TURNS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for part in tokens:
                model(part)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def peak(documents: int) -> None:
    """Print the most memory that a collection of the Mamba-1 takes in this process."""
    weights = random_weights(MambaConfig(768, 24, 50280, 1536, dt_rank=48))
    with tempfile.TemporaryDirectory() as name:
        collecting(weights, MAMBA1, new_plan(documents), Path(name))
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    cuda = torch.cuda.max_memory_allocated() / 2**30
    print(f"{documents:8,} documents{host:10.2f} GiB on the host{cuda:10.2f} GiB on the device", flush=True)


def memory() -> None:
    """`peak` of three numbers of documents, each in a process of its own."""
    print(f"peak memory of collect, mamba1, 130m shape ({machine()}, {torch.cuda.get_device_name()})", flush=True)
    for documents in (64, 512, 4096):
        subprocess.run([sys.executable, __file__, "peak", str(documents)], check=True)


def ragged(plan: DocumentSet) -> DocumentSet:
    """The same documents, cut at 64 to SEQ_LEN tokens."""
    lengths = np.random.default_rng(1).integers(64, SEQ_LEN + 1, len(plan.documents))
    documents = [
        TokenizedDocument(d.index, d.sha256, d.tokens[:length])
        for d, length in zip(plan.documents, lengths, strict=True)
    ]
    return DocumentSet(tuple(documents), plan.read, 0, len(documents))


def of_texts(weights: ModelWeights, family: str, plan: DocumentSet) -> str:
    """A row: seconds as the median of TURNS turns, together also the least and the most of them."""
    batches = [Batch.pack([d.tokens.tolist() for d in block]) for block in plan.blocks(BLOCK)]
    model = floating_model(weights, choose_placement("cuda").device, DTYPES["float16"], rotated=True)
    plain, turns = [], []
    with tempfile.TemporaryDirectory() as name:
        for turn in range(-1, TURNS):
            plain.append(plain_forward(model, batches))
            turns.append(collecting(weights, family, plan, Path(name) / str(turn)))
    observed, written = np.array([turn[:2] for turn in turns[1:]]).T
    together = observed + written
    forward, both = np.median(plain[1:]), np.median(together)
    tokens = sum(batch.tokens.numel() for batch in batches)
    _, _, size, raw = turns[-1]
    return (
        f"{tokens:9,}{forward:9.2f} s{np.median(observed):9.2f} s{np.median(observed) / forward:8.2f}"
        f"{np.median(written):9.2f} s{both:9.2f} s ({min(together):.2f} to {max(together):.2f})"
        f"{size / 1e6:9.1f} MB{(size - raw) / 1e6:9.1f} MB"
    )


def main(documents: int) -> None:
    """Print one table, two rows per family."""
    shapes: dict[str, ModelWeights] = {
        MAMBA1: random_weights(MambaConfig(768, 24, 50280, 1536, dt_rank=48)),
        MAMBA2: random_weights(Mamba2Config(768, 24, 50288, 1536)),
    }
    plan = new_plan(documents)
    upstream = upstream_forward([Batch.pack([d.tokens.tolist() for d in block]) for block in plan.blocks(BLOCK)])
    rows = []
    for family, weights in shapes.items():
        for kind, texts in (("alike", plan), ("ragged", ragged(plan))):
            rows.append(f"{family + ', ' + kind:16}" + of_texts(weights, family, texts))
    print(
        f"\ncollect of {documents} documents of {SEQ_LEN} tokens, or 64 to {SEQ_LEN} (ragged), 130m shapes, all sites,"
    )
    print(f"float16, medians of {TURNS} ({machine()}, {torch.cuda.get_device_name()})")
    said = "it is not installed here" if upstream is None else f"{upstream:.2f} s"
    print(f"mamba-ssm's own forward pass of the Mamba-1, alike, float16: {said}")
    print(f"upstream's calibration of it: {UPSTREAM} s for 512 documents, measured before")
    heads = f"{'tokens':>9}{'plain':>11}{'observing':>11}{'ratio':>8}{'writing':>11}{'together':>11}"
    print(f"{'':16}{heads}{'':15}{'database':>12}{'w/o raw':>12}")
    print("\n".join(rows))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("needs a CUDA device")
    elif sys.argv[1:] == ["memory"]:
        memory()
    elif sys.argv[1:2] == ["peak"]:
        peak(int(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 512)
