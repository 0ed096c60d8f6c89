"""The pictures of `quambase plot`: their axes hold the numbers and say what they are, and every format is written."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from fabricate import half, make_run, random_activations
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

import quambase
from quambase.analyzer.analyze import analyze
from quambase.analyzer.pictures import frame
from quambase.analyzer.pictures.asked import SHOWN
from quambase.analyzer.pictures.channels import ChannelsPicture
from quambase.analyzer.pictures.convergence import _apart, convergence_figure
from quambase.analyzer.pictures.groups import groups_figure
from quambase.analyzer.pictures.heatmap import _digits
from quambase.analyzer.pictures.numbers.channels import Channel
from quambase.analyzer.pictures.numbers.largest_tokens import LargestToken
from quambase.analyzer.pictures.numbers.site_grid import QUANTITIES
from quambase.analyzer.pictures.plot import KINDS, Picture, plot
from quambase.analyzer.pictures.tokens import TokensPicture
from quambase.analyzer.site.channel_division import Division
from quambase.cli import plot as command
from quambase.cli.main import quambase as cli
from quambase.schema.checksums import file_sha256
from quambase.schema.errors import (
    DatabaseInvalid,
    DataInvalid,
    OutputRefused,
    QuambaseError,
    ScalesInvalid,
    UnknownName,
)
from quambase.schema.pictures import WIDTHS, new_figure, picture_style, power_text, save_picture
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.manifest import Manifest, TableFile
from quambase.schema.tables import OUTLIERS, RUN_TABLES, write_table

SITE = "x_proj:output"


@dataclass(frozen=True)
class Stored:
    """Stands in for a stored evaluation."""

    id: str = "0123456789abcdef"
    labels: tuple[str, ...] = ("float", "absmax", "mse")

    @property
    def about(self) -> dict[str, Any]:
        return {"model": "fabricated"}

    def by_position(self) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for strategy, factor in (("mse", 2.0), ("absmax", 1.0), ("absmax, state int8:channel", 0.5)):
            for low, high in [(None, None), (0, 0), (1, 8), (9, 16), (17, 32)]:
                kl = factor * (high or 8)
                place: dict[str, Any] = {"data": "one", "strategy": strategy, "decoded_from": low, "decoded_to": high}
                rows.append(place | {"kl": kl, "kl_low": kl / 2 if low != 17 else None, "kl_high": 2 * kl})
                rows[-1]["prefill_kl"] = {"mse": 0.1}.get(strategy, 0.2)
        return pa.Table.from_pylist(rows + [row | {"data": "two"} for row in rows])

    def summary(self) -> pa.Table:
        names = ("kl", "perplexity", "flips", "accuracy", "kl_vs_quamba")
        empty = {f"{name}{end}": None for name in names for end in ("", "_low", "_high")}
        sizes = {"task": "perplexity", "documents": 9, "clusters": 3, "tokens": 50, "kl_vs_quamba_verdict": None}
        rows = []
        for data in ("one", "two"):
            for label in self.labels:
                kl = {"float": 0.0, "absmax": 0.2, "mse": 0.1}[label]
                row = empty | sizes | {"data": data, "strategy": label, "kl": kl, "flips": kl / 2, "kl_low": kl / 2}
                rows.append(row | {"kl_high": 2 * kl, "kl_vs_quamba_verdict": "better" if label == "mse" else None})
        return pa.Table.from_pylist(rows)


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with sensitivities, scales and tokens."""
    folder = tmp_path_factory.mktemp("db")
    run = make_run(folder, sensitive=True, by_position=True)
    key = {"run": "run-a", "layer": 1, "site": SITE, "group_name": "B", "document": 3, "position": 7}
    rows = [key | {"token_id": i, "token": t, "channel": 2, "value": v} for i, (t, v) in enumerate(TOKENS)]
    write_table(run / "outliers.parquet", "outliers", pa.Table.from_pylist(rows, OUTLIERS), RUN_TABLES["outliers"])
    manifest = Manifest.load(run)
    manifest.tables["outliers.parquet"] = TableFile(len(TOKENS), file_sha256(run / "outliers.parquet"))
    manifest.identity.update(block=3, seq_len=512, sites=[])  # of which converge says how to collect more
    manifest.save(run)
    labels = ["absmax", "mse", "quamba", "effect", "percentile", "outlier_piecewise", "effect_affine"]
    analyze(folder, strategies=labels, out=folder / "scales.parquet")
    return folder


