"""The README names every command, strategy and table there is, and no command there is not."""

import re
from pathlib import Path

import pytest

from quambase.analyzer.strategies import STRATEGIES
from quambase.cli.main import COMMANDS, load_command
from quambase.schema.sites import MAMBA1_SITES
from quambase.schema.tables import RUN_TABLES

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme_and_its_help_ends_with_an_example(command: str) -> None:
    assert re.search(rf"`(quambase )?{command}[ `]", README), command
    text = load_command(command).help or ""
    assert "Example:" in text
    example = text.split("Example:")[1].split()
    assert command in example[:3]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: str) -> None:
    for parameter in load_command(command).params:
        if parameter.param_type_name == "option":
            assert getattr(parameter, "help", None), f"{command} {parameter.name}"


def test_every_strategy_table_and_site_is_in_the_readme() -> None:
    for name in [*STRATEGIES, *RUN_TABLES, *(site.name for site in MAMBA1_SITES)]:
        assert f"`{name}`" in README, name


def test_no_unknown_command_is_in_the_readme() -> None:
    used = set(re.findall(r"^\$? ?(?:\.venv/bin/)?quambase ([a-z]+)", README, flags=re.MULTILINE))
    used |= set(re.findall(r"`quambase ([a-z]+)", README))
    assert used and used <= set(COMMANDS)
