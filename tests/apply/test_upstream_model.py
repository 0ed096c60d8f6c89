# mypy: disable-error-code="call-overload"
"""Upstream Quamba's own W8A8 model on a GPU (`apply --backend quamba`) beside ours: same weights, scales and tokens.

Needs a GPU and the package `quamba` with its kernels; docs/upstream.md says how it was built and what these tests saw.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded_operators import OPERATORS
from test_cuda_int8 import _ordered
from tiny_model import WORDS, write_model, write_texts

from quambase.analyzer.analyze import analyze
from quambase.apply.evaluation.likelihood import log_probabilities, torch_compare
from quambase.apply.int8.build import build_model
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.apply.int8.operators.cuda import CudaInt8Operators
from quambase.apply.int8.operators.host import HostInt8Operators
from quambase.apply.int8.weights import PlacedWeights
from quambase.apply.upstream.backend import build_upstream
from quambase.collector.collect import collect
from quambase.model.checkpoint import LoadedModel, load_model
from quambase.model.inputs.text import read_documents
from quambase.model.language_model import floating_model
from quambase.model.mamba1 import MambaConfig
from quambase.model.mamba2 import Mamba2Config
from quambase.model.packed_batch import Batch, PlacedBatch
from quambase.model.weights import random_weights, tensors_of
from quambase.schema.scale_table import read_scales
from quambase.schema.sites import MAMBA2

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("quamba") is None, reason="needs upstream's package quamba"),
    pytest.mark.filterwarnings("ignore"),  # upstream's, while it is imported
]

DOCUMENTS, LENGTH = 4, 301
"""Tokens that fill neither a chunk of the Mamba-2 scan (256) nor the rows of a matrix product's tile (16)."""

PROMPT, STEPS = 16, 40
"""Tokens of a prompt, and with those decoded one at a time."""

WHOLE = {"quantize_lm_head": True, "quantize_embedding": True}
CASES: dict[str, tuple[str, str | None, str | None, dict[str, bool]]] = {
    "mamba-5m": ("mamba-5m", None, None, {}),
    "mamba-5m-whole": ("mamba-5m", None, None, WHOLE),
    "mamba2-8m-sorted": ("mamba2-8m", "fixed", None, {}),
    "mamba2-8m-sorted-as-upstream": ("mamba2-8m", "quamba2", None, {}),
    "mamba2-8m-scale-a-tensor": ("mamba2-8m", "none", "tensor", {}),
    "mamba-130m-layers": ("mamba", None, None, {}),
    "mamba2-130m-layers": ("mamba2", "fixed", None, {}),
}
"""Model (``mamba``, ``mamba2``: random weights), its groups, granularity of its scales, what else is quantized."""


@dataclass
class Case:
    """Upstream's model, what its blocks made of ``batch`` in the order of our operators, and our model."""

    loaded: LoadedModel
    batch: Batch
    theirs: Any
    recorded: list[torch.Tensor]
    logits: torch.Tensor
    host: Int8LanguageModel


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, groups, granularity, switches = CASES[request.param]
    folder = tmp_path_factory.mktemp("upstream")
    if name.startswith("mamba-") or name.startswith("mamba2-"):
        data, texts = None, [document.text for document in read_documents("sample:evaluation", 200)]
    else:
        generator = np.random.default_rng(0)
        texts = [" ".join(generator.choice(WORDS, LENGTH)) for _ in range(2 * DOCUMENTS)]
        data, name = str(write_texts(folder / "texts.jsonl", texts[DOCUMENTS:])), str(random_model(folder, name))
    collect(name, samples=16, data=data, db=folder / "db", groups=groups, device="cpu", progress=False)
    analyze(folder / "db", out=folder / "scales.parquet")
    loaded = load_model(name)
    path = folder / "scales.parquet"
    theirs = build_upstream(path, strategy="quamba", granularity=granularity, **switches).model
    tokens = [ids[:LENGTH] for ids in loaded.tokenizer.encode_batch(texts) if len(ids) >= LENGTH][:DOCUMENTS]
    recorded: list[torch.Tensor] = []
    watched = watch(theirs, recorded)
    try:
        with torch.inference_mode():
            logits = theirs(torch.tensor(tokens, device="cuda")).logits.flatten(0, 1)
    except RuntimeError as error:
        if not switches or "kInt8" not in str(error):
            raise
        pytest.skip("this mamba_ssm calls the last norm as a float one (docs/upstream.md)")
    unwatch(watched)
    table = read_scales(path)
    scales = table.group_scales_for("quamba", granularity) if granularity else table.group_scales_for("quamba")
    host = build_model(loaded.any_weights, table, scales, compat="upstream", **switches)
    return Case(loaded, Batch.pack(tokens), theirs, recorded, logits, host)


