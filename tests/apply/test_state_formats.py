"""Formats of the cached state: numbers against PyTorch's casts, scales and feedback against the definition."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.analyzer.analyze import analyze
from quambase.apply.evaluation.candidates import from_scales
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.int8.build import int8_on_cuda
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.apply.int8.operators import simulated_scans
from quambase.apply.int8.operators.host import HostInt8Operators
from quambase.apply.int8.state_formats import (
    CHANNEL,
    FEEDBACK,
    GRIDS,
    HEAD,
    INDEX,
    RESIDUAL_LEVELS,
    ROUNDINGS,
    SCALES,
    SITE,
    STOCHASTIC,
    TABLE,
    SimulatedState,
    StateFormat,
    StateLayout,
)
from quambase.collector.collect import collect
from quambase.model.packed_batch import Batch
from quambase.schema.errors import DataInvalid
from quambase.schema.values.number_format import INT8

KINDS = {"mamba1": write_tiny_model, "mamba2": write_tiny_mamba2}
CASTS = {"fp8": torch.float8_e4m3fn, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMATS = [
    StateFormat(number, scales, rounding, every)
    for number in GRIDS
    for scales in (SCALES if GRIDS[number].scaled else (TABLE,))
    for rounding in (ROUNDINGS if number != "float32" else ROUNDINGS[:1])
    for every in ((1, 7) if scales != TABLE else (1,))
]


def kept(values: torch.Tensor, text: str, table: float = 1.0, channels: int = 1, heads: int = 1) -> SimulatedState:
    """A state that has kept ``values`` (b, ., .)."""
    layout = StateLayout(torch.tensor(table), channels, heads)
    empty = torch.zeros(len(values), 1, 1)
    state = SimulatedState(empty, empty, layout, StateFormat.parse(text), torch.Generator().manual_seed(0))
    state.keep(values)
    return state


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_format_is_read_as_it_is_written(form: StateFormat) -> None:
    assert StateFormat.parse(str(form)) == form


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int9", "expected one of int8, int16, fp8"),
        ("int8:channel:site", "is no format"),
        ("int8:channel:channel", "is no format"),
        ("int8:nearest:feedback", "is no format"),
        ("int8:channel:every=0", "is no format"),
        ("int8:channel:every=", "is no format"),
        ("int8:every=4", "fixed"),
        ("float16:channel", "has no scales"),
        ("float32:stochastic", "not rounded"),
        ("", "is no format"),
    ],
)
def test_what_is_no_format(text: str, said: str) -> None:
    with pytest.raises(DataInvalid, match=said):
        StateFormat.parse(text)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
@settings(deadline=None)
def test_numbers_are_those_of_pytorchs_casts(values: list[float]) -> None:
    x = torch.tensor(values).view(1, 1, -1)
    for number, dtype in CASTS.items():
        largest = torch.finfo(dtype).max
        assert GRIDS[number].largest == largest
        expected = x.clamp(-largest, largest).to(dtype).to(torch.float32)
        # A table's scale of 448 / 127 makes the scale of fp8 one.
        found = kept(x, number, table=448 / 127).ssm
        assert torch.equal(found, expected), (number, found, expected)
    codes = INT8.quantize(x.numpy(), 0.5)
    assert np.array_equal(kept(x, "int8", table=0.5).ssm.numpy(), codes.astype(np.float32) * 0.5)


@pytest.mark.parametrize("number", [name for name in GRIDS if name != "float32"])
def test_stochastic_rounding_is_to_a_neighbour_and_true_in_the_mean(number: str) -> None:
    value, count = 3.3, 20_000
    text = f"{number}:stochastic"
    found = kept(torch.full((1, 1, count), value), text, table=GRIDS[number].largest / 127).ssm
    below, above = found.min().item(), found.max().item()
    spacing = float(GRIDS[number].spacing(torch.tensor([value])))
    assert below < value < above and above - below == spacing and len(found.unique()) == 2
    # The mean of ``count`` draws of two values: five standard errors.
    assert abs(found.double().mean().item() - value) < 5 * spacing * 0.5 / math.sqrt(count)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("scales", [SITE, HEAD, CHANNEL, INDEX])
def test_scales_are_the_largest_of_what_shares_one(channels: int, scales: str) -> None:
    heads, shape = 3, (2, 6, 4) if channels == 1 else (2, 4, 6)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    state = kept(values, f"int8:{scales}", channels=channels, heads=heads)
    count = set()
    for b, i, n in itertools.product(range(2), range(6), range(4)):
        of = values[b] if channels == 1 else values[b].T  # (channels, indices)
        share = {SITE: of, HEAD: of[i // 2 * 2 : i // 2 * 2 + 2], CHANNEL: of[i], INDEX: of[:, n]}[scales]
        expected = np.float32(share.abs().max().item()) / np.float32(127)
        code = np.rint(np.float32(of[i, n].item()) / expected)
        found = state.ssm[b] if channels == 1 else state.ssm[b].T
        assert found[i, n].item() == np.float32(code) * expected
        count.add((b, float(expected)))
    assert state.layout.scale_count(values.shape, scales) == len(count) // 2


def test_a_state_of_zeros_stays_zero() -> None:
    for form in FORMATS:
        assert torch.equal(kept(torch.zeros(2, 4, 3), str(form)).ssm, torch.zeros(2, 4, 3)), form


def test_scales_are_kept_for_some_tokens() -> None:
    state = kept(torch.full((1, 1, 2), 127.0), "int8:site:every=3")
    seen = []
    for value in (254.0, 254.0, 254.0):
        state.keep(torch.full((1, 1, 2), value))
        seen.append(state.ssm[0, 0, 0].item())
    assert seen == [127.0, 127.0, 254.0]  # beyond the old scale it saturates


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30))
@settings(deadline=None)
def test_feedback_is_that_of_the_definition(values: list[float]) -> None:
    scale = np.float32(0.25)
    state, residual = None, np.float32(0)
    unit = scale / np.float32(2 * RESIDUAL_LEVELS)
    for value in values:
        x = torch.full((1, 1, 1), value)
        if state is None:
            state = kept(x, f"int8:{FEEDBACK}", table=0.25)
        else:
            state.keep(x)
        with_error = np.float32(value) + residual
        stored = np.float32(np.clip(np.rint(with_error / scale), -128, 127)) * scale
        residual = np.float32(np.clip(np.rint((with_error - stored) / unit), -127, 127)) * unit
        assert state.ssm.item() == stored


def test_feedback_adds_up_what_rounding_loses() -> None:
    """A constant below half a step is lost to nearest rounding; with feedback its mean is kept."""
    for rounding, expected in (("", 0.0), (":feedback", 0.3)):
        state = kept(torch.full((1, 1, 1), 0.3), f"int8{rounding}")
        total = state.ssm.item()
        for _ in range(999):
            state.keep(torch.full((1, 1, 1), 0.3))
            total += state.ssm.item()
        # What is lost at the end is one residual, and each step's residual is rounded to 1/254.
        assert total / 1000 == pytest.approx(expected, abs=0.5 / 254 + 0.001)


def test_bytes_of_a_sequence() -> None:
    values = torch.ones(3, 6, 4)
    expected = {"int8": 24, "int8:channel": 24 + 4 * 6, "int8:index": 24 + 16, "int8:head": 24 + 8, "fp8:site": 28,
                "int8:feedback": 48, "float16": 48, "float32": 96, "int16:channel:stochastic": 48 + 24}  # fmt: skip
    for text, count in expected.items():
        state = kept(values, text, heads=2)
        state.conv = torch.zeros(3, 4, 5, dtype=torch.int8)
        assert state.bytes_per_sequence == 20 + count
        assert state.first(2).bytes_per_sequence == 20 + count and len(state.first(2).ssm) == 2


# In a model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    KINDS[request.param](root / "tiny")
    write_texts(root / "text.jsonl", [" ".join(f"w{(7 * i + j) % 19}" for j in range(30)) for i in range(12)])
    collect(str(root / "tiny"), data=str(root / "text.jsonl"), db=root / "db", progress=False)
    analyze(root / "db", strategies=["absmax"], out=root / "scales.parquet")
    return root


def int8_model(world: Path) -> Int8LanguageModel:
    found = from_scales(world / "scales.parquet", ["absmax"], None, False, quantize_embedding=False, compat=None)
    model = found.models["absmax"]
    assert isinstance(model, Int8LanguageModel)
    return model


def test_int8_with_the_tables_scales_is_the_kernels_state(world: Path) -> None:
    model = int8_model(world)
    simulated = model.with_state(StateFormat.parse("int8"))
    batch = Batch.pack([[1, 2, 3, 4, 5, 6], [7, 8, 9]])
    tokens = torch.tensor([4, 5])
    states = []
    for each in (model, simulated):
        hidden, state = each.prefill(batch)
        logits = each.step(tokens, state)
        states.append((hidden, logits, state))
    (hidden, logits, codes), (same_hidden, same_logits, values) = states
    assert torch.equal(hidden, same_hidden)
    # Scans of other kernels: float32 sums in another order, and a quotient at a tie.
    assert torch.allclose(logits, same_logits, rtol=0, atol=1e-3)
    off = whole = 0
    for kernel, simulation in zip(codes, values, strict=True):
        assert isinstance(simulation, SimulatedState) and simulation.scales is not None
        found = (simulation.ssm / simulation.scales).round()
        assert torch.allclose(found, simulation.ssm / simulation.scales, rtol=1e-5)
        difference = (found - kernel.ssm).abs()
        assert difference.max() <= 1
        off, whole = off + int(difference.sum()), whole + difference.numel()
    assert off <= whole / 100


def test_plain_pytorch_makes_the_kernels_state_of_a_prompt(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA does where a state is simulated: prefill's kernels give the outputs, plain PyTorch the state."""
    model = int8_model(world).with_state(StateFormat("float32"))
    batch = Batch.pack([[1, 2, 3, 4, 5, 6], [7], [8, 9, 1, 1]])
    kernels = model.prefill(batch)
    plain = simulated_on_prefill(model, monkeypatch)
    found = plain.prefill(batch)
    assert torch.equal(kernels[0], found[0])
    for kernel, state in zip(kernels[1], found[1], strict=True):
        # Sums of six float32 products in another order, of a Mamba-2 then rounded to float16.
        assert torch.allclose(kernel.ssm, state.ssm, rtol=2e-3, atol=1e-6)