TOKENS = [("$x^2$", -9.0), ("\n\x1b[31m", 5.0), ("漢\U00020000", 4.0), ("</text><script>", 3.0), ("a" * 80, 2.0)]


def drawn(kind: str, db: Path, **asked: Any) -> Picture:
    found = plot(kind, db, evaluation=Stored() if kind in ("evaluation", "decoding") else None, **asked)
    FigureCanvasAgg(found.figure).draw()
    return found


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


CHOSEN: dict[str, dict[str, Any]] = {
    "distribution": {"site": SITE, "layer": 1},
    "error": {"site": "x_proj:input", "layer": 1},
    "heatmap": {},
    "channels": {"site": SITE, "layer": 1},
    "positions": {"site": SITE, "layer": 1},
    "tokens": {"site": SITE, "layer": 1},
    "strategies": {},
    "convergence": {"strategies": ["absmax", "quamba"]},
    "evaluation": {},
    "decoding": {},
}
"""All but groups, which are of a sorted Mamba-2: tests/collector/test_collect_groups.py."""


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("kind", CHOSEN)
def test_every_picture_is_as_wide_as_asked_and_nothing_is_cut_off(db: Path, kind: str, columns: int) -> None:
    found = drawn(kind, db, columns=columns, **CHOSEN[kind])
    assert found.figure.get_figwidth() == WIDTHS[columns]
    renderer = found.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    box = found.figure.get_tightbbox(renderer)  # of all that is drawn, in inches
    # A hundredth of an inch of tolerance: a glyph may overhang its box.
    assert box.x0 >= -0.01 and box.x1 <= WIDTHS[columns] + 0.01
    assert box.y0 >= -0.01 and box.y1 <= found.figure.get_figheight() + 0.01
    sizes = [text.get_fontsize() for text in found.figure.findobj(Text) if text.get_text()]
    assert min(sizes) >= 6, "legible where it is printed"
    assert not any("mathdefault" in text for text in texts(found.figure)), "formulas would be shown as written"
    assert found.table.num_rows and 1 <= len(found.summary) <= 2
    assert all(axes.get_xlabel() or axes.get_ylabel() for axes in found.figure.axes)


def test_a_distribution_is_drawn_as_counted(db: Path) -> None:
    found = drawn("distribution", db, site=SITE, layer=1, group="B")
    (axes,) = found.figure.axes
    (steps,) = axes.patches
    values, edges, _ = steps.get_data()  # type: ignore[attr-defined]
    rows = found.table.to_pylist()
    total = sum(row["count"] for row in rows)
    assert total == sum(d.size for d in random_activations()[1, SITE]["B"])
    assert values.tolist() == [row["count"] / total for row in rows[1:]]
    assert edges.tolist() == [rows[1]["low"], *(row["high"] for row in rows[1:])]
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ("log", "log", "|x|")
    assert axes.get_ylabel() == "share of values per 1/8 octave"
    expected = {*SHOWN} | {mark.label for mark in found.numbers.marks if mark.selected}  # type: ignore[attr-defined]
    assert {mark.label for mark in found.numbers.marks} == expected  # type: ignore[attr-defined]
    lines = {float(line.get_xdata()[0]) for line in axes.lines}  # type: ignore[index]
    assert lines == {mark.clips_at for mark in found.numbers.marks}  # type: ignore[attr-defined]
    amax = max(float(np.abs(d.astype(np.float16)).max()) for d in random_activations()[1, SITE]["B"])
    assert any(re.search(rf"absmax.* {amax:.3g}: clips 0 %", text) for text in texts(found.figure))
    assert found.summary[0].startswith(f"layer 1 {SITE}, group B: largest |x| {amax:.3g}, 99.9 % of values within ")


def test_labels_of_a_staircase_meet_neither_each_other_nor_a_line() -> None:
    with picture_style():
        figure = Figure(figsize=(3.35, 3), layout="constrained")
        axes = figure.subplots()
        axes.set(xscale="log", xlim=(1e-3, 10))
        look = frame.looks([])["mse"]
        places = (4.0, 4.1, 0.5, 0.52, 4.1, 9.0)
        frame.staircase(axes, [frame.Mark(x, f"strategy{i}", "0.123", look) for i, x in enumerate(places)])
        FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    labels = [text for text in axes.texts if text.get_text()]
    assert [text.get_text() for text in labels if "," in text.get_text()] == ["strategy1, strategy4 0.123"]
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [text.get_window_extent(renderer) for text in labels]
    assert len(boxes) == len(set(places))
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
    for line in (text for text in axes.texts if isinstance(text, Annotation) and not text.get_text()):
        assert line.arrow_patch is not None
        path = line.arrow_patch.get_window_extent(renderer)
        assert not any(box.overlaps(path) for box in boxes)


