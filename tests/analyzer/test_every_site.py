"""The channels and the largest tokens of every site from one query, against a query for each site."""

from __future__ import annotations

from pathlib import Path

from made_report import TOKENS, make_database

from quambase.analyzer.pictures.numbers.channels import channels_by_reach, channels_of_every_site
from quambase.analyzer.pictures.numbers.largest_tokens import largest_tokens, largest_tokens_of_every_site
from quambase.schema.sql.database import StatsDB


def test_one_query_answers_as_one_for_each_site(tmp_path: Path) -> None:
    folder = make_database(tmp_path, scales=False, evaluation=False)
    with StatsDB(folder) as database:
        keys = [(r["layer"], r["site"]) for r in database.sql("select distinct layer, site from channels").to_pylist()]
        channels = channels_of_every_site(database, "run-a")
        assert channels == {key: channels_by_reach(database, "run-a", *key) for key in keys} and len(keys) == 22
        for limit in (3, None):
            tokens = largest_tokens_of_every_site(database, "run-a", limit)
            assert [(key, len(mine)) for key, mine in tokens.items()] == [
                ((layer, "x_proj:input"), limit or len(TOKENS)) for layer in (0, 1)
            ]
            assert all(mine == largest_tokens(database, "run-a", *key, limit) for key, mine in tokens.items())
