"""What pyproject.toml declares is what the product imports: nothing is missing, nothing needless is installed."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
STAGES = ("api", "schema", "model", "collector", "analyzer", "apply", "report", "cli")

MODULES = {"scikit-learn": "sklearn", "huggingface-hub": "huggingface_hub", "cuda-bindings": "cuda"}
"""Packages whose module has another name than theirs with underscores."""

OWN = {"quambase", "quamba", "transformers"}
"""Not declared: ourselves; and what only an installed upstream Quamba brings along."""


def declared(*extras: str) -> set[str]:
    """The modules of the dependencies, and of these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(each for name in extras for each in project["optional-dependencies"][name])]
    names = [re.match(r"[\w-]+", each)[0].replace("_", "-") for each in wanted]
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def imported() -> set[str]:
    """The top modules that any file of the product imports, at its beginning or inside a function."""
    found = set()
    for path in (path for stage in STAGES for path in (ROOT / stage).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).split(".")[0])
    return found - sys.stdlib_module_names


def test_every_dependency_is_imported() -> None:
    assert declared() - imported() == set()


def test_every_import_is_declared() -> None:
    assert imported() - OWN - declared("cuda", "train", "hub", "eval") == set()
