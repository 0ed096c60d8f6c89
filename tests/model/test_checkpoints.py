# mypy: disable-error-code="attr-defined"
"""Checkpoints as people have them: read as transformers reads them, or refused in one line."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from quambase.model.checkpoint import load_model, load_weights
from quambase.model.inputs import hub
from quambase.model.language_model import floating_model
from quambase.model.mamba1 import MambaConfig
from quambase.model.mamba2 import Mamba2Config
from quambase.model.packed_batch import Batch
from quambase.model.weights import random_weights, tensors_of, weights_digest
from quambase.schema.errors import CheckpointInvalid, DataInvalid, QuambaseError

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]

MAMBA1 = MambaConfig(d_model=16, n_layer=2, vocab_size=48, d_inner=32, d_state=4, dt_rank=1)
MAMBA2 = Mamba2Config(d_model=16, n_layer=2, vocab_size=48, d_inner=32, d_state=4, headdim=8, ngroups=2)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 516567560\n"
TOKENS = list(range(1, 30))


def hugging_face(family: str, seed: int = 1) -> tuple[Config, Tensors]:
    """A random model in transformers' layout; Mamba-1's head is tied, Mamba-2's is not."""
    shared = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 48, "state_size": 4, "conv_kernel": 4}
    if family == "mamba1":
        tensors = tensors_of(random_weights(MAMBA1, seed))
        config = shared | {"model_type": "mamba", "intermediate_size": 32, "expand": 2, "time_step_rank": 1}
    else:
        tensors = tensors_of(random_weights(MAMBA2, seed))
        tensors["lm_head.weight"] = torch.randn(48, 16, generator=torch.Generator().manual_seed(seed))
        config = shared | {"model_type": "mamba2", "expand": 2, "num_heads": 4, "head_dim": 8, "n_groups": 2}
    return config, {k.replace("embedding.", "embeddings."): v for k, v in tensors.items()}


def mamba_ssm(family: str) -> tuple[Config, Tensors]:
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 45, "pad_vocab_size_multiple": 8, "rms_norm": True}
    if family == "mamba1":
        return config | {"ssm_cfg": {"d_state": 4}}, tensors_of(random_weights(MAMBA1, 1))
    ssm = {"layer": "Mamba2", "d_state": 4, "headdim": 8, "ngroups": 2}
    return config | {"ssm_cfg": ssm}, tensors_of(random_weights(MAMBA2, 1))


def write(folder: Path, config: Config, tensors: Tensors, name: str | None = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {k: v.contiguous().clone() for k, v in tensors.items()}
    if name:
        save_file(tensors, folder / name, {"format": "pt"}) if name.endswith("s") else torch.save(
            tensors, folder / name
        )
    return folder


def write_shards(folder: Path, config: Config, tensors: Tensors, stem: str, ending: str) -> Path:
    write(folder, config, tensors, None)
    names = sorted(tensors)
    parts = {f"{stem}-{i + 1:05d}-of-00002.{ending}": names[i::2] for i in range(2)}
    for name, part in parts.items():
        write(folder, config, {key: tensors[key] for key in part}, name)
    weight_map = {key: name for name, part in parts.items() for key in part}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder


def write_tokenizer(folder: Path, ids: dict[str, int], added: tuple[str, ...] = ()) -> None:
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))


def refusal(folder: Path, load: Callable[[Path], object] = load_weights) -> str:
    with pytest.raises(CheckpointInvalid) as error:
        load(folder)
    assert str(error.value).isprintable(), error.value
    return str(error.value)