def random_model(folder: Path, family: str) -> Path:
    """Layers of mamba-130m's or mamba2-130m's sizes (Hadamard transforms of 12 times a power of two), few tokens."""
    raw = {"d_model": 768, "n_layer": 3, "vocab_size": len(WORDS) + 1, "ssm_cfg": {}}
    if family == "mamba":
        weights = random_weights(MambaConfig(768, 3, 64, 1536, dt_rank=48))
        return write_model(folder / "model", raw, tensors_of(weights))
    weights2 = random_weights(Mamba2Config(768, 3, 64, 1536))
    return write_model(folder / "model", raw | {"ssm_cfg": {"layer": "Mamba2"}}, tensors_of(weights2))


def unwatch(watched: list[tuple[Any, str]]) -> None:
    for owner, name in watched:
        delattr(owner, name)  # its class's again


def watch(model: Any, recorded: list[torch.Tensor]) -> list[tuple[Any, str]]:
    """Keep what each step of each block returns, (tokens, channels); which methods were replaced for that."""
    watched: list[tuple[Any, str]] = []

    def rows(found: Any) -> torch.Tensor:  # (documents, length, ...), first where a residual or a state follows
        first: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return first.flatten(2).flatten(0, 1)

    def turned(found: torch.Tensor) -> torch.Tensor:  # (documents, channels, length)
        return rows(found.transpose(1, 2))

    def step(owner: Any, name: str, kept: Callable[[Any], torch.Tensor]) -> None:
        original = getattr(owner, name)

        def called(*arguments: Any, **keywords: Any) -> Any:
            found = original(*arguments, **keywords)
            recorded.append(kept(found).clone())
            return found

        setattr(owner, name, called)
        watched.append((owner, name))

    for block in model.backbone.layers:
        mixer = block.mixer
        step(block.norm, "forward", rows)
        if hasattr(mixer, "x_proj"):
            step(mixer.in_proj, "to_seqlen_last", turned)
            step(mixer.conv1d, "forward", turned)
            step(mixer.x_proj, "forward", rows)
            step(mixer.dt_proj, "to_seqlen_last", turned)
            step(mixer.selective_scan, "forward", rows)
        else:
            step(mixer.in_proj, "forward", rows)
            step(mixer.conv1d, "forward", lambda found: torch.cat([turned(part) for part in found], dim=1))
            step(mixer.qchunk_scan, "forward", rows)
        step(mixer.had, "forward", rows)
        step(mixer.out_proj, "forward", rows)
    if type(model.backbone.norm_f).__name__ == "QRMSNorm":
        step(model.backbone.norm_f, "forward", rows)
        step(model.lm_head, "forward", rows)
    return watched


