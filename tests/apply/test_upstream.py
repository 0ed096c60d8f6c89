"""The adapter to upstream's package, against a stand-in that records what is called with what, in which order."""

from __future__ import annotations

import json
import shutil
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from test_act_scales import models, table_of, write  # noqa: F401  a fixture
from test_apply_evaluate import scale_rows

from quambase.apply.upstream import backend as upstream
from quambase.cli.main import quambase
from quambase.schema.errors import BackendUnavailable, CheckpointInvalid, ScalesInvalid
from quambase.schema.groups import LayerGroups
from quambase.schema.sites import MAMBA1, MAMBA2, layer_sites


class Linear:
    """What upstream's W8A8B16O16Linear computes: codes times int8 weights, times both scales, in float16."""

    def __init__(self, weight: torch.Tensor, input_scale: float) -> None:
        scale = weight.abs().max().clamp(min=1e-5) / 127
        self.weight = torch.round(weight / scale).clamp(-128, 127).to(torch.int8).t()
        self.a = torch.tensor([[input_scale]])
        self.b = torch.tensor([[float(scale)]])

    @classmethod
    def from_fp16(cls, original: torch.nn.Linear, input_scale: float = 1.0) -> Linear:
        return cls(original.weight.data, input_scale)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ self.weight.float() * self.a * self.b).half()


