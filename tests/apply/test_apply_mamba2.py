"""apply and evaluate of a tiny Mamba-2 end to end: group rows, the sorted model, the stored bits, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_apply_evaluate import scale_rows
from tiny_int8_mamba2 import CONFIG, absmax_scales, documents, tiny_weights

from quambase.apply.apply import apply
from quambase.apply.evaluate import evaluate
from quambase.apply.group_scales import channel_maps
from quambase.apply.quamba2 import build
from quambase.apply.store import TENSORS, load_stored, save_model
from quambase.cli.apply import apply as apply_command
from quambase.model.batch import Batch
from quambase.model.load import load_model
from quambase.model.mamba2_weights import mamba2_tensors_of
from quambase.model.prepare import prepare
from quambase.model.reorder import reorder
from quambase.schema.errors import ScalesInvalid
from quambase.schema.grouping import LayerGroups
from quambase.schema.scales import read_scales, write_scales
from quambase.schema.sites import MAMBA2
from quambase.schema.tables import SCALES

WORDS = [f"w{i}" for i in range(CONFIG.vocab_size)]


def layer_groups(seed: int) -> LayerGroups:
    """Heads permuted within their SSD group of 4, channels within their head; 2 x 2 groups of uneven sizes."""
    generator = np.random.default_rng(seed)
    heads = np.concatenate([generator.permutation(4) + 4 * g for g in range(2)])
    channels = np.concatenate([generator.permutation(8) + 8 * head for head in heads])
    sizes = (((3, 5), (6, 2)), ((1, 7), (4, 4)))
    return LayerGroups(tuple(heads.tolist()), ((1, 3), (2, 2)), tuple(channels.tolist()), sizes)


GROUPS = [layer_groups(i) for i in range(CONFIG.n_layer)]


def prepared_and_sorted():
    return prepare(reorder(tiny_weights(), GROUPS))


def group_rows(scales, label):
    """Rows of a table of granularity "group": the whole of each site, and its groups, in no particular order."""
    rows = []
    whole = {key: scale if isinstance(scale, float) else max(scale) for key, scale in scales.items()}
    for row in scale_rows(whole, label, family=MAMBA2):
        scale = scales[row["layer"], row["site"]]
        rows.append(row)
        if isinstance(scale, tuple):
            names = [f"g{i}" for i in range(2)]
            if len(scale) > 2:
                names = [group.name for group in GROUPS[row["layer"]].groups()]
            rows += [row | {"group_name": n, "scale": s} for n, s in zip(names, scale, strict=True)][::-1]
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Mamba-2 checkpoint and scale tables: of the sorted model by channel group, of the plain one per tensor, SSD."""
    root = tmp_path_factory.mktemp("world2")
    weights, folder = tiny_weights(), root / "tiny2"
    folder.mkdir()
    save_file({k: v.clone().contiguous() for k, v in mamba2_tensors_of(weights).items()}, folder / "model.safetensors")
    ssm = {"layer": "Mamba2", "d_state": CONFIG.d_state, "headdim": CONFIG.headdim, "ngroups": CONFIG.ngroups}
    raw = {"d_model": CONFIG.d_model, "n_layer": CONFIG.n_layer, "vocab_size": CONFIG.vocab_size, "ssm_cfg": ssm}
    (folder / "config.json").write_text(json.dumps(raw))
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.save(str(folder / "tokenizer.json"))
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, length)) for length in (30, 12, 50, 8, 21, 9, 17, 33, 26, 14)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    loaded = load_model(str(folder))
    maps = channel_maps(GROUPS)
    for name, model, groups in (
        ("tensor", prepare(weights), None),
        ("ssd", prepare(weights), None),
        ("channel", prepared_and_sorted(), {"layers": [layer.to_json() for layer in GROUPS]}),
    ):
        base = absmax_scales(model, documents(1), name, maps)
        rows = group_rows(base, "quamba")
        tight = {k: tuple(s * 0.4 for s in v) if isinstance(v, tuple) else v * 0.4 for k, v in base.items()}
        rows += group_rows(tight, "tight")
        about = {"name": "tiny2", "path": str(folder), "family": MAMBA2, "n_layer": CONFIG.n_layer}
        run = {
            "model": about | ({"groups": groups} if groups else {}),
            "identity": {"weights_sha256": loaded.weights_sha256},
            "data": {},
        }
        provenance = {"format_version": 1, "quambase": "0", "granularity": "group", "runs": {"run-a": run}}
        write_scales(root / f"{name}.parquet", pa.Table.from_pylist(rows, SCALES), provenance)
    return root


def test_group_rows_come_in_channel_order(world):
    scales = read_scales(world / "channel.parquet").group_scales_for("quamba")
    expected = absmax_scales(prepared_and_sorted(), documents(1), "channel", channel_maps(GROUPS))
    assert scales == expected
    assert len(scales[0, "x_conv_out:input"]) == 8 and len(set(scales[0, "x_conv_out:input"])) == 8
    assert len(scales[1, "B_conv_out:input"]) == 2


