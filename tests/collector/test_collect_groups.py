# mypy: disable-error-code="call-overload"
"""Runs of a tiny Mamba-2 whose heads and channels are sorted: what is stored, against the run that is not sorted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from stored_runs import stored_table, write_as_version_1
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

from quambase.analyzer.analyze import analyze
from quambase.analyzer.pictures.plot import plot
from quambase.analyzer.site.group_spread import group_spread
from quambase.cli.main import quambase
from quambase.collector.clustering import layer_groups
from quambase.collector.collect import CollectedRun, collect
from quambase.collector.first_pass import statistics_of_run
from quambase.model.checkpoint import load_model
from quambase.model.prepare import prepare, reorder
from quambase.schema.errors import DatabaseInvalid, DataInvalid, UnknownName
from quambase.schema.groups import GRANULARITIES, ChannelGroup, LayerGroups
from quambase.schema.scale_table import read_scales
from quambase.schema.sql.database import StatsDB
from quambase.schema.values.distribution import Distribution

Rows = list[dict[str, object]]
X, STATE = "x_conv_out:input", "ssm_state_act:input"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SSD groups of five heads: a head group has two of them."""
    return write_tiny_mamba2(tmp_path_factory.mktemp("model") / "tiny2", d_model=40)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts.jsonl")


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("db")


def run_tiny(model: Path, data: Path, db: Path, **options: object) -> CollectedRun:
    settings = {"samples": 9, "seq_len": 32, "batch_size": 4, "progress": False} | options
    return collect(str(model), data=str(data), db=db, **settings)


@pytest.fixture(scope="module")
def plain(model: Path, data: Path, db: Path) -> CollectedRun:
    return run_tiny(model, data, db, groups="none", keep_tokens="all")


@pytest.fixture(scope="module")
def grouped(model: Path, data: Path, db: Path) -> CollectedRun:
    return run_tiny(model, data, db, keep_tokens="all")


def table(run: CollectedRun, name: str, site: str = "") -> Rows:
    rows = stored_table(run.folder, name).to_pylist()
    return [row for row in rows if not site or row["site"] == site]


def order_of(run: CollectedRun) -> list[LayerGroups]:
    found = run.manifest.model.layer_groups
    assert found is not None
    return found


def named(run: CollectedRun) -> Iterator[tuple[int, ChannelGroup]]:
    for layer, groups in enumerate(order_of(run)):
        for group in groups.groups():
            yield layer, group


def raw(run: CollectedRun, site: str) -> dict[tuple[int, str], dict[tuple[int, int], np.ndarray]]:
    """(layer, group) to (document, position) to the kept values."""
    found: dict = {}
    for row in table(run, "activations", site):
        key = row["layer"], row["group_name"]
        found.setdefault(key, {})[row["document"], row["position"]] = np.array(row["values"], np.float32)
    return found


def whole(run: CollectedRun, site: str, layer: int) -> dict[tuple[int, int], np.ndarray]:
    """(document, position) to the site's values, SSD groups put together; a run that is not sorted."""
    parts = {name: values for (la, name), values in raw(run, site).items() if la == layer}
    return {
        place: np.concatenate([parts[name][place] for name in sorted(parts)]) for place in next(iter(parts.values()))
    }


def test_fixed_is_the_default_and_found_in_the_runs_own_statistics(grouped: CollectedRun, plain: CollectedRun) -> None:
    """The first pass over all seven documents sees what the unsorted run stores."""
    weights = str(plain.manifest.identity["weights_sha256"])
    expected = [layer_groups(layer, 8, 2) for layer in statistics_of_run(plain.folder, weights)]
    assert order_of(grouped) == expected
    assert [sorted(sizes) for sizes in expected[0].head_groups] == [[1, 1, 1, 2]] * 2
    stored = grouped.manifest.model.groups
    assert stored is not None and (stored.variant, stored.settings["documents"]) == ("fixed", 7)
    assert plain.manifest.model.layer_groups is None and "groups" not in plain.manifest.identity
    assert grouped.manifest.created["group_seconds"] >= 0


