"""What is written runs as written: every example of README, docs/ and --help, its output compared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from executed_docs import PAGES, ROOT, Example, difference, examples, readable, run, same

from quambase.cli.main import COMMANDS, load_command, quambase

ALONE = ("import", "merge", "groups", "converge")
"""Commands whose examples make a run of their own, which other commands would then take for the newest."""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a reader follows README and docs/ from top to bottom."""
    return tmp_path_factory.mktemp("session")


@pytest.mark.parametrize("page", PAGES)
def test_every_example_of_a_page_prints_what_is_shown(session: Path, page: str) -> None:
    for example in examples(page):
        code, found = run(example, session)
        assert code == 0, f"{example}: {example.text}\n" + "\n".join(found)
        if not example.python:
            problem = difference(example.shown, found)
            assert problem is None, f"{example}: {example.text}\n{problem}"


HUB = "lambada_openai"
"""A task whose data set is on the hub; tests/apply/evaluation/test_lm_eval.py runs these commands with another task."""


def help_examples(command: str) -> list[str]:
    text = (load_command(command).help or "").replace("\b", "").split("Example:")[1]
    return [line.strip() for line in text.strip().splitlines() if line.strip() and HUB not in line]


# tests/cli/test_demo.py runs the demo.
@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "demo"])
def test_every_example_of_help_runs(session: Path, tmp_path: Path, command: str) -> None:
    folder = tmp_path if command in ALONE else session
    torch.save(torch.randn(8, 6), folder / "activations.pt")
    for name, right in (("a", 7), ("b", 5)):
        samples = [{"doc_id": i, "doc": {"id": i}, "acc": float(i < right)} for i in range(12)]
        (folder / f"samples_{name}.jsonl").write_text("\n".join(map(json.dumps, samples)))
    for line in help_examples(command):
        code, found = run(Example(command, 0, False, line, []), folder)
        assert code == 0, f"{line}\n" + "\n".join(found)


def test_the_groups_own_example_runs(session: Path) -> None:
    for line in (quambase.help or "").replace("\b", "").split("Example:")[1].strip().splitlines():
        code, found = run(Example("quambase", 0, False, line.strip(), []), session)
        assert code == 0, f"{line}\n" + "\n".join(found)


def test_no_page_with_examples_is_left_out() -> None:
    """A block of commands or Python in any page is one that is run."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    with_examples = {str(p.relative_to(ROOT)) for p in pages if re.search("^```(console|python)$", p.read_text(), re.M)}
    assert with_examples == {page for page in PAGES if any(examples(page))}
    assert sum(1 for page in PAGES for _ in examples(page)) > 12


def test_the_comparison_notices() -> None:
    shown = ["strategy  KL", "mse       5.39", "...", "done in 3.1 s: run-0123456789ab"]
    found = ["strategy   KL", "mse        5.41", "other 1", "done in 22.7 s: run-ba9876543210"]
    assert difference(shown, found) is None
    for changed in (
        ["strategy   KL", "mse        6.41", *found[2:]],  # a number beyond the tolerance
        ["strategy   KL", "mse        -5.41", *found[2:]],
        ["strategy   KL", "msе        5.41", *found[2:]],  # another letter
        found[:-1],
        [*found, "one more"],
        found[1:],
    ):
        assert difference(shown, changed) is not None, changed
    assert same("KL 5.39 [5, 5.72]", "KL 5.4 [5.05, 5.81]") and not same("33,855 tokens", "13,855 tokens")
    assert same("18.43  -0.097 % same", "18.43  -0.017 % same") and not same("-0.097 % same", "-0.017 % worse")
    assert not same("+0.01 % same", "+0.31 % same") and not same("-0.097 % worse", "-0.017 % worse")
    assert not same("1 row", "2 rows") and same("a 0.01", "a 0.05") and not same("a 0.01", "a 0.08")
    assert readable("x\r 10%|# | 3/9 [00:01<00:02, 3.1it/s]\rdone\n\n") == ["done"]
