"""Picture of an evaluation by decoding: KL against the number of tokens decoded, with prefill for comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from matplotlib.figure import Figure

from quambase.analyzer.pictures.asked import Asked
from quambase.analyzer.pictures.frame import legend_outside, looks, one_panel, styled
from quambase.schema.errors import DataInvalid
from quambase.schema.pictures import logarithmic


@dataclass(frozen=True)
class DecodingPicture:
    """The numbers of the picture: rows of `quambase.apply.evaluation.decode_summary.BY_POSITION` of one text."""

    evaluation: str
    model: str
    rows: pa.Table
    labels: list[str]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, asked: Asked) -> DecodingPicture:
        """Read it. DataInvalid: no evaluation was given, or nothing was decoded in it; UnknownName: it lacks a
        strategy.
        """
        if asked.evaluation is None:
            raise DataInvalid("a picture of decoding needs an evaluation: give what quambase.evaluate returned")
        found = asked.evaluation.by_position()
        if not found.num_rows:
            raise DataInvalid(
                f"nothing was decoded in evaluation {asked.evaluation.id}; expected one of `evaluate --mode decode`"
            )
        texts = list(dict.fromkeys(found["data"].to_pylist()))
        of_first = [row for row in found.to_pylist() if row["data"] == texts[0]]
        every = list(dict.fromkeys(row["strategy"] for row in of_first))
        labels = asked.labels(every, f"evaluation {asked.evaluation.id}")
        rows = [row for row in of_first if row["strategy"] in labels]
        notes = [f"of {len(texts)} texts, {texts[0]} is drawn"] if len(texts) > 1 else []
        about = asked.evaluation.about
        table = pa.Table.from_pylist(rows, found.schema)
        return cls(asked.evaluation.id, f"{about['model']}, {texts[0]}", table, labels, notes)

    def table(self) -> pa.Table:
        """A row for each strategy and number of tokens decoded."""
        return self.rows

    def words(self) -> list[str]:
        """Which strategy has the least KL by decoding, and how that changes with length."""
        rows = self.rows.to_pylist()
        best = min((row for row in rows if row["decoded_from"] is None), key=lambda row: row["kl"])
        mine = [row for row in rows if row["strategy"] == best["strategy"] and row["decoded_from"]]
        first, last = mine[0], mine[-1]
        return [
            f"{best['strategy']} has the least KL by decoding, {best['kl']:.2g} nats a token, prefill "
            f"{best['prefill_kl']:.2g}; {first['kl']:.2g} at {_range(first)} tokens decoded, {last['kl']:.2g} at "
            f"{_range(last)}"
        ]

    @styled
    def draw(self, columns: int) -> Figure:
        """A line for each strategy with its 95 % band; prefill of the same predictions thin and grey."""
        legend_lines = 0.13 * ((len(self.labels) + 2) // (1 if columns == 1 else 2))
        heading = f"{self.model}: evaluation {self.evaluation[:8]}"
        figure, axes = one_panel(columns, 2.4 + legend_lines, heading)
        look = looks(self.labels)
        drawn: set[tuple[float, ...]] = set()
        for label in self.labels:
            mine = [row for row in self.rows.to_pylist() if row["strategy"] == label and row["decoded_from"]]
            ends = [row["decoded_to"] for row in mine]
            before = tuple(row["prefill_kl"] for row in mine)
            if before not in drawn:  # formats of the state share it
                name = "prefill" if not drawn else None
                axes.plot(ends, before, color="0.6", linewidth=0.8, label=name, zorder=1)
                drawn.add(before)
            axes.plot(
                ends,
                [row["kl"] for row in mine],
                color=look[label].color,
                linestyle=look[label].linestyle,
                marker=look[label].marker,
                label=label,
            )
            self._band(axes, mine, look[label].color)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["decoded_to"] for row in self.rows.to_pylist() if row["decoded_from"]}))
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
        axes.set_xlabel("tokens decoded, up to")
        logarithmic(axes, "y")
        axes.set_ylabel("KL to the float model\n(nats a token)")
        legend_outside(figure, axes, columns)
        return figure

    def _band(self, axes: Any, rows: list[dict[str, Any]], color: str) -> None:
        """The 95 % interval where there is one."""
        known = [row for row in rows if row["kl_low"] is not None and row["kl_low"] > 0]
        ends, low, high = ([row[name] for row in known] for name in ("decoded_to", "kl_low", "kl_high"))
        axes.fill_between(ends, low, high, color=color, alpha=0.12, linewidth=0)


def _range(row: dict[str, Any]) -> str:
    return f"{row['decoded_from']:,} to {row['decoded_to']:,}"