def assert_as_transformers(folder: Path) -> None:
    """Our logits are those of the model that transformers loads from the same folder."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    model = floating_model(load_weights(folder))
    found = model.logits(model.hidden(Batch.pack([TOKENS]))).numpy()
    # Another model's logits are off by about their own size; both round float32 sums of at most 100 terms in another
    # order, which is some 100 times 2^-24 a layer.
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


# ---------------------------------------------------------------- what transformers reads


@pytest.mark.filterwarnings("ignore")  # transformers' notices about missing kernels and ties
class TestAsTransformers:
    @pytest.mark.parametrize("family", ["mamba1", "mamba2"])
    def test_keys_of_both_layouts(self, tmp_path: Path, family: str) -> None:
        """transformers changes its own keys when a model grows, and leaves the converted one's older keys behind."""
        config, tensors = hugging_face(family)
        grown = {k: torch.cat([v, v[:3]]) if "embeddings" in k or "head" in k else v for k, v in tensors.items()}
        old = {"d_model": 8, "n_layer": 9, "ssm_cfg": {"d_state": 99}, "pad_vocab_size_multiple": 8, "rms_norm": True}
        folder = write(tmp_path, config | {"vocab_size": 51} | old, grown)
        assert load_weights(folder).config.vocab_size == 51
        assert_as_transformers(folder)

    @pytest.mark.parametrize("family", ["mamba1", "mamba2"])
    @pytest.mark.parametrize("ending", ["safetensors", "bin"])
    def test_shards(self, tmp_path: Path, family: str, ending: str) -> None:
        stem = "model" if ending == "safetensors" else "pytorch_model"
        folder = write_shards(tmp_path, *hugging_face(family), stem, ending)
        assert weights_digest(load_weights(folder)) == weights_digest(
            load_weights(write(tmp_path / "one", *hugging_face(family)))
        )
        assert_as_transformers(folder)

    def test_which_of_several_files(self, tmp_path: Path) -> None:
        """Written over and over in place: transformers takes the first of this order, whatever lies beside it."""
        config, _ = hugging_face("mamba1")
        kinds = ["pytorch shards", "pytorch_model.bin", "shards", "model.safetensors"]
        for seed, kind in enumerate(kinds):
            tensors = hugging_face("mamba1", seed)[1]
            if kind.endswith("shards"):
                stem, ending = ("model", "safetensors") if kind == "shards" else ("pytorch_model", "bin")
                write_shards(tmp_path, config, tensors, stem, ending)
            else:
                write(tmp_path, config, tensors, kind)
            assert torch.equal(load_weights(tmp_path).embedding, tensors["backbone.embeddings.weight"]), kind
            assert_as_transformers(tmp_path)
        for shard in tmp_path.glob("model-0*"):
            shard.unlink()
        assert torch.equal(load_weights(tmp_path).embedding, tensors["backbone.embeddings.weight"]), "a left-over index"

    @pytest.mark.parametrize("family", ["mamba1", "mamba2"])
    def test_a_head_that_differs_is_kept_though_config_ties_it(self, tmp_path: Path, family: str) -> None:
        config, tensors = hugging_face(family)
        folder = write(
            tmp_path, config | {"tie_word_embeddings": True}, tensors | {"lm_head.weight": torch.randn(48, 16)}
        )
        assert_as_transformers(folder)

    @pytest.mark.parametrize("family", ["mamba1", "mamba2"])
    @pytest.mark.parametrize(
        "settings",
        [{"hidden_act": "swish"}, {"layer_norm_epsilon": 0.1}, {"residual_in_fp32": False}, {"time_step_floor": 0.5},
         {"use_mambapy": True}, {"time_step_max": 7.0}, {"bos_token_id": None}],
    )  # fmt: skip
    def test_settings_that_count_or_do_not(self, tmp_path: Path, family: str, settings: Config) -> None:
        config, tensors = hugging_face(family)
        assert_as_transformers(write(tmp_path, config | settings, tensors))

    def test_the_width_inside_is_what_config_says(self, tmp_path: Path) -> None:
        config, tensors = hugging_face("mamba1")
        assert_as_transformers(write(tmp_path / "both", config | {"expand": 3}, tensors))
        del config["intermediate_size"]
        assert_as_transformers(write(tmp_path / "expand", config, tensors))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("layout", [hugging_face, mamba_ssm])
