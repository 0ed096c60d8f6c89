"""The figures of docs/answers.md: what each strategy's scales cost, and how well their cost is predicted.

python benchmarks/measure_scales.py mamba-5m 100 8
python benchmarks/measure_scales.py mamba2-8m 60 4

Model, documents of the evaluation, documents of `evaluate --one-at-a-time`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from quambase.analyzer.analyze import analyze
from quambase.analyzer.summary import selection, summarize
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.evaluation.one_at_a_time import one_at_a_time
from quambase.apply.evaluation.sentences import sentence
from quambase.apply.evaluation.summary import summarize as summarize_results
from quambase.collector.collect import collect

TEXT = "sample:evaluation"
EVALUATED = ("effect_affine", "effect", "mse", "percentile:0.9999", "quamba", "absmax")
ALONE = ("effect", "mse", "quamba", "percentile:0.999", "absmax")


def main(model: str, documents: int, alone: int) -> None:
    """Collect, analyze, evaluate, and quantize one site at a time; print what comes out."""
    with tempfile.TemporaryDirectory() as name:
        db, scales = Path(name), Path(name) / "scales.parquet"
        collect(model, 128, db=db, sensitivity=40, progress=False)
        table = analyze(db, out=scales).table
        for row in summarize(table).to_pylist():
            if row["predicted_kl"] is not None:
                print(f"{row['strategy']:24} predicted KL x1000 {1000 * row['predicted_kl']:.3g}")
        print("\n".join(selection(table)), flush=True)
        options = {"data": TEXT, "samples": documents, "task": "perplexity", "db": db}
        found = summarize_results(evaluate(scales=scales, strategies=EVALUATED, **options).results).to_pylist()
        print(f"\n{model}, {documents} documents of {TEXT}: KL x1000\n{sentence(found)}")
        for row in found:
            shown = " to ".join(f"{1000 * row[end]:.3g}" for end in ("kl_low", "kl_high") if row[end] is not None)
            verdict = row["kl_vs_quamba_verdict"]
            print(f"{row['strategy']:20} {1000 * row['kl']:.3g} ({shown}) {verdict}, {row['kl_vs_quamba']}", flush=True)
        each = one_at_a_time(scales, ALONE, data=TEXT, samples=alone, db=db)
        print(f"\none site at a time, {alone} documents:", *each.summary, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
