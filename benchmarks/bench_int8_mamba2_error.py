# mypy: disable-error-code="attr-defined, call-arg"
"""Where the error of the INT8 Mamba-2 comes from: KL and top-1 agreement with one operator quantized, or all but one.

    python benchmarks/bench_int8_mamba2_error.py [MODEL]

Without a model: random weights of two shapes, once with channels of unequal size. One operator is quantized in the
float32 model (codes times scale, the INT8 model's own weights and scales); the last rows are the INT8 model itself.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timing import machine

from quambase.apply.int8.arithmetic import SplitInt8Weight
from quambase.apply.int8.build import build
from quambase.apply.int8.group_scales import channel_groups_of, values_of
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.model.block import Change, Show, unchanged
from quambase.model.checkpoint import load_model
from quambase.model.inputs.text import read_documents
from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.mamba2 import Mamba2Block, Mamba2BlockWeights, Mamba2Config
from quambase.model.operators.host import HostOperators
from quambase.model.operators.interface import BlockState, SsdInputs
from quambase.model.packed_batch import Batch, PlacedBatch
from quambase.model.prepare import prepare
from quambase.model.weights import ModelWeights, random_weights
from quambase.schema.scale_table import Scale
from quambase.schema.sites import MAMBA2, layer_sites

SHAPES = {
    "tiny, 8 SSD groups": Mamba2Config(64, 4, 1024, 512, d_state=32, headdim=16, ngroups=8),
    "24 layers like mamba2-130m, 192 wide": Mamba2Config(192, 24, 4096, 384, d_state=128, headdim=32),
}

WEIGHTS = ("in_proj weight", "conv weight and bias", "A_log", "D", "out_proj weight")
ACTIVATIONS = {
    "in_proj input": "in_proj:input",
    "z": "z_act:input",
    "x before conv": "x_conv_in:input",
    "B before conv": "B_conv_in:input",
    "C before conv": "C_conv_in:input",
    "dt": "dt_act:input",
    "x": "x_conv_out:input",
    "B": "B_conv_out:input",
    "C": "C_conv_out:input",
    "out_proj input": "out_proj:input",
}
OPERATORS = (*ACTIVATIONS, *WEIGHTS)

DOCUMENTS, LENGTH, GROUPS = 4, 256, 16


def dequantized(weight: SplitInt8Weight) -> torch.Tensor:
    """Codes times their row's scale."""
    scales = weight.row_scales.view(-1, *[1] * (weight.codes.dim() - 1))
    return weight.codes.to(torch.float32) * scales


