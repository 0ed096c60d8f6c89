"""Builds the INT8 model with upstream Quamba's own functions and kernels, from a scale table.

An adapter to the package `quamba` (enyac-group/Quamba), its `mamba_ssm` and a CUDA GPU. docs/upstream.md says how they
were built and how far upstream's model is from ours; without them, tests use a stand-in that records the calls.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quambase.apply.apply import load_source
from quambase.apply.int8.needed_scales import Replaced, missing_scale
from quambase.apply.scale_choice import DEFAULT_OTHERWISE, notes_on
from quambase.apply.upstream.act_scales import on_device, upstream_form
from quambase.model.block_kinds import kind_of
from quambase.model.checkpoint import LoadedModel
from quambase.model.weights import tensors_of
from quambase.schema.errors import BackendUnavailable, CheckpointInvalid, OutputRefused
from quambase.schema.scale_table import SELECTED, read_scales
from quambase.schema.sites import HEAD_LAYER

CUDA = "cuda"  # upstream's functions use this device by name
NORM_EPS = 1e-5  # mamba-ssm's, which its configuration cannot change

ADVICE = "leave out --backend for quambase's own INT8 model, or use the scales there with --export FILE.pt"


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, AssertionError) as error:  # also a kernel library that does not load
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackendUnavailable(f"upstream's package is not usable here ({name}: {first}); {ADVICE}") from None


def check_gemm(linear: Any, device: str) -> None:
    """Compare upstream's INT8 GEMM, class ``linear`` (W8A8B16O16Linear), with the integer product.

    As published, its kernel has a body only for compute capability 8.0 to 8.6, and elsewhere leaves the output
    unchanged without an error. BackendUnavailable: an element differs by more than float16's rounding.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    codes = torch.randint(-127, 128, (32, 128), generator=generator).to(torch.int8)
    original = torch.nn.Linear(128, 64, bias=False).to(device=device, dtype=torch.float16)
    original.weight.data = weight.to(device=device, dtype=torch.float16)
    quantized = linear.from_fp16(original, input_scale=2.0**-10)
    found = quantized(codes.to(device)).double().cpu()
    product = codes.double() @ quantized.weight.double().cpu()[:, :64]
    expected = product * float(quantized.a) * float(quantized.b)
    if not torch.allclose(found, expected, rtol=2.0**-9, atol=2.0**-12):
        worst = float((found - expected).abs().max())
        raise BackendUnavailable(
            f"upstream's INT8 matrix product is wrong on this GPU (off by up to {worst:.3g}): its kernel is empty "
            f"outside compute capability 8.0 to 8.6; build it as compute_80 PTX, or {ADVICE}"
        )


@dataclass(frozen=True)
class Built:
    """Upstream's model, the scales that were replaced because its kernel would wrap, and notes for the user."""

    model: Any
    replaced: list[Replaced]
    notes: list[str]


def build_upstream(
    scales: Path,
    *,
    strategy: str = SELECTED,
    at: Collection[str] = (),
    otherwise: str = DEFAULT_OTHERWISE,
    granularity: str | None = None,
    quantize_lm_head: bool = False,
    quantize_embedding: bool = False,
    model: str | None = None,
    out: Path | None = None,
) -> Built:
    """Upstream's W8A8 model with one strategy's scales, on the GPU; also saved to ``out`` if that is given.

    Upstream's own loader reads a saved model only if its head is quantized, and a Mamba-2 only if it is sorted into
    four by four groups.

    Errors: OutputRefused (``out`` is not empty), BackendUnavailable (no package, no GPU, or a wrong GEMM),
    CheckpointInvalid (sizes that mamba-ssm does not support), and those of `act_scales.upstream_form` and of `apply`.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputRefused(f"{out} exists and is not an empty folder; name a new one with --out")
    utils, reordering = _module("quamba.modelutils_mamba"), _module("quamba.reorder_utils")
    linears = _module("quamba.qLinearLayer")
    if not torch.cuda.is_available():
        raise BackendUnavailable(f"upstream's kernels need a CUDA GPU and there is none; {ADVICE}")
    check_gemm(linears.W8A8B16O16Linear, CUDA)
    table = read_scales(scales)
    form, replaced = upstream_form(table, strategy, at, otherwise, granularity)
    content = on_device(form, CUDA)
    if quantize_lm_head and "lm_head:input" not in content["act_scales"][HEAD_LAYER]:
        raise missing_scale([(HEAD_LAYER, "lm_head:input")], [(HEAD_LAYER, "lm_head:input")])
    source = load_source(table, model)
    kind = kind_of(source.any_weights.config).model_type
    found = utils.configure_model(_float_model(source), kind, use_had_transform=True)
    if content["reorder_params"] is not None:
        reordering.reorder_mamba(found, content["reorder_params"])
    found = utils.fuse_had_matrices(found)
    found = utils.quantize_fp16_model(
        found,
        kind,
        content["act_scales"],
        CUDA,
        w_bits=8,
        a_bits=8,
        quantize_embedding=quantize_embedding,
        quantize_lm_head=quantize_lm_head,
    )
    if out is not None:
        _save(found, out)
    return Built(found, replaced, notes_on(table))


def _float_model(source: LoadedModel) -> Any:
    """Upstream's float16 model of these weights, on the GPU.

    Its own `from_pretrained` reads only mamba-ssm's layout in a pytorch_model.bin; ours reads every layout and format.
    """
    language, configs = _module("mamba_ssm.models.mixer_seq_simple"), _module("mamba_ssm.models.config_mamba")
    weights = source.any_weights
    sizes = asdict(weights.config)
    d_model, d_inner, eps = sizes.pop("d_model"), sizes.pop("d_inner"), sizes.pop("norm_eps")
    if d_inner % d_model or eps != NORM_EPS:
        raise CheckpointInvalid(
            f"{source.name} has {d_inner} channels of {d_model} and norms with epsilon {eps:g}; upstream's model can "
            f"only have whole multiples and {NORM_EPS:g}: {ADVICE}"
        )
    n_layer, vocab_size = sizes.pop("n_layer"), sizes.pop("vocab_size")
    config = configs.MambaConfig(
        d_model=d_model,
        n_layer=n_layer,
        vocab_size=vocab_size,
        ssm_cfg={"layer": kind_of(weights.config).layer, "expand": d_inner // d_model, **sizes},
        pad_vocab_size_multiple=1,  # padding rows are counted already
        tie_embeddings=False,  # `configure_model` unties them
    )
    found = language.MambaLMHeadModel(config, device=CUDA, dtype=torch.float16)
    found.load_state_dict({"lm_head.weight": weights.lm_head} | tensors_of(weights))
    return found


def _save(model: Any, out: Path) -> None:
    """Save as upstream's `quantize_model_mamba` does: the configuration names the classes to load."""
    config, first = model.config, model.backbone.layers[0]
    config.ssm_cfg["layer"] = type(first.mixer).__name__
    config.norm_cfg = {"norm": type(first.norm).__name__}
    config.embedding_cfg = {"layer": type(model.backbone.embedding).__name__}
    config.lm_head_cfg = {"layer": type(model.lm_head).__name__}
    config.tie_embeddings = False
    if hasattr(config, "use_cache"):
        del config.use_cache
    model.save_pretrained(str(out))
