"""A run that `collect` wrote, read back: SQL, summaries, groups and scale tables agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_model import write_texts, write_tiny_model

from quambase.analyzer.analyze import analyze
from quambase.collector.collect import collect
from quambase.schema.sites import MAMBA1_SITES, layer_sites
from quambase.schema.sql.database import StatsDB
from quambase.schema.tables import QUANTILES, SITE_STATS
from quambase.schema.values.distribution import Distribution


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected")
    collect(str(write_tiny_model(folder / "tiny")), 9, data=str(write_texts(folder / "t.jsonl")), db=folder / "db")
    return folder / "db"


def test_site_stats_follow_from_counts(database: Path) -> None:
    with StatsDB(database) as db:
        run = db.runs[0].run
        stored = {(r["layer"], r["site"], r["group_name"]): r for r in db.sql("select * from _site_stats").to_pylist()}
        found = {(la, s, g): d for la, s, g, d in db.distributions(run, "group")}
        assert set(stored) == set(found)
        assert len(stored) == 2 * (10 + 2 + 3) + 2
        for key, distribution in found.items():
            expected = distribution.summary()
            for name in SITE_STATS.names[4:-1]:
                # Moments are of up to 65,536 terms, in pairs here and with what is lost there: some twenty roundings,
                # of which the mean's are relative to the values.
                tolerance = (
                    {"rel": 1e-14, "abs": 1e-14 * expected["std"]} if name in ("mean", "std", "kurtosis") else {}
                )
                assert stored[key][name] == pytest.approx(expected[name], **{"rel": 1e-15, **tolerance}, nan_ok=True)


def test_quantile_macro_agrees_with_site_stats(database: Path) -> None:
    with StatsDB(database) as db:
        for name, p in QUANTILES.items():
            rows = db.sql(
                f"select s.{name} as stored, q.quantile as computed "
                "from site_stats s full join quantile($p) q using (run, layer, site, group_name)",
                {"p": p},
            )
            assert rows.num_rows == 32
            assert rows["stored"].to_pylist() == rows["computed"].to_pylist()


def test_activations_of_a_kept_token_are_among_the_counts(database: Path) -> None:
    with StatsDB(database) as db:
        rows = db.sql("select layer, site, group_name, values from activations").to_pylist()
        groups = {(la, s, g): d for la, s, g, d in db.distributions(db.runs[0].run, "group")}
    assert rows
    for row in rows:
        kept = Distribution.of_values(np.array(row["values"], np.float32))
        assert np.isin(kept.values, groups[row["layer"], row["site"], row["group_name"]].values).all()


def test_documents_are_numbered_by_their_place_in_the_file(database: Path) -> None:
    with StatsDB(database) as db:
        for series in db.documents(db.runs[0].run).values():
            assert series.documents.tolist() == [0, 2, 3, 4, 5, 7, 8]  # 1 and 6 are empty


def test_every_site_gets_every_scale(database: Path) -> None:
    table = analyze(database, out=None).table
    assert table.num_rows == 22 * 11
    assert {(r["layer"], r["site"]) for r in table.to_pylist()} == {(la, s.name) for la, s in layer_sites(2)}
    consumed = {r["site"] for r in table.to_pylist() if r["consumed"]}
    assert consumed == {s.name for s in MAMBA1_SITES if s.consumed}
