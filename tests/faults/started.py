"""Commands in processes of their own, with lines of Python that run before them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BEGIN = """
import os, shutil, sys
from quambase.cli.main import COMMANDS, load_command
from quambase.cli.main import quambase as command
for name in COMMANDS:
    load_command(name)
import quambase.apply.evaluation.evaluate, quambase.analyzer.analyze, quambase.apply.apply, quambase.report.report
"""


def start(folder: Path, prelude: str, *words: str) -> subprocess.CompletedProcess[str]:
    script = BEGIN + prelude + "command(sys.argv[1:])"
    command = [sys.executable, "-c", script, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
