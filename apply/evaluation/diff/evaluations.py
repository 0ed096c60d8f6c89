"""Two stored evaluations compared. No torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from quambase.apply.evaluation.comparisons import EXPONENTIAL, RATIO, SHARE
from quambase.apply.evaluation.diff.figures import Compared, Figure, because, compare
from quambase.apply.evaluation.sentences import few_clusters
from quambase.apply.evaluation.stored import Evaluation
from quambase.schema.errors import DataInvalid
from quambase.schema.stored.results import FLOAT, UPSTREAM
from quambase.schema.values.arrays import Float64


def compare_evaluations(a: Evaluation, b: Evaluation, seed: int = 0) -> Compared:
    """Compare two stored evaluations on the texts that both have; ``seed`` is of the random sign flips.

    Strategies that both have are compared with themselves; where each has one more, these with each other, first.
    DataInvalid: no text or no strategy in common, or a text whose documents differ.
    """
    figures: list[Figure] = []
    notes: list[str] = []
    texts = [_texts(one) for one in (a, b)]
    for text in texts[0]:
        if text in texts[1]:
            figures += _stored_figures(a, b, text, notes)
    for one, other, name in ((texts[0], texts[1], "A"), (texts[1], texts[0], "B")):
        notes += [f"only in {name}, left out: {data}, {task}" for task, data in one if (task, data) not in other]
    if not figures:
        raise DataInvalid(f"evaluations {a.id} and {b.id} have no text and strategy in common" + because(notes))
    if a.about.get("weights_sha256") != b.about.get("weights_sha256"):
        notes.append("the models differ: KL and flips are each to the own floating-point model")
    table = compare(figures, seed)
    for row in table.to_pylist():
        if line := few_clusters(f"{row['data']}, {row['task']}", row["documents"], row["clusters"]):
            notes.append(line)
    notes.insert(0, "documents are paired by their hashes")
    first, second = (f"evaluation {one.id} of {one.about.get('model')}" for one in (a, b))
    return Compared(first, second, table, list(dict.fromkeys(notes)))


def _texts(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(task, data) of an evaluation."""
    columns = (evaluation.results[name].to_pylist() for name in ("task", "data"))
    return list(dict.fromkeys((str(task), str(data)) for task, data in zip(*columns, strict=True)))


def _stored_figures(a: Evaluation, b: Evaluation, text: tuple[str, str], notes: list[str]) -> Iterator[Figure]:
    """The figures of one text; ``notes`` gets a line about strategies that are left out."""
    task, data = text
    sides = [_by_strategy(one, task, data) for one in (a, b)]
    first, second = (next(iter(side.values())) for side in sides)
    if sorted(first["sha256"].to_pylist()) != sorted(second["sha256"].to_pylist()):
        mine, theirs = (set(table["sha256"].to_pylist()) for table in (first, second))
        raise DataInvalid(
            f"{data}, {task}: evaluations {a.id} (A) and {b.id} (B) are not about the same documents: "
            f"{len(mine - theirs):,} of {first.num_rows:,} are only in A, {len(theirs - mine):,} of "
            f"{second.num_rows:,} only in B; evaluate both with the same --data and --samples"
        )
    if first["tokens"].to_pylist() != second["tokens"].to_pylist():
        raise DataInvalid(
            f"{data}, {task}: the documents of evaluations {a.id} (A) and {b.id} (B) have other numbers of tokens; "
            "evaluate both with one tokenizer and one --window"
        )
    for labels in _labels(list(sides[0]), list(sides[1]), notes):
        one, other = (side[label] for side, label in zip(sides, labels, strict=True))
        yield from _strategy_figures(task, data, labels, one, other)


def _by_strategy(evaluation: Evaluation, task: str, data: str) -> dict[str, pa.Table]:
    """The rows of each strategy on one text, in one order of documents: by hash, then by number."""
    results = evaluation.results
    mask = pc.and_(pc.equal(results["task"], task), pc.equal(results["data"], data))
    rows = results.filter(mask).sort_by([("sha256", "ascending"), ("document", "ascending")])
    labels = pc.unique(results.filter(mask)["strategy"]).to_pylist()
    return {str(label): rows.filter(pc.equal(rows["strategy"], label)) for label in labels}


def _labels(a: list[str], b: list[str], notes: list[str]) -> list[tuple[str, str]]:
    """Which strategy of A is compared with which of B: the only ones that are not in both (but for upstream's scales,
    which stand beside every applied model), then those that are.
    """
    only = [label for label in a if label not in b], [label for label in b if label not in a]
    both = [(label, label) for label in sorted(a, key=lambda label: label == FLOAT) if label in b]
    own = [[label for label in side if label != UPSTREAM] or side for side in only]
    if len(own[0]) == len(own[1]) == 1:
        both.insert(0, (own[0][0], own[1][0]))
    for place, (name, side) in enumerate(zip("AB", only, strict=True)):
        if left := [label for label in side if label not in [labels[place] for labels in both]]:
            notes.append(f"only in {name}, left out: {', '.join(left)}")
    return both


def _strategy_figures(task: str, data: str, labels: tuple[str, str], a: pa.Table, b: pa.Table) -> Iterator[Figure]:
    """KL, flips, perplexity and accuracy, those of them that both have, of a strategy of A and one of B."""
    clusters = [one or other for one, other in zip(a["cluster"].to_pylist(), b["cluster"].to_pylist(), strict=True)]
    tokens = a["tokens"].cast(pa.float64()).to_numpy()
    likelihoods, answers = (not (a[name].null_count or b[name].null_count) for name in ("nll", "correct"))
    per = np.ones_like(tokens) if answers else tokens

    def figure(metric: str, kind: str, name: str, weights: Float64, larger_is_better: bool = False) -> Figure:
        one, other = (table[name].cast(pa.float64()).to_numpy() for table in (a, b))
        if metric == "flips":
            one, other = tokens - one, tokens - other
        return Figure(metric, kind, one, other, weights, clusters, larger_is_better, data, task, labels)

    if likelihoods and labels != (FLOAT, FLOAT):
        yield figure("kl", RATIO, "kl", tokens)
        yield figure("flips", RATIO, "top1_agreement", tokens)
    if likelihoods:
        yield figure("perplexity", EXPONENTIAL, "nll", per)
    if answers:
        yield figure("accuracy", SHARE, "correct", per, larger_is_better=True)