class SomeQuantized(Mamba2Block):
    """A rotated float32 block with the ``chosen`` operators rounded to INT8 codes and back, as block ``index`` of the
    INT8 model has them.
    """

    def __init__(
        self, weights: Mamba2BlockWeights, int8: Int8LanguageModel, index: int, chosen: frozenset[str]
    ) -> None:
        codes = int8.weights.layers[index]
        changed = {
            "in_proj weight": {"in_proj": dequantized(codes.in_proj)},
            "conv weight and bias": {
                "conv_weight": dequantized(codes.conv_weight),
                "conv_bias": dequantized(codes.conv_bias),
            },
            "A_log": {"A_log": codes.A_log.dequantized()},
            "D": {"D": codes.D.dequantized()},
            "out_proj weight": {"out_proj": codes.out_proj.dequantized()},
        }
        for name in chosen & changed.keys():
            weights = dataclasses.replace(weights, **changed[name])
        super().__init__(int8.config, weights, HostOperators(int8.config.ngroups), rotated=True)
        self.chosen, self.int8, self.index = chosen, int8, index

    def _rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if name not in self.chosen:
            return values
        scale = values_of(self.int8.scales[self.index, ACTIVATIONS[name]])
        if name == "x":
            scale = scale[channel_groups_of(self.config, self.int8.channel_groups[self.index], len(scale))]
        elif name in ("B", "C"):
            scale = torch.repeat_interleave(scale, self.config.bc_width // len(scale))
        return (values / scale).round().clamp(-128, 127) * scale

    def forward(
        self,
        normalised: torch.Tensor,
        batch: PlacedBatch,
        state: BlockState | None = None,
        show: Show | None = None,
        change: Change = unchanged,
    ) -> torch.Tensor:
        c, ops = self.config, self.operators
        sizes = [c.d_inner, c.d_inner, c.bc_width, c.bc_width, c.heads]
        projected = F.linear(self._rounded("in_proj input", normalised), self.in_proj)
        names = ("z", "x before conv", "B before conv", "C before conv", "dt")
        parts = zip(names, torch.split(projected, sizes, dim=1), strict=True)
        z, *conv_parts, dt = (self._rounded(name, part) for name, part in parts)
        conv_out = ops.conv_silu(torch.cat(conv_parts, dim=1), self.conv_weight, self.conv_bias, batch)
        after = zip("xBC", torch.split(conv_out, sizes[1:4], dim=1), strict=True)
        x, b, read = (self._rounded(name, part) for name, part in after)
        y, _ = ops.ssd_scan(SsdInputs(x, b, read, dt, self.a, self.d, self.dt_bias), batch)
        gated = ops.gated_norm(y, z, self.gated_norm, c.norm_eps, rotated=True)
        return F.linear(self._rounded("out_proj input", gated), self.out_proj)


def some_quantized(prepared: ModelWeights, int8: Int8LanguageModel, chosen: frozenset[str]) -> LanguageModel:
    """The rotated float32 model of such blocks."""
    model = floating_model(prepared, rotated=True)
    model.blocks = [SomeQuantized(layer, int8, i, chosen) for i, layer in enumerate(prepared.layers)]
    return model


def observe(prepared: ModelWeights, batch: Batch) -> dict[tuple[int, str], torch.Tensor]:
    """Absmax of every site over the batch, by channel (the state's over its last axis)."""
    found: dict[tuple[int, str], torch.Tensor] = {}

    def tap(layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        amax = values.abs().amax(0)
        amax = amax.amax(1) if amax.dim() == 2 else amax
        found[layer, site] = torch.maximum(found[layer, site], amax) if (layer, site) in found else amax

    floating_model(prepared, rotated=True).hidden(batch, tap)
    return found


def scales_of(
    config: Mamba2Config, amax: dict[tuple[int, str], torch.Tensor], groups: list[torch.Tensor]
) -> dict[tuple[int, str], Scale]:
    """Absmax / 127 of every site; by group of channels and SSD group if there are ``groups``."""
    scales: dict[tuple[int, str], Scale] = {}
    for layer, site in layer_sites(config.n_layer, MAMBA2):
        values = amax[layer, site.name]
        index = torch.zeros(len(values), dtype=torch.int64)
        if groups and site.name in ("x_conv_out:input", "ssm_state_act:input"):
            index = groups[layer]
        elif groups and site.name in ("B_conv_out:input", "C_conv_out:input"):
            index = torch.arange(len(values)) * config.ngroups // len(values)
        parts = [float(values[index == g].max().clamp(min=1e-5)) / 127 for g in range(int(index.max()) + 1)]
        scales[layer, site.name] = tuple(parts) if len(parts) > 1 else parts[0]
    return scales


def groups_by_size(config: Mamba2Config, amax: dict[tuple[int, str], torch.Tensor]) -> list[torch.Tensor]:
    """Channels of x sorted by absmax and cut in GROUPS equal groups: what sorting and clustering is after."""
    maps = []
    for layer in range(config.n_layer):
        order = amax[layer, "x_conv_out:input"].argsort(stable=True)
        index = torch.empty_like(order)
        index[order] = torch.arange(config.d_inner) * GROUPS // config.d_inner
        maps.append(index)
    return maps


def uneven_weights(config: Mamba2Config, spread: float) -> ModelWeights:
    """Random blocks that make up most of the residual stream, a head of its own, x of log-normally unequal size."""
    weights = random_weights(config)
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(config.vocab_size, config.d_model, generator=generator) * 3 / config.d_model**0.5
    layers = []
    for layer in weights.layers:
        conv = layer.conv_weight.clone()
        conv[: config.d_inner] *= torch.exp(spread * torch.randn(config.d_inner, 1, generator=generator))
        layers.append(dataclasses.replace(layer, conv_weight=conv))
    return dataclasses.replace(weights, embedding=weights.embedding * 15, lm_head=head, layers=tuple(layers))


def compare(expected: torch.Tensor, logits: torch.Tensor) -> tuple[float, float]:
    """Mean KL in nats per token and top-1 agreement."""
    p, q = expected.log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean()), float((p.argmax(-1) == q.argmax(-1)).float().mean())


def rows_of(weights: ModelWeights, calibration: Batch, batch: Batch) -> Iterator[tuple[str, float, float]]:
    """Label, KL and top-1 agreement of every variant, on tokens other than the calibration's."""
    prepared = prepare(weights)
    amax = observe(prepared, calibration)
    reference = floating_model(weights)
    expected = reference.logits(reference.hidden(batch))
    groups = groups_by_size(weights.config, amax)
    int8 = build(prepared, scales_of(weights.config, amax, []), channel_groups=[[index] for index in groups])

    def measured(model: LanguageModel | Int8LanguageModel) -> tuple[float, float]:
        return compare(expected, model.logits(model.hidden(batch)))

    everything = frozenset(OPERATORS)
    yield "float16 weights only", *measured(floating_model(prepared, rotated=True))
    for name in OPERATORS:
        yield f"only {name}", *measured(some_quantized(prepared, int8, frozenset({name})))
    for name in ("z", "x", "dt", "out_proj input", "in_proj input", "in_proj weight"):
        yield f"all but {name}", *measured(some_quantized(prepared, int8, everything - {name}))
    yield "all, in float32", *measured(some_quantized(prepared, int8, everything))
    yield "INT8, one scale per tensor", *measured(int8)
    yield f"INT8, x in {GROUPS} groups", *measured(int8.with_scales(scales_of(weights.config, amax, groups)))


def main() -> None:
    """Print one table per model."""
    torch.manual_seed(0)
    cases: dict[str, tuple[ModelWeights, Batch, Batch]] = {}
    if sys.argv[1:]:
        loaded = load_model(sys.argv[1])
        assert loaded.family == MAMBA2, "no Mamba-2"
        texts = [loaded.tokenizer.encode(d.text)[:LENGTH] for d in read_documents("python-docs:evaluation", 40)]
        texts = [text for text in texts if len(text) > 1]
        half = len(texts) // 2
        cases[loaded.name] = loaded.any_weights, Batch.pack(texts[:half]), Batch.pack(texts[half:])
    else:
        for title, config in SHAPES.items():
            for spread in (0.0, 1.0):
                tokens = torch.randint(0, config.vocab_size, (2 * DOCUMENTS, LENGTH)).tolist()
                halves = Batch.pack(tokens[:DOCUMENTS]), Batch.pack(tokens[DOCUMENTS:])
                cases[f"{title}, {'unequal' if spread else 'equal'} channels"] = (
                    uneven_weights(config, spread),
                    *halves,
                )
    print(machine())
    for title, case in cases.items():
        print(f"\n{title}\n{'':32}{'KL/token':>12}{'top-1 %':>10}")
        for label, kl, top1 in rows_of(*case):
            print(f"{label:32}{kl:12.6f}{100 * top1:10.2f}")


if __name__ == "__main__":
    main()
