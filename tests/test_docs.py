"""README and docs/ name every command, strategy, site and table there is, and no command there is not."""

import re
from pathlib import Path

import pytest
from generated_docs import PARTS, generated

from quambase.analyzer.strategies import DEFAULT_LABELS, STRATEGIES, parse_labels
from quambase.cli.main import COMMANDS, load_command
from quambase.schema.sites import MAMBA1_SITES
from quambase.schema.tables import RUN_TABLES

ROOT = Path(__file__).parent.parent


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


ALL = "\n".join(
    page(str(path.relative_to(ROOT))) for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_described_and_its_help_ends_with_an_example(command: str) -> None:
    assert re.search(rf"^\| `quambase {command}[ `]", page("docs/commands.md"), re.M), command
    text = load_command(command).help or ""
    assert "Example:" in text
    example = text.split("Example:")[1].split()
    assert command in example


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: str) -> None:
    for parameter in load_command(command).params:
        if parameter.param_type_name == "option":
            assert getattr(parameter, "help", None), f"{command} {parameter.name}"


def test_every_strategy_table_and_site_is_described() -> None:
    for name in STRATEGIES:
        assert f"`{name}`" in page("docs/strategies.md"), name
    for name in [*RUN_TABLES, *(site.name for site in MAMBA1_SITES)]:
        assert f"`{name}`" in page("docs/database.md"), name


def test_the_counts_of_strategies_are_right() -> None:
    labels = {*DEFAULT_LABELS, *(choice.label for choice in parse_labels(["all"]))}
    said = re.search(r"These are (\d+) names and, with the percentiles, (\d+) labels", page("docs/strategies.md"))
    assert said and (int(said[1]), int(said[2])) == (len(STRATEGIES), len(labels))


def test_every_link_leads_to_a_file() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_no_unknown_command_is_named() -> None:
    used = set(re.findall(r"^\$? ?(?:\.venv/bin/)?quambase ([a-z-]+)", ALL, flags=re.MULTILINE))
    used |= set(re.findall(r"`quambase ([a-z-]+)", ALL))
    assert used and used <= set(COMMANDS)


@pytest.mark.parametrize("name", PARTS)
def test_a_generated_part_is_what_the_code_says(name: str) -> None:
    path, make = PARTS[name]
    text = page(f"docs/{path}")
    assert generated(text, name, make()) == text, "run python tests/generated_docs.py"


def test_every_file_that_contributing_names_is_there() -> None:
    named = set(re.findall(r"`([\w-]+(?:/[\w-]+)*/[\w.-]+\.(?:py|sql|cuh?|md))`", page("CONTRIBUTING.md")))
    assert len(named) > 30 and [name for name in sorted(named) if not (ROOT / name).exists()] == []
