# mypy: disable-error-code="attr-defined"
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quambase.model.checkpoint import load_model, load_weights
from quambase.model.inputs.names import BUNDLED
from quambase.model.inputs.sources import find_sources
from quambase.model.language_model import floating_model
from quambase.model.mamba1 import MambaConfig
from quambase.model.weights import random_weights, tensors_of, weights_digest
from quambase.schema.errors import CheckpointInvalid, ModelNotFound

CONFIG = MambaConfig(d_model=16, n_layer=2, vocab_size=48, d_inner=32, d_state=4, d_conv=4, dt_rank=1)
MAMBA_SSM = {"d_model": 16, "n_layer": 2, "vocab_size": 45, "ssm_cfg": {"d_state": 4}, "pad_vocab_size_multiple": 8}
HUGGING_FACE = {
    "model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 48, "state_size": 4,
    "time_step_rank": "auto", "intermediate_size": 32, "conv_kernel": 4, "layer_norm_epsilon": 1e-5,
}  # fmt: skip


@pytest.fixture
def weights() -> object:
    return random_weights(CONFIG, seed=1)


def write(folder: Path, config: dict[str, object], tensors: dict[str, torch.Tensor], kind: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {k: v.clone().contiguous() for k, v in tensors.items()}
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "index":
        names = sorted(tensors)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in shards.items():
            save_file({k: tensors[k] for k in part}, folder / file)
        index = {"weight_map": {k: file for file, part in shards.items() for k in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def hugging_face(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.replace("embedding.weight", "embeddings.weight"): v for k, v in tensors.items()}


@pytest.mark.parametrize("kind", ["safetensors", "bin", "index"])
@pytest.mark.parametrize("layout", ["mamba_ssm", "hugging_face"])
def test_every_layout_gives_the_same_model(tmp_path: Path, weights: object, kind: str, layout: str) -> None:
    tensors = tensors_of(weights)
    config = MAMBA_SSM if layout == "mamba_ssm" else HUGGING_FACE
    folder = write(tmp_path / "m", config, hugging_face(tensors) if layout == "hugging_face" else tensors, kind)
    loaded = load_weights(folder)
    assert loaded.config == CONFIG
    assert weights_digest(loaded) == weights_digest(weights)
    assert loaded.lm_head is loaded.embedding


def test_an_untied_head_is_kept(tmp_path: Path, weights: object) -> None:
    tensors = tensors_of(weights) | {"lm_head.weight": torch.ones(48, 16)}
    loaded = load_weights(write(tmp_path / "m", MAMBA_SSM, tensors, "safetensors"))
    assert torch.equal(loaded.lm_head, torch.ones(48, 16))
    assert weights_digest(loaded) != weights_digest(weights)


def test_a_checkpoint_written_by_transformers_loads(tmp_path: Path) -> None:
    from transformers import MambaConfig as HFConfig
    from transformers import MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(HFConfig(vocab_size=48, hidden_size=16, num_hidden_layers=2, state_size=4))
    model.save_pretrained(tmp_path / "hf")
    loaded = load_weights(tmp_path / "hf")
    assert torch.equal(loaded.layers[1].A_log, model.backbone.layers[1].mixer.A_log)
    assert loaded.config.dt_rank == 1


def test_the_bundled_model_loads_and_predicts_english() -> None:
    loaded = load_model("mamba-5m")
    model = floating_model(loaded.any_weights)
    state = model.new_state(1)
    for token in loaded.tokenizer.encode("She looked at the old man and said to"):
        logits = model.step(torch.tensor([token]), state)
    assert loaded.tokenizer.decode([int(logits.argmax())]).strip() in {"him", "me", "her", "the", "himself", "herself"}
    assert loaded.bundled and loaded.path == BUNDLED / "mamba-5m"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, 'ssm_cfg.layer = "Mamba3"; expected "Mamba1" or "Mamba2"'),
        ({"rms_norm": False}, "rms_norm = false"),
        ({"attn_layer_idx": [1]}, "hybrid"),
        ({"ssm_cfg": {"d_state": 4, "conv_bias": False}}, "conv bias"),
        ({"d_model": 32}, "config.json implies"),
        ({"n_layer": 3}, "has no tensor backbone.layers.2.norm.weight"),
    ],
)
def test_a_config_we_cannot_follow_is_refused(tmp_path: Path, weights: object, config: dict, message: str) -> None:
    folder = write(tmp_path / "m", MAMBA_SSM | config, tensors_of(weights), "safetensors")
    with pytest.raises(CheckpointInvalid, match=message):
        load_weights(folder)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'), 'describes a "gpt2"'),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:900]), "cut short"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, weights: object, damage: object, message: str) -> None:
    folder = write(tmp_path / "m", MAMBA_SSM, tensors_of(weights), "safetensors")
    damage(folder)
    with pytest.raises(CheckpointInvalid, match=message):
        load_weights(folder)


def test_a_pickle_is_not_run(tmp_path: Path, weights: object, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "m", MAMBA_SSM, tensors_of(weights), "bin")
    torch.save({"x": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointInvalid, match="more than tensors"):
        load_weights(folder)
    assert "this ran" not in capsys.readouterr().out


def test_nan_weights_are_refused(tmp_path: Path, weights: object) -> None:
    tensors = tensors_of(weights) | {"backbone.norm_f.weight": torch.full((16,), float("nan"))}
    with pytest.raises(CheckpointInvalid, match=r"norm_f.weight holds NaN"):
        load_weights(write(tmp_path / "m", MAMBA_SSM, tensors, "safetensors"))


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(ModelNotFound, match=r"did you mean .*mamba-5m"):
        find_sources("mamba-5x")


def test_a_hub_name_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelNotFound, match=rf"2 things are not in the local hub cache {re.escape(str(tmp_path))} and could not"
    ) as e:
        find_sources("mamba-130m")
    assert "\n" not in str(e.value)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path, weights: object) -> None:
    folder = write(tmp_path / "m", MAMBA_SSM, tensors_of(weights), "safetensors")
    with pytest.raises(ModelNotFound, match=r"holds no tokenizer.json; name one with --tokenizer"):
        load_model(str(folder))
    shutil.copy(BUNDLED / "mamba-5m" / "tokenizer.json", folder)
    with pytest.raises(CheckpointInvalid, match="has 8192 tokens with ids up to 8191, the model's embedding 48 rows"):
        load_model(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointInvalid, match=r"not a readable tokenizer.json"):
        load_model(str(folder))
