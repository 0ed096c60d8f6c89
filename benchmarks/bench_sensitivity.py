"""What `collect --sensitivity` costs: its forward and backward pass beside the plain forward pass of its documents.

python benchmarks/bench_sensitivity.py [cpu | cuda] [130m]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timing import table

from quambase.collector.block_runners import choose_placement
from quambase.collector.documents import DocumentSet, TokenizedDocument
from quambase.collector.layouts import site_layouts
from quambase.collector.sensitivity import (
    SensitivityPlan,
    acting_sites,
    collect_sensitivity,
    sensitivity_file,
    total_sums,
)
from quambase.model.block import ModelConfig
from quambase.model.language_model import floating_model
from quambase.model.mamba1 import MambaConfig
from quambase.model.mamba2 import Mamba2Config
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare
from quambase.model.weights import random_weights
from quambase.schema.progress import SILENT
from quambase.schema.sites import FAMILIES

SMALL: tuple[ModelConfig, ...] = (
    MambaConfig(256, 7, 8192, 512, dt_rank=16),
    Mamba2Config(256, 12, 8192, 512, d_state=64, headdim=32, ngroups=2),
)
LARGE: tuple[ModelConfig, ...] = (MambaConfig(768, 24, 50280, 1536, dt_rank=48), Mamba2Config(768, 24, 50288, 1536))


def main(device: str, large: bool) -> None:
    """Print a table for each family: 40 documents of 512 tokens at 130m, of 256 otherwise."""
    where, length = choose_placement(device), 512 if large else 256
    for config in LARGE if large else SMALL:
        weights = prepare(random_weights(config))
        random = np.random.default_rng(0)
        texts = [TokenizedDocument(i, "", random.integers(0, 8000, length).astype(np.int32)) for i in range(40)]
        names = [site.name for site in FAMILIES[config.kind] if not site.sampled]
        plan = SensitivityPlan.of(DocumentSet(tuple(texts), 40, 0, 0), 40, names, config.kind, 0)
        index = acting_sites(site_layouts(config, names), config.kind)
        model = floating_model(weights, where.device, rotated=True)
        batches = [Batch.join([document.tokens for document in part]) for part in plan.parts]
        seconds: dict[str, list[float]] = {"plain forward": [], "sensitivity": []}
        for _ in range(3):  # the first compiles
            start = time.perf_counter()
            for batch in batches:
                model.logits(model.hidden(batch))
            if where.device.type == "cuda":
                torch.cuda.synchronize()
            seconds["plain forward"].append(time.perf_counter() - start)
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                collect_sensitivity(weights, where, plan, index, range(len(plan.parts)), Path(folder), SILENT)
                seconds["sensitivity"].append(time.perf_counter() - start)
                files = [Path(folder) / sensitivity_file(part) for part in range(len(plan.parts))]
                size = sum(path.stat().st_size for path in files)
                rows = int((total_sums(index, files).counts > 0).sum())
        print(f"\n{config.kind}: {40 * length:,} tokens; {rows:,} rows, files of the parts {size / 1e6:.1f} MB")
        shown = {name: min(values[1:]) for name, values in seconds.items()}
        table(f"sensitivity of {config.kind}, {device}", "seconds", shown, "plain forward")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu", "130m" in sys.argv)
