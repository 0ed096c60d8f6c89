"""A report for reviewers: the longest functions of the product, its longest files, and its fullest folders.

``python tests/house.py`` prints it. Nothing fails by it: a number is a reason to look, not a limit.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
STAGES = ("api", "schema", "model", "collector", "analyzer", "apply", "report", "cli")
SHOWN = 10


def product() -> list[Path]:
    """Every Python file of the product."""
    return sorted(path for stage in STAGES for path in (ROOT / stage).glob("**/*.py"))


def functions(path: Path) -> list[tuple[int, str, bool]]:
    """Lines (decorators counted), name, and whether Numba compiles it, of every function of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            compiled = any("jit" in ast.dump(decorator) for decorator in node.decorator_list)
            found.append(((node.end_lineno or node.lineno) - first + 1, node.name, compiled))
    return found


def report() -> list[str]:
    """The lines of the report."""
    files = product()
    long = [(lines, path, name, kernel) for path in files for lines, name, kernel in functions(path)]
    sizes = [(len(path.read_text(encoding="utf-8").splitlines()), path) for path in files]
    lines = [f"{sum(size for size, _ in sizes):,} lines in {len(files)} files", "", "longest functions"]
    for count, path, name, kernel in sorted(long, key=lambda item: -item[0])[:SHOWN]:
        lines.append(f"{count:5}  {path.relative_to(ROOT)}: {name}{' (kernel)' if kernel else ''}")
    lines += ["", "longest files"]
    lines += [f"{count:5}  {path.relative_to(ROOT)}" for count, path in sorted(sizes, reverse=True)[:SHOWN]]
    lines += ["", "fullest folders"]
    folders = Counter(path.parent for path in files if path.name != "__init__.py")
    return lines + [f"{count:5}  {folder.relative_to(ROOT)}" for folder, count in folders.most_common(SHOWN)]


if __name__ == "__main__":
    print("\n".join(report()))