def test_channel_maps_number_each_groups_channels():
    for found, layer in zip(channel_maps(GROUPS), GROUPS, strict=True):
        for number, group in enumerate(layer.groups()):
            assert sorted(np.flatnonzero(found.numpy() == number).tolist()) == sorted(group.channels)
        assert (found >= 0).all() and found.max() == 7


@pytest.mark.parametrize("granularity", ["tensor", "ssd", "channel"])
def test_a_stored_model_gives_the_same_bits(world, tmp_path, granularity):
    applied = apply(world / f"{granularity}.parquet", strategy="quamba", db=tmp_path)
    stored = load_stored(applied.folder).model
    prepared = prepared_and_sorted() if granularity == "channel" else prepare(tiny_weights())
    maps = channel_maps(GROUPS)
    built = build(prepared, absmax_scales(prepared, documents(1), granularity, maps), channel_groups=maps)
    batch = Batch.pack(documents(2))
    assert torch.equal(stored.logits(stored.hidden(batch)), built.logits(built.hidden(batch)))
    tokens = torch.tensor([1, 2, 3, 4])
    (_, a), (_, b) = stored.prefill(batch), built.prefill(batch)
    assert torch.equal(stored.step(tokens, a), built.step(tokens, b))
    tensors = load_file(applied.folder / TENSORS)
    assert tensors["layers.0.in_proj"].dtype == torch.int8 and tensors["layers.0.in_proj.scale"].shape == (5,)


def test_quantized_head_and_embedding_survive_storing(tmp_path):
    prepared = prepare(tiny_weights())
    scales = absmax_scales(prepared, documents(1), "ssd")
    model = build(prepared, scales, quantize_lm_head=True, quantize_embedding=True, compat="upstream")
    save_model(tmp_path / "m", model, {})
    stored = load_stored(tmp_path / "m").model
    batch = Batch.pack(documents(2))
    assert torch.equal(stored.logits(stored.hidden(batch)), model.logits(model.hidden(batch)))
    assert stored.compat == "upstream" and stored.quantized_lm_head


def run(world, name, db, **settings):
    return evaluate(
        scales=world / f"{name}.parquet",
        data=[str(world / "text.jsonl")],
        window=16,
        task="perplexity",
        db=db,
        **settings,
    )


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_evaluate_compares_strategies_with_the_float_model(world, tmp_path, granularity):
    rows = run(world, granularity, tmp_path, strategies=["quamba", "tight"]).results.to_pylist()
    total = {s: sum(row["kl"] for row in rows if row["strategy"] == s) for s in ("float", "quamba", "tight")}
    tokens = sum(row["tokens"] for row in rows if row["strategy"] == "quamba")
    agree = sum(row["top1_agreement"] for row in rows if row["strategy"] == "quamba") / tokens
    assert 0 == total["float"] < total["quamba"] < total["tight"]
    # A sorted model with the groups of an unsorted one, or scales of other sites, is far above 0.02 nats.
    assert total["quamba"] / tokens < 0.02 and agree > 0.9
    applied = apply(world / f"{granularity}.parquet", strategy="tight", db=tmp_path)
    again = evaluate(
        applied.folder, data=[str(world / "text.jsonl")], window=16, task="perplexity", db=tmp_path
    ).results.to_pylist()
    assert [r["kl"] for r in again if r["strategy"] == "tight"] == [r["kl"] for r in rows if r["strategy"] == "tight"]


def test_a_strategy_at_one_site_keeps_the_other_groups(world, tmp_path):
    table = world / "channel.parquet"
    applied = apply(table, strategy="tight", at=["x_conv_out:input"], otherwise="quamba", db=tmp_path)
    mixed = load_stored(applied.folder).model.scales
    expected = {label: read_scales(table).group_scales_for(label) for label in ("quamba", "tight")}
    for key, scale in mixed.items():
        values = expected["tight" if key[1] == "x_conv_out:input" else "quamba"][key]
        np.testing.assert_allclose(scale, values, rtol=1e-7)  # one rounding to float32


def test_groups_without_their_channels_are_refused(world, tmp_path):
    table = read_scales(world / "channel.parquet")
    provenance = json.loads(json.dumps(table.provenance))
    del provenance["runs"]["run-a"]["model"]["groups"]
    write_scales(tmp_path / "lost.parquet", table.table, provenance)
    with pytest.raises(ScalesInvalid, match="x_conv_out:input has 8 scale groups, expected 1 or 2"):
        apply(tmp_path / "lost.parquet", strategy="quamba", db=tmp_path)


def test_the_command_names_a_missing_site_in_one_line(world, tmp_path):
    table = read_scales(world / "tensor.parquet")
    kept = table.table.filter(pa.array([row["site"] != "dt_act:input" for row in table.table.to_pylist()]))
    write_scales(tmp_path / "less.parquet", kept, table.provenance)
    found = CliRunner().invoke(
        apply_command, ["--scales", str(tmp_path / "less.parquet"), "--strategy", "quamba", "--db", str(tmp_path)]
    )
    assert found.exit_code == 1
    assert "no scale for layer 0 dt_act:input (2 of" in found.stderr
