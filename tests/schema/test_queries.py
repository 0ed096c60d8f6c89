"""The product's SQL lies in two files, every named query is used, and `definitions_for` finds what a query reads."""

import re
from pathlib import Path

from quambase.schema.sql.database import StatsDB
from quambase.schema.sql.queries import definitions_for, named_queries, sql_file

ROOT = Path(__file__).parents[2]
STAGES = ("schema", "model", "collector", "analyzer", "apply", "cli")


def sources() -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for stage in STAGES for path in (ROOT / stage).rglob("*.py")}


def test_every_named_query_is_used_by_its_name() -> None:
    text = "\n".join(sources().values())
    used = set(re.findall(r'(?:self|database)\.query\("(\w+)"|_names\("(\w+)"\)', text))
    found = {name for pair in used for name in pair if name}
    assert found | {"sites", "layers"} == set(named_queries())  # f"{kind}s" names these two
    assert len(named_queries()) == sql_file("queries.sql").count("\n-- name: ")


def test_every_named_query_says_what_it_answers_and_ends_at_its_semicolon() -> None:
    for part in sql_file("queries.sql").split("\n-- name: ")[1:]:
        name, comment, *lines = part.splitlines()
        assert re.fullmatch(r"-- [A-Z].*\.", comment), name
        assert "\n".join(lines).rstrip().endswith(";") and "".join(lines).count(";") == 1, name
    assert all(not query.endswith(";") and "--" not in query for query in named_queries().values())


def test_no_query_of_the_product_lies_elsewhere() -> None:
    """Settings and comments of the connection are no queries."""
    for path, text in sources().items():
        found = re.findall(r'"\s*(?:SELECT|WITH|CREATE|INSERT)\s[^"]*', text)
        assert [q for q in found if "FROM" in q and "asked" not in q] == [], path


def test_definitions_follow_what_a_view_reads() -> None:
    def names(query: str) -> list[str]:
        return [re.findall(r"CREATE (?:VIEW|MACRO) (\w+)", statement)[0] for statement in definitions_for(query)]

    assert names("select * from OUTLIER_CHANNELS") == ["channel_stats", "outlier_channels"]
    assert names("select * from quantile(0.5), runs") == ["runs", "absolute_counts", "quantile"]
    assert names("select 1") == []


def test_a_trace_sees_the_query_and_its_parameters(fabricated_database: Path) -> None:
    seen: list[str] = []
    with StatsDB(fabricated_database, trace=seen.append) as database:
        database.sql("select $a as a", {"a": 7})
        database.stats(limit=1)
    assert seen[0] == "select $a as a\n-- $a = 7"
    assert seen[1] == named_queries()["sites_by_outliers"] + "\n-- $site = None\n-- $layer = None\n-- $limit = 1"
    assert len(seen) == 2
