"""Stored evaluations: which a database holds, and their rows, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Required, TypedDict

import pyarrow as pa

from quambase.schema import CHECKED_SINCE, FORMAT_VERSION
from quambase.schema.checksums import ALTERED, file_sha256
from quambase.schema.errors import DatabaseInvalid
from quambase.schema.json_files import Count, Sha256, as_type, read_json
from quambase.schema.tables import RESULTS, read_table

PERPLEXITY, LAST_WORD, LM_EVAL = "perplexity", "last-word", "lm-eval"
"""Tasks. The last stands for every task of lm-eval, whose own name is that of the text."""

PREFILL, DECODE = "prefill", "decode"
"""Tasks of the same predictions, those after a prompt: by one forward pass, and token by token from the cached state.
"""

STATE = ", state "
"""Between a strategy's label and the format in which its state is cached, where that is not the kernels' own."""

PROMPT_TOKENS = 16
"""Tokens of a prompt by default: few, since what follows is scored."""

WINDOW = 2048
"""Tokens that a model reads at once by default; a longer text is cut."""

FLOAT = "float"
"""The label of the floating-point model, which every strategy is compared with."""

UPSTREAM = "quamba"
"""The label of upstream's own scales, which every strategy is compared with, too."""

KL_DIFFERENCE = f"kl_vs_{UPSTREAM}"
"""The first figure of a strategy in a summary: how much more KL to the floating-point model it has than upstream's
scales.
"""

LATER = {"cluster": None, "weight_bits": None, "positions": None}
"""Columns that evaluations of earlier versions lack, and what they hold then."""

EVALUATION, RESULTS_FILE = "evaluation.json", "results.parquet"
"""Files of the folder ``results/<evaluation id>``. The first is written last: with it the evaluation is finished."""

ADVICE = "delete its folder and evaluate again"


class _Task(TypedDict, total=False):
    task: Required[str]
    data: Required[str]
    documents: Required[Count]


class _About(TypedDict, total=False):
    """The entries of evaluation.json that are read again."""

    evaluation: Required[str]
    model: Required[str]
    scales: Required[str]
    strategies: Required[list[str]]
    tasks: Required[list[_Task]]
    notes: Required[list[str]]
    run: str | None
    device: str
    number: Count
    results_sha256: Sha256


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What ``folder/evaluation.json`` says; DatabaseInvalid: missing, damaged, altered, another folder's, a newer
    format.
    """
    path = folder / EVALUATION
    try:
        about = read_json(path, DatabaseInvalid, ADVICE, FORMAT_VERSION, CHECKED_SINCE)
    except FileNotFoundError:
        raise DatabaseInvalid(f"{folder} holds no finished evaluation; run its command again to finish it") from None
    as_type(about, _About, path, DatabaseInvalid, ADVICE)
    if about["evaluation"] != folder.name:
        raise DatabaseInvalid(f"{path} tells of evaluation {about['evaluation']}, not of {folder.name}; {ADVICE}")
    return about


def read_results(folder: Path) -> pa.Table:
    """The rows (RESULTS) of a finished evaluation; DatabaseInvalid: unfinished, damaged, altered."""
    about = read_evaluation(folder)
    path = folder / RESULTS_FILE
    expected = about.get("results_sha256")  # quambase before 0.2 stored none
    if expected is not None and path.exists() and file_sha256(path) != expected:
        raise DatabaseInvalid(f"{path} {ALTERED}; {ADVICE}")
    return read_table(path, RESULTS, LATER)


def finished_evaluations(db: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What the finished evaluations of ``db`` say of themselves, oldest first, and a line for each damaged one.

    The database numbers evaluations as they finish; the time of a file decides nothing.
    """
    found, damaged = [], []
    for path in sorted((db / "results").glob(f"*/{EVALUATION}")):
        try:
            found.append(read_evaluation(path.parent))
        except DatabaseInvalid as error:
            damaged.append(f"evaluation {path.parent.name} is left out: {error}")
    return sorted(found, key=_age), damaged


def next_number(db: Path) -> int:
    """The number of the evaluation that finishes next."""
    found, _ = finished_evaluations(db)
    return 1 + (_age(found[-1])[0] if found else 0)


def _age(about: dict[str, Any]) -> tuple[int, str]:
    return about.get("number", 0), about["evaluation"]