class Followed:
    """Our operators on upstream's inputs: each result is compared with upstream's, which goes on in its place."""

    def __init__(self, inner: Any, recorded: list[torch.Tensor]) -> None:
        self.inner, self.left, self.seen = inner, iter(recorded), dict[str, list[float]]()

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self.inner, name)
        if name not in OPERATORS:
            return operator

        def call(*arguments: Any) -> torch.Tensor:
            found: torch.Tensor = operator(*arguments)
            wanted = next(self.left, None)
            if wanted is None:  # the last norm of a head that is not quantized
                return found
            wanted = wanted.to(found.device)
            if found.dtype == torch.int8:
                apart, off = (found.int() - wanted.int()).abs(), 0.0
            else:
                apart = (_ordered(found.half()) - _ordered(wanted)).abs()
                off = float((found.float() - wanted.float()).norm() / wanted.float().norm())
            counts = self.seen.setdefault(name, [0, 0, 0, 0.0])
            for i, count in enumerate((apart.numel(), (apart == 1).sum(), (apart > 1).sum())):
                counts[i] += int(count)
            counts[3] = max(counts[3], off)
            return found.copy_(wanted)

        return call


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_every_operator_on_upstreams_inputs(case: Case, where: str) -> None:
    sizes, device = case.host.config.operator_sizes, torch.device(where)
    inner = HostInt8Operators(sizes) if where == "cpu" else CudaInt8Operators(device, sizes)
    followed = Followed(inner, case.recorded)
    model = case.host.on(PlacedWeights(case.host.weights, followed))
    found = model.logits(model.hidden(case.batch)).float()
    assert next(followed.left, None) is None
    for name, (total, one, more, off) in followed.seen.items():
        print(f"{name} ({where}): {total} values, {one} one apart, {more} more, norm of the difference {off:.2e}")
    for name, (total, one, more, off) in followed.seen.items():
        if name in ("linear_to_int8", "linear_to_half", "rotate"):
            # Integers are exact, and their factors multiply in the same order; sums of the transform too.
            assert one + more == 0, name
        elif name == "selective_scan":
            # Float32 sums of a tree there, in order here, and its exp and log are approximate (2^-21): few values fall
            # on another float16.
            assert one + more <= 0.01 * total and off <= 2.0**-13, name
        elif name == "ssd_scan":
            # Upstream's C B^T has TF32 operands, which lose less than 2^-10 each, always toward zero, and its decayed
            # products, B and states are rounded to float16 (2^-11 each).
            assert off <= 2.0**-9, name
        else:
            # Norms, gates and the convolution: some roundings of 2^-24 of codes up to 128, and GPU approximations of
            # division, root and exp (2^-21): 1e-4 of a code, in which one value in ten thousand changes to the next.
            # (A float16 of the gated norm that goes the other way moves its whole row, but by 2^-11 of one entry.)
            assert more == 0 and one <= 1e-4 * total, name
    wanted = case.logits.to(device).float()
    # A head that is not quantized is left: a norm, and sums of d products rounded to float16 (2^-11 of the largest).
    assert (found - wanted).abs().max() <= 2.0**-10 * wanted.abs().max()


def test_the_whole_models_are_as_far_from_the_float_model(case: Case) -> None:
    """A code that goes the other way is followed by others, until the rounding is drawn anew: two INT8 models whose
    operators agree are as far apart as two draws of the same error, and as far from the float model.
    """
    device = torch.device("cuda")
    operators = CudaInt8Operators(device, case.host.config.operator_sizes)
    model = case.host.on(PlacedWeights(case.host.weights, operators))
    floating = floating_model(case.loaded.any_weights, device, torch.float16)
    ours, real = (m.logits(m.hidden(case.batch)) for m in (model, floating))
    theirs = case.logits
    targets = torch.cat([case.batch.tokens[1:], case.batch.tokens[:1]]).to(device)
    scored = torch.arange(len(targets), device=device) % LENGTH != LENGTH - 1
    logp, top = log_probabilities(real)
    figures = {}
    for name, logits in (("ours", ours), ("upstream", theirs), ("float", real)):
        nll, kl, best = torch_compare(logp, logits, targets)
        per_document = (nll * scored).view(DOCUMENTS, LENGTH).sum(1)
        figures[name] = (per_document, float(kl.mean()), float((best == top).double().mean()))
        print(f"{name}: nats per document {per_document.tolist()}, KL to float {figures[name][1]:.5f}", end=", ")
        print(f"argmax of float {figures[name][2]:.4f}")
    spread = real.float().std()
    distance = {}
    for name, a, b in (("ours", ours, real), ("upstream", theirs, real), ("both", ours, theirs)):
        difference = (a.float() - b.float()).abs() / spread
        distance[name] = float(difference.square().mean().sqrt())
        same = float((a.argmax(1) == b.argmax(1)).double().mean())
        print(f"{name}: max {difference.max():.4f}, mean {difference.mean():.5f}, rms {distance[name]:.5f}", end=", ")
        print(f"argmax {same:.4f}")
    # Independent errors of these sizes would be sqrt(a^2 + b^2) apart; shared ones are less.
    assert distance["both"] <= 1.1 * (distance["ours"] ** 2 + distance["upstream"] ** 2) ** 0.5
    # KL grows with the square of the error; over 1,204 tokens two draws of it differ by some percent.
    assert figures["ours"][1] == pytest.approx(figures["upstream"][1], rel=0.25)
    # A document's likelihood moves by the standard deviation of a token's log-likelihood, about sqrt(2 KL) of a nat,
    # over the root of as many tokens: four of these, and both models move.
    bound = 4 * (2 * (figures["ours"][1] + figures["upstream"][1]) * LENGTH) ** 0.5
    assert ((figures["ours"][0] - figures["upstream"][0]).abs() <= bound).all()