def test_an_error_curve_goes_through_its_strategies(db: Path) -> None:
    found = drawn("error", db, site="x_proj:input", layer=1, strategies=["mse", "absmax", "effect_affine"])
    upper, lower = found.figure.axes
    numbers: Any = found.numbers
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("mean squared error", "predicted KL\n(nats a token)")
    for axes, losses in ((upper, numbers.curve.mse), (lower, numbers.curve.predicted_kl)):
        curve = axes.lines[0]
        assert np.array_equal(curve.get_xdata(), numbers.curve.scales) and np.array_equal(curve.get_ydata(), losses)
    points = {line.get_ydata()[0]: line for line in upper.lines[1:] if len(line.get_xdata()) == 1}  # type: ignore[index]
    marks = {mark.label: mark for mark in numbers.marks}
    assert set(points) == {mark.mse for mark in marks.values()}
    assert points[marks["effect_affine"].mse].get_markerfacecolor() == "white", "off the curve"
    assert "open: with a zero point or two segments" in texts(found.figure)
    assert marks["mse"].scale == numbers.curve.least_mse_scale
    assert f"at {marks['mse'].scale:.3g}" in found.summary[0] and "mse 1" in found.summary[1]
    usual: Any = plot("error", db, site="x_proj:input", layer=1).numbers
    assert [mark.label for mark in usual.marks if mark.selected] == ["effect_affine"], "beside the usual ones"
    assert {mark.label for mark in usual.marks} == {*SHOWN, "effect_affine"}
    named: Any = plot("error", db, site="x_proj:input", layer=1, strategies=["selected", "sigma"]).numbers
    assert {mark.label for mark in named.marks} == {"effect_affine", "sigma"}
    plain = make_run(db.parent / "plain", "plain").parent.parent
    bare = drawn("error", plain, site=SITE, layer=1)
    assert len(bare.figure.axes) == 1 and bare.table["predicted_kl"].null_count == bare.table.num_rows
    with pytest.raises(DatabaseInvalid, match="lacks what effect needs"):
        plot("error", plain, site=SITE, layer=1, strategies=["effect"])


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_heat_map_has_each_number_in_its_cell(db: Path, quantity: str) -> None:
    found = drawn("heatmap", db, quantity=quantity, columns=2)
    numbers: Any = found.numbers
    axes = found.figure.axes[0]
    (image,) = axes.images
    values = numbers.grid.values(quantity)
    assert np.array_equal(np.ma.filled(image.get_array(), np.nan), values.T, equal_nan=True)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(numbers.grid.sites)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "head"]
    assert axes.get_xlabel() == "layer"
    written = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    assert len(written) == np.isfinite(values).sum() and np.isfinite(values).sum() > 5
    factor = 1e6 if quantity in ("clipped_share", "predicted_kl") else 1
    for (column, row), text in written.items():
        assert text == _digits(values[column, row] * factor)
    label = found.figure.axes[1].get_xlabel()
    assert quantity.split("_")[0] in label.lower() and ("millionths" in label) == (factor > 1)
    worst = np.nanmin(values) if quantity == "sqnr_db" else np.nanmax(values)
    assert f"{worst:.3g} at layer" in found.summary[0]


def test_a_heat_map_of_one_strategy(db: Path) -> None:
    found = plot("heatmap", db, quantity="sqnr_db", strategies=["absmax"])
    assert "of absmax" in found.summary[0]
    with pytest.raises(UnknownName, match="2 strategies were named"):
        plot("heatmap", db, strategies=["absmax", "mse"])
    with pytest.raises(UnknownName, match="quantity"):
        plot("heatmap", db, quantity="mse")


def test_digits() -> None:
    given = (0.0, 0.0123, 0.996, 1.04, 9.94, 9.96, 99.6, 999.4, 999.6, 9960.0, 123456.0)
    assert [*map(_digits, given)] == ["0", "0.012", "1.0", "1.0", "9.9", "10", "100", "999", "1.0k", "10k", "123k"]


