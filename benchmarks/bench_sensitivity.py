"""What `collect --sensitivity` costs: its forward and backward pass beside the plain forward pass of its documents; and
the stages of one pass, compiled and in plain PyTorch, and how far the two differ.

python benchmarks/bench_sensitivity.py [cpu | cuda] [130m]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from timing import table

from quambase.collector import sensitivity
from quambase.collector.block_runners import choose_placement
from quambase.collector.documents import DocumentSet, TokenizedDocument
from quambase.collector.layouts import site_layouts
from quambase.collector.sensitivity import (
    TOGETHER,
    PresentSums,
    SensitivityPlan,
    acting_sites,
    collect_sensitivity,
    loss_gradient,
    part_sums,
    sensitivity_file,
    total_sums,
    write_sums,
)
from quambase.collector.statistics import SiteIndex
from quambase.model.block import ModelConfig
from quambase.model.language_model import LanguageModel, floating_model, without_tf32
from quambase.model.mamba1 import MambaConfig
from quambase.model.mamba2 import Mamba2Config
from quambase.model.operators.choice import choose_differentiable_operators
from quambase.model.operators.differentiable import DifferentiableOperators, on_gradient
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare
from quambase.model.weights import random_weights
from quambase.schema.progress import SILENT
from quambase.schema.sites import FAMILIES, SiteKey

SMALL: tuple[ModelConfig, ...] = (
    MambaConfig(256, 7, 8192, 512, dt_rank=16),
    Mamba2Config(256, 12, 8192, 512, d_state=64, headdim=32, ngroups=2),
)
LARGE: tuple[ModelConfig, ...] = (MambaConfig(768, 24, 50280, 1536, dt_rank=48), Mamba2Config(768, 24, 50288, 1536))


def seconds(work: Callable[[], object], device: torch.device, before: Callable[[], object] = tuple) -> float:
    """The least of three times ``work``, each after ``before``, which is not counted."""
    found = []
    for _ in range(3):
        before()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


def stages(model: LanguageModel, texts: list[TokenizedDocument], index: SiteIndex) -> dict[str, float]:
    """Milliseconds of the stages of one pass over ``texts``, and of its file."""
    device, batch = model.device, Batch.join([text.tokens for text in texts])
    hidden: list[torch.Tensor] = []

    def forward() -> None:
        hidden[:] = [model.differentiable_hidden(batch, lambda *_: None)]

    def backward() -> None:
        with without_tf32():
            torch.autograd.backward(hidden[0], gradient)

    part_sums(model, texts, index, 0)  # compiles
    found = {"forward": seconds(forward, device)}
    uniform = torch.rand(len(batch.tokens), dtype=torch.float64, device=device)
    found["head"] = seconds(lambda: loss_gradient(model, hidden[0].detach(), uniform), device)
    gradient = loss_gradient(model, hidden[0].detach(), uniform)
    found["backward"] = seconds(backward, device, before=forward)
    whole = seconds(lambda: part_sums(model, texts, index, 0), device)
    found["sums, in the backward pass"] = whole - sum(found.values())
    sums = part_sums(model, texts, index, 0)
    found["sums to the host"] = seconds(lambda: PresentSums.of(sums), device)
    present = PresentSums.of(sums)
    with tempfile.TemporaryDirectory() as folder:
        found["file"] = seconds(lambda: write_sums(Path(folder) / "part.npz", present), device)
    return {name: 1000 * value for name, value in found.items()}


def gradients(model: LanguageModel, texts: list[TokenizedDocument], index: SiteIndex) -> dict[SiteKey, torch.Tensor]:
    """The gradient at every site of ``index``, of a random one at the head's input."""
    found: dict[SiteKey, torch.Tensor] = {}

    def keep(key: SiteKey, gradient: torch.Tensor) -> None:
        found[key] = gradient.clone()

    def tap(layer: int, site: str, values: torch.Tensor, _: slice) -> None:
        if (layer, site) in index.layouts:
            on_gradient(values, partial(keep, (layer, site)))

    hidden = model.differentiable_hidden(Batch.join([text.tokens for text in texts]), tap)
    slope = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    with without_tf32():
        hidden.backward(slope.to(hidden.device))
    return found


def compare(config: ModelConfig, device: torch.device, texts: list[TokenizedDocument], index: SiteIndex) -> None:
    """Print the stages of a pass, of the compiled operators and sums and of plain PyTorch's, and their differences."""
    weights, sizes = prepare(random_weights(config)), config.operator_sizes
    compiled = LanguageModel(weights, choose_differentiable_operators(sizes, device), rotated=True)
    plain = LanguageModel(weights, DifferentiableOperators(sizes.ngroups, device), rotated=True)
    forward = floating_model(weights, device, rotated=True)
    batch = Batch.join([text.tokens for text in texts])
    forward.logits(forward.hidden(batch))
    before = {"plain forward": 1000 * seconds(lambda: forward.logits(forward.hidden(batch)), device)}
    title = f"{len(texts)} documents of {config.kind}, {device.type}"
    table(
        f"{title}, {type(compiled.operators).__name__}", "ms", before | stages(compiled, texts, index), "plain forward"
    )
    mine = gradients(compiled, texts, index)
    sums = part_sums(compiled, texts, index, 0)
    with mock.patch.object(sensitivity, "choose_squares", lambda device: None):
        again = part_sums(compiled, texts, index, 0)
        table(f"{title}, plain PyTorch", "ms", before | stages(plain, texts, index), "plain forward")
    off = {
        key: float((mine[key] - wanted).abs().max() / wanted.abs().max())
        for key, wanted in gradients(plain, texts, index).items()
    }
    worst = max(off, key=lambda key: off[key])
    print(f"largest difference of a gradient, of its site's largest: {off[worst]:.1e}, at layer {worst[0]} {worst[1]}")
    for name, pair in zip(sums._fields, zip(sums, again, strict=True), strict=True):
        print(f"{name} of the compiled sums and of plain PyTorch's: {'equal' if torch.equal(*pair) else 'DIFFERENT'}")


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
        batches = [Batch.join([text.tokens for text in texts[i : i + TOGETHER]]) for i in range(0, 40, TOGETHER)]
        taken: dict[str, list[float]] = {"plain forward": [], "sensitivity": []}
        for _ in range(3):  # the first compiles
            start = time.perf_counter()
            for batch in batches:
                model.logits(model.hidden(batch))
            if where.device.type == "cuda":
                torch.cuda.synchronize()
            taken["plain forward"].append(time.perf_counter() - start)
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                collect_sensitivity(weights, where, plan, index, range(len(plan.parts)), Path(folder), SILENT)
                taken["sensitivity"].append(time.perf_counter() - start)
                files = [Path(folder) / sensitivity_file(part) for part in range(len(plan.parts))]
                size = sum(path.stat().st_size for path in files)
                rows = int((total_sums(index, files).counts > 0).sum())
        print(f"\n{config.kind}: {40 * length:,} tokens; {rows:,} rows, files of the parts {size / 1e6:.1f} MB")
        shown = {name: min(values[1:]) for name, values in taken.items()}
        table(f"sensitivity of {config.kind}, {device}", "seconds", shown, "plain forward")
        compare(config, where.device, texts[:TOGETHER], index)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu", "130m" in sys.argv)
