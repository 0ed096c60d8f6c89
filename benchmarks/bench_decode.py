"""Token-by-token decoding: tokens a second and bytes of state a sequence, floating point beside INT8.

python benchmarks/bench_decode.py [--model NAME | --shape SHAPE] [--device cpu|cuda] [--batch 1,8,64,256] [--steps N]

Models of a named shape with random weights, or a real model. On CUDA float16 and INT8, each by plain launches and as a
CUDA graph (`DecodingSteps`), and mamba-ssm's own step as its CUDA graph where it is installed; on the CPU float32 and
INT8. All sides of a batch size take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from timing import alternate, machine

from quambase.apply.int8.build import AnyInt8Model, build, int8_on_cuda
from quambase.model.checkpoint import load_model
from quambase.model.decoding_steps import DecodingSteps
from quambase.model.language_model import floating_model
from quambase.model.mamba1 import MambaConfig
from quambase.model.mamba2 import Mamba2Config
from quambase.model.operators.choice import choose_device
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare
from quambase.model.weights import ModelWeights, random_weights

SHAPES = {
    "mamba-7m": MambaConfig(256, 12, 8192, 512, dt_rank=16),
    "mamba2-8m": Mamba2Config(256, 12, vocab_size=8192, d_inner=512),
    "mamba-130m": MambaConfig(768, 24, 50280, 1536, dt_rank=48),
    "mamba2-130m": Mamba2Config(768, 24, vocab_size=50288, d_inner=1536),
    "mamba-2.8b": MambaConfig(2560, 64, 50280, 5120, dt_rank=160),
    "mamba2-2.7b": Mamba2Config(2560, 64, vocab_size=50288, d_inner=5120),
}

SMALL, LARGE = ("mamba-7m", "mamba2-8m"), ("mamba-130m", "mamba2-130m")

Side = Callable[[], object]


def int8_model(weights: ModelWeights, device: torch.device) -> AnyInt8Model:
    """The INT8 model with scales of absmax / 127 over 4 documents of 64 random tokens."""
    prepared = prepare(weights)
    tokens = torch.randint(0, weights.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    amax: dict[tuple[int, str], float] = {}

    def tap(layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        amax[layer, site] = max(amax.get((layer, site), 1e-3), float(values.abs().max()))

    floating_model(prepared, device, rotated=True).hidden(Batch.pack(tokens.tolist()), tap)
    host = build(prepared, {key: value / 127 for key, value in amax.items()})
    return host if device.type == "cpu" else int8_on_cuda({"it": host}, device)["it"]


class StepModel(Protocol):
    """A model that takes token after token, floating-point or INT8."""

    def new_state(self, sequences: int) -> Any: ...

    def step(self, tokens: torch.Tensor, state: Any) -> torch.Tensor: ...


def state_bytes(model: StepModel) -> int:
    """Bytes of one sequence's state."""
    return sum(part.numel() * part.element_size() for block in model.new_state(1) for part in (block.conv, block.ssm))


def stepping(step: Callable[[torch.Tensor], object], tokens: torch.Tensor) -> Side:
    """A side: ``step`` of each row of tokens (steps, b), and waiting for the device."""

    def run() -> None:
        for row in tokens:
            step(row)
        if tokens.is_cuda:
            torch.cuda.synchronize()

    return run


def plain(model: StepModel, sequences: int) -> Callable[[torch.Tensor], object]:
    """The model's own steps from a new state."""
    state = model.new_state(sequences)
    return lambda tokens: model.step(tokens, state)