def test_channels_are_drawn_by_rank(db: Path) -> None:
    found = drawn("channels", db, site=SITE, layer=1)
    (axes,) = found.figure.axes
    points = [
        (rank, amax)
        for line in axes.lines
        if line.get_linestyle() == "None"
        for rank, amax in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]
    amax = [c.amax for c in found.numbers.channels]  # type: ignore[attr-defined]
    assert sorted(points) == [*enumerate(amax, 1)] and amax == sorted(amax, reverse=True) and len(amax) == 18
    (legend,) = found.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["B", "C", "dt"]
    first = found.numbers.channels[0]  # type: ignore[attr-defined]
    assert str(first.channel) in [text.get_text() for text in axes.texts]
    assert f"the farthest is channel {first.channel}, |x| up to {first.amax:.3g}" in found.summary[0]
    one = plot("channels", db, site=SITE, layer=1, group="B")
    assert one.table.num_rows == 6 and set(one.table["group_name"].to_pylist()) == {"B"}
    with pytest.raises(UnknownName, match="unknown group of x_proj:output 'Q'"):
        plot("channels", db, site=SITE, layer=1, group="Q")


@pytest.mark.parametrize("columns", WIDTHS)
def test_numbers_of_channels_do_not_meet(columns: int) -> None:
    channels = [Channel(1000 + i, "all", 9.0 - i / 1000, 0.0, 2.0) for i in range(2000)]
    figure = ChannelsPicture("layer 0 s", "m", channels, []).draw(columns)
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [t.get_window_extent(renderer) for t in figure.axes[0].texts if t.get_text().isdigit()]
    assert len(boxes) >= 3
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


@pytest.mark.parametrize(("label", "columns"), [("mse", 2), ("selected, state fp8:channel:stochastic", 1)])
def test_labels_below_a_narrow_picture_are_whole(label: str, columns: int) -> None:
    @frame.styled
    def draw(width: int) -> Figure:
        figure = new_figure(width, 2.4)
        axes = figure.subplots()
        for i in range(5):
            axes.plot([0, 1], [0, i], label=f"{label} {i}")
        frame.legend_outside(figure, axes, width)
        return figure

    figure = draw(1)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) == columns


def test_dead_channels_and_values_are_drawn(db: Path) -> None:
    assert "0 of 6 channels" in drawn("channels", db, site="dt_proj:input", layer=0).summary[0]
    dead = drawn("distribution", db, site="dt_proj:input", layer=0)
    assert "all values are 0" in texts(dead.figure) and "largest |x| 0" in dead.summary[0]
    assert drawn("error", db, site="dt_proj:input", layer=0).table.num_rows > 100


def test_hostile_tokens_are_drawn_as_text(db: Path, tmp_path: Path) -> None:
    found = drawn("tokens", db, site=SITE, layer=1, out=tmp_path / "t.svg")
    axes = found.figure.axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[:4] == ["'$x^2$'", "'\\n\\x1b[31m'", "'\\u6f22\\U00020000'", "'</text><script>'"]
    assert labels[4] == f"'{'a' * 17}…'"
    assert [bar.get_width() for bar in axes.patches] == [9, 5, 4, 3, 2]  # type: ignore[attr-defined]
    assert len({to_hex(bar.get_facecolor()) for bar in axes.patches}) == 2, "the negative one has another colour"
    assert [t.get_text() for t in axes.child_axes[0].get_yticklabels()][:2] == ["-9, 2, 3:7", "5, 2, 3:7"]
    svg = (tmp_path / "t.svg").read_text()
    assert re.search(r"<text [^>]*>'\$x\^2\$'</text>", svg), "no formula"
    assert "<script>" not in svg and "&lt;script&gt;" in svg
    with pytest.raises(DatabaseInvalid, match="stores no tokens of layer 0"):
        plot("tokens", db, site=SITE, layer=0)
    with pytest.raises(DatabaseInvalid, match="group C"):
        plot("tokens", db, site=SITE, layer=1, group="C")


def test_the_words_around_a_token_are_shown_where_they_are_known() -> None:
    token = LargestToken(2.0, 1, 5, 7, " cat", 3, "all", "long ago and far away the black", " sat on\n")
    picture = TokensPicture("layer 0 s", "m", [token], [])
    figure = picture.draw(2)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["…go and far away the black[ cat] sat on\\n"]
    assert picture.words()[1] == "the 1 largest are made by one token in one channel"