def test_the_table_of_groups_names_them(grouped: CollectedRun) -> None:
    for site in (X, "x_conv_out:output", STATE, "ssm_state_act:output"):
        rows = table(grouped, "groups", site)
        found = {
            (r["layer"], r["group_name"], r["ssd_group"], r["head_group"], r["channel_group"], tuple(r["channels"]))
            for r in rows
        }
        assert found == {(layer, group.name, *group) for layer, group in named(grouped)}
        assert len(rows) == 2 * 2 * 4 * 4
    others = {row["site"] for row in table(grouped, "groups") if row["head_group"] is None}
    assert "B_conv_out:input" in others and "x_conv_in:input" in others


def test_values_are_the_unsorted_runs_at_their_new_places(grouped: CollectedRun, plain: CollectedRun) -> None:
    for site, width in ((X, 1), (STATE, 4)):
        found = raw(grouped, site)
        before = [whole(plain, site, layer) for layer in range(2)]
        assert found.keys() == {(layer, group.name) for layer, group in named(grouped)}
        for layer, group in named(grouped):
            sources = np.array(order_of(grouped)[layer].channel_index)[list(group.channels)]
            assert found[layer, group.name].keys() == before[layer].keys()
            for place, values in found[layer, group.name].items():
                expected = before[layer][place].reshape(-1, width)[sources].reshape(-1)
                # float16 weights are permuted, not changed, but the second layer's input is summed in another order
                # and out_proj is rounded to float16 after a rotation of other columns: some float16 ulps.
                assert np.abs(values - expected).max() <= 30 * 2.0**-11 * max(1, np.abs(before[layer][place]).max())


def test_the_run_is_of_the_reordered_model(grouped: CollectedRun, model: Path, data: Path, db: Path) -> None:
    """Every site's distribution is that of the model reordered first, by the same kernel in the same blocks."""
    from tiny_model import TEXTS

    from quambase.model.language_model import floating_model
    from quambase.model.packed_batch import Batch

    loaded = load_model(str(model))
    runner = floating_model(prepare(reorder(loaded.any_weights, order_of(grouped))), rotated=True)  # type: ignore[arg-type]
    texts = [tokens[:32] for text in TEXTS[:4] if (tokens := loaded.tokenizer.encode(text))]
    seen = {}
    runner.hidden(Batch.pack(texts), lambda layer, site, values, _: seen.update({(layer, site): values.clone()}))
    for layer in range(2):
        for site in ("dt_act:input", "out_proj:input"):
            rows = raw(grouped, site)[layer, "all"]
            ours = np.concatenate([rows[place] for place in sorted(rows) if place[0] < 4])
            np.testing.assert_array_equal(ours, seen[layer, site].numpy().reshape(-1))


def test_counts_channels_and_documents_are_of_the_kept_values(grouped: CollectedRun) -> None:
    for site, width in ((X, 1), (STATE, 4)):
        values = raw(grouped, site)
        counts: dict = {}
        for row in table(grouped, "counts", site):
            counts.setdefault((row["layer"], row["group_name"]), []).append((row["value"], row["count"]))
        channels = {(r["layer"], r["group_name"], r["channel"]): r for r in table(grouped, "channels", site)}
        documents = {(r["layer"], r["group_name"], r["document"]): r["amax"] for r in table(grouped, "documents", site)}
        used = 0
        for layer, group in named(grouped):
            mine = values[layer, group.name]
            tally = Distribution.of_values(np.concatenate(list(mine.values())))
            assert list(zip(tally.values.tolist(), tally.counts.tolist(), strict=True)) == counts[layer, group.name]
            matrix = np.stack([row.reshape(-1, width) for row in mine.values()])  # (rows, members, width)
            by_row = matrix[..., 0].T if site == X else matrix.reshape(-1, width).T
            names = group.channels if site == X else range(width)
            for name, column in zip(names, by_row, strict=True):
                row = channels[layer, group.name, name]
                used += 1
                assert (row["count"], row["min"], row["max"]) == (column.size, column.min(), column.max())
                # At most 300 float64 additions of values of at most some ten.
                assert row["sum"] == pytest.approx(column.astype(float).sum(), abs=1e-10)
                assert row["sum_sq"] == pytest.approx((column.astype(float) ** 2).sum(), rel=1e-12)
            for document in {place[0] for place in mine}:
                amax = max(np.abs(row.astype(np.float16)).max() for place, row in mine.items() if place[0] == document)
                assert documents[layer, group.name, document] == amax
        assert used == len(channels)


