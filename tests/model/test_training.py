# mypy: disable-error-code="attr-defined, misc"
"""The training recipe on a CPU: data, schedule, resuming, networks against their definitions, export."""

import json
import lzma
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.model.checkpoint import load_weights
from quambase.schema.errors import CheckpointInvalid, DataInvalid
from training.card import write_card
from training.data import (
    Windows,
    books,
    read_tokens,
    tokenize_books,
    train_tokenizer,
    write_tokens,
)
from training.export import export_model, export_run, read_model, shape_of, write_pytorch_model
from training.heldout import held_out
from training.loop import LOG, Recipe, Training, optimizer_of
from training.networks import LanguageModel, after_ssd, before_ssm
from training.scans import ssd_scan, ssm_scan
from training.shape import SHAPES, Shape

TINY = {
    "mamba1": Shape("mamba1", d_model=32, n_layer=2, vocab_size=64, d_state=4),
    "mamba2": Shape("mamba2", d_model=32, n_layer=2, vocab_size=64, d_state=4, headdim=8, ngroups=2),
}
RECIPE = Recipe(tokens=6 * 3 * 16, length=16, batch=3, warmup=2 * 48, lr=0.01, seed=5)


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, 400).astype(np.uint16)


def text_file(path: Path) -> Path:
    path.write_bytes(lzma.compress(b"A first line.\nIts second, caf\xc3\xa9.\n\n\nAnother book.\n\nThe end"))
    return path


def test_books_are_runs_of_lines(tmp_path: Path) -> None:
    assert list(books(text_file(tmp_path / "a.txt.xz"))) == [
        "A first line.\nIts second, café.",
        "Another book.",
        "The end",
    ]


def test_a_damaged_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt.xz").write_bytes(b"no xz at all")
    with pytest.raises(DataInvalid, match="cannot be read as UTF-8 text"):
        list(books(tmp_path / "a.txt.xz"))


