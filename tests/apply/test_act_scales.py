# mypy: disable-error-code="list-item"
"""Scales in upstream's form and back: the same tensors; every channel gets the scale of its own group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_apply_evaluate import scale_rows
from tiny_int8_mamba2 import CONFIG as CONFIG2
from tiny_int8_mamba2 import tiny_weights as tiny_mamba2
from tiny_model import write_tiny_model

from quambase.apply.apply import apply
from quambase.apply.int8.model_folder import load_stored
from quambase.apply.upstream.act_scales import STATE, X, export_act_scales, on_device, upstream_form
from quambase.apply.upstream.import_act_scales import import_act_scales
from quambase.cli.main import quambase
from quambase.model.checkpoint import load_model
from quambase.model.weights import tensors_of
from quambase.schema.errors import ScalesInvalid
from quambase.schema.groups import LayerGroups
from quambase.schema.scale_table import ScaleTable, read_scales, write_scales
from quambase.schema.sites import MAMBA1, MAMBA2, layer_sites
from quambase.schema.tables import SCALES

HEADS, HEADDIM, D_STATE = CONFIG2.heads, CONFIG2.headdim, CONFIG2.d_state
positive = st.floats(min_value=2.0**-20, max_value=2.0**10, width=32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family: 2 layers; the second has 8 heads of 8 channels in 2 SSD groups, d_state 16."""
    root = tmp_path_factory.mktemp("models")
    first = write_tiny_model(root / "tiny")
    second = root / "tiny2"
    second.mkdir()
    save_file({k: v.clone().contiguous() for k, v in tensors_of(tiny_mamba2()).items()}, second / "model.safetensors")
    ssm = {"layer": "Mamba2", "d_state": D_STATE, "headdim": HEADDIM, "ngroups": CONFIG2.ngroups}
    raw = {"d_model": CONFIG2.d_model, "n_layer": CONFIG2.n_layer, "vocab_size": CONFIG2.vocab_size, "ssm_cfg": ssm}
    (second / "config.json").write_text(json.dumps(raw))
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(CONFIG2.vocab_size)}, unk_token="w0")).save(
        str(second / "tokenizer.json")
    )
    return {MAMBA1: first, MAMBA2: second}


def table_of(rows: list[dict], model: Path, groups: list[LayerGroups] | None = None) -> ScaleTable:
    loaded = load_model(str(model))
    about = {"name": model.name, "path": str(model), "family": loaded.family, "n_layer": 2}
    about |= {"d_state": D_STATE, "ngroups": CONFIG2.ngroups} if loaded.family == MAMBA2 else {}
    about |= {"groups": {"layers": [layer.to_json() for layer in groups]}} if groups else {}
    run = {"model": about, "identity": {"weights_sha256": loaded.weights_sha256}, "data": {}}
    provenance = {"format_version": 1, "quambase": "0", "granularity": "group", "runs": {"run-a": run}}
    return ScaleTable(pa.Table.from_pylist(rows, schema=SCALES), provenance)


def write(table: ScaleTable, path: Path) -> Path:
    write_scales(path, table.table, table.provenance)
    return path


def whole_rows(draw: Any, family: str) -> list[dict]:
    keys = [(layer, site.name) for layer, site in layer_sites(2, family)]
    scales = draw(st.lists(positive, min_size=len(keys), max_size=len(keys)))
    return scale_rows(dict(zip(keys, scales, strict=True)), "mse", selected=True, family=family)


def parts(draw: Any, total: int, count: int) -> tuple[int, ...]:
    """``total`` in ``count`` parts of at least one."""
    cuts = sorted(draw(st.permutations(range(1, total)))[: count - 1])
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True))


@st.composite
def sorted_layers(draw: Any) -> list[LayerGroups]:
    """Two layers of heads and channels in any order, in a grid of groups of any sizes."""
    head_groups, channel_groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    layers = []
    for _ in range(2):
        share = HEADS // 2
        heads = [4 * g + head for g in range(2) for head in draw(st.permutations(range(share)))]
        channels = [HEADDIM * head + c for head in heads for c in draw(st.permutations(range(HEADDIM)))]
        sizes = tuple(parts(draw, share, head_groups) for _ in range(2))
        inner = tuple(tuple(parts(draw, HEADDIM, channel_groups) for _ in range(head_groups)) for _ in range(2))
        layers.append(LayerGroups(tuple(heads), sizes, tuple(channels), inner))
    return layers