def test_strategies_are_drawn_best_first(db: Path) -> None:
    found = drawn("strategies", db, columns=2)
    left, right = found.figure.axes
    labels = [label.get_text() for label in left.get_yticklabels()]
    numbers: Any = found.numbers
    assert labels == [s.label + (" †" if s.needs_decode else "") for s in numbers.strategies]
    assert labels[-1] == "outlier_piecewise †" and "two segments" in " ".join(texts(found.figure))
    for height, each in enumerate(numbers.strategies):
        expected = sorted(loss.sqnr_db for loss in each.sites.values() if np.isfinite(loss.sqnr_db))
        dots, middle = (line for line in left.lines if line.get_ydata()[0] == height)  # type: ignore[index]
        assert sorted(dots.get_xdata()) == expected  # type: ignore[arg-type]
        assert middle.get_xdata()[0] == np.median(expected)  # type: ignore[index]
        (loss,) = (line.get_xdata()[0] for line in right.lines if line.get_ydata()[0] == height)  # type: ignore[index]
        assert loss == each.predicted_kl
    assert f"{numbers.strategies[0].label}, median SQNR" in found.summary[0]
    two = plot("strategies", db, strategies=["mse", "absmax"])
    assert set(two.table["strategy"].to_pylist()) == {"mse", "absmax"}
    with pytest.raises(UnknownName, match="strategy 'msee' in the scale table; did you mean mse"):
        plot("strategies", db, strategies=["msee"])


def test_an_evaluation_has_a_mark_and_an_interval_for_each_text(db: Path) -> None:
    found = drawn("evaluation", db, columns=2)
    axes = found.figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mse", "absmax"], "the float model is left out"
    assert axes.get_xscale() == "log" and [a.get_xlabel().split(":")[0] for a in found.figure.axes][1] == "flips"
    marks = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert [line.get_label() for line in marks] == ["one, perplexity", "two, perplexity"]
    assert all(np.array_equal(line.get_xdata(), [0.1, 0.2]) for line in marks)
    bars = [tuple(line.get_xdata()) for line in axes.lines if line.get_linestyle() != "None"]  # type: ignore[arg-type]
    assert bars == [(0.05, 0.2), (0.1, 0.4)] * 2
    assert found.summary == [
        "mse is best on 2 of 2 texts, such as one, 9 documents: KL 0.1 [0.05, 0.2], better than quamba"
    ]
    assert len(drawn("evaluation", db, columns=1).figure.axes) == 1
    with pytest.raises(DataInvalid, match="the floating-point model alone"):
        plot("evaluation", db, evaluation=Stored(labels=("float",)))
    with pytest.raises(DataInvalid, match=r"quambase\.evaluate returned"):
        plot("evaluation", db)
    with pytest.raises(UnknownName, match="evaluation 0123"):
        plot("evaluation", db, evaluation=Stored(), strategies=["quambaa"])


def test_positions_have_a_line_for_each_quantile_and_each_scale(db: Path, tmp_path: Path) -> None:
    parts = random_activations()[1, SITE]
    values = [np.concatenate(part, axis=1) for part in zip(*parts.values(), strict=True)]
    found = drawn("positions", db, site=SITE, layer=1)
    axes = found.figure.axes[0]
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert {"largest", "99.99 %", "99.9 %", "99 %", "median"} < lines.keys()
    ends = [8 << bucket for bucket in range(math.ceil(math.log2(max(8, *map(len, values)) / 8)) + 1)]
    for line, p in (("largest", 1), ("99.9 %", 0.999), ("median", 0.5)):
        x, y = lines[line].get_data()
        assert list(x) == ends
        for high, value in zip(ends, np.asarray(y), strict=True):
            low = 0 if high == 8 else high // 2
            here = np.concatenate([half(d[low:high]).ravel() for d in values]).astype(np.float64)
            assert value == np.quantile(np.abs(here[np.isfinite(here)]), p)
    with StatsDB(db, scales=db / "scales.parquet") as database:
        rows = database.query("scales_of_group", {"run": "run-a", "layer": 1, "site": SITE, "group": "all"}).to_pylist()
    chosen = {row["label"]: 127 * row["scale"] for row in rows if row["selected"] or row["label"] == "quamba"}
    assert {name[: -len(" clips")] for name in lines if name.endswith(" clips")} == chosen.keys() != set()
    for label, clip in chosen.items():
        assert np.asarray(lines[f"{label} clips"].get_ydata())[0] == pytest.approx(clip, rel=0.02)  # 127 or 128 steps
    assert re.fullmatch(
        r"layer 1 x_proj:output: 99.99 % of \|x\| within \S+ at tokens 1 to 8, \S+ at tokens \d+ to "
        rf"{ends[-1]}, \S+ times as far", found.summary[0]
    )  # fmt: skip
    make_run(tmp_path)
    with pytest.raises(DatabaseInvalid, match="run-a has no counts by position; collect again with --by-position"):
        plot("positions", tmp_path, site=SITE, layer=1)


