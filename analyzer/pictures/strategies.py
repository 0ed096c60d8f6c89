"""Picture of the strategies side by side over all sites."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quambase.analyzer.pictures import frame
from quambase.analyzer.pictures.asked import Asked
from quambase.analyzer.pictures.numbers.strategies import StrategyOverSites, strategies_over_sites
from quambase.schema.pictures import logarithmic, new_figure


@dataclass(frozen=True)
class StrategiesPicture:
    """The numbers of the picture; ``strategies``: the best first."""

    model: str
    strategies: list[StrategyOverSites]
    notes: list[str]

    @classmethod
    def of(cls, asked: Asked) -> StrategiesPicture:
        """Read it. ScalesInvalid: there is no scale table; UnknownName: it lacks a strategy; errors of `Asked`."""
        with asked.open() as database:
            run = database.runs[0]
            every = strategies_over_sites(database, run.run, asked.scale_table(database, "a picture of strategies"))
            labels = asked.labels([each.label for each in every], "the scale table")
            found = [each for each in every if each.label in labels]
            return cls(run.model.name, found, database.notes)

    def table(self) -> pa.Table:
        """A row for each strategy and site."""
        return pa.Table.from_pylist(
            [
                {
                    "strategy": each.label,
                    "layer": layer,
                    "site": site,
                    "sqnr_db": loss.sqnr_db,
                    "clipped_share": loss.clipped_share,
                    "predicted_kl": loss.predicted_kl,
                }
                for each in self.strategies
                for (layer, site), loss in each.sites.items()
            ]
        )

    def words(self) -> list[str]:
        """The best strategy, and how the next three that need no decoder compare."""
        first = self.strategies[0]
        middle = np.nanmedian([loss.sqnr_db for loss in first.sites.values()])
        text = f"best over {len(first.sites)} sites: {first.label}, median SQNR {middle:.3g} dB"
        if first.predicted_kl is None:
            return [text]
        rest = [each for each in self.strategies[1:] if each.predicted_kl and not each.needs_decode]
        others = [f"{each.label} {each.predicted_kl / first.predicted_kl:.3g}" for each in rest[:3]]  # type: ignore[operator]
        text += f", predicted KL {first.predicted_kl:.3g} nats a token"
        return [text + (f"; times as much: {', '.join(others)}" if others and first.predicted_kl else "")]

    @frame.styled
    def draw(self, columns: int) -> Figure:
        """A line for each strategy: the SQNR at every site with the median, and the predicted KL of all together."""
        known = any(each.predicted_kl for each in self.strategies)
        figure = new_figure(columns, 0.95 + 0.16 * len(self.strategies))
        frame.title(figure, f"{self.model}: sites that act in evaluation")
        panels = figure.subplots(1, 2 if known else 1, sharey=True, squeeze=False)[0]
        self._sqnr(panels[0])
        if known:
            self._loss(panels[1])
        heights = range(len(self.strategies))
        marks = [f"{each.label}{' †' if each.needs_decode else ''}" for each in self.strategies]
        panels[0].set_yticks(heights, marks)
        panels[0].invert_yaxis()
        for axes in panels:
            axes.tick_params(axis="y", length=0)
        if any(each.needs_decode for each in self.strategies):
            frame.footnote(figure, "† two segments: its codes need a decoder")
        return figure

    def _sqnr(self, axes: Axes) -> None:
        for height, each in enumerate(self.strategies):
            values = np.array([loss.sqnr_db for loss in each.sites.values()])
            values = values[np.isfinite(values)]
            axes.plot(values, np.full(values.size, height), "o", markersize=2, alpha=0.35, color="#0072B2", mew=0)
            if values.size:
                axes.plot(np.median(values), height, "|", markersize=8, mew=1.4, color="black")
        axes.set_xlabel("SQNR of each site\n(dB); bar: median")

    def _loss(self, axes: Axes) -> None:
        for height, each in enumerate(self.strategies):
            if each.predicted_kl:
                axes.plot(each.predicted_kl, height, "o", color="#D55E00")
                text, at = f"{each.predicted_kl:#.2g}", (each.predicted_kl, height)
                axes.annotate(text, at, (4, 0), textcoords="offset points", va="center", fontsize=6)
        axes.margins(x=0.25)
        logarithmic(axes, "x")
        axes.set_xlabel("predicted KL\n(nats a token)")
