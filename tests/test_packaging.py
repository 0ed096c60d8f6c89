"""The wheel holds exactly what the tree does."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

from lowest_versions import lowest

ROOT = Path(__file__).parent.parent
FOLDERS = ("schema", "model", "collector", "analyzer", "apply", "report", "cli")


def test_the_wheel_equals_the_tree(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("quambase/")}
    expected = {f"quambase/{name}" for name in tracked if name.split("/")[0] in FOLDERS}
    expected |= {name.replace("api/", "quambase/", 1) for name in tracked if name.startswith("api/")}
    assert packed == expected


def test_console_scripts_are_there() -> None:
    names = {e.name for e in entry_points(group="console_scripts") if e.value.startswith("quambase.")}
    assert names == {"collect", "analyze", "apply", "evaluate", "quambase"}


def test_no_path_of_a_machine_is_committed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(rb"(?<![\w.])/(?:home|root|work|Users|tmp)/\w+")
    for name in tracked:
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".toml", ".sh", ".sql", ".txt", ".json"}
            and path.exists()
            and path.name != "tokenizer.json"
        ):
            found = pattern.search(path.read_bytes())
            assert found is None, f"{name} names {found[0]!r}" if found else ""


def test_the_lowest_versions_are_declared_and_below_the_pinned_ones() -> None:
    """What `make test-lowest` installs, beside what the checkout is developed with."""
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    found = dict(line.split("==") for line in lowest())
    assert list(found) == [re.split("[><=]", requirement)[0] for requirement in declared]
    assert found["torch"] == pinned["torch"]
    number = lambda version: [int(part) for part in version.split(".")]  # noqa: E731
    for name, version in found.items():
        assert number(version) <= number(pinned[name]), name