class Empty(Linear):
    """The kernel on a GPU it was not built for."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), self.weight.shape[1], dtype=torch.float16)


class Model:
    """mamba-ssm's MambaLMHeadModel as it is called."""

    def __init__(self, config: SimpleNamespace, *, calls: list, **kwargs: object) -> None:
        self.calls, self.config = calls, config
        calls.append(("MambaLMHeadModel", deepcopy(vars(config)), kwargs))
        config.use_cache = False  # as upstream's functions leave it; its own classes cannot be made with it
        layer = SimpleNamespace(mixer=torch.nn.Identity(), norm=torch.nn.Identity())
        self.backbone = SimpleNamespace(layers=[layer], embedding=torch.nn.Identity())
        self.lm_head = torch.nn.Identity()

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        self.calls.append(("load_state_dict", tensors))

    def save_pretrained(self, folder: str) -> None:
        self.calls.append(("save_pretrained", folder, vars(self.config).copy()))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list:
    """The stand-in installed, its kernels working, its "GPU" the CPU; what it was called with."""
    made: list = []

    def record(name: str, **fixed: object):
        def called(model: Model, *args: object, **kwargs: object) -> Model:
            made.append((name, args, kwargs))
            return model

        return called

    functions = ("configure_model", "fuse_had_matrices", "quantize_fp16_model")
    contents = {
        "quamba": {},
        "quamba.modelutils_mamba": {name: record(name) for name in functions},
        "quamba.reorder_utils": {"reorder_mamba": record("reorder_mamba")},
        "quamba.qLinearLayer": {"W8A8B16O16Linear": Linear},
        "mamba_ssm": {},
        "mamba_ssm.models": {},
        "mamba_ssm.models.config_mamba": {"MambaConfig": SimpleNamespace},
        "mamba_ssm.models.mixer_seq_simple": {"MambaLMHeadModel": partial(Model, calls=made)},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(upstream, "CUDA", "cpu")
    return made


def table(family: str, models: dict[str, Path], folder: Path, groups: list[LayerGroups] | None = None) -> Path:  # noqa: F811
    scales = {(layer, site.name): 0.5 for layer, site in layer_sites(2, family)}
    rows = scale_rows(scales, "mse", True, family=family)
    return write(table_of(rows, models[family], groups), folder / "scales.parquet")


def test_mamba1_is_built_as_upstream_builds_it(calls: list, models: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    upstream.build_upstream(table(MAMBA1, models, tmp_path), quantize_lm_head=True, out=tmp_path / "out")
    assert [call[0] for call in calls] == [
        "MambaLMHeadModel", "load_state_dict", "configure_model", "fuse_had_matrices", "quantize_fp16_model",
        "save_pretrained",
    ]  # fmt: skip
    made, loaded, configure, _, quantize, save = calls
    ssm = {"layer": "Mamba1", "expand": 2, "d_state": 4, "d_conv": 4, "dt_rank": 1}
    # The folder has 60 rows in its config.json, padded to a multiple of 8.
    sizes = {"d_model": 16, "n_layer": 2, "vocab_size": 64, "pad_vocab_size_multiple": 1, "tie_embeddings": False}
    assert made[1:] == (sizes | {"ssm_cfg": ssm}, {"device": "cpu", "dtype": torch.float16})
    # A tied head too has to be given: upstream's classes are made with one of their own.
    names = {*load_file(models[MAMBA1] / "model.safetensors"), "lm_head.weight"}
    assert loaded[1].keys() == names
    assert configure[1:] == (("mamba",), {"use_had_transform": True})
    kind, act_scales, device = quantize[1]
    assert (kind, device) == ("mamba", "cpu") and act_scales[0]["x_proj:input"].item() == 0.5
    # Upstream's own defaults are 4 bits, and a quantized head and embedding.
    assert quantize[2] == {"w_bits": 8, "a_bits": 8, "quantize_embedding": False, "quantize_lm_head": True}
    assert save[1] == str(tmp_path / "out")
    assert save[2] == sizes | {
        "ssm_cfg": ssm | {"layer": "Identity"},
        "norm_cfg": {"norm": "Identity"},
        "embedding_cfg": {"layer": "Identity"},
        "lm_head_cfg": {"layer": "Identity"},
    }


def test_a_sorted_mamba2_is_reordered_before_the_rotation(calls: list, models: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    groups = [LayerGroups(tuple(range(8)), ((2, 2), (2, 2)), tuple(range(64)), (((8,), (8,)),) * 2)] * 2
    upstream.build_upstream(table(MAMBA2, models, tmp_path, groups))
    assert [call[0] for call in calls] == [
        "MambaLMHeadModel", "load_state_dict", "configure_model", "reorder_mamba", "fuse_had_matrices",
        "quantize_fp16_model",
    ]  # fmt: skip
    assert calls[0][1]["ssm_cfg"] == {
        "layer": "Mamba2", "expand": 2, "d_state": 16, "d_conv": 4, "headdim": 8, "ngroups": 2,
    }  # fmt: skip
    assert "backbone.layers.1.mixer.norm.weight" in calls[1][1]
    (params,) = calls[3][1]
    assert params["head_index"][1].tolist() == list(range(8))
    assert calls[-1][1][0] == "mamba2" and len(calls[-1][1][1][0]["x_conv_out:input"]) == 2


def test_the_command_prints_the_folder_and_says_what_upstream_cannot_read(
    calls: list,
    models: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    command = ["apply", "--scales", str(table(MAMBA1, models, tmp_path)), "--backend", "quamba", "--out", "folder"]
    done = CliRunner().invoke(quambase, command)
    assert (done.exit_code, done.stdout) == (0, "folder\n")
    assert done.stderr.splitlines() == [
        "scales of run run-a",
        "note: upstream's own loader reads no model without --quantize-lm-head",
    ]
    done = CliRunner().invoke(quambase, [*command, "--quantize-lm-head"])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "folder\n", "scales of run run-a\n")


def test_a_kernel_that_computes_nothing_is_noticed(
    calls: list,
    models: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upstream.check_gemm(Linear, "cpu")
    monkeypatch.setattr(sys.modules["quamba.qLinearLayer"], "W8A8B16O16Linear", Empty)
    with pytest.raises(BackendUnavailable, match=r"INT8 matrix product is wrong on this GPU \(off by up to .*\)"):
        upstream.build_upstream(table(MAMBA1, models, tmp_path))
    assert calls == []


def test_one_wrong_element_is_noticed() -> None:
    class Off(Linear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            found = super().__call__(x)
            found[3, 5] += 2.0**-5
            return found

    with pytest.raises(BackendUnavailable):
        upstream.check_gemm(Off, "cpu")


def test_sizes_that_mamba_ssm_cannot_have(calls: list, models: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "model"
    shutil.copytree(models[MAMBA1], folder)
    raw = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4}
    raw |= {"time_step_rank": 1, "layer_norm_epsilon": 1e-6}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointInvalid, match="32 channels of 16 and norms with epsilon 1e-06"):
        upstream.build_upstream(table(MAMBA1, {MAMBA1: folder}, tmp_path))


def test_a_quantized_head_needs_its_scale(calls: list, models: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    scales = {(layer, site.name): 0.5 for layer, site in layer_sites(2, MAMBA1) if layer >= 0}
    path = write(table_of(scale_rows(scales, "mse", True), models[MAMBA1]), tmp_path / "s.parquet")
    with pytest.raises(ScalesInvalid, match="no scale for layer -1 lm_head:input"):
        upstream.build_upstream(path, quantize_lm_head=True)


def test_without_the_package_or_a_gpu_there_is_one_line(
    calls: list,
    models: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["apply", "--scales", str(table(MAMBA1, models, tmp_path)), "--backend", "quamba", "--out", "folder"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(quambase, command)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert "need a CUDA GPU and there is none; leave out --backend" in done.stderr
    monkeypatch.setitem(sys.modules, "quamba.reorder_utils", None)
    done = CliRunner().invoke(quambase, command)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert "upstream's package is not usable here (quamba.reorder_utils:" in done.stderr
    assert "--export FILE.pt" in done.stderr