def test_outliers_lie_where_they_say(grouped: CollectedRun) -> None:
    for site, width in ((X, 1), (STATE, 4)):
        values = raw(grouped, site)
        members = {(layer, group.name): list(group.channels) for layer, group in named(grouped)}
        rows = table(grouped, "outliers", site)
        assert rows
        for row in rows:
            key = row["layer"], row["group_name"]
            channel, index = divmod(row["channel"], width)
            place = members[key].index(channel) * width + index
            assert np.float16(values[key][row["document"], row["position"]][place]) == row["value"]


def test_groups_from_a_run_in_either_order(grouped: CollectedRun, plain: CollectedRun, model: Path, data: Path) -> None:
    db = plain.folder.parent.parent
    for source in (plain, grouped):
        run = run_tiny(model, data, db, groups_from=source.manifest.run, sites=[X])
        assert run.manifest.identity["groups"]["run"] == source.manifest.run
        # The grouped run's first layer sees the same x, its second one's last bits differ: the same clusters.
        assert order_of(run)[0] == order_of(grouped)[0]
        heads = [sorted(layer.head_groups) for layer in order_of(run)]
        assert heads == [sorted(layer.head_groups) for layer in order_of(grouped)]
    with pytest.raises(DatabaseInvalid, match="the database has no run nowhere"):
        run_tiny(model, data, db, groups_from="nowhere")
    lacking = run_tiny(model, data, db, groups="none", sites=[STATE])
    with pytest.raises(DatabaseInvalid, match=f"lacks {X}"):
        run_tiny(model, data, db, groups_from=lacking.manifest.run)


