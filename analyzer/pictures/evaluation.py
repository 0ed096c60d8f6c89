"""Picture of an evaluation: what each strategy loses on each text, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quambase.analyzer.pictures import frame
from quambase.analyzer.pictures.asked import Asked
from quambase.analyzer.pictures.numbers.evaluation import Estimate, Evaluated, EvaluatedText, evaluated_texts
from quambase.schema.errors import DataInvalid
from quambase.schema.pictures import logarithmic, new_figure
from quambase.schema.stored.results import FLOAT, UPSTREAM

PANELS: tuple[tuple[str, Callable[[Evaluated], Estimate | None], bool], ...] = (
    ("KL to the float model\n(nats a token)", lambda row: row.kl, True),
    ("flips: share of tokens with\nanother most likely token", lambda row: row.flips, False),
    ("accuracy", lambda row: row.accuracy, False),
)
"""What is drawn: its label, the number, and whether the axis is logarithmic."""


@dataclass(frozen=True)
class EvaluationPicture:
    """The numbers of the picture."""

    evaluation: str
    model: str
    texts: list[EvaluatedText]
    labels: list[str]
    notes: list[str]

    @classmethod
    def of(cls, asked: Asked) -> EvaluationPicture:
        """Read it. DataInvalid: no evaluation was given, or one of no strategy; UnknownName: it lacks a strategy."""
        if asked.evaluation is None:
            raise DataInvalid(
                "a picture of an evaluation needs one: give what quambase.evaluate returned, or a stored one by "
                "quambase.apply.evaluation.stored.find_evaluation"
            )
        texts = evaluated_texts(asked.evaluation.summary())
        every = list(dict.fromkeys(row.strategy for text in texts for row in text.strategies if row.strategy != FLOAT))
        labels = asked.labels(every, f"evaluation {asked.evaluation.id}")
        if not labels:
            raise DataInvalid(
                f"evaluation {asked.evaluation.id} holds the floating-point model alone; expected strategies, too: "
                "`evaluate --strategy all`"
            )
        return cls(asked.evaluation.id, str(asked.evaluation.about["model"]), texts, labels, [])

    def table(self) -> pa.Table:
        """A row for each text and strategy."""
        rows = []
        for text in self.texts:
            for row in text.strategies:
                values = {"task": text.task, "data": text.data, "documents": text.documents, "strategy": row.strategy}
                for name in ("kl", "perplexity", "flips", "accuracy", "kl_difference"):
                    found: Estimate | None = getattr(row, name)
                    for end, part in (("", "value"), ("_low", "low"), ("_high", "high")):
                        values[f"{name}{end}"] = None if found is None else getattr(found, part)
                rows.append(values | {"verdict": row.verdict})
        return pa.Table.from_pylist(rows)

    def words(self) -> list[str]:
        """Which strategy is best on most texts, and how good it is on the first of them."""
        bests = [next((row for row in text.strategies if row.strategy in self.labels), None) for text in self.texts]
        counted = Counter(best.strategy for best in bests if best is not None)
        label, times = counted.most_common(1)[0]
        text, best = next((t, b) for t, b in zip(self.texts, bests, strict=True) if b and b.strategy == label)
        number, of = (best.kl, "KL") if best.kl else (best.accuracy, "accuracy")
        value = "" if number is None else f": {of} {_interval(number)}"
        verdict = f", {best.verdict} than {UPSTREAM}" if best.verdict in ("better", "worse") else ""
        return [
            f"{label} is best on {times} of {len(self.texts)} texts, such as {text.data}, {text.documents} "
            f"documents{value}{verdict}"
        ]

    @frame.styled
    def draw(self, columns: int) -> Figure:
        """A line for each strategy, a mark and its 95 % interval for each text."""
        panels = [p for p in PANELS if any(p[1](row) for text in self.texts for row in text.strategies)]
        panels = panels[: 1 if columns == 1 else None]
        figure = new_figure(columns, 0.9 + 0.2 * len(self.labels) + 0.14 * len(self.texts) * (columns == 1))
        frame.title(figure, f"{self.model}, evaluation {self.evaluation[:8]}: 95 % intervals")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for each, (name, number, log) in zip(axes, panels, strict=True):
            self._panel(each, number)
            each.set_xlabel(name)
            if log:
                logarithmic(each, "x")
            each.tick_params(axis="y", length=0)
        axes[0].set_yticks(range(len(self.labels)), self.labels)
        axes[0].invert_yaxis()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=1 if columns == 1 else len(labels))
        return figure

    def _panel(self, axes: Axes, number: Callable[[Evaluated], Estimate | None]) -> None:
        apart = 0.6 / max(1, len(self.texts))
        for place, text in enumerate(self.texts):
            rows = {row.strategy: number(row) for row in text.strategies}
            known = [(h, e) for h, label in enumerate(self.labels) if (e := rows.get(label)) is not None]
            color, marker = f"C{place % 7}", "os^Dv"[place % 5]
            heights = [h + apart * (place - (len(self.texts) - 1) / 2) for h, _ in known]
            axes.plot([e.value for _, e in known], heights, marker, color=color, label=f"{text.data}, {text.task}")
            for height, (_, e) in zip(heights, known, strict=True):
                if e.low is not None and e.high is not None:
                    axes.plot([e.low, e.high], [height, height], color=color, linewidth=0.9)


def _interval(number: Estimate) -> str:
    ends = "" if number.low is None or number.high is None else f" [{number.low:.3g}, {number.high:.3g}]"
    return f"{number.value:.3g}{ends}"
