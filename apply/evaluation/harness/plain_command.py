"""Whether lm-eval's own command `lm_eval` knows our models: two files in the environment's site-packages.

lm-eval looks for models in its own package alone. `import quambase_lm_eval` in a `.pth` file runs whenever Python
starts, and adds our model to lm-eval's registry. That changes the whole environment: only the user's command does it.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

from quambase.schema.errors import DataInvalid

MODULE, AT_START = "quambase_lm_eval.py", "quambase_lm_eval.pth"


def site_packages() -> Path:
    """The folder in which both files lie or would lie. DataInvalid: Python reads no `.pth` files there."""
    folder = Path(sysconfig.get_path("purelib"))
    if str(folder) not in sys.path:
        raise DataInvalid(f"Python does not read {folder}; use `quambase lm-eval ARGUMENTS` instead of `lm_eval`")
    return folder


def enable() -> Path:
    """Make `lm_eval --model quambase` work in this environment; the folder of the two files. DataInvalid, OSError."""
    folder = site_packages()
    shutil.copyfile(Path(__file__).with_name(MODULE), folder / MODULE)
    (folder / AT_START).write_text(f"import {Path(MODULE).stem}\n", encoding="utf-8")
    return folder


def disable() -> bool:
    """Undo `enable`; False if there was nothing to undo. DataInvalid, OSError."""
    folder = site_packages()
    found = [path for name in (AT_START, MODULE) if (path := folder / name).exists()]
    for path in found:
        path.unlink()
    return bool(found)