def upstream(shape: str, sequences: int, steps: int) -> Callable[[torch.Tensor], object] | None:
    """The step of mamba-ssm's model of a shape as its CUDA graph, in float16; None where it is not installed."""
    try:
        from mamba_ssm.models.config_mamba import MambaConfig as UpstreamConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
        from mamba_ssm.utils.generation import update_graph_cache
    except ImportError:
        return None
    config = SHAPES[shape]
    layer = {"layer": "Mamba2"} if isinstance(config, Mamba2Config) else {}
    sizes = UpstreamConfig(d_model=config.d_model, n_layer=config.n_layer, vocab_size=config.vocab_size, ssm_cfg=layer)
    model = MambaLMHeadModel(sizes, device="cuda", dtype=torch.float16).eval()
    cache = update_graph_cache(model, None, sequences, 1, steps + 2)
    positions = torch.ones(sequences, 1, dtype=torch.int64, device="cuda")

    def step(tokens: torch.Tensor, _kept: object = model) -> object:  # the graph reads the weights where they are
        with torch.inference_mode():
            return cache.run(tokens[:, None], positions, 1)

    return step


def sides_of(models: Mapping[str, StepModel], shape: str | None, tokens: torch.Tensor) -> dict[str, Side]:
    """Every side of one batch size, the floating-point model's first."""
    sequences = tokens.shape[1]
    found: dict[str, Side] = {}
    for name, model in models.items():
        if tokens.is_cuda:
            found[f"{name}, graph"] = stepping(DecodingSteps(model.step, model.new_state(sequences)).step, tokens)
        found[name] = stepping(plain(model, sequences), tokens)
    theirs = upstream(shape, sequences, len(tokens)) if tokens.is_cuda and shape else None
    if theirs is not None:
        found["float16 by mamba-ssm, graph"] = stepping(theirs, tokens)
    return found


def measure(title: str, weights: ModelWeights, shape: str | None, asked: argparse.Namespace) -> list[str]:
    """The lines of one model's table."""
    device: torch.device = asked.on
    name, dtype = ("float16", torch.float16) if device.type == "cuda" else ("float32", torch.float32)
    models: dict[str, Any] = {name: floating_model(weights, device, dtype), "INT8": int8_model(weights, device)}
    sizes = {label: state_bytes(model) for label, model in models.items()}
    lines = [f"\n{title}: {', '.join(f'{label} {size:,} bytes of state a sequence' for label, size in sizes.items())}"]
    generator = torch.Generator().manual_seed(1)
    for sequences in asked.batch:
        tokens = torch.randint(0, weights.config.vocab_size, (asked.steps, sequences), generator=generator).to(device)
        seconds = alternate(sides_of(models, shape, tokens), asked.rounds)
        base = next(iter(seconds.values()))
        for side, value in seconds.items():
            speed = asked.steps * sequences / value
            lines.append(
                f"  b={sequences:<4} {side:28}{speed:14,.0f} tokens/s {value / asked.steps * 1e3:9.3f} ms a step"
                f" {base / value:6.2f}x"
            )
    return lines


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a bundled name, folder, short name or hub id instead of random weights")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: 130m on CUDA, 7m and 8m on the CPU")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch", help="sequences, with commas; default 1,8,64,256 on CUDA, 1,8 on the CPU")
    parser.add_argument(
        "--steps", type=int, help="tokens of each sequence and round; default 64 on CUDA, 16 on the CPU"
    )
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    asked.on = choose_device(asked.device)
    on_cuda = asked.on.type == "cuda"
    asked.batch = [int(b) for b in (asked.batch or ("1,8,64,256" if on_cuda else "1,8")).split(",")]
    asked.steps = asked.steps or (64 if on_cuda else 16)
    return asked


def main() -> None:
    """Print one table per model."""
    asked = arguments()
    on_cuda = asked.on.type == "cuda"
    where = f"{torch.cuda.get_device_name(asked.on)}; {machine()}" if on_cuda else machine()
    lines = [f"\n{asked.steps} steps, medians of {asked.rounds} interleaved rounds ({where}); ratios to the first line"]
    if asked.model:
        lines += measure(asked.model, load_model(asked.model).any_weights, None, asked)
    else:
        for shape in asked.shape or (LARGE if on_cuda else SMALL):
            lines += measure(f"{shape} shape, random weights", random_weights(SHAPES[shape]), shape, asked)
    if on_cuda and "mamba-ssm" not in "".join(lines):
        lines.append("\nmamba-ssm is not installed here, or the model is no named shape: its step was not measured")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
