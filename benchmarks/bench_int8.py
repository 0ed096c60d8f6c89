"""INT8 beside the float32 forward on the CPU, same tokens; and what another strategy on the same weights costs."""

from __future__ import annotations

import time

import torch
from timing import alternate, table

from quambase.apply.int8.build import build
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.mamba1 import MambaConfig
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare
from quambase.model.weights import random_weights
from quambase.schema.sites import layer_sites

SHAPES = {
    "7 M shape, 8 x 512": (MambaConfig(256, 12, 8192, 512, dt_rank=16), 8, 512),
    "mamba-130m shape (random weights), 2 x 512": (MambaConfig(768, 24, 50280, 1536, dt_rank=48), 2, 512),
}


def absmax_scales(model: LanguageModel, batch: Batch) -> dict[tuple[int, str], float]:
    """Absmax / 127 of every site over the batch."""
    amax = {(layer, site.name): 1e-5 for layer, site in layer_sites(model.config.n_layer)}

    def tap(layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        amax[layer, site] = max(amax[layer, site], float(values.abs().max()))

    model.hidden(batch, tap)
    return {key: value / 127 for key, value in amax.items()}


def main() -> None:
    """Print one table per shape."""
    for title, (config, documents, length) in SHAPES.items():
        weights = random_weights(config)
        tokens = torch.randint(0, config.vocab_size, (documents, length), generator=torch.Generator().manual_seed(0))
        batch = Batch.pack(tokens.tolist())
        prepared = prepare(weights)
        scales = absmax_scales(floating_model(prepared, rotated=True), Batch.pack(tokens[:, :64].tolist()))
        floating, rotated = floating_model(weights), floating_model(prepared, rotated=True)
        start = time.perf_counter()
        int8 = build(prepared, scales)
        first = time.perf_counter() - start
        start = time.perf_counter()
        int8.with_scales({key: scale * 0.9 for key, scale in scales.items()})
        another = time.perf_counter() - start

        def run(model: LanguageModel | Int8LanguageModel, packed: Batch = batch) -> torch.Tensor:
            return model.hidden(packed)

        sides = {
            "float32": lambda model=floating: run(model),
            "float32, rotated": lambda model=rotated: run(model),
            "INT8": lambda model=int8: run(model),
        }
        seconds = alternate(sides)
        table(title, "tokens/s", {name: documents * length / s for name, s in seconds.items()}, "float32")
        print(f"building the INT8 model: {first:.2f} s; another strategy on its weights: {another * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