@st.composite
def mamba2_rows(draw: Any) -> tuple[list[dict], list[LayerGroups]]:
    """A table by scale group; the state has a scale for each state index in some of the layers."""
    layers = draw(sorted_layers())
    rows = []
    for row in whole_rows(draw, MAMBA2):
        rows.append(row)
        several = draw(st.booleans())
        if row["site"] in (X, STATE):
            for group in layers[row["layer"]].groups():
                scale = draw(positive)
                by_index = st.lists(positive, min_size=D_STATE, max_size=D_STATE)
                components = draw(by_index) if several and row["site"] == STATE else None
                rows.append(row | {"group_name": group.name, "scale": scale, "component_scales": components})
        elif row["site"] in ("B_conv_out:input", "C_conv_out:input") and draw(st.booleans()):
            rows += [row | {"group_name": f"g{i}", "scale": draw(positive)} for i in range(2)]
    return rows, layers


def same(one: object, other: object) -> bool:
    """Equal in structure, types and every bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def exported(table: ScaleTable, folder: Path, name: str) -> tuple[Path, dict]:
    path = export_act_scales(write(table, folder / f"{name}.parquet"), folder / f"{name}.pt").path
    return path, torch.load(path, weights_only=True)


@settings(deadline=None, max_examples=15)
@given(data=st.data())
@pytest.mark.parametrize("family", [MAMBA1, MAMBA2, "sorted"])
def test_export_import_export_is_the_identity(
    data: st.DataObject, family: str, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    model = models[MAMBA1 if family == MAMBA1 else MAMBA2]
    if family == "sorted":
        table = table_of(*(lambda rows, layers: (rows, model, layers))(*data.draw(mamba2_rows())))
    else:
        table = table_of(whole_rows(data.draw, family), model)
    path, first = exported(table, folder, "first")
    import_act_scales(path, str(model), folder / "imported.parquet")
    imported = read_scales(folder / "imported.parquet")
    _, again = exported(imported, folder, "again")
    for key in ("act_scales", "reorder_params"):
        assert same(first[key], again[key])
    # What the INT8 model reads is what the original table has.
    before, after = table.group_scales_for("mse"), imported.group_scales_for("imported")
    for layer, site in layer_sites(2, table.model.family):
        if site.consumed and site.name != STATE:
            scale = before[layer, site.name]
            by_group = isinstance(after[layer, site.name], tuple) and not isinstance(scale, tuple)
            assert after[layer, site.name] == ((scale,) * 2 if by_group else scale)


def test_mamba1_has_upstreams_list(models: dict[str, Path]) -> None:
    scales = {(layer, site.name): 1.5 + layer for layer, site in layer_sites(2, MAMBA1)}
    content = upstream_form(table_of(scale_rows(scales, "mse", True), models[MAMBA1]), "mse")[0]
    layers = content["act_scales"]
    assert isinstance(layers, list) and len(layers) == 3 and content["reorder_params"] is None
    names = ("in_proj", "x_proj", "dt_proj", "ssm_state_act", "out_proj")
    assert set(layers[0]) == set(layers[1]) == {f"{name}:{end}" for name in names for end in ("input", "output")}
    assert set(layers[-1]) == {"lm_head:input", "lm_head:output"}
    for place, value in enumerate((1.5, 2.5, 0.5)):
        for scale in layers[place].values():
            assert scale.dtype == torch.float32 and scale.dim() == 0 and scale.item() == value
    about = json.loads(content["quambase"])
    assert (about["strategy"], about["run"]) == ("mse", "run-a") and len(about["weights_sha256"]) == 64


@settings(deadline=None, max_examples=20)
@given(drawn=mamba2_rows())
def test_every_channel_finds_its_own_groups_scale(drawn: Any, models: dict[str, Path]) -> None:
    """Read as upstream's kernels do: by the first cumulative head and channel range that the channel lies before."""
    rows, layers = drawn
    content = upstream_form(table_of(rows, models[MAMBA2], layers), "mse")[0]
    stored = {(r["layer"], r["site"], r["group_name"]): r for r in rows}
    for layer, groups in enumerate(layers):
        found = content["act_scales"][layer]
        names = {channel: group.name for group in groups.groups() for channel in group.channels}
        for channel, name in names.items():
            head, place = divmod(channel, HEADDIM)
            ssd, head = divmod(head, HEADS // 2)
            for site in (X, STATE):
                ends = np.cumsum([int(size) for size, _, _ in found[site][ssd]])
                of_head = found[site][ssd][int(np.searchsorted(ends, head, side="right"))]
                of_channel = int(np.searchsorted(torch.cumsum(of_head[1], 0).numpy(), place, side="right"))
                row = stored[layer, site, name]
                expected = row["scale"] if site == X else row["component_scales"] or [row["scale"]] * D_STATE
                assert of_head[2][of_channel].tolist() == expected
                assert of_head[0].dtype == of_head[1].dtype == torch.int32 and of_head[0].dim() == 0
        for name in ("B_conv_out:input", "C_conv_out:input"):
            whole = stored[layer, name, "all"]
            assert found[name].tolist() == [stored.get((layer, name, f"g{i}"), whole)["scale"] for i in range(2)]
        # Upstream decodes these by the output's scale, and the codes were made with the input's.
        for name in ("z_act", "x_conv_in", "B_conv_in", "C_conv_in", "dt_act"):
            assert torch.equal(found[f"{name}:output"], found[f"{name}:input"])
    params = content["reorder_params"]
    for layer, groups in enumerate(layers):
        assert params["head_index"][layer].tolist() == list(groups.head_index)
        assert params["channel_index"][layer].tolist() == list(groups.channel_index)
        assert params["head_groups"][layer].dtype == params["channel_group"][layer].dtype == torch.int32


def test_coarser_scales_are_repeated(models: dict[str, Path]) -> None:
    """2 SSD groups of 2 head groups of 2 channel groups each: eight places whatever the granularity."""
    sizes = (((3, 5), (6, 2)), ((1, 7), (4, 4)))
    groups = [LayerGroups(tuple(range(8)), ((1, 3), (2, 2)), tuple(range(64)), sizes)] * 2
    rows = scale_rows({(la, s.name): 0.5 for la, s in layer_sites(2, MAMBA2)}, "mse", True, family=MAMBA2)
    for row in [row for row in rows if row["site"] in (X, STATE)]:
        names = ["g0", "g1", "g0h0", "g0h1", "g1h0", "g1h1"]
        scales = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        rows += [row | {"group_name": name, "scale": s} for name, s in zip(names, scales, strict=True)]
    table = table_of(rows, models[MAMBA2], groups)
    for granularity, expected in (
        ("tensor", [0.5] * 8),
        ("ssd_group", [1.0] * 4 + [2.0] * 4),
        ("head_group", [3.0, 3.0, 4.0, 4.0, 5.0, 5.0, 6.0, 6.0]),
    ):
        layer = upstream_form(table, "mse", granularity=granularity)[0]["act_scales"][1]
        assert [s for heads in layer[X] for _, _, found in heads for s in found.tolist()] == expected
        state = torch.cat([found for heads in layer[STATE] for _, _, found in heads])
        assert state.tolist() == [[s] * D_STATE for s in expected]
    rows.append(rows[-1] | {"site": X, "group_name": "g2"})
    with pytest.raises(ScalesInvalid, match="has 3 scale groups, which is none of its divisions"):
        upstream_form(table_of(rows, models[MAMBA2], groups), "mse", granularity="ssd_group")


@pytest.mark.parametrize("family", [MAMBA1, MAMBA2])
def test_an_imported_table_is_applied(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    scales = {(layer, site.name): 0.01 + 0.001 * i for i, (layer, site) in enumerate(layer_sites(2, family))}
    table = write(table_of(scale_rows(scales, "mse", True, family=family), models[family]), tmp_path / "s.parquet")
    original = load_stored(apply(table, strategy="mse", db=tmp_path).folder).model
    file = str(tmp_path / "act.pt")
    runner = CliRunner()
    done = runner.invoke(quambase, ["apply", "--scales", str(table), "--strategy", "mse", "--export", file])
    assert (done.exit_code, done.stdout.strip()) == (0, file), done.output
    # Upstream's own list alone, as its first release cached it.
    torch.save(torch.load(file, weights_only=True)["act_scales"], file)
    done = runner.invoke(quambase, ["apply", "--import", file, "--model", str(models[family])])
    assert done.exit_code == 0, done.output
    imported = Path(done.stdout.strip())
    assert imported == tmp_path / "act.parquet" and "load them with: apply --scales" in done.stderr
    found = load_stored(apply(imported, db=tmp_path).folder).model
    assert found.scales == original.scales
    row = read_scales(imported).table.to_pylist()[0]
    assert row["label"] == "imported" and row["selected"] and row["amax"] is None and row["mse"] is None
    refused = runner.invoke(quambase, ["apply", "--import", file, "--model", str(models[family])])
    assert refused.exit_code == 0, "its own table is replaced"
    other = models[MAMBA2 if family == MAMBA1 else MAMBA1]
    with pytest.raises(ScalesInvalid, match="belongs to model"):
        apply(imported, model=str(other), db=tmp_path)


def test_a_scale_that_clips_where_upstream_wraps_is_replaced(models: dict[str, Path], tmp_path: Path) -> None:
    """By the table's scale of least error that clips nothing there, or absmax; everything else stays."""
    scales = {(layer, site.name): 0.5 for layer, site in layer_sites(2, MAMBA1)}
    rows = []
    for label, scale, mse in (("mse", 0.5, 1.0), ("wide", 2.0, 9.0), ("safe", 0.75, 3.0), ("barely", 0.5001, 2.0)):
        rows += [row | {"mse": mse} for row in scale_rows(dict.fromkeys(scales, scale), label, label == "mse")]
    for row in rows:
        row["amax"] = 127.5 * 0.5 if row["site"] == "out_proj:input" else 1e3
        if (row["label"], row["layer"]) == ("barely", 1):
            row["scale"] = 0.4  # clips in layer 1
    table = table_of(rows, models[MAMBA1])
    content, replaced = upstream_form(table, "mse")
    plain, _ = upstream_form(table_of([row | {"amax": 1.0} for row in rows], models[MAMBA1]), "mse")
    for layer, mine in enumerate(content["act_scales"]):
        for site, scale in mine.items():
            wanted = (
                {0: 0.5001, 1: 0.75}[layer] if site == "out_proj:input" else float(plain["act_scales"][layer][site])
            )
            assert float(scale) == np.float32(wanted), (layer, site)
    assert [(one.layer, one.site, one.label) for one in replaced] == [
        (0, "out_proj:input", "barely"),
        (1, "out_proj:input", "safe"),
    ]
    alone = table_of([row for row in rows if row["label"] == "mse"], models[MAMBA1])
    content, replaced = upstream_form(alone, "mse")
    assert {one.label for one in replaced} == {"absmax"}
    # 127 steps of it reach the largest value.
    assert float(content["act_scales"][0]["out_proj:input"]) == np.float32(127.5 * 0.5 / 127)
    path = write(table, tmp_path / "s.parquet")
    done = CliRunner().invoke(
        quambase, ["apply", "--scales", path, "--strategy", "mse", "--export", f"{tmp_path}/e.pt"]
    )
    assert done.exit_code == 0, done.stderr
    assert "layer 0 out_proj:input: scale 0.5 clips, 0.5001 (barely) instead" in done.stderr
    assert json.loads(torch.load(tmp_path / "e.pt", weights_only=True)["quambase"])["replaced"][0].startswith("layer 0")


def test_what_upstream_has_no_form_for_is_refused(models: dict[str, Path]) -> None:
    model = models[MAMBA2]
    scales = {(layer, site.name): 0.5 for layer, site in layer_sites(2, MAMBA2)}
    rows = scale_rows(scales, "mse", True, family=MAMBA2)
    by_ssd = [row | {"group_name": f"g{i}"} for row in rows if row["site"] == "B_conv_out:input" for i in range(2)]
    with pytest.raises(ScalesInvalid, match=r"B_conv_out:input has 2 scale groups; upstream has one per tensor"):
        upstream_form(table_of(rows + by_ssd, model), "mse")
    ragged = LayerGroups(tuple(range(8)), ((4,), (2, 2)), tuple(range(64)), (((8,),), ((8,), (8,))))
    with pytest.raises(ScalesInvalid, match=r"layer 0 has \[1, 2\] head groups"):
        upstream_form(table_of(rows, model, [ragged, ragged]), "mse")
    with pytest.raises(ScalesInvalid, match=r"no scale for layer 0 in_proj:input"):
        upstream_form(table_of([row for row in rows if row["site"] != "in_proj:input"], model), "mse")


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this ran",)


def layers_of(family: str) -> list[dict[str, object]]:
    layers: list[dict[str, object]] = [{}, {}, {}]
    for layer, site in layer_sites(2, family):
        layers[layer][site.name] = torch.tensor(0.5)
    return layers


def changed(family: str, layer: int, site: str, value: object) -> list[dict[str, object]]:
    layers = layers_of(family)
    layers[layer][site] = value
    return layers


NESTED = [[(torch.tensor(4), torch.tensor([8]), torch.tensor([0.5]))] for _ in range(2)]


@pytest.mark.parametrize(
    ("family", "content", "message"),
    [
        (MAMBA1, {"x": 1}, "holds no act_scales; expected a list of dicts"),
        (MAMBA1, [1, 2], "holds no act_scales"),
        (MAMBA1, Malicious(), "is not loaded, since a pickle can run code"),
        (MAMBA1, layers_of(MAMBA1)[1:], r"has scales of 1 layers and a head, tiny has 2 layers; give their model"),
        (MAMBA2, layers_of(MAMBA1), r"has no scale for layer 0 z_act:input, which the INT8 model reads"),
        (MAMBA1, changed(MAMBA1, 0, "conv:input", torch.tensor(1.0)), "conv:input, which is no site of a mamba1"),
        (MAMBA1, changed(MAMBA1, 0, X.replace("conv_out", "proj"), 0.5), "x_proj:input is no scale tensor"),
        (MAMBA1, changed(MAMBA1, 1, "x_proj:input", torch.tensor(-1.0)), "the scale at layer 1 x_proj:input is -1.0"),
        (MAMBA2, changed(MAMBA2, 0, X, NESTED), "scales of sorted heads and channels and no reorder_params"),
        (MAMBA1, {"act_scales": layers_of(MAMBA1), "reorder_params": {"head_index": []}}, "are not upstream's"),
        (
            MAMBA1,
            {"act_scales": layers_of(MAMBA1), "quambase": json.dumps({"weights_sha256": "0", "format_version": 1})},
            r"has scales of other weights \(0\) than tiny",
        ),
        (MAMBA1, {"act_scales": layers_of(MAMBA1), "quambase": "{}"}, "the provenance in .* is damaged"),
        (
            MAMBA1,
            {"act_scales": layers_of(MAMBA1), "quambase": '{"format_version": 9, "weights_sha256": null}'},
            "has format version 9; this quambase reads up to 2",
        ),
    ],
)
def test_what_cannot_be_imported_is_named(
    family: str, content: object, message: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ScalesInvalid, match=message) as error:
        import_act_scales(tmp_path / "a.pt", str(models[family]), tmp_path / "a.parquet")
    assert "\n" not in str(error.value) and not (tmp_path / "a.parquet").exists()
    assert "this ran" not in capsys.readouterr().out


def test_groups_that_do_not_fit_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    plain = LayerGroups(tuple(range(8)), ((2, 2), (2, 2)), tuple(range(64)), (((8,), (8,)),) * 2)
    rows = scale_rows({(la, s.name): 0.5 for la, s in layer_sites(2, MAMBA2)}, "mse", True, family=MAMBA2)
    content = upstream_form(table_of(rows, models[MAMBA2], [plain, plain]), "mse")[0]
    good = content["act_scales"][1][X]
    for bad, message in (
        (good[:1], r"layer 1 x_conv_out:input has not the groups of reorder_params"),
        ([[(torch.tensor(1), *group[1:]) for group in heads] for heads in good], "sizes differ"),
        ([[(*group[:2], torch.ones(3)) for group in heads] for heads in good], "3 scales for 1 channel groups"),
    ):
        content["act_scales"][1][X] = bad
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ScalesInvalid, match=message):
            import_act_scales(tmp_path / "a.pt", str(models[MAMBA2]), tmp_path / "a.parquet")
    content["act_scales"][1][X] = good
    content["quambase"] = None
    torch.save(content | {"act_scales": layers_of(MAMBA1)}, tmp_path / "a.pt")
    with pytest.raises(ScalesInvalid, match="are of 8 heads, 64 channels and 2 SSD groups, which tiny has not"):
        import_act_scales(tmp_path / "a.pt", str(models[MAMBA1]), tmp_path / "a.parquet")


def test_files_that_are_none(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ScalesInvalid, match="is missing; expected a file"):
        import_act_scales(tmp_path / "no.pt", "mamba-5m", tmp_path / "a.parquet")
    (tmp_path / "cut.pt").write_bytes(b"PK\3\4 nothing")
    with pytest.raises(ScalesInvalid, match="cannot be read") as error:
        import_act_scales(tmp_path / "cut.pt", "mamba-5m", tmp_path / "a.parquet")
    assert "\n" not in str(error.value)


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    for arguments, message in (
        (["--export", "a.pt", "--import", "b.pt"], "give one of --export, --import and --backend quamba"),
        (["--import", "b.pt"], "--import needs --model NAME"),
        (["--backend", "quamba"], "--backend quamba needs --out FOLDER"),
    ):
        done = CliRunner().invoke(quambase, ["apply", *arguments])
        assert done.exit_code == 2 and message in done.stderr


def test_tensors_move_and_the_rest_stays() -> None:
    value = {"a": [(torch.tensor(1.0), 2)], "b": None}
    moved = on_device(value, "meta")
    assert moved["a"][0][0].device.type == "meta" and moved["a"][0][1] == 2 and moved["b"] is None
    assert isinstance(moved["a"][0], tuple)
