"""``python tests/faults [--command NAME] [--every K]``: disturb the commands at every call, or every K-th; a table.

A command is run in a folder of its own with a tiny model, thousands of times; all take an hour or two."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "support")]


def arguments() -> argparse.Namespace:
    from faults.commands import COMMANDS

    parser = argparse.ArgumentParser(description="Let each change of a file fail, a command at a time.")
    parser.add_argument("--command", action="append", choices=list(COMMANDS), help="only this one; once for each")
    parser.add_argument("--every", type=int, default=1, help="try every K-th call only")
    parser.add_argument("--sample", type=int, help="instead, so many calls at most of each command, each in one way")
    parser.add_argument("--careless", action="store_true", help="plant a fault: files are written in their places")
    parser.add_argument("--show", type=int, default=20, help="describe so many of the faults that were found")
    return parser.parse_args()


def main() -> int:
    """Exit code 1 if anything was found."""
    from faults.attempts import Disturbed, Folders, table
    from faults.commands import COMMANDS
    from faults.disturbed import prepare_process

    given = arguments()
    prepare_process(given.careless)
    folders, outcomes = Folders(Path(os.environ["FAULTS_FOLDER"])), []
    for name in given.command or COMMANDS:
        disturbed = Disturbed(name, COMMANDS[name], folders)
        for outcome in disturbed.sample(given.sample) if given.sample else disturbed.every(given.every):
            outcomes.append(outcome)
            print(table(outcomes).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(outcomes))
    found = [fault for outcome in outcomes for fault in outcome.faults]
    print("\n".join(found[: given.show]))
    return 1 if found else 0


def start() -> int:
    """Compile faults.c, and start this program again with it preloaded."""
    import subprocess

    from faults.disturbed import build, environment

    arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        variables = {**environment(build(folder), folder), "FAULTS_FOLDER": str(folder)}
        return subprocess.run([sys.executable, *sys.argv], env=variables).returncode


if __name__ == "__main__":
    sys.exit(main() if "FAULTS_FOLDER" in os.environ else start())
