"""What a report says of positions and of decoding: against the tables, and nothing where there is nothing."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest
from fabricate import make_run, random_activations
from made_report import DECODED, HOSTILE, Page, add_decoding, make_database

from quambase.analyzer.analyze import analyze
from quambase.analyzer.pictures.plot import plot
from quambase.apply.evaluation.stored import find_evaluation
from quambase.report.report import report
from quambase.schema.scale_table import read_scales
from quambase.schema.sites import STATE_BY_CHANNEL
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.results import read_results

STATE = "ssm_state_act:input"
REACHES = ("amax", "q9999", "q999", "q99", "q50")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("along") / "db", along=True)


@pytest.fixture(scope="module")
def page(database: Path) -> Page:
    return Page(report(database, out=database.parent / "report.html").path)


def section(page: Page, name: str) -> str:
    """The words of a section, of which there is one."""
    (found,) = re.findall(rf'<section id="{name}".*?</section>', page.source, re.S)
    return re.sub(r"(\s|<[^>]*>)+", " ", found)


def test_positions_lead_with_the_site_that_differs_most(page: Page, database: Path) -> None:
    with StatsDB(database) as opened:
        rows = opened.sql("select * from position_stats where group_name = 'all' order by all").to_pylist()
    reach: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        reach.setdefault(row["site"], {}).setdefault(row["layer"], []).append(row["q9999"])
    # Of each site the layer whose ends differ most, either way; then the sites by the same.
    # A site of zeros differs in nothing.
    unequal = {
        s: {n: abs(math.log(r[-1] / r[0])) if r[0] else 0 for n, r in layers.items()} for s, layers in reach.items()
    }
    layer_of = {site: max(layers, key=lambda layer: layers[layer]) for site, layers in unequal.items()}
    order = sorted(unequal, key=lambda site: -max(unequal[site].values()))
    words = section(page, "positions")
    table = words.split("times as far")[-1]
    found = re.findall(r"(\w+:\w+) (-?\d+) 1 to 8 (\S+) (\d+ to \d+) (\S+) (\S+)", table)
    assert [(site, int(layer)) for site, layer, *_ in found] == [(site, layer_of[site]) for site in order]
    for site, layer, first, _, last, times in found:
        ends = reach[site][int(layer)]
        assert (first, last, times) == (
            f"{ends[0]:.3g}",
            f"{ends[-1]:.3g}",
            f"{ends[-1] / ends[0]:.3g}" if ends[0] else "–",
        )
    worst = order[0]
    drawn = plot("positions", database, site=worst, layer=layer_of[worst])
    assert f"Most unequal: {drawn.summary[0]} ." in words
    assert f"Next: quambase plot positions --site {worst} --layer {layer_of[worst]} --run run-a" in words


def test_each_site_has_its_reach_by_position(page: Page, database: Path) -> None:
    with StatsDB(database) as opened:
        rows = opened.sql("select * from position_stats where group_name = 'all' order by tokens_from").to_pylist()
    scales = read_scales(database / "scales.parquet").table.to_pylist()
    clipped = 0
    for p in page.data["pages"]:
        mine = [row for row in rows if (row["layer"], row["site"]) == (p["layer"], p["site"])]
        found = p["positions"]
        assert found["to"] == [row["tokens_to"] for row in mine] != []
        assert found["tokens"] == [f"{row['tokens_from']} to {row['tokens_to']}" for row in mine]
        for name in REACHES:
            assert found[name] == pytest.approx([row[name] for row in mine], rel=5e-4), "four digits"
        here = {
            row["label"]
            for row in scales
            if (row["layer"], row["site"], row["group_name"]) == (p["layer"], p["site"], "all")
            and (row["selected"] or row["label"] == "quamba")
        }
        assert {label for label, _ in found["clips"]} == here
        clipped += len(here)
    assert clipped > 20


def test_the_state_along_documents_clips_where_the_states_scale_does(tmp_path: Path) -> None:
    activations = random_activations(3)
    activations[1, STATE_BY_CHANNEL] = activations[1, STATE]
    make_run(tmp_path / "db", activations=activations, by_position=True)
    analyze(tmp_path / "db", strategies=("absmax", "quamba"), out=tmp_path / "db" / "scales.parquet")
    page = Page(report(tmp_path / "db", out=tmp_path / "r.html").path)
    clips = {p["site"]: p["positions"]["clips"] for p in page.data["pages"] if p["layer"] == 1}
    assert clips[STATE_BY_CHANNEL] == clips[STATE] and "quamba" in dict(clips[STATE])
    assert clips["ssm_state_act:output"] != clips[STATE]


def test_decoding_says_what_evaluate_says(page: Page, database: Path) -> None:
    words = section(page, "decoding")
    assert "Decoding with mse, state int8:channel has a KL of" in words and "It adds" in words
    evaluation = find_evaluation(database, "decoded").id
    assert f"Next: quambase plot decoding --evaluation {evaluation} --columns 2 --db" in words
    rows = [row for row in read_results(database / "results" / evaluation).to_pylist() if row["strategy"] != "float"]
    (data,) = page.data["decoding"]

    def kl(task: str, label: str, low: int) -> float:
        """By the definition: the sum of KL over that of tokens."""
        mine = [p for r in rows if (r["task"], r["strategy"]) == (task, label) for p in r["positions"]]
        mine = [p for p in mine if p["decoded_from"] == low]
        return 1000 * sum(p["kl"] for p in mine) / sum(p["tokens"] for p in mine)

    labels = {"decode": ["mse", "quamba", "mse, state int8:channel"], "prefill": ["mse", "quamba"]}
    for task, key in (("decode", "decoded"), ("prefill", "prefill")):
        keys = {(label, high) for label in labels[task] for low, high in DECODED if low}
        assert {(row["strategy"], row["to"]) for row in data[key]} == keys and len(data[key]) == len(keys)
        for row in data[key]:
            low = next(low for low, high in DECODED if high == row["to"])
            assert row["kl"] == pytest.approx(kl(task, row["strategy"], low), rel=5e-4)
            assert task == "prefill" or row["low"] < row["kl"] < row["high"]
    lines = re.findall(r"(decode|prefill) (mse, state int8:channel|mse|quamba) (\S+)", words.split(" all ")[1])
    assert len(lines) == 5
    assert [float(all_) for *_, all_ in lines] == sorted(float(all_) for *_, all_ in lines), "the least first"


def test_it_says_how_to_decode_again(page: Page) -> None:
    words = section(page, "provenance")
    assert "quambase evaluate --scales scales.parquet --strategy mse --strategy quamba --data" in words
    assert "--samples 12 --mode decode --state int8:channel --prompt-tokens 5" in words
    assert "Evaluation by decoding" in words and words.count("quambase evaluate") == 2


def test_the_next_command_names_a_strategy_of_the_table(tmp_path: Path) -> None:
    """A format of the state is none."""
    made = make_database(tmp_path / "db", name="m")
    add_decoding(made, number=2)  # the newest
    found = report(made, out=tmp_path / "r.html")
    words = shlex.split(found.command)
    assert words[words.index("--strategy") + 1] == "mse"
    assert "mse, state int8:channel loses" in found.summary[0]
    assert section(Page(found.path), "provenance").count("quambase evaluate") == 1


def test_absent_data_have_no_section(tmp_path: Path) -> None:
    made = make_database(tmp_path / "db")
    page = Page(report(made, out=tmp_path / "r.html").path)
    ids = [attributes.get("id") for _, attributes in page.elements]
    assert not {"decoding", "positions", "site-by-position"} & set(ids)
    assert not {"#decoding", "#positions"} & {attributes.get("href") for _, attributes in page.elements}
    assert page.data["decoding"] == [] and {p["positions"] for p in page.data["pages"]} == {None}


def test_a_named_evaluation_is_shown_alone(database: Path, tmp_path: Path) -> None:
    page = Page(report(database, evaluation="0123", out=tmp_path / "r.html").path)
    assert page.data["decoding"] == [] and "--mode decode" not in page.words()
    assert HOSTILE in page.words()
