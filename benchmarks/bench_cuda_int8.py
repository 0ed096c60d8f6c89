# mypy: disable-error-code="misc"
"""INT8 forward passes on CUDA beside float16 ones of the same tokens: models of 130m's shapes with random weights.

python benchmarks/bench_cuda_int8.py [documents]

Hidden states and all logits, chunk by chunk, at the same batch. The float16 models are ours and, where it is installed,
mamba-ssm's. Then one integer product of each shape, beside PyTorch's and its float16 one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from timing import alternate, machine

from quambase.apply.int8.arithmetic import Int8Weight
from quambase.apply.int8.build import build, int8_on_cuda
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.apply.int8.operators.cuda import CudaInt8Operators
from quambase.apply.int8.operators.interface import Multipliers
from quambase.model.language_model import floating_model
from quambase.model.mamba1 import MambaConfig
from quambase.model.mamba2 import Mamba2Config
from quambase.model.operators.torch import TorchOperators
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare
from quambase.model.weights import ModelWeights, random_weights

SEQ_LEN, BLOCK = 512, 32

MAMBA1_130M = MambaConfig(768, 24, 50280, 1536, dt_rank=48)
MAMBA2_130M = Mamba2Config(768, 24, vocab_size=50288, d_inner=1536)

PRODUCTS = {"in_proj": (768, 3072), "x_proj": (1536, 80), "dt_proj": (48, 1536), "out_proj": (1536, 768)}


class Model(Protocol):
    def hidden(self, batch: Batch) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


def forward(model: Model, batches: list[Batch], logits: bool = True) -> None:
    """Hidden states and all logits, chunk by chunk; nothing is kept."""
    for batch in batches:
        hidden = model.hidden(batch)
        if not logits:
            continue
        for documents in batch.chunks(TorchOperators.head_rows):
            model.logits(hidden[int(batch.offsets[documents.start]) : int(batch.offsets[documents.stop])])
    torch.cuda.synchronize()


def absmax_model(weights: ModelWeights, batch: Batch, device: torch.device) -> Int8LanguageModel:
    """The INT8 model with scales of absmax / 127 over one batch."""
    prepared = prepare(weights)
    amax: dict[tuple[int, str], torch.Tensor] = {}

    def tap(layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        found = values.abs().max().float()
        amax[layer, site] = torch.maximum(amax.get((layer, site), found), found)

    floating_model(prepared, device, torch.float16, rotated=True).hidden(batch, tap)
    scales = {key: max(float(value), 1e-3) / 127 for key, value in amax.items()}
    return build(prepared, scales)


def upstream(batches: list[Batch]) -> Callable[[], object] | None:
    """mamba-ssm's Mamba-1 of this shape in float16, hidden states and logits; None where it is not installed."""
    try:
        from mamba_ssm.models.config_mamba import MambaConfig as UpstreamConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError:
        return None
    model = MambaLMHeadModel(
        UpstreamConfig(d_model=768, n_layer=24, vocab_size=50280), device="cuda", dtype=torch.float16
    ).eval()
    tokens = [batch.tokens.view(batch.documents, -1).cuda() for batch in batches]

    def run() -> None:
        with torch.inference_mode():
            for part in tokens:
                hidden = model.backbone(part)
                for rows in hidden.flatten(0, 1).split(TorchOperators.head_rows):
                    model.lm_head(rows)
        torch.cuda.synchronize()

    return run


def products(device: torch.device) -> Mapping[str, Mapping[str, float]]:
    """Microseconds of each product of a batch's rows."""
    rows, found = SEQ_LEN * BLOCK, {}
    operators = CudaInt8Operators(device, MAMBA1_130M.operator_sizes)

    def timed(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(100):
                call()
            torch.cuda.synchronize()

        return run

    for name, (depth, columns) in PRODUCTS.items():
        x = torch.randint(-128, 128, (rows, depth), dtype=torch.int8, device=device)
        weight = torch.randint(-128, 128, (columns, depth), dtype=torch.int8, device=device)
        half, half_weight = x.half() / 128, weight.half() / 128
        padded = operators.matrix(Int8Weight(weight, 1.0))
        sides: dict[str, Callable[[], None]] = {
            "float16 by PyTorch": timed(lambda a=half, b=half_weight: torch.nn.functional.linear(a, b)),
            "int32 by PyTorch": timed(lambda a=x, b=weight: torch._int_mm(a, b.T)),
            "codes by quambase": timed(lambda a=x, b=padded: operators.linear_to_int8(a, b, Multipliers(1e-3, 1.0))),
        }
        found[name] = {side: seconds / 100 * 1e6 for side, seconds in alternate(sides).items()}
    return found


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    device = torch.device("cuda", torch.cuda.current_device())
    tokens = np.random.default_rng(0).integers(0, 50277, (count, SEQ_LEN))
    batches = [Batch.join(list(part)) for part in np.array_split(tokens, max(1, count // BLOCK))]
    lines = []
    for family, weights in (
        ("mamba-130m", random_weights(MAMBA1_130M)),
        ("mamba2-130m", random_weights(MAMBA2_130M)),
    ):
        half = floating_model(weights, device, torch.float16)
        (int8,) = int8_on_cuda({"absmax": absmax_model(weights, batches[0], device)}, device).values()
        sides: dict[str, Callable[[], object]] = {
            "float16": lambda half=half: forward(half, batches),
            "INT8": lambda int8=int8: forward(int8, batches),
            "float16, no logits": lambda half=half: forward(half, batches, logits=False),
            "INT8, no logits": lambda int8=int8: forward(int8, batches, logits=False),
        }
        theirs = upstream(batches) if family == "mamba-130m" else None
        if theirs is not None:
            sides["float16 by mamba-ssm"] = theirs
        seconds = alternate(sides)
        lines += [
            f"{family:12}  {side:22}{value:9.3f} s{value / seconds['float16']:8.2f}" for side, value in seconds.items()
        ]
        del half, int8
        torch.cuda.empty_cache()
    print(f"\n{count} x {SEQ_LEN} tokens, {BLOCK} documents a batch ({torch.cuda.get_device_name()}; {machine()})")
    print("\n".join([f"{'':38}{'seconds':>9}{'ratio':>10}", *lines]))
    print(f"\none product of {SEQ_LEN * BLOCK} rows, microseconds, queueing included (what bounds the small ones)")
    for name, sides in products(device).items():
        print(f"{name:10}" + "".join(f"{side:>20} {value:8.1f}" for side, value in sides.items()))


if __name__ == "__main__":
    if torch.cuda.is_available():
        main()
    else:
        print("needs a CUDA device")
