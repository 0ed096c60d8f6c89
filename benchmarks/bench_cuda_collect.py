"""`collect` on CUDA beside the plain forward pass of the same tokens at the same batch: models of 130m's shapes.

python benchmarks/bench_cuda_collect.py [documents]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timing import machine

from quambase.collector.layouts import site_layouts
from quambase.collector.observers import DTYPES, Kept, choose_where, new_observer
from quambase.collector.plan import Plan, PlannedDocument, sampled_states, sampled_tokens
from quambase.collector.run import OUTLIERS
from quambase.collector.statistics import ENCODINGS, SiteStatistics
from quambase.collector.writer import part_folder, write_part, write_run
from quambase.model.batch import Batch
from quambase.model.device import HEAD_ROWS, DeviceModel, device_model
from quambase.model.mamba2_weights import Mamba2Config, Mamba2Weights, random_mamba2_weights
from quambase.model.weights import MambaConfig, MambaWeights, random_weights
from quambase.schema.sites import FAMILIES, MAMBA1, MAMBA2

SEQ_LEN, BLOCK, KEEP = 512, 32, 64
UPSTREAM = 33.6
"""Seconds of upstream's calibration of 512 such documents on one H100, measured beside."""


def plain_forward(model: DeviceModel, batches: list[Batch]) -> float:
    """Seconds of hidden states and all logits, chunk by chunk, nothing kept."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for batch in batches:
        hidden = model.hidden(batch)
        for documents in batch.chunks(HEAD_ROWS):
            model.logits(hidden[int(batch.offsets[documents.start]) : int(batch.offsets[documents.stop])])
    torch.cuda.synchronize()
    return time.perf_counter() - start


def collecting(
    weights: MambaWeights | Mamba2Weights, family: str, plan: Plan, folder: Path
) -> tuple[float, float, int]:
    """Seconds of observing every block and of the final writing; bytes of the database."""
    layouts = site_layouts(weights.config, [site.name for site in FAMILIES[family]])
    statistics = {key: SiteStatistics.empty(layout, OUTLIERS) for key, layout in layouts.items()}
    kept = Kept(sampled_tokens(plan, KEEP, 0), sampled_states(plan, KEEP // weights.config.d_state, 0))
    observer = new_observer(
        weights,
        choose_where("cuda"),
        statistics,
        OUTLIERS,
        run="run",
        kept=kept,
        write=lambda number, documents, activations: write_part(folder, number, documents, activations),
    )
    blocks = plan.blocks(BLOCK)
    torch.cuda.synchronize()
    start = time.perf_counter()
    with observer:
        for number, documents in enumerate(blocks):
            observer.observe(number, documents)
        observer.settle()
        observed = time.perf_counter()
        statistics = observer.statistics()
    parts = [part_folder(folder, number) for number in range(len(blocks))]
    tables = write_run(
        folder, "run", statistics, ENCODINGS["float16"], lambda _, __, row, channel: (row, 0, "", channel), parts
    )
    written = time.perf_counter()
    return observed - start, written - observed, sum((folder / name).stat().st_size for name in tables)


def main(documents: int) -> None:
    """Print one table, a row per family."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50277, (documents, SEQ_LEN)).astype(np.int32)
    plan = Plan(tuple(PlannedDocument(i, f"{i:064}", row) for i, row in enumerate(tokens)), documents, 0, 0)
    batches = [Batch.pack([d.tokens.tolist() for d in block]) for block in plan.blocks(BLOCK)]
    device = choose_where("cuda").device
    shapes: dict[str, MambaWeights | Mamba2Weights] = {
        MAMBA1: random_weights(MambaConfig(768, 24, 50280, 1536, dt_rank=48)),
        MAMBA2: random_mamba2_weights(Mamba2Config(768, 24, 50288, 1536)),
    }
    lines = []
    for family, weights in shapes.items():
        model = device_model(weights, device, DTYPES["float16"], rotated=True)
        plain_forward(model, batches[:1])
        with tempfile.TemporaryDirectory() as name:
            some = Plan(plan.documents[:BLOCK], BLOCK, 0, 0)
            collecting(weights, family, some, Path(name) / "warm")
            plain, turns = [], []
            for turn in range(2):
                plain.append(plain_forward(model, batches))
                turns.append(collecting(weights, family, plan, Path(name) / str(turn)))
        observed, written, size = min(turns)
        rate = documents * SEQ_LEN / min(plain)
        lines.append(
            f"{family + ', 130m shape':20}{min(plain):9.2f} s{observed:9.2f} s{observed / min(plain):8.2f}"
            f"{UPSTREAM * documents / 512 / observed:10.1f}{written:9.2f} s{size / 1e6:9.1f} MB{rate:12,.0f}"
        )
    print(
        f"\ncollect of {documents} x {SEQ_LEN} tokens, all sites, float16 ({machine()}, {torch.cuda.get_device_name()})"
    )
    print(f"upstream: its calibration of the Mamba-1, {UPSTREAM} s for 512 documents")
    heads = (
        f"{'plain':>11}{'collect':>11}{'ratio':>8}{'upstream':>10}{'writing':>11}{'database':>12}{'plain tok/s':>12}"
    )
    print(" " * 20 + heads)
    print("\n".join(lines))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("needs a CUDA device")
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 512)
