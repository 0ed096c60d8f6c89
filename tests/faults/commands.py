"""The commands that are disturbed: what each needs in its folder before, in the fewest files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tiny_model import write_texts, write_tiny_mamba2, write_tiny_model

COLLECT = ("collect", "--data", "texts.jsonl", "--samples", "6", "--batch-size", "2", "--keep-tokens", "4")
MAMBA1 = (*COLLECT, "--model", "mamba1")
GROUPED = (*COLLECT, "--model", "grouped")
SENSITIVE = ("--sensitivity", "2")
ALONG = ("--by-position", "--state-every", "8")
STRATEGIES = ("--strategy", "absmax", "--strategy", "mse", "--strategy", "quamba")
ANALYZE = ("analyze", *STRATEGIES)
APPLY = ("apply", "--strategy", "mse")
EVALUATE = ("evaluate", "--data", "texts.jsonl", "--samples", "5", "--bootstrap", "100")
EXPORT = ("apply", "--strategy", "absmax", "--export", "act_scales.pt")


@dataclass(frozen=True)
class Command:
    """``words`` of `quambase`, in a folder where the commands ``before`` have been run."""

    words: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()


COMMANDS = {
    "collect": Command(MAMBA1),
    "collect grouped": Command(GROUPED),
    "collect --shard": Command((*GROUPED, "--shard", "1/2")),
    "collect --sensitivity": Command((*MAMBA1, *SENSITIVE)),
    "collect --by-block": Command((*MAMBA1, "--by-block")),
    "collect --by-position": Command((*MAMBA1, *ALONG)),
    "collect --by-position --shard": Command((*GROUPED, *ALONG, "--shard", "1/2")),
    "merge": Command(("merge",), ((*GROUPED, *SENSITIVE, "--shard", "0/2"), (*GROUPED, *SENSITIVE, "--shard", "1/2"))),
    "merge --by-position": Command(
        ("merge",), ((*GROUPED, *ALONG, "--shard", "0/2"), (*GROUPED, *ALONG, "--shard", "1/2"))
    ),
    "import": Command(("import", "tensor.npy", "--site", "x_proj:input")),
    "analyze": Command(ANALYZE, (MAMBA1,)),
    "analyze again": Command(ANALYZE, (MAMBA1, ("analyze", "--strategy", "absmax"))),
    "apply": Command(APPLY, (MAMBA1, ANALYZE)),
    "apply --export": Command(EXPORT, (GROUPED, ANALYZE)),
    "evaluate": Command(EVALUATE, (MAMBA1, ANALYZE, APPLY)),
    "evaluate --scales": Command((*EVALUATE, "--strategy", "mse", "--strategy", "quamba"), (GROUPED, ANALYZE)),
    "report": Command(("report",), (MAMBA1, ANALYZE, APPLY, EVALUATE)),
    "plot pdf": Command(("plot", "heatmap", "--out", "heatmap.pdf"), (MAMBA1,)),
    "plot png": Command(("plot", "distribution", "--out", "picture.png"), (MAMBA1, ANALYZE)),
}


def make_inputs(folder: Path) -> None:
    """Models, a text and a tensor, which the commands name by relative paths."""
    write_tiny_model(folder / "mamba1")
    write_tiny_mamba2(folder / "grouped")
    write_texts(folder / "texts.jsonl")
    np.save(folder / "tensor.npy", np.linspace(-3, 3, 2 * 8 * 4, dtype=np.float32).reshape(2, 8, 4))
