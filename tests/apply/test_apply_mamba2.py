# mypy: disable-error-code="call-overload"
"""apply and evaluate of a tiny Mamba-2 end to end: group rows, the sorted model, the stored bits, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.evaluation.stored import find_evaluation, list_evaluations
from quambase.apply.int8.build import build
from quambase.apply.int8.group_scales import channel_maps
from quambase.apply.int8.model_folder import load_stored, save_model
from quambase.cli.apply import apply as apply_command
from quambase.cli.evaluate import evaluate as evaluate_command
from quambase.model.checkpoint import load_model
from quambase.model.packed_batch import Batch
from quambase.model.prepare import prepare, reorder
from quambase.model.weights import tensors_of
from quambase.schema.errors import ScalesInvalid, UnknownName
from quambase.schema.groups import LayerGroups
from quambase.schema.scale_table import read_scales, write_scales
from quambase.schema.sites import MAMBA2
from quambase.schema.stored.int8_models import TENSORS
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


def finest(layers: Any) -> Any:
    """Each layer's smallest groups of channels."""
    return [maps[-1] for maps in channel_maps(layers)]


def prepared_and_sorted() -> Any:
    return prepare(reorder(tiny_weights(), GROUPS))


def group_rows(scales: Any, label: Any) -> Any:
    """Rows of a table of granularity "group": the whole of each site, and its groups of every level, in no particular
    order. A larger group's scale is the largest of its members'.
    """
    rows = []
    whole = {key: scale if isinstance(scale, float) else max(scale) for key, scale in scales.items()}
    for row in scale_rows(whole, label, family=MAMBA2):
        scale = scales[row["layer"], row["site"]]
        rows.append(row)
        if isinstance(scale, tuple):
            names = [f"g{i}" for i in range(2)]
            if len(scale) > 2:
                names = [group.name for group in GROUPS[row["layer"]].groups()]
            levels = {}
            for name, value in zip(names, scale, strict=True):
                for end in (2, 4, 6)[: len(name) // 2]:
                    levels[name[:end]] = max(value, levels.get(name[:end], 0.0))
            rows += [row | {"group_name": n, "scale": s} for n, s in levels.items()][::-1]
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Mamba-2 checkpoint and scale tables: of the sorted model by channel group, of the plain one per tensor, SSD."""
    root = tmp_path_factory.mktemp("world2")
    weights, folder = tiny_weights(), root / "tiny2"
    folder.mkdir()
    save_file({k: v.clone().contiguous() for k, v in tensors_of(weights).items()}, folder / "model.safetensors")
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
    maps = finest(GROUPS)
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


def test_group_rows_come_in_channel_order(world: Any) -> None:
    scales = read_scales(world / "channel.parquet").group_scales_for("quamba")
    expected = absmax_scales(prepared_and_sorted(), documents(1), "channel", finest(GROUPS))
    assert scales == expected
    assert len(scales[0, "x_conv_out:input"]) == 8 and len(set(scales[0, "x_conv_out:input"])) == 8
    assert len(scales[1, "B_conv_out:input"]) == 2


def test_channel_maps_number_each_groups_channels() -> None:
    for (by_head, by_channel), layer in zip(channel_maps(GROUPS), GROUPS, strict=True):
        heads = [0, 0, 1, 1, 2, 2, 3, 3]  # two channel groups in each of the four head groups
        for number, group in enumerate(layer.groups()):
            assert sorted(np.flatnonzero(by_channel.numpy() == number).tolist()) == sorted(group.channels)
            assert set(by_head[list(group.channels)].tolist()) == {heads[number]}
        assert (by_channel >= 0).all() and by_channel.max() == 7


@pytest.mark.parametrize("granularity", ["tensor", "ssd", "channel"])
def test_a_stored_model_gives_the_same_bits(world: Any, tmp_path: Path, granularity: str) -> None:
    applied = apply(world / f"{granularity}.parquet", strategy="quamba", db=tmp_path)
    stored = load_stored(applied.folder).model
    prepared = prepared_and_sorted() if granularity == "channel" else prepare(tiny_weights())
    scales = absmax_scales(prepared, documents(1), granularity, finest(GROUPS))
    built = build(prepared, scales, channel_groups=channel_maps(GROUPS))
    batch = Batch.pack(documents(2))
    assert torch.equal(stored.logits(stored.hidden(batch)), built.logits(built.hidden(batch)))
    tokens = torch.tensor([1, 2, 3, 4])
    (_, a), (_, b) = stored.prefill(batch), built.prefill(batch)
    assert torch.equal(stored.step(tokens, a), built.step(tokens, b))
    tensors = load_file(applied.folder / TENSORS)
    assert tensors["layers.0.in_proj"].dtype == torch.int8 and tensors["layers.0.in_proj.scale"].shape == (5,)


def test_quantized_head_and_embedding_survive_storing(tmp_path: Path) -> None:
    prepared = prepare(tiny_weights())
    scales = absmax_scales(prepared, documents(1), "ssd")
    model = build(prepared, scales, quantize_lm_head=True, quantize_embedding=True, compat="upstream")
    about = {"source": {"name": "tiny2", "path": "tiny2"}, "strategy": "absmax", "weights_sha256": ""}
    save_model(tmp_path / "m", model, about)
    stored = load_stored(tmp_path / "m").model
    batch = Batch.pack(documents(2))
    assert torch.equal(stored.logits(stored.hidden(batch)), model.logits(model.hidden(batch)))
    assert stored.compat == "upstream" and stored.quantized_lm_head


def run(world: Any, name: Any, db: Any, **settings: Any) -> Any:
    return evaluate(
        scales=world / f"{name}.parquet",
        data=[str(world / "text.jsonl")],
        window=16,
        task="perplexity",
        db=db,
        **settings,
    )


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_evaluate_compares_strategies_with_the_float_model(world: Any, tmp_path: Path, granularity: str) -> None:
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


def test_a_strategy_at_one_site_keeps_the_other_groups(world: Any, tmp_path: Path) -> None:
    table = world / "channel.parquet"
    applied = apply(table, strategy="tight", at=["x_conv_out:input"], otherwise="quamba", db=tmp_path)
    mixed = load_stored(applied.folder).model.scales
    expected = {label: read_scales(table).group_scales_for(label) for label in ("quamba", "tight")}
    for key, scale in mixed.items():
        values = expected["tight" if key[1] == "x_conv_out:input" else "quamba"][key]
        np.testing.assert_allclose(scale, values, rtol=1e-7)  # one rounding to float32


def test_every_granularity_of_one_table(world: Any, tmp_path: Path) -> None:
    """A coarser granularity reads the same rows as a table that has no finer ones, and gives the same results."""
    full = read_scales(world / "channel.parquet")
    assert full.granularities() == ["tensor", "ssd_group", "head_group", "group"]
    lengths = {"tensor": 1, "ssd_group": 2, "head_group": 4, "group": 8}
    found = run(world, "channel", tmp_path, strategies=["quamba"], granularities=["all"])
    kl = {}
    for row in found.results.to_pylist():
        kl.setdefault(row["strategy"], []).append(row["kl"])
    assert list(kl) == ["float", "quamba (tensor)", "quamba (ssd_group)", "quamba (head_group)", "quamba"]
    for place, (level, length) in enumerate(lengths.items()):
        scale = full.group_scales_for("quamba", level)[0, "x_conv_out:input"]
        assert isinstance(scale, float) if length == 1 else len(scale) == length
        kept = [row["granularity"] in list(lengths)[: place + 1] for row in named_levels(full.table)]
        write_scales(tmp_path / "coarse.parquet", full.table.filter(pa.array(kept)), full.provenance)
        alone = evaluate(
            scales=tmp_path / "coarse.parquet",
            strategies=["quamba"],
            data=[str(world / "text.jsonl")],
            window=16,
            task="perplexity",
            db=tmp_path,
        ).results.to_pylist()
        label = "quamba" if level == "group" else f"quamba ({level})"
        assert [r["kl"] for r in alone if r["strategy"] == "quamba"] == kl[label]
        applied = apply(world / "channel.parquet", strategy="quamba", granularity=level, db=tmp_path)
        assert applied.strategy == f"quamba ({level})"
        assert load_stored(applied.folder).model.scales[1, "x_conv_out:input"] == pytest.approx(
            full.group_scales_for("quamba", level)[1, "x_conv_out:input"], rel=1e-7
        )


def named_levels(table: Any) -> Any:
    """The rows, each with the level its group's name says, written out."""
    levels = {"a": "tensor", 2: "ssd_group", 4: "head_group", 6: "group"}
    rows = table.to_pylist()
    return [{"granularity": levels["a" if r["group_name"] == "all" else len(r["group_name"])]} for r in rows]


def test_scales_by_state_index_are_loaded_and_stored(world: Any, tmp_path: Path) -> None:
    table = read_scales(world / "channel.parquet")
    rows = table.table.to_pylist()
    state = "ssm_state_act:input"
    for row in rows:
        if row["site"] == state:
            row["component_scales"] = [row["scale"] * (1 + 0.01 * n) for n in range(CONFIG.d_state)]
    write_scales(tmp_path / "index.parquet", pa.Table.from_pylist(rows, SCALES), table.provenance)
    scales = read_scales(tmp_path / "index.parquet").group_scales_for("quamba")
    names = [group.name for group in GROUPS[1].groups()]
    components = {
        r["group_name"]: r["component_scales"]
        for r in pa.Table.from_pylist(rows, SCALES).to_pylist()
        if (r["layer"], r["site"], r["label"]) == (1, state, "quamba")
    }
    assert [list(np.float32(part)) for part in scales[1, state]] == [list(np.float32(components[n])) for n in names]
    applied = apply(tmp_path / "index.parquet", strategy="quamba", db=tmp_path)
    stored = load_stored(applied.folder).model
    built = build(prepared_and_sorted(), scales, channel_groups=channel_maps(GROUPS))
    assert stored.scales[1, state] == built.scales[1, state] and len(stored.scales[1, state][0]) == CONFIG.d_state
    batch, tokens = Batch.pack(documents(2)), torch.tensor([1, 2, 3, 4])
    (_, a), (_, b) = stored.prefill(batch), built.prefill(batch)
    assert torch.equal(a[1].ssm, b[1].ssm) and torch.equal(stored.step(tokens, a), built.step(tokens, b))


def test_a_granularity_that_the_table_does_not_hold(world: Any, tmp_path: Path) -> None:
    with pytest.raises(ScalesInvalid, match="has no scales by head_group \\(it has tensor, ssd_group\\)"):
        apply(world / "ssd.parquet", strategy="quamba", granularity="head_group", db=tmp_path)
    with pytest.raises(UnknownName, match="unknown granularity 'heads'"):
        run(world, "ssd", tmp_path, strategies=["quamba"], granularities=["heads"])


def test_the_float_model_alone(world: Any, tmp_path: Path) -> None:
    """Its rows are those that it has beside INT8 models, and the tokens it gets right are counted one by one."""
    arguments = ["--float", "--model", str(world / "tiny2"), "--data", str(world / "text.jsonl"), "--window", "16"]
    done = CliRunner().invoke(
        evaluate_command, [*arguments, "--task", "perplexity", "--db", str(tmp_path), "--format", "json"]
    )
    assert done.exit_code == 0, done.output
    beside = run(world, "tensor", tmp_path, strategies=["quamba"]).results.to_pylist()
    stored = {e["strategies"]: e["evaluation"] for e in list_evaluations(tmp_path)[0].to_pylist()}
    alone = find_evaluation(tmp_path, stored[""]).results.to_pylist()
    names = ("document", "tokens", "nll", "kl", "top1_agreement", "top1_right")
    assert [[r[n] for n in names] for r in alone] == [[r[n] for n in names] for r in beside if r["strategy"] == "float"]

    loaded = load_model(str(world / "tiny2"))
    model, right = loaded.floating(), 0
    for line in (world / "text.jsonl").read_text().splitlines():
        tokens = loaded.tokenizer.encode(json.loads(line)["text"])
        for start in range(0, len(tokens), 16):
            window = tokens[start : start + 16]
            best = model.logits(model.hidden(Batch.pack([window]))).argmax(-1).tolist()
            right += sum(a == b for a, b in zip(best[:-1], window[1:], strict=True))
    summary = json.loads(done.stdout)[0]
    assert sum(r["top1_right"] for r in alone) == right > 0
    assert summary["token_accuracy"] == right / sum(r["tokens"] for r in alone)
    refused = CliRunner().invoke(evaluate_command, ["--float", "--db", str(tmp_path)])
    assert refused.exit_code == 1 and "--float --model NAME" in refused.stderr


def test_groups_without_their_channels_are_refused(world: Any, tmp_path: Path) -> None:
    table = read_scales(world / "channel.parquet")
    provenance = json.loads(json.dumps(table.provenance))
    del provenance["runs"]["run-a"]["model"]["groups"]
    write_scales(tmp_path / "lost.parquet", table.table, provenance)
    with pytest.raises(ScalesInvalid, match="x_conv_out:input has 8 scale groups, expected 1 or 2"):
        apply(tmp_path / "lost.parquet", strategy="quamba", db=tmp_path)


def test_the_command_names_a_missing_site_in_one_line(world: Any, tmp_path: Path) -> None:
    table = read_scales(world / "tensor.parquet")
    kept = table.table.filter(pa.array([row["site"] != "dt_act:input" for row in table.table.to_pylist()]))
    write_scales(tmp_path / "less.parquet", kept, table.provenance)
    found = CliRunner().invoke(
        apply_command, ["--scales", str(tmp_path / "less.parquet"), "--strategy", "quamba", "--db", str(tmp_path)]
    )
    assert found.exit_code == 1
    assert "no scale for layer 0 dt_act:input (2 of" in found.stderr
