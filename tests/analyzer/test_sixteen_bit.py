"""Which operators to leave in 16 bit: against every subset of them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fabricate import make_run
from hypothesis import given, settings
from hypothesis import strategies as st

from quambase.analyzer.analyze import analyze
from quambase.analyzer.sixteen_bit import choose, frontier, sentence
from quambase.cli.main import load_command
from quambase.schema.errors import DatabaseInvalid, DataInvalid, ScalesInvalid
from quambase.schema.scale_table import MIXED, read_scales, write_scales
from quambase.schema.sites import FAMILIES, OPERATORS, find_site

ACTING = {family: [site.name for site in sites if site.acts and not site.head] for family, sites in FAMILIES.items()}


def row(layer: int, site: str, kl: float | None, **others: Any) -> dict[str, Any]:
    return {"layer": layer, "site": site, "predicted_kl": kl, "consumed": True, "decode_only": False, **others}


def loss_of(rows: list[dict[str, Any]], family: str, kept: set[tuple[int, str]]) -> float:
    """By definition: what sites lose that an operator of codes reads."""
    left = [
        each["predicted_kl"]
        for each in rows
        if any((each["layer"], name) not in kept for name in find_site(each["site"], family).read_by)
    ]
    return math.fsum(left)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 2), st.data())
def test_no_subset_is_better(family: str, layers: int, data: st.DataObject) -> None:
    # Multiples of 2^-10 add without rounding, so that equal losses are equal.
    kl = st.integers(0, 50).map(lambda n: n / 1024)
    rows = [row(layer, site, data.draw(kl)) for layer in range(layers) for site in ACTING[family]]
    operators = [
        (layer, name) for layer in range(layers) for name in OPERATORS if (family, name) != ("mamba2", "x_proj")
    ]
    best: dict[int, float] = {}
    for count in range(len(operators) + 1):
        every = itertools.combinations(operators, count)
        best[count] = min(loss_of(rows, family, set(kept)) for kept in every)
    found = frontier(rows, family)
    assert found[0].operators == () and found[0].loss == best[0] and found[-1].loss == 0
    for kept in found:
        assert kept.loss == best[len(kept.operators)] == loss_of(rows, family, set(kept.operators))
    assert [len(kept.operators) for kept in found] == [
        count for count in best if count == 0 or best[count] < min(best[fewer] for fewer in range(count))
    ]
    for budget in {0.25 * best[0], 0.5 * best[0], *best.values()}:
        if budget > 0:
            fewest = min(count for count, loss in best.items() if loss <= budget)
            assert len(choose(found, None, budget).operators) == fewest
    for keep in range(1, len(found[-1].operators) + 1):
        assert choose(found, keep, None).loss == min(best[count] for count in range(keep + 1))


def test_what_does_not_act_counts_nothing() -> None:
    rows = [row(0, "in_proj:input", 0.25), row(0, "out_proj:input", 0.5)]
    others = [
        row(0, "ssm_state_act:input", 9.0, decode_only=True),
        row(-1, "lm_head:input", 9.0),
        row(0, "x_proj:output", 9.0, consumed=False),
    ]
    found = frontier([*rows, *others], "mamba1")
    assert [(kept.operators, kept.loss) for kept in found] == [
        ((), 0.75),
        (((0, "out_proj"),), 0.25),
        (((0, "in_proj"), (0, "out_proj")), 0.0),
    ]
    assert frontier([*rows, row(1, "in_proj:input", None)], "mamba1") == [], "a loss is not known"
    assert frontier(rows, "imported") == []


def test_sentences() -> None:
    rows = [row(0, "in_proj:input", 0.25), row(3, "out_proj:input", 0.5), row(3, "in_proj:input", 0.25)]
    found = frontier(rows, "mamba1")
    assert sentence(found, None) == (
        "half of the predicted loss would be gone with 1 of 3 operators in 16 bit: analyze --keep 16bit=1"
    )
    assert sentence(found, found[2]) == (
        "mixed leaves 2 of 3 operators in 16 bit: predicted loss 0.25 nats a token, 75 % less: layer 0 in_proj; "
        "layer 3 out_proj"
    )
    assert sentence([], None) is None and sentence(found[:1], None) is None
    with pytest.raises(DataInvalid, match="16bit=4: with 3 operators in 16 bit nothing is lost; give 3 or fewer"):
        choose(found, 4, None)
    with pytest.raises(DatabaseInvalid, match="collect the run again with --sensitivity"):
        choose([], 1, None)


def test_the_table_has_the_strategy_mixed(tmp_path: Path) -> None:
    make_run(tmp_path / "db", sensitive=True)
    plain = analyze(tmp_path / "db", out=tmp_path / "plain.parquet")
    found = analyze(tmp_path / "db", out=tmp_path / "mixed.parquet", keep=1)
    assert found.mix is not None and len(found.mix.operators) == 1 and found.mix.loss < plain.frontier[0].loss
    table, without = read_scales(tmp_path / "mixed.parquet"), read_scales(tmp_path / "plain.parquet")
    assert repr(table.table.to_pylist()) == repr(without.table.to_pylist())  # NaN of empty groups and all
    assert without.in_16_bit == frozenset() and without.default_label == "selected"
    assert table.in_16_bit == set(found.mix.operators) and table.default_label == MIXED
    assert table.in_16_bit_for("mse") == frozenset() and table.in_16_bit_for(MIXED) == table.in_16_bit
    assert table.group_scales_for(MIXED) == table.group_scales_for("selected")
    with pytest.raises(ScalesInvalid, match="no strategy mixed; make one that does with `analyze --keep 16bit=N`"):
        without.group_scales_for(MIXED)
    met = analyze(tmp_path / "db", out=None, budget=0.999 * plain.frontier[0].loss)
    assert met.mix == plain.frontier[1]
    enough = analyze(tmp_path / "db", out=None, budget=2 * plain.frontier[0].loss)
    loss = f"{plain.frontier[0].loss:.2g}"
    count = len(plain.frontier[-1].operators)
    words = f"no operator needs 16 bit: the predicted loss is {loss} nats a token with all {count} in INT8"
    assert enough.mix == plain.frontier[0] and sentence(enough.frontier, enough.mix) == words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1, "budget": 1.0}, "keep and budget are both given"),
        ({"keep": 0}, "keep is 0 operators in 16 bit; expected at least 1"),
        ({"budget": math.nan}, "budget is nan nats a token; expected a positive number"),
        ({"budget": 0.0}, "budget is 0.0 nats a token; expected a positive number"),
        ({"keep": 1, "target": "upstream"}, "upstream's INT8 model has no operator in 16 bit"),
        ({"keep": 1, "run": "all"}, "operators in 16 bit are those of one model; name one run"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_run(tmp_path / "db", sensitive=True)
    with pytest.raises(DataInvalid, match=message):
        analyze(tmp_path / "db", out=None, **options)


def test_a_run_without_sensitivities_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "db")
    with pytest.raises(DatabaseInvalid, match="has no sensitivities, which predicted effects need"):
        analyze(tmp_path / "db", out=None, keep=1)


def test_on_the_command_line(tmp_path: Path) -> None:
    make_run(tmp_path / "db", sensitive=True)
    command, options = load_command("analyze"), ["--db", str(tmp_path / "db"), "--out", str(tmp_path / "s.parquet")]
    shown = CliRunner().invoke(command, [*options, "--keep", "16bit=1"])
    assert shown.exit_code == 0 and "mixed leaves 1 of" in shown.stderr
    for wrong in ("6", "8bit=6", "16bit=x", "16bit="):
        refused = CliRunner().invoke(command, [*options, "--keep", wrong])
        assert refused.exit_code == 2 and f"'{wrong}'; expected 16bit=NUMBER, such as 16bit=6" in refused.stderr
    shown = CliRunner().invoke(command, [*options, "--budget", "KL=1e-9", "--format", "json", "--force"])
    assert shown.exit_code == 0 and json.loads(shown.stdout)
    assert "mixed leaves" in shown.stderr


def test_a_damaged_list_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "db", sensitive=True)
    found = analyze(tmp_path / "db", out=None, keep=1)
    path = tmp_path / "s.parquet"
    for wrong in ([[0, "convolution"]], [["0", "in_proj"]], [[0]], 3):
        write_scales(path, found.table, {**found.provenance, "kept_16bit": wrong})
        with pytest.raises(ScalesInvalid, match="is damaged"):
            read_scales(path)