def test_decoding(case: Case) -> None:
    """The states after a prompt, and the logits of tokens fed one at a time, of one document and of two."""
    generation = pytest.importorskip("mamba_ssm.utils.generation")
    mamba2 = case.host.config.kind == MAMBA2
    documents = case.batch.tokens.view(DOCUMENTS, LENGTH)
    floating = floating_model(case.loaded.any_weights, torch.device("cuda"), torch.float16)
    for count in (1, 2):
        tokens = documents[:count, :STEPS]
        params = generation.InferenceParams(max_seqlen=STEPS, max_batch_size=count)
        recorded: list[torch.Tensor] = []
        watched = watch(case.theirs, recorded)
        with torch.inference_mode():
            theirs = [case.theirs(tokens[:, :PROMPT].cuda(), inference_params=params).logits[:, -1]]
            unwatch(watched)
            caches = params.key_value_memory_dict
            kept = [(conv.cpu().int(), ssm.cpu().int()) for conv, ssm in (caches[i] for i in sorted(caches))]
            for params.seqlen_offset in range(PROMPT, STEPS):
                token = tokens[:, params.seqlen_offset, None].cuda()
                theirs.append(case.theirs(token, inference_params=params).logits[:, -1])
        # Each layer's states of upstream's own codes: one that went the other way before would change many.
        prompt, followed = Batch.pack(tokens[:, :PROMPT].tolist()), case.host.new_state(count)
        placed, operators = PlacedBatch.of(prompt, torch.device("cpu")), case.host.placed.operators
        for layer, (conv, ssm) in enumerate(kept):
            norms = recorded[:: 6 if mamba2 else 8]  # the first step of each block
            block, scales = case.host.placed.blocks[layer], case.host.laid_out[layer]
            block.forward(operators, norms[layer].cpu(), scales, placed, followed[layer])
            ssm_codes = followed[layer].ssm.int()
            mine = ssm_codes if mamba2 else ssm_codes.transpose(1, 2)
            apart = (mine - ssm.reshape(mine.shape)).abs()
            print(f"layer {layer}: {int((apart > 0).sum())} of {apart.numel()} state codes differ")
            assert torch.equal(followed[layer].conv.int().transpose(1, 2), conv)
            # Sums in another order; in Mamba-2 float16 too, by which codes up to 127 are at most 127 * 2^-9 = 0.25
            # off, on average far less.
            assert apart.max() <= 1 and (apart > 0).double().mean() <= (0.02 if mamba2 else 1e-3)
        hidden, state = case.host.prefill(prompt)
        ours = [case.host.logits(hidden[PROMPT - 1 :: PROMPT])]
        ours += [case.host.step(tokens[:, step], state) for step in range(PROMPT, STEPS)]
        a, b = torch.stack(ours).float(), torch.stack(theirs).float().cpu()
        real = floating.logits(floating.hidden(Batch.pack(tokens.tolist()))).float().cpu()
        c = real.view(count, STEPS, -1)[:, PROMPT - 1 :].transpose(0, 1)
        distance = [float((x - y).square().mean().sqrt() / c.std()) for x, y in ((a, c), (b, c), (a, b))]
        # Until a code goes the other way, logits differ by sums of the head in another order, to a place of float16.
        same = ((a - b).abs().amax((1, 2)) <= 2.0**-10 * b.abs().max()).tolist()
        print(
            f"{count}: rms to float {distance[0]:.5f}, of upstream {distance[1]:.5f}, both {distance[2]:.5f}", end=", "
        )
        print(f"{[*same, False].index(False)} of {len(same)} steps alike before the first that is not")
        # As for a prompt: two draws of the same error, over fewer tokens.
        assert distance[2] <= 1.25 * (distance[0] ** 2 + distance[1] ** 2) ** 0.5
