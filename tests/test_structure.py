"""The stages meet on disk: which folder may import which, and what works without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from house import product, report

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "schema": {"schema"},
    "model": {"schema", "model"},
    "collector": {"schema", "model", "collector"},
    "analyzer": {"schema", "analyzer"},
    "apply": {"schema", "model", "apply"},
    "report": {"schema", "analyzer", "apply", "report"},
    "cli": {"schema", "model", "collector", "analyzer", "apply", "report", "cli"},
    "api": {"schema", "model", "collector", "analyzer", "apply", "report", "cli"},
}
FORBIDDEN = {
    "schema": {"torch", "click"},
    "analyzer": {"torch", "click"},
    "model": {"click"},
    "collector": {"click"},
    "apply": {"click"},
    "report": {"torch", "click"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_one_way(folder: str) -> None:
    files = sorted((ROOT / folder).glob("**/*.py"))
    assert files
    for path in files:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "quambase":
                assert parts[1] in ALLOWED[folder], f"{path.relative_to(ROOT)} imports {name}"
            assert parts[0] not in FORBIDDEN.get(folder, set()), f"{path.relative_to(ROOT)} imports {name}"


def test_the_rule_would_notice() -> None:
    assert imports(ROOT / "collector" / "collect.py") >= {"quambase.model.checkpoint", "quambase.schema.sites"}


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        *(
            [name, "--help"]
            for name in ("sql", "stats", "analyze", "compare", "converge", "plot", "results", "report", "diff")
        ),
    ],
)
def test_analysis_commands_work_without_torch(command: list[str]) -> None:
    """With torch (and what only the model needs) made unimportable, as on a laptop that never installed it."""
    script = (
        "import sys\n"
        "for name in ('torch', 'tokenizers', 'safetensors', 'transformers'): sys.modules[name] = None\n"
        "from quambase.cli.main import quambase\n"
        "quambase()"
    )
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def module_of(path: Path) -> str:
    """The name under which a file of the product is imported."""
    stage, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = ["quambase", *(() if stage == "api" else (stage,)), *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_level_imports(path: Path) -> set[str]:
    """What a file imports when it is imported: not inside functions, and not for the type checker alone."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Names that lead back to the first of them; none where there is no cycle."""
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := walk(other, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_files_import_in_no_cycle() -> None:
    files = {module_of(path): path for folder in ALLOWED for path in (ROOT / folder).glob("**/*.py")}
    graph = {name: top_level_imports(path) & files.keys() - {name} for name, path in files.items()}
    assert sum(map(len, graph.values())) > 200
    assert cycle(graph) == []


def test_a_cycle_would_be_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_report_for_reviewers_counts_every_file() -> None:
    lines = report()
    assert lines[0].endswith(f" lines in {len(product())} files") and "longest functions" in lines


def test_one_place_decides_where_machine_code_is_kept() -> None:
    """`kept_njit` works, and says so, where no folder can be written; ``cache=True`` elsewhere would raise there."""
    holders = [path for path in product() if "cache=True" in path.read_text("utf-8")]
    assert [path.relative_to(ROOT).as_posix() for path in holders] == ["schema/compiled.py"]