def test_a_head_that_is_missing_is_refused_unless_it_is_tied(
    tmp_path: Path, family: str, layout: Callable[[str], tuple[Config, Tensors]]
) -> None:
    config, tensors = layout(family)
    tensors.pop("lm_head.weight", None)
    key = "tie_embeddings" if layout is mamba_ssm else "tie_word_embeddings"
    load = write(tmp_path / "tied", config | {key: True}, tensors)
    tied = load_weights(load)
    assert tied.lm_head is tied.embedding
    assert "has no tensor lm_head.weight" in refusal(write(tmp_path / "untied", config | {key: False}, tensors))
    # Where config.json says nothing, only transformers' Mamba-2 is untied.
    silent = write(tmp_path / "silent", config, tensors)
    if (layout, family) == (hugging_face, "mamba2"):
        assert "has no tensor lm_head.weight" in refusal(silent)
    else:
        assert load_weights(silent).config.n_layer == 2


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "gelu"}, 'config.json says hidden_act = "gelu"; expected "silu" or "swish"'),
        ({"hidden_act": 3}, "hidden_act = 3"),
        ({"use_bias": True}, "projection biases"),
        ({"use_bias": "no"}, 'use_bias = "no"; expected true or false'),
        ({"use_conv_bias": False}, "no conv bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has a quantization_config: the checkpoint is quantized"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon = null; expected a positive number"),
        ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon = NaN; expected a positive number"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon = -1e-05; expected a positive number"),
        ({"hidden_size": "16"}, 'hidden_size = "16"; expected a whole number from 1 to 2147483647'),
        ({"hidden_size": 16.5}, "hidden_size = 16.5"),
        ({"hidden_size": True}, "hidden_size = true"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"vocab_size": 2**31}, "vocab_size = 2147483648"),
        ({"vocab_size": 10**4000}, "vocab_size = a number of more than 60 digits"),
        ({"state_size": [4]}, "state_size = a list of 1"),
        ({"conv_kernel": {"a": "b" * 999}}, "conv_kernel = an object of 1"),
        ({"expand": [1], "intermediate_size": None}, "expand = a list of 1; expected a positive number"),
        ({"expand": 2.01, "intermediate_size": None}, "expand = 2.01; expected a factor that gives a whole number of"),
        ({"model_type": "falcon_mamba"}, 'describes a "falcon_mamba"; expected Mamba-1 or Mamba-2'),
        ({"model_type": ["mamba"]}, "model_type = "),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1; expected true or false"),
    ],
)  # fmt: skip
def test_settings_we_cannot_follow_in_transformers_words(
    tmp_path: Path, family: str, settings: Config, message: str
) -> None:
    config, tensors = hugging_face(family)
    assert message in refusal(write(tmp_path, config | settings, tensors))


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": None}, "has no d_model|says d_model = null"),
        ({"d_model": -16}, "d_model = -16; expected a whole number"),
        ({"n_layer": 1e12}, "n_layer = 1000000000000.0"),
        ({"n_layer": 10**12}, "n_layer = 1000000000000; expected a whole number"),
        ({"vocab_size": "many"}, 'vocab_size = "many"'),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple = 0"),
        ({"ssm_cfg": [1]}, "ssm_cfg = a list of 1; expected an object"),
        ({"ssm_cfg": {"d_state": math.inf}}, "ssm_cfg.d_state = Infinity"),
        ({"ssm_cfg": {"layer": 2}}, 'ssm_cfg.layer = 2; expected "Mamba1" or "Mamba2"'),
        ({"ssm_cfg": {"expand": 0}}, "ssm_cfg.expand = 0; expected a positive number"),
        ({"norm_epsilon": 1e-6}, "norm_epsilon = 1e-06; expected 1e-05"),
        ({"tie_embeddings": "yes"}, 'tie_embeddings = "yes"; expected true or false'),
        ({"quantization": {"bits": 4}}, "has a quantization: the checkpoint is quantized already"),
    ],
)
def test_settings_we_cannot_follow_in_mamba_ssms_words(
    tmp_path: Path, family: str, settings: Config, message: str
) -> None:
    config, tensors = mamba_ssm(family)
    changed = config | settings
    if isinstance(settings.get("ssm_cfg"), dict):
        changed["ssm_cfg"] = config["ssm_cfg"] | settings["ssm_cfg"]
    assert re.search(message, refusal(write(tmp_path, changed, tensors)))


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_size_that_config_leaves_out_is_named(tmp_path: Path, family: str, key: str) -> None:
    config, tensors = hugging_face(family)
    del config[key]
    assert f"config.json has no {key}; expected a whole number" in refusal(write(tmp_path, config, tensors))