def test_decoding_has_a_line_for_each_strategy_and_one_for_each_prefill(db: Path) -> None:
    found = drawn("decoding", db, columns=2)
    (axes,) = found.figure.axes
    lines = {str(line.get_label()): line for line in axes.lines}
    assert list(lines)[:2] == ["prefill", "mse"] and len(axes.lines) == 5  # formats of the state share a prefill
    assert np.array_equal(lines["absmax"].get_xdata(), [8, 16, 32]), "the prompt's own prediction is left out"
    assert np.array_equal(lines["absmax, state int8:channel"].get_ydata(), [4, 8, 16])
    assert found.summary == [
        "absmax, state int8:channel has the least KL by decoding, 4 nats a token, prefill 0.2; 4 at 1 to 8 tokens "
        "decoded, 16 at 17 to 32"
    ]
    assert found.notes == ["of 2 texts, one is drawn"]
    assert set(drawn("decoding", db, strategies=["mse"]).table["strategy"].to_pylist()) == {"mse"}
    with pytest.raises(UnknownName, match="did you mean mse"):
        plot("decoding", db, evaluation=Stored(), strategies=["msee"])
    with pytest.raises(DataInvalid, match=r"quambase\.evaluate returned"):
        plot("decoding", db)


def test_convergence_is_drawn_as_measured(db: Path) -> None:
    found = drawn("convergence", db, strategies=["absmax", "quamba"], columns=2)
    moved, _ = found.figure.axes
    for label in ("absmax", "quamba"):
        (line,) = (line for line in moved.lines if line.get_label() == label)
        rows = [row for row in found.table.to_pylist() if row["strategy"] == label]
        assert list(line.get_xdata()) == [row["documents"] for row in rows]  # type: ignore[arg-type]
        assert list(line.get_ydata()) == [row["change"] for row in rows]  # type: ignore[arg-type]
    # No movement at all is drawn on the lower edge of the logarithmic axis.
    still = [row | {"change": 0.0, "change_low": 0.0} for row in found.table.to_pylist()]
    axes = convergence_figure("still", pa.Table.from_pylist(still, found.table.schema)).axes[0]
    assert all(list(line.get_ydata()) == [axes.get_ylim()[0]] * len(line.get_ydata()) for line in axes.lines[:2])  # type: ignore[arg-type]
    assert (moved.get_xlabel(), moved.get_yscale()) == ("documents", "log")
    assert _apart({1, 2, 4, 31, 32}) == [32, 4, 2, 1]


def test_groups_are_drawn_in_both_orders() -> None:
    before, after = (Division(np.array(amax), (2, 2)) for amax in ([1.0, 8.0, 2.0, 4.0], [1.0, 2.0, 4.0, 8.0]))
    figure = groups_figure("heading", before, after)
    left, right = figure.axes
    for axes, division in ((left, before), (right, after)):
        assert np.array_equal(axes.lines[0].get_ydata(), division.amax)
        (steps,) = axes.patches
        assert steps.get_data()[0].tolist() == division.reach.tolist()  # type: ignore[attr-defined]
        assert axes.get_title(loc="left").endswith(f"mean step {division.mean_step:.3f}, spread {division.spread:.3g}")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_every_format_is_written_and_equal_pictures_are_equal_files(db: Path, tmp_path: Path, suffix: str) -> None:
    files = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for path in files:
        found = plot("distribution", db, site=SITE, layer=1, out=path)
        assert found.path == path
    first, second = (path.read_bytes() for path in files)
    assert first == second
    if suffix == "svg":
        assert re.search(r"<text [^>]*>share of values per 1/8 octave</text>", first.decode()), "text is text"
    if suffix == "pdf":
        assert first.startswith(b"%PDF") and b"/FontFile2" in first and b"/Type3" not in first
    if suffix == "png":
        width = int.from_bytes(first[16:20], "big")
        assert width == round(3.35 * 300)