def test_tokens_decode_to_the_books(tmp_path: Path) -> None:
    path = text_file(tmp_path / "a.txt.xz")
    tokenizer = train_tokenizer([path], tmp_path / "tokenizer.json", vocab_size=270)
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    count = write_tokens(again, path, tmp_path / "a.npy")
    found = read_tokens([tmp_path / "a.npy", tmp_path / "a.npy"])
    assert found.dtype == np.uint16 and len(found) == 2 * count
    ends = np.flatnonzero(found == 0)
    documents = [list(part) for part in np.split(found[:count], ends[:3] + 1)[:3]]
    assert [part.pop() for part in documents] == [0, 0, 0]
    assert [again.decode(part) for part in documents] == list(books(path))
    assert [list(part[:-1]) for part in tokenize_books(again, path, at_once=2)] == documents


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 3), st.integers(2, 200))
def test_an_epoch_sees_every_token_once(length: int, batch: int, seed: int, total: int) -> None:
    if total // length < 2:
        with pytest.raises(DataInvalid, match="less than two windows"):
            Windows(total, length, batch, seed)
        return
    windows = Windows(total, length, batch, seed)
    steps = -(-2 * windows.per_epoch // batch)
    starts = np.concatenate([windows.starts(step) for step in range(steps)])
    for epoch in range(2):
        seen = starts[epoch * windows.per_epoch : (epoch + 1) * windows.per_epoch]
        tokens = (np.sort(seen)[:, None] + np.arange(length)).ravel()
        assert (np.diff(tokens) == 1).all()  # adjoining and disjoint
        assert tokens[0] >= 0 and tokens[-1] + 1 < total  # the last target exists
        assert total - len(tokens) < 2 * length
    # Any step on its own, and after any other, gives the same windows.
    other = Windows(total, length, batch, seed)
    for step in reversed(range(steps)):
        assert (other.starts(step) == starts[step * batch : (step + 1) * batch]).all()


def test_epochs_and_seeds_shuffle_anew() -> None:
    one, two = (Windows(4000, 10, 399, seed) for seed in (0, 1))
    orders = [one.starts(0), one.starts(1), two.starts(0)]
    # Chance leaves about one window of 399 in its place; half of them would be no shuffle.
    assert all((a - a.min() == b - b.min()).mean() < 0.5 for a, b in zip(orders, orders[1:] + orders[:1], strict=True))


def test_learning_rate_rises_then_falls_to_zero() -> None:
    recipe = Recipe(tokens=1000, length=10, batch=1, warmup=200, lr=1.0)
    rates = [recipe.lr_at(step) for step in range(recipe.steps)]
    assert recipe.steps == 100
    assert rates[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert rates[20] == 1.0 and rates[60] == pytest.approx(0.5) and recipe.lr_at(100) == pytest.approx(0, abs=1e-12)
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_only_matrices_decay() -> None:
    model = LanguageModel(TINY["mamba2"])
    decayed, plain = (group["params"] for group in optimizer_of(model, RECIPE).param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in decayed} == {"embedding", "in_proj", "conv1d", "out_proj"}
    assert len(decayed) + len(plain) == len(names)
    model = LanguageModel(TINY["mamba1"])
    matrices = {id(p) for p in optimizer_of(model, RECIPE).param_groups[0]["params"]}
    A_logs = [p for name, p in model.named_parameters() if name.endswith("A_log")]
    assert len(A_logs) == 2 and not any(id(p) in matrices for p in A_logs)  # though two-dimensional


@pytest.mark.parametrize("architecture", TINY)
def test_resuming_equals_going_on(architecture: str, ids: np.ndarray, tmp_path: Path) -> None:
    whole = Training(TINY[architecture], RECIPE, ids, tmp_path / "whole")
    assert whole.run(log_every=1)
    stopped = Training(TINY[architecture], RECIPE, ids, tmp_path / "parts")
    assert not stopped.run(minutes=0)
    for _ in range(2):
        stopped.train_step()
    stopped.save()
    stopped.train_step()  # lost: it was not saved
    resumed = Training(TINY[architecture], RECIPE, ids, tmp_path / "parts")
    assert resumed.step == 2
    assert resumed.run(log_every=1)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name  # the same operations in the same order
    logs = [(tmp_path / run / LOG).read_text().splitlines() for run in ("whole", "parts")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0][2:] == losses[1] and len(losses[0]) == RECIPE.steps


def test_lines_after_the_checkpoint_are_dropped(ids: np.ndarray, tmp_path: Path) -> None:
    training = Training(TINY["mamba1"], RECIPE, ids, tmp_path)
    training.train_step()
    training.save()
    (tmp_path / LOG).write_text('{"step": 1}\n{"step": 2}\n')
    Training(TINY["mamba1"], RECIPE, ids, tmp_path)
    assert (tmp_path / LOG).read_text() == '{"step": 1}\n'


def test_another_runs_checkpoint_is_refused(ids: np.ndarray, tmp_path: Path) -> None:
    Training(TINY["mamba1"], RECIPE, ids, tmp_path).save()
    with pytest.raises(CheckpointInvalid, match="another run"):
        Training(TINY["mamba1"], replace(RECIPE, lr=0.02), ids, tmp_path)
    with pytest.raises(DataInvalid, match="vocabulary 64"):
        Training(TINY["mamba1"], RECIPE, ids + np.uint16(64), tmp_path / "new")


def test_training_learns(tmp_path: Path) -> None:
    """Alternating tokens: the loss must fall far below ln 2, which a unigram model could not pass."""
    ids = np.tile(np.array([3, 9], np.uint16), 400)
    training = Training(TINY["mamba1"], Recipe(tokens=40 * 64, length=16, batch=4, warmup=64, lr=0.02), ids, tmp_path)
    lines: list[str] = []
    measure = lambda model: held_out(model, [ids[:40]], length=16)  # noqa: E731
    training.run(log_every=10, measure=measure, show=lines.append)
    assert json.loads(lines[-1])["loss"] < 0.2
    assert json.loads(lines[-1])["heldout_accuracy"] == 1.0


def test_a_loss_that_is_not_finite_stops(ids: np.ndarray, tmp_path: Path) -> None:
    training = Training(TINY["mamba1"], RECIPE, ids, tmp_path)
    with torch.no_grad():
        training.model.backbone.norm_f.weight.fill_(math.nan)
    with pytest.raises(CheckpointInvalid, match="the loss is nan"):
        training.run()


def test_held_out_counts_every_target_once(ids: np.ndarray) -> None:
    """Against one document and one token at a time."""
    torch.manual_seed(0)
    model = LanguageModel(TINY["mamba1"])
    documents = [ids[:23], ids[30:31], ids[40:57], ids[60:62]]
    found = held_out(model, documents, length=8, batch=2)
    losses, right = [], []
    for document in documents:
        for first in range(0, len(document), 8):
            window = torch.from_numpy(document[first : first + 8].astype(np.int64))
            with torch.no_grad():
                logits = model(window[None])[0]
            for position in range(len(window) - 1):
                losses.append(-torch.log_softmax(logits[position], 0)[window[position + 1]].item())
                right.append(logits[position].argmax() == window[position + 1])
    assert found["heldout_targets"] == len(losses)
    # float32 sums of about 40 terms of size 4, and the figures' rounding to 5e-6 (loss) and 5e-4 (perplexity).
    assert found["heldout_loss"] == pytest.approx(np.mean(losses), abs=2e-5)
    assert found["heldout_perplexity"] == pytest.approx(math.exp(np.mean(losses)), abs=3e-3)
    assert found["heldout_accuracy"] == pytest.approx(np.mean(right), abs=6e-6)


def test_ssm_scan_by_its_definition() -> None:
    """Float64, one channel, state and time step at a time."""
    rng = np.random.default_rng(1)
    b, e, n, length = 2, 3, 4, 5
    x, dt, z = (rng.standard_normal((b, e, length)) for _ in range(3))
    A, B, C = -rng.random((e, n)), rng.standard_normal((b, n, length)), rng.standard_normal((b, n, length))
    D, bias = rng.standard_normal(e), rng.standard_normal(e)
    expected = np.zeros((b, e, length))
    for i in range(b):
        for c in range(e):
            state = np.zeros(n)
            for t in range(length):
                s = math.log1p(math.exp(dt[i, c, t] + bias[c]))
                for k in range(n):
                    state[k] = math.exp(s * A[c, k]) * state[k] + s * B[i, k, t] * x[i, c, t]
                gate = z[i, c, t] / (1 + math.exp(-z[i, c, t]))
                expected[i, c, t] = (C[i, :, t] @ state + D[c] * x[i, c, t]) * gate
    found = ssm_scan(*(torch.tensor(a, dtype=torch.float32) for a in (x, dt, A, B, C, D, z, bias)))
    # About 30 float32 operations on values below 10: 30 x 2^-24 x 10.
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


def test_ssd_scan_by_its_definition() -> None:
    """Float64; heads 0, 1 read the first group's B and C, heads 2, 3 the second's."""
    rng = np.random.default_rng(2)
    b, length, h, p, g, n = 2, 5, 4, 3, 2, 6
    x, dt = rng.standard_normal((b, length, h, p)), rng.standard_normal((b, length, h))
    B, C = rng.standard_normal((b, length, g, n)), rng.standard_normal((b, length, g, n))
    A, D, bias = -rng.random(h), rng.standard_normal(h), rng.standard_normal(h)
    expected = np.zeros_like(x)
    for i in range(b):
        for j in range(h):
            state = np.zeros((p, n))
            for t in range(length):
                s = math.log1p(math.exp(dt[i, t, j] + bias[j]))
                state = math.exp(s * A[j]) * state + s * np.outer(x[i, t, j], B[i, t, j // 2])
                expected[i, t, j] = state @ C[i, t, j // 2] + D[j] * x[i, t, j]
    found = ssd_scan(*(torch.tensor(a, dtype=torch.float32) for a in (x, dt, A, B, C, D, bias)))
    # About 40 float32 operations on values below 15: 40 x 2^-24 x 15.
    np.testing.assert_allclose(found.numpy(), expected, atol=4e-5)


@pytest.mark.filterwarnings("ignore")  # transformers' notices about missing kernels
@pytest.mark.parametrize("architecture", TINY)
def test_logits_equal_transformers(architecture: str) -> None:
    """An implementation by others; ours of Mamba-1 is compared with it in test_mamba_forward."""
    torch.manual_seed(3)
    shape = TINY[architecture]
    model = LanguageModel(shape)
    with torch.no_grad():
        for parameter in model.parameters():  # so that no norm weight is one and no bias zero
            parameter += 0.05 * torch.randn_like(parameter)
    sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "expand": 2}
    other: torch.nn.Module
    if architecture == "mamba1":
        other = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, time_step_rank=shape.dt_rank))
    else:
        other = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(
                **sizes, head_dim=8, num_heads=8, n_groups=2, chunk_size=8, tie_word_embeddings=True
            )
        )
    state = {k.replace("embedding.", "embeddings."): v for k, v in model.state_dict().items()}
    state["lm_head.weight"] = state["backbone.embeddings.weight"]
    other.load_state_dict(state)
    ids = torch.randint(0, 64, (2, 21))
    with torch.no_grad():
        # Logits below 2 after two layers of sums of 64 float32 terms: 2 x 2 x 64 x 2^-24 = 2e-5.
        torch.testing.assert_close(model(ids), other(ids).logits, atol=2e-5, rtol=0)


def test_a_loss_is_the_cross_entropy_of_the_logits(ids: np.ndarray) -> None:
    model = LanguageModel(TINY["mamba2"])
    batch = torch.from_numpy(ids[:51].astype(np.int64)).view(3, 17)
    logits = torch.log_softmax(model(batch[:, :-1]), -1)
    expected = -logits.gather(-1, batch[:, 1:, None]).mean()
    torch.testing.assert_close(model.loss(batch), expected)


@pytest.mark.parametrize("architecture", TINY)
def test_export_round_trip(architecture: str, ids: np.ndarray, tmp_path: Path) -> None:
    shape = TINY[architecture]
    training = Training(shape, RECIPE, ids, tmp_path / "run")
    training.run(log_every=2)
    (tmp_path / "tokenizer.json").write_text("{}")
    folder = export_run(tmp_path / "run", tmp_path / "tokenizer.json", tmp_path / "model")
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", LOG}
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert shape_of(json.loads((folder / "config.json").read_text())) == shape
    read = read_model(folder).state_dict()
    for name, tensor in training.model.state_dict().items():
        assert torch.equal(read[name], tensor.bfloat16().float()), name
    strict = torch.load(write_pytorch_model(folder, tmp_path / "upstream") / "pytorch_model.bin", weights_only=True)
    assert set(strict) == {*read, "lm_head.weight"}
    assert torch.equal(strict["lm_head.weight"], strict["backbone.embedding.weight"])
    assert strict["backbone.layers.0.mixer.conv1d.weight"].ndim == 3


def test_the_package_reads_an_exported_mamba1(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    model = LanguageModel(TINY["mamba1"])
    folder = export_model(model.state_dict(), TINY["mamba1"], tmp_path / "tokenizer.json", tmp_path / "model")
    weights = load_weights(folder)
    assert weights.lm_head is weights.embedding
    assert torch.equal(weights.layers[1].A_log, model.state_dict()["backbone.layers.1.mixer.A_log"].bfloat16().float())


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match=r"checkpoint.pt is missing"):
        export_run(tmp_path, tmp_path / "tokenizer.json", tmp_path / "model")


def test_reference_shapes_fit_their_limits() -> None:
    """Between 5 and 9.5 M parameters, a bfloat16 file below 16 MiB, every kind of group in Mamba-2."""
    for shape in SHAPES.values():
        count = sum(p.numel() for p in LanguageModel(shape).parameters())
        assert 5e6 < count < 9.5e6 and 2 * count < 2**24
    shape = SHAPES["mamba2-8m"]
    assert shape.headdim in (32, 64) and shape.heads >= 8 and shape.ngroups >= 2
    assert shape.heads % (4 * shape.ngroups) == 0


def test_the_card_holds_the_figures(ids: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    training = Training(TINY["mamba2"], RECIPE, ids, tmp_path / "run")
    training.run(log_every=2, measure=lambda model: held_out(model, [ids[:40]], length=16))
    folder = export_run(tmp_path / "run", tmp_path / "tokenizer.json", tmp_path / "model")
    row = {"heldout_loss": 3.6543, "heldout_perplexity": 38.64, "heldout_accuracy": 0.3123, "heldout_targets": 1234}
    text = write_card(folder, RECIPE, {"mamba-ssm, float32": row, "note": "A remark."}).read_text()
    assert "| mamba-ssm, float32 | 3.6543 | 38.64 | 0.3123 |" in text and "A remark." in text
    assert "8 heads of 8, 2 SSD groups" in text and "288 in 6 steps of 3 windows of 16" in text
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_dense_parts_take_the_activation_dtype() -> None:
    """The compiled functions return activations of the asked type and keep the residual stream in float32."""
    mixer = LanguageModel(TINY["mamba1"]).backbone.layers[0].mixer
    h = torch.randn(2, 5, 32)
    parts = before_ssm(
        h, torch.ones(32), mixer.in_proj.weight, mixer.conv1d.weight, mixer.conv1d.bias, mixer.x_proj.weight,
        mixer.dt_proj.weight, torch.bfloat16,
    )  # fmt: skip
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert [tuple(part.shape) for part in parts] == [(2, 64, 5)] * 3 + [(2, 4, 5)] * 2
    y = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    assert after_ssd(h, y, y, torch.ones(64), mixer.out_proj.weight, 2).dtype == torch.float32