@pytest.mark.parametrize("limit", [[], [0], [0.0, 0.1], "0", 3, [None, None], [0, {"__float__": "x"}], [[0], math.inf]])
def test_any_other_limit_of_the_time_step_is_refused(tmp_path: Path, limit: object) -> None:
    config, tensors = hugging_face("mamba2")
    assert "expected [0, infinity], no limit" in refusal(write(tmp_path, config | {"time_step_limit": limit}, tensors))
    for none in ([0.0, math.inf], [0, {"__float__": "Infinity"}], None):
        assert load_weights(write(tmp_path, config | {"time_step_limit": none}, tensors)).config.heads == 4


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize(
    "beside", [".weight_scale", ".weight_scale_inv", ".qweight", ".scales", ".weight.absmax", ".SCB"]
)
def test_what_a_quantizer_writes_is_refused(tmp_path: Path, family: str, beside: str) -> None:
    config, tensors = hugging_face(family)
    name = "backbone.layers.0.mixer.in_proj"
    folder = write(tmp_path, config, tensors | {name + beside: torch.ones(1)})
    assert f'has a tensor "{name}{beside}": the checkpoint is quantized already; give the original' in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_of_a_byte_each_are_refused(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    config, tensors = hugging_face("mamba2")
    key = "backbone.layers.1.mixer.out_proj.weight"
    message = refusal(write(tmp_path, config, tensors | {key: tensors[key].to(dtype)}, name))
    assert f"tensor {key} is {dtype}: the checkpoint is quantized already" in message


@pytest.mark.parametrize(
    "change",
    [lambda t: t.to(torch.complex64), lambda t: t.to(torch.int32), lambda t: t.to_sparse(), lambda t: t.to("meta"),
     lambda t: t[:1, :1].clone().expand(t.shape)],
)  # fmt: skip
def test_weights_that_are_no_plain_floats_are_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    config, tensors = hugging_face("mamba1")
    key = "backbone.layers.1.mixer.out_proj.weight"
    folder = write(tmp_path, config, {}, None)
    torch.save(tensors | {key: change(tensors[key])}, folder / "pytorch_model.bin")
    assert f"tensor {key} holds" in refusal(folder)


def test_parameters_are_weights(tmp_path: Path) -> None:
    """As in a state dict that was saved with keep_vars."""
    config, tensors = hugging_face("mamba1")
    folder = write(tmp_path, config, {}, None)
    torch.save(tensors, folder / "pytorch_model.bin")
    plain = weights_digest(load_weights(folder))
    torch.save({k: torch.nn.Parameter(v) for k, v in tensors.items()}, folder / "pytorch_model.bin")
    assert weights_digest(load_weights(folder)) == plain


OTHER_CONTENT = [b"\xff\xfe{}", b"[" * 100_000, b'{"vocab_size": ' + b"9" * 9999, b'"x"', b"null", b"{", b"\x80\x02.",
                 b"PK\x03\x04", b"\x80\x02]q\x00.", b"\x80\x02}q\x00(K\x01K\x02u."]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
             "pytorch_model.bin.index.json", "tokenizer.json"],
)  # fmt: skip
class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path, name: str) -> Path:
        config, tensors = hugging_face("mamba1")
        weights = name if name.endswith((".safetensors", ".bin")) else None
        folder = write(
            tmp_path, config, tensors, "model.safetensors" if name in ("config.json", "tokenizer.json") else weights
        )
        write_tokenizer(folder, {f"w{i}": i for i in range(47)} | {"?": 47})
        return folder

    def load(self, folder: Path) -> object:
        return load_model(str(folder))

    def test_a_pointer_of_git_lfs(self, folder: Path, name: str) -> None:
        (folder / name).write_text(POINTER)
        message = refusal(folder, self.load)
        assert f"{name} is a Git LFS pointer, not the file itself; run `git lfs pull`" in message

    def test_an_empty_file(self, folder: Path, name: str) -> None:
        (folder / name).write_bytes(b"")
        assert f"{name} is empty; download it again" in refusal(folder, self.load)

    def test_a_link_elsewhere_is_never_to_be_deleted(self, folder: Path, name: str, tmp_path: Path) -> None:
        (tmp_path / "passwd").write_text("root:x:0:0\n")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "passwd")
        assert "delete" not in refusal(folder, self.load)

    @pytest.mark.parametrize("other", ["device", "pipe", "folder"])
    def test_what_is_no_regular_file(self, folder: Path, name: str, other: str) -> None:
        (folder / name).unlink(missing_ok=True)
        if other == "device":
            (folder / name).symlink_to("/dev/zero")
        elif other == "pipe":
            os.mkfifo(folder / name)
        else:
            (folder / name).mkdir()
        assert f"{name} is not a regular file" in refusal(folder, self.load)

    @pytest.mark.parametrize("content", OTHER_CONTENT)
    def test_any_other_content(self, folder: Path, name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        assert name in refusal(folder, self.load) or "config.json" in refusal(folder, self.load)


def test_a_link_into_the_hubs_cache_is_to_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    blob = tmp_path / "cache" / "blob"
    blob.parent.mkdir()
    blob.write_bytes(b"{")
    (tmp_path / "config.json").symlink_to(blob)
    assert hub.mend(tmp_path / "config.json") == f"delete {blob.resolve()} and repeat the command"
    assert f"delete {blob.resolve()} and" in refusal(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"], {"x": 1}, {"x": None}, "model.safetensors"])
@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_without_files_is_refused(tmp_path: Path, weight_map: object, stem: str) -> None:
    folder = write(tmp_path, *hugging_face("mamba1"), None)
    for index in ({"weight_map": weight_map}, {}, []):
        (folder / f"{stem}.index.json").write_text(json.dumps(index))
        assert f"{stem}.index.json" in refusal(folder)


@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_leads_nowhere_else(tmp_path: Path, stem: str) -> None:
    config, tensors = hugging_face("mamba1")
    outside = write(tmp_path / "other", config, tensors, stem) / stem
    folder = write(tmp_path / "m", config, tensors, None)
    (folder / "sub").mkdir()
    for name in (
        f"../other/{stem}",
        str(outside),
        f"sub/../../other/{stem}",
        "..",
        "",
        stem + "\0",
        "x" * 999 + stem,
        "x.pkl",
    ):
        (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
        assert "index.json names " in refusal(folder) and "file beside it" in refusal(folder)
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, f"gone-{stem}")}))
    assert f"gone-{stem} is missing, though the index names it" in refusal(folder)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    config, tensors = hugging_face("mamba1")
    folder = write(tmp_path, config, tensors, "pytorch_model.bin")
    plain = folder / "pytorch_model.bin"
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.namelist():
            packed.writestr(entry, archive.read(entry))
    plain.write_bytes((tmp_path / "packed").read_bytes())
    assert "is a compressed archive; expected what torch.save writes" in refusal(folder)