def simulated_on_prefill(model: Int8LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Int8LanguageModel:
    """``model`` with the state of prefill made as on CUDA."""
    scan: Any = HostInt8Operators.selective_scan
    ssd: Any = HostInt8Operators.ssd_scan
    plain_scan: Any = simulated_scans.selective_scan
    plain_ssd: Any = simulated_scans.ssd_scan

    def selective_scan(self: HostInt8Operators, *arguments: Any) -> torch.Tensor:
        *given, state = arguments
        if isinstance(state, SimulatedState):
            plain_scan(*given, state)
        found: torch.Tensor = scan(self, *given, None)
        return found

    def ssd_scan(self: HostInt8Operators, *arguments: Any) -> torch.Tensor:
        *given, state = arguments
        if isinstance(state, SimulatedState):
            plain_ssd(*given, state, self.sizes.ngroups)
        found: torch.Tensor = ssd(self, *given, None)
        return found

    monkeypatch.setattr(HostInt8Operators, "selective_scan", selective_scan)
    monkeypatch.setattr(HostInt8Operators, "ssd_scan", ssd_scan)
    return model


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("text", ["int8", "int8:channel", "fp8:head", "int8:index:feedback"])
def test_cuda_keeps_the_cpus_states(world: Path, text: str) -> None:
    host = int8_model(world).with_state(StateFormat.parse(text))
    device = int8_on_cuda({"": host}, torch.device("cuda"))[""]
    assert isinstance(device, Int8LanguageModel) and device.state_format == host.state_format
    batch, tokens = Batch.pack([[1, 2, 3, 4, 5, 6], [7, 8, 9]]), torch.tensor([4, 5])
    found = []
    for model in (host, device):
        _, state = model.prefill(batch)
        logits = model.step(tokens, state)
        found.append((logits.float().cpu(), [each.ssm.cpu() for each in state]))
    # A code of an activation may differ by one, which a step of the state follows.
    assert torch.allclose(found[0][0], found[1][0], rtol=0, atol=0.02)
    off = [
        ((mine - other).abs() > 1e-3 * mine.abs().max()).float().mean()
        for mine, other in zip(*[s for _, s in found], strict=True)
    ]
    assert max(off) < 0.05


def test_an_unrounded_state_decodes_as_prefill(world: Path, tmp_path: Path) -> None:
    states = ["float32", "int16:channel", "int8", "int8:index:stochastic"]
    found = evaluate(
        scales=world / "scales.parquet", strategies=["absmax"], data=world / "text.jsonl", mode="decode",
        prompt_tokens=2, states=states, db=tmp_path / "db", device="cpu",
    ).results.to_pylist()  # fmt: skip
    labels = ["absmax", *(f"absmax, state {StateFormat.parse(text)}" for text in states)]
    kl = {
        (task, label): sum(row["kl"] for row in found if (row["task"], row["strategy"]) == (task, label))
        for task in ("decode", "prefill") for label in labels
    }  # fmt: skip
    assert not any(kl["prefill", label] for label in labels[1:]), "a forward pass has no format"
    unrounded, prefill = kl["decode", labels[1]], kl["prefill", "absmax"]
    # Decoding rounds elsewhere than prefill (the convolution's sums, x of a Mamba-2), by codes of one.
    assert unrounded == pytest.approx(prefill, rel=0.25)
    assert kl["decode", labels[2]] == pytest.approx(unrounded, rel=0.25)
    # As `int8` is the kernels' own arithmetic.
    assert kl["decode", labels[3]] == pytest.approx(kl["decode", "absmax"], rel=0.1)


def test_formats_act_in_decoding_only(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="say --mode decode"):
        evaluate(scales=world / "scales.parquet", data=world / "text.jsonl", states=["int8"], db=tmp_path / "db")


def test_stochastic_rounding_repeats(world: Path) -> None:
    model = int8_model(world).with_state(StateFormat("int8", CHANNEL, STOCHASTIC))
    logits = []
    for _ in range(2):
        _, state = model.prefill(Batch.pack([[1, 2, 3]]))
        for token in (4, 5, 6):
            found = model.step(torch.tensor([token]), state)
        logits.append(found)
    assert torch.equal(*logits)
