"""What dividing a Mamba-2's sites buys: every strategy at every granularity, in error of x, perplexity and KL.

    python benchmarks/bench_granularity.py [TEXT ...]

Collects the bundled Mamba-2 (and, beside it, the bundled Mamba-1) on the bundled calibration text, analyzes, and
evaluates on TEXT (default: the real text among the bundled ones). A temporary folder holds the databases.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from timing import machine

from quambase.analyzer.analyze import analyze
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.evaluation.summary import summarize
from quambase.apply.evaluation.summary_text import readable
from quambase.collector.collect import collect
from quambase.schema.groups import GROUP
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.results import FLOAT

SAMPLES, EVALUATED = 128, 40

ERROR = """
SELECT label, granularity, sum(groups)::BIGINT AS scales, avg(mse) AS mse FROM granularity_gain
WHERE site = 'x_conv_out:input' GROUP BY ALL
"""


def size_of(folder: Path) -> float:
    """Megabytes of the tables in ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*.parquet")) / 1e6


def collected(model: str, db: Path, groups: str | None = None) -> str:
    """Collect and say what it took: one line of a table."""
    start = time.perf_counter()
    run = collect(model, SAMPLES, db=db, groups=groups, progress=False)
    seconds = time.perf_counter() - start
    raw = size_of(run.folder / "activations")
    found = pq.read_metadata(run.folder / "groups.parquet").num_rows
    return (
        f"| {model} {groups or ''} | {run.manifest.data['tokens']:,} | {seconds:.1f} | "
        f"{run.manifest.created.get('group_seconds', 0)} | {found} | {size_of(run.folder) - raw:.1f} | {raw:.1f} |"
    )


def main() -> None:
    """Print the collections' table, then the strategies'."""
    texts = sys.argv[1:] or ["python-docs:evaluation"]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        lines = [collected("mamba-5m", root / "first")]
        lines.append(collected("mamba2-8m", root / "plain", groups="none"))
        lines.append(collected("mamba2-8m", root / "second", groups="quamba2"))
        lines.append(collected("mamba2-8m", root / "second", groups="fixed"))
        analyze(root / "second", strategies=["all"], out=root / "scales.parquet")
        with StatsDB(root / "second", scales=root / "scales.parquet") as db:
            errors = {(row["label"], row["granularity"]): row for row in db.sql(ERROR).to_pylist()}
        found = evaluate(
            scales=root / "scales.parquet",
            granularities=["all"],
            data=texts,
            samples=EVALUATED,
            task="perplexity",
            db=root / "second",
            progress=True,
        )
        rows = readable(summarize(found.results)).figures.to_pylist()
    print(machine())
    print(
        "\n| run | tokens | seconds | first pass, s | groups | MB without raw | MB raw |\n|---|---|---|---|---|---|---|"
    )
    print("\n".join(lines))
    for text in texts:
        print(f"\n{text}\n\n| strategy | granularity | scales of x | MSE of x | perplexity | KL a token |")
        print("|---|---|---|---|---|---|")
        for row in (row for row in rows if row["text"] == text):
            label, _, level = row["strategy"].partition(" (")
            level = level.rstrip(")") or GROUP
            error = errors.get((label, level))
            scales, mse = (str(error["scales"]), f"{error['mse']:.4g}") if error else ("", "")
            shown = "" if label == FLOAT else level
            print(f"| {label} | {shown} | {scales} | {mse} | {row['perplexity']} | {row['KL/token']} |")


if __name__ == "__main__":
    main()