# ---------------------------------------------------------------- tokens and rows


def test_a_token_id_beyond_the_embedding_is_refused_before_any_work(tmp_path: Path) -> None:
    folder = write(tmp_path, *hugging_face("mamba1"))
    for largest in (48, 400, 10**9):
        write_tokenizer(folder, {f"w{i}": i for i in range(46)} | {"?": 46, "last": 47})
        raw = json.loads((folder / "tokenizer.json").read_text())
        raw["model"]["vocab"]["last"] = largest
        (folder / "tokenizer.json").write_text(json.dumps(raw))
        message = refusal(folder, lambda f: load_model(str(f)))
        assert f"has 48 tokens with ids up to {largest}, the model's embedding 48 rows" in message
    write_tokenizer(folder, {"?": 0, "last": 47})
    assert load_model(str(folder)).tokenizer.encode("last x") == [47, 0]


def test_an_added_token_without_a_row_stops_only_the_text_that_holds_it(tmp_path: Path) -> None:
    folder = write(tmp_path, *hugging_face("mamba1"))
    write_tokenizer(folder, {f"w{i}": i for i in range(47)} | {"?": 47}, ("<pad>",))
    tokenizer = load_model(str(folder)).tokenizer
    assert tokenizer.encode("w1 w2") == [1, 2]
    assert tokenizer.ids == 48
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["w3", text])):
        with pytest.raises(DataInvalid, match=r'begins "w1 <pad>" holds the token "<pad>" of id 48, .* has 48 rows'):
            encode("w1 <pad>")