def test_groups_from_a_run_of_an_earlier_version(plain: CollectedRun, tmp_path: Path) -> None:
    weights = str(plain.manifest.identity["weights_sha256"])
    earlier = write_as_version_1(plain.folder, tmp_path)
    for mine, theirs in zip(statistics_of_run(earlier, weights), statistics_of_run(plain.folder, weights), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_another_models_statistics_are_refused(plain: CollectedRun, data: Path, tmp_path: Path) -> None:
    other = write_tiny_mamba2(tmp_path / "other")
    with pytest.raises(DatabaseInvalid, match="of other weights"):
        run_tiny(other, data, plain.folder.parent.parent, groups_from=plain.manifest.run)


def test_quamba2_takes_every_document_and_has_its_own_run(model: Path, data: Path, tmp_path: Path) -> None:
    origins = []
    for options in ({"groups": "quamba2"}, {"groups": "quamba2", "group_samples": 3}, {"group_samples": 3}):
        run = run_tiny(model, data, tmp_path, sites=[X], **options)
        origins.append((run.manifest.run, run.manifest.identity["groups"]))
    assert len({run for run, _ in origins}) == 3
    assert [(o["variant"], o["documents"]) for _, o in origins] == [("quamba2", 7), ("quamba2", 3), ("fixed", 3)]


def test_options_that_do_not_go_together(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="unknown grouping 'fixd'; did you mean fixed"):
        run_tiny(model, data, tmp_path, groups="fixd")
    with pytest.raises(DataInvalid, match="--groups none says"):
        run_tiny(model, data, tmp_path, groups="none", group_samples=2)
    with pytest.raises(DataInvalid, match="leave out --group-samples"):
        run_tiny(model, data, tmp_path, groups_from="a", group_samples=2)
    first = write_tiny_model(tmp_path / "mamba1")
    with pytest.raises(DataInvalid, match="no heads to group"):
        run_tiny(first, data, tmp_path, groups="fixed")
    assert "groups" not in run_tiny(first, data, tmp_path, groups="none").manifest.identity


def test_the_scale_table_has_every_group_and_carries_the_order(
    grouped: CollectedRun, plain: CollectedRun, tmp_path: Path
) -> None:
    scale_file = tmp_path / "scales.parquet"
    analyze(grouped.folder.parent.parent, run=grouped.manifest.run, granularity="group", out=scale_file)
    found = read_scales(scale_file)
    rows = [row for row in found.table.to_pylist() if row["label"] == "quamba"]
    for site in (X, STATE):
        mine = {(r["layer"], r["group_name"]): r for r in rows if r["site"] == site}
        smallest = {(layer, group.name) for layer, group in named(grouped)}
        assert {key for key, row in mine.items() if row["granularity"] == "group"} == smallest
        assert {key for key, row in mine.items() if row["consumed"]} == smallest
        united = {(layer, name[:end]) for layer, name in smallest for end in (2, 4)}
        assert mine.keys() == smallest | united | {(0, "all"), (1, "all")}
        for (layer, name), row in mine.items():
            members = [mine[k] for k in smallest if k[0] == layer and (name == "all" or k[1].startswith(name))]
            # Upstream's scale follows from the largest value, so a larger group's is the largest of its members'.
            assert row["scale"] == max(m["scale"] for m in members)
            assert row["count"] == sum(m["count"] for m in members)
    assert found.model.layer_groups == order_of(grouped)
    with StatsDB(grouped.folder.parent.parent, "all") as db:
        pooled = {
            run: {(la, s): d for la, s, _, d in db.distributions(run)}
            for run in (grouped.manifest.run, plain.manifest.run)
        }
    first, second = (pooled[run][0, X] for run in (grouped.manifest.run, plain.manifest.run))
    # The first layer's x is the same, element for element but for float32's last bits.
    assert first.total == second.total and abs(first.amax - second.amax) <= 2.0**-10 * second.amax


def test_larger_groups_are_the_sums_of_their_members(grouped: CollectedRun) -> None:
    """Every granularity's distributions, tallied from the rows of `counts` by the beginning of the group's name."""
    tally: dict[tuple[int, str, str], Counter[float]] = {}
    for row in table(grouped, "counts"):
        name = str(row["group_name"])
        larger = {name[:2], name[:4]} if name.startswith("g") else set()
        for group in {"all", name} | larger:
            tally.setdefault((row["layer"], row["site"], group), Counter())[row["value"]] += row["count"]
    with StatsDB(grouped.folder.parent.parent, grouped.manifest.run) as db:
        rows = list(db.distributions(grouped.manifest.run, "group"))
    assert {(layer, site, name) for layer, site, name, _ in rows} == tally.keys()
    for layer, site, name, found in rows:
        expected = sorted(tally[layer, site, name].items())
        assert list(zip(found.values.tolist(), found.counts.tolist(), strict=True)) == expected


def test_a_finer_granularity_never_has_a_larger_least_error(grouped: CollectedRun) -> None:
    """The best scale of a group is one its members may use too, so their own best are at least as good together."""
    found = analyze(grouped.folder.parent.parent, grouped.manifest.run, ["mse", "ema_percentile"], "group", out=None)
    rows = found.table.to_pylist()
    error: dict[tuple[int, str], dict[str, float]] = {}
    for row in (r for r in rows if r["label"] == "mse" and r["site"] in (X, STATE)):
        levels = error.setdefault((row["layer"], row["site"]), {})
        levels[row["granularity"]] = levels.get(row["granularity"], 0.0) + row["mse"] * row["count"]
    for levels in error.values():
        ordered = [levels[name] for name in GRANULARITIES]
        # Scales are rounded to float32, which moves an error near its minimum by some 2^-48 of the signal.
        assert all(fine <= coarse * (1 + 1e-9) for coarse, fine in pairwise(ordered))
        assert ordered[-1] < ordered[0]
    # Quantiles of a larger group's documents do not follow from its members', so this strategy has no row there.
    averaged = {r["granularity"] for r in rows if r["label"] == "ema_percentile" and r["site"] == X}
    assert averaged == {"tensor", "group"}


def test_a_state_has_scales_by_state_index(grouped: CollectedRun) -> None:
    """absmax and quamba, as upstream: largest value of each index in each group of channels, from the raw states."""
    rows = analyze(grouped.folder.parent.parent, grouped.manifest.run, out=None).table.to_pylist()
    largest: dict[tuple[int, str], np.ndarray] = {}
    for row in table(grouped, "activations", STATE):
        half = (
            np.abs(np.array(row["values"], np.float32).astype(np.float16).astype(np.float64)).reshape(-1, 4).max(axis=0)
        )
        for group in {"all", row["group_name"], row["group_name"][:2], row["group_name"][:4]}:
            key = row["layer"], group
            largest[key] = np.maximum(largest.get(key, 0), half)
    seen = 0
    for row in (r for r in rows if r["site"] == STATE):
        scales = row["component_scales"]
        if row["label"] not in ("absmax", "quamba"):
            assert scales is None or row["needs_decode"]
            continue
        expected = np.maximum(largest[row["layer"], row["group_name"]], 1e-5 if row["label"] == "quamba" else 0) / 127
        # A float32 quotient or product: half a unit in the last place of it, and of the reciprocal.
        assert scales == pytest.approx(np.maximum(expected, 1e-6).tolist(), rel=2 * 2.0**-24)
        assert row["scale"] == max(scales)
        seen += 1
    assert seen == 2 * len(largest)
    assert not any(r["component_scales"] for r in rows if r["site"] != STATE and not r["needs_decode"])


def values_by_channel(run: CollectedRun, layer: int) -> np.ndarray:
    """(channels,) largest absolute x of every channel, over every token, from the raw activations."""
    largest = np.zeros(len(order_of(run)[layer].channel_index))
    members = {r["group_name"]: r["channels"] for r in table(run, "groups", X) if r["layer"] == layer}
    for row in table(run, "activations", X):
        if row["layer"] == layer:
            place = members[row["group_name"]]
            largest[place] = np.maximum(largest[place], np.abs(np.array(row["values"])))
    return largest


def reach_of(amax: np.ndarray, groups: list[list[int]]) -> tuple[int, float, float]:
    """Groups, spread and mean step, written out."""
    reach = [max(amax[c] for c in group) for group in groups]
    steps = [r for r, group in zip(reach, groups, strict=True) for _ in group]
    return len(groups), max(reach) / min(reach), sum(steps) / len(steps) / max(amax)


def test_spread_before_and_after_sorting(grouped: CollectedRun, tmp_path: Path) -> None:
    found = group_spread(grouped.folder.parent.parent, grouped.manifest.run, picture=tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    steps = []
    for row, layer in zip(found.table.to_pylist(), order_of(grouped), strict=True):
        after = values_by_channel(grouped, row["layer"])
        before = np.array([after[layer.channel_index.index(c)] for c in range(after.size)])
        groups = [list(group.channels) for group in layer.groups()]
        for name, amax in (("before", before), ("after", after)):
            count, spread, step = reach_of(amax, groups)
            # Stored as float32 and summed in another order.
            assert (row["groups"], row[f"spread_{name}"], row[f"mean_step_{name}"]) == pytest.approx(
                (count, spread, step), rel=1e-6
            )
        steps.append(row["mean_step_after"] / row["mean_step_before"])
        assert steps[-1] < 1, "sorting is what makes groups alike"
    assert found.layer == int(np.argmin(steps))
    with pytest.raises(UnknownName, match="unknown layer '9'"):
        group_spread(grouped.folder.parent.parent, grouped.manifest.run, 9)


def test_spread_of_a_run_that_was_not_sorted(plain: CollectedRun) -> None:
    with pytest.raises(DatabaseInvalid, match="has no sorted groups; collect a Mamba-2 with --groups fixed"):
        group_spread(plain.folder.parent.parent, plain.manifest.run)
    with pytest.raises(UnknownName, match="runs were chosen; groups looks at one"):
        group_spread(plain.folder.parent.parent, "all")


def test_views_answer_what_granularity_buys(grouped: CollectedRun, tmp_path: Path) -> None:
    """The views group_spread and granularity_gain against the rows they are of, one by one."""
    db, path = grouped.folder.parent.parent, tmp_path / "s.parquet"
    scales = analyze(db, grouped.manifest.run, ["mse", "absmax"], "group", out=path).table.to_pylist()
    with StatsDB(db, grouped.manifest.run, scales=path) as opened:
        gains = opened.sql("SELECT * FROM granularity_gain").to_pylist()
        spreads = opened.sql("SELECT * FROM group_spread WHERE site = $site", {"site": X}).to_pylist()
    error: dict[tuple[object, ...], list[tuple[float, int]]] = {}
    for row in scales:
        key = (row["layer"], row["site"], row["label"], row["granularity"])
        error.setdefault(key, []).append((row["mse"], row["count"]))
    assert len(gains) == len(error)
    for row in gains:
        parts = error[row["layer"], row["site"], row["label"], row["granularity"]]
        pooled = sum(e * n for e, n in parts) / sum(n for _, n in parts)
        (whole, _), *none = error[row["layer"], row["site"], row["label"], "tensor"]
        assert not none and row["groups"] == len(parts)
        assert (row["mse"], row["tensor_mse"]) == pytest.approx((pooled, whole), rel=1e-12)
        assert row["gain_db"] == pytest.approx(10 * math.log10(whole / pooled), abs=1e-9)
    for row in spreads:
        half = values_by_channel(grouped, row["layer"]).astype(np.float16).astype(np.float64)
        layer = order_of(grouped)[row["layer"]]
        count, spread, step = reach_of(half, [list(group.channels) for group in layer.groups()])
        assert (row["groups"], row["spread"], row["mean_step"]) == pytest.approx((count, spread, step), rel=1e-6)


@pytest.mark.parametrize(("heads", "channels"), [(1, 1), (2, 3), (4, 4), (5, 8), (50, 50)])
def test_macro_regrouped(grouped: CollectedRun, heads: int, channels: int) -> None:
    """Equal parts of ranked heads and channels, by plain loops."""
    with StatsDB(grouped.folder.parent.parent, grouped.manifest.run) as db:
        rows = db.sql("SELECT * FROM regrouped($h, $c)", {"h": heads, "c": channels}).to_pylist()
    for row in rows:
        amax = values_by_channel(grouped, row["layer"])
        per_head = amax.reshape(2, -1, 8)  # two SSD groups of heads of 8
        groups = []
        for g, mine in enumerate(per_head):
            ranked = np.argsort(mine.mean(axis=1), kind="stable")
            for some in np.array_split(ranked, min(heads, len(ranked))):
                for part in np.array_split(np.arange(8), min(channels, 8)):
                    group = []
                    for head in some:
                        order = np.argsort(mine[head], kind="stable")
                        group += [(g * len(mine) + head) * 8 + order[i] for i in part]
                    groups.append(group)
        count, spread, step = reach_of(amax, groups)
        assert (row["groups"], row["spread"], row["mean_step"]) == pytest.approx((count, spread, step), rel=1e-6)


def test_the_command(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["collect", "--model", str(model), "--data", str(data), "--samples", "9", "--db", str(tmp_path)]
    done = CliRunner().invoke(quambase, [*arguments, "--groups", "quamba2", "--group-samples", "4", "--site", X])
    assert done.exit_code == 0, done.output
    # The site stands for its groups, which are not named beside it.
    assert f" {X} (largest" in " ".join(done.stderr.split()) and done.stdout == ""
    picture = tmp_path / "groups.svg"
    shown = CliRunner().invoke(quambase, ["groups", "--db", str(tmp_path), "--picture", str(picture)])
    assert shown.exit_code == 0 and "mean_step_after" in shown.stdout and picture.exists()
    drawn = CliRunner().invoke(
        quambase, ["plot", "groups", "--db", str(tmp_path), "--out", str(picture), "--layer", "0"]
    )
    assert drawn.exit_code == 0 and "layer 0: sorting makes the mean step" in drawn.stderr, drawn.output
    found = plot("groups", tmp_path, layer=0)
    width = len(found.table) // 2
    assert found.table["order"].to_pylist() == ["model"] * width + ["sorted"] * width
    left, right = found.figure.axes
    for axes, order in ((left, "model"), (right, "sorted")):
        rows = [row for row in found.table.to_pylist() if row["order"] == order]
        assert axes.lines[0].get_ydata().tolist() == [row["amax"] for row in rows]  # type: ignore[union-attr]
        assert all(row["amax"] <= row["group_amax"] for row in rows)
    refused = CliRunner().invoke(quambase, [*arguments, "--groups", "nothing"])
    assert refused.exit_code == 2 and "--groups" in refused.stderr