def test_our_style_is_used_whatever_the_users_is(db: Path, tmp_path: Path) -> None:
    plain, styled = tmp_path / "a.png", tmp_path / "b.png"
    plot("heatmap", db, out=plain)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 20}):
        plot("heatmap", db, out=styled)
        assert mpl.rcParams["font.size"] == 30, "and theirs is left as it is"
    assert plain.read_bytes() == styled.read_bytes()


def test_the_style_is_for_others_too() -> None:
    script = (
        "import matplotlib.pyplot as plt; plt.style.use('quambase.schema.quambase'); print(plt.rcParams['font.size'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "7.0"


def test_looks_are_told_apart_and_stay_the_same() -> None:
    labels = ["absmax", "mine", "sigma", "yours", "mse"]
    assert len({*frame.looks(labels).values()}) == len(frame.looks(labels))
    assert frame.looks(["mse"])["mse"] == frame.looks(labels)["mse"]


def test_ticks_are_plain_text() -> None:
    given = (1e-3, 0.01, 0.2, 1.0, 1000.0, 1e4, 2e-5, 0.0, -1.0)
    assert [*map(power_text, given)] == ["10⁻³", "0.01", "0.2", "1", "1000", "10⁴", "2·10⁻⁵", "", ""]


def test_refusals(db: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "mine.png"
    foreign.write_bytes(b"precious")
    with pytest.raises(OutputRefused):
        plot("channels", db, out=foreign)
    assert foreign.read_bytes() == b"precious"
    plot("channels", db, out=foreign, force=True)
    with pytest.raises(QuambaseError, match=r"cannot be saved as 'x\.gif'"):
        plot("channels", db, out=tmp_path / "x.gif")
    with pytest.raises(DataInvalid, match="columns is 3; expected 1 or 2"):
        plot("channels", db, columns=3)
    with pytest.raises(UnknownName, match="did you mean heatmap"):
        plot("heatmaps", db)
    make_run(tmp_path / "none", "r")
    with pytest.raises(ScalesInvalid, match="there is no scale table; run `analyze`"):
        plot("strategies", tmp_path / "none", scales=None)
    make_run(tmp_path / "none", "s", number=2)
    with pytest.raises(UnknownName, match="plot looks at one"):
        plot("channels", tmp_path / "none", run="all")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["plot", *map(str, arguments)])


def test_the_command(db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(KINDS) == command.KINDS and command.QUANTITIES == QUANTITIES
    monkeypatch.chdir(tmp_path)
    done = run("distribution", "--db", db, "--site", SITE, "--layer", "1")
    assert done.exit_code == 0 and done.stdout == "" and (tmp_path / "distribution.png").exists()
    lines = done.stderr.splitlines()
    assert lines[0] == "run run-a" and lines[-1] == "written: distribution.png"
    assert lines[1].startswith(f"layer 1 {SITE}: largest |x| ")
    shown = run("channels", "--db", db, "--site", SITE, "--layer", "1", "--format", "csv", "--out", "c.pdf")
    assert shown.stdout.startswith('"channel","group_name","amax"') and len(shown.stdout.splitlines()) == 19
    assert run("evaluation", "--db", db).stderr.startswith("error: ") and run("nope", "--db", db).exit_code == 2
    with StatsDB(db) as database:
        worst = database.stats(limit=1).to_pylist()[0]
    assert f"layer {worst['layer']} {worst['site']}" in run("channels", "--db", db).stderr


def test_the_function(db: Path) -> None:
    found = quambase.plot("channels", str(db))
    assert isinstance(found.figure.axes[0], Axes) and found.path is None and "channel" in repr(found)


def test_an_own_figure_is_saved_in_our_style(tmp_path: Path) -> None:
    figure = Figure()
    figure.subplots().set_title("$a$")
    save_picture(figure, tmp_path / "f.svg")
    assert "Creator" in (tmp_path / "f.svg").read_text() or "quambase" in (tmp_path / "f.svg").read_text()