def test_a_text_that_a_tokenizer_cannot_encode_is_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path, *hugging_face("mamba1"))
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="missing"))
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = load_model(str(folder)).tokenizer
    assert loaded.encode("a") == [0]
    with pytest.raises(DataInvalid, match="cannot encode a text"):
        loaded.encode("b")


# ---------------------------------------------------------------- any content

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 16, 2**31, "DIGITS"])
JSON = st.recursive(
    st.none() | st.booleans() | st.text(max_size=5) | NUMBERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FILES = st.dictionaries(st.text(max_size=4), JSON | st.just("../a.safetensors"))
KINDS = [hugging_face("mamba1"), hugging_face("mamba2"), mamba_ssm("mamba1"), mamba_ssm("mamba2")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [write(tmp_path_factory.mktemp("any"), *kind) for kind in KINDS]


def dumps(value: object) -> str:
    """As JSON; ``DIGITS`` becomes a number that Python refuses to read."""
    return json.dumps(value).replace('"DIGITS"', "9" * 5000)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_change_of_config_loads_or_is_one_line(folders: list[Path], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(KINDS) - 1))
    config = copy.deepcopy(KINDS[place][0])
    for _ in range(data.draw(st.integers(1, 3))):
        target = config.get("ssm_cfg") if data.draw(st.booleans()) else config
        target = target if isinstance(target, dict) and target else config
        key = data.draw(
            st.sampled_from([*target, "tie_embeddings", "hidden_act", "dt_limit", "time_step_limit", "d_ssm"])
        )
        if data.draw(st.booleans()):
            target[key] = data.draw(JSON)
        else:
            target.pop(key, None)
    text = dumps(config)
    if data.draw(st.integers(0, 3)) == 0:
        cut = data.draw(st.integers(0, len(text)))
        text = text[:cut] + data.draw(st.text(max_size=3)) + text[cut + data.draw(st.integers(0, 3)) :]
    (folders[place] / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_weights(folders[place])
    except QuambaseError as error:
        assert str(error).isprintable()


@settings(max_examples=150, deadline=None)
@given(
    JSON
    | st.dictionaries(
        st.just("weight_map"), JSON | st.dictionaries(st.text(max_size=4), JSON | st.just("../a.safetensors"))
    )
)
def test_any_index_loads_or_is_one_line(tmp_path_factory: pytest.TempPathFactory, index: object) -> None:
    folder = write(tmp_path_factory.mktemp("index"), *KINDS[0], None)
    (folder / "model.safetensors.index.json").write_text(dumps(index))
    assert refusal(folder)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["model.safetensors", "pytorch_model.bin"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3),
    st.floats(0, 1),
)
def test_any_damage_of_weights_loads_or_is_one_line(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[float, int]], end: float
) -> None:
    folder = write(tmp_path_factory.mktemp("damage"), *KINDS[0], name)
    content = bytearray((folder / name).read_bytes())
    for where, byte in changes:
        content[min(int(where**4 * len(content)), len(content) - 1)] = byte  # most of them near the beginning
    (folder / name).write_bytes(content[: len(content) if end > 0.3 else int(end * len(content))])
    try:
        load_weights(folder)
    except QuambaseError as error:
        assert str(error).isprintable()
