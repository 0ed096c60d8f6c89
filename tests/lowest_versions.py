"""Prints, as requirements for pip, the lowest versions that pyproject.toml declares.

torch is the exception: constraints.txt's, since no lower one has a CPU build under its plain name, and what pip would
take instead brings CUDA.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def lowest() -> list[str]:
    """`name==version` of every dependency, of `name>=version` in pyproject.toml; torch as constraints.txt pins it."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    pinned = re.findall(r"^torch==.+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = []
    for requirement in declared:
        name, version = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<[\d.]+)?", requirement).groups()
        found.append(pinned[0] if name == "torch" else f"{name}=={version}")
    return found


if __name__ == "__main__":
    print("\n".join(lowest()))
