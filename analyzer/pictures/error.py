"""Picture of the error against the scale: MSE, and the predicted effect on the model's output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quambase.analyzer.pictures import frame
from quambase.analyzer.pictures.asked import Asked
from quambase.analyzer.pictures.numbers.error_curve import ErrorCurve, error_curve
from quambase.analyzer.pictures.numbers.marks import Mark
from quambase.analyzer.site.one_site import place
from quambase.schema.pictures import logarithmic, new_figure
from quambase.schema.values.arrays import Float64


@dataclass(frozen=True)
class ErrorPicture:
    """The numbers of the picture; ``place``: the scale group in words."""

    place: str
    model: str
    curve: ErrorCurve
    marks: list[Mark]
    notes: list[str]

    @classmethod
    def of(cls, asked: Asked) -> ErrorPicture:
        """Read it. Errors of `Asked`."""
        with asked.open() as database:
            group = asked.chosen_group(database)
            found = asked.marks(database, group)
            curve = error_curve(group, [mark.scale for mark in found])
            where = place(group.layer, group.site, group.group_name)
            return cls(where, database.runs[0].model.name, curve, found, database.notes)

    def table(self) -> pa.Table:
        """A row for each scale of the curve."""
        kl = self.curve.predicted_kl
        columns = {"scale": self.curve.scales, "mse": self.curve.mse}
        return pa.table(
            columns | {"predicted_kl": pa.nulls(len(self.curve.scales), pa.float64()) if kl is None else kl}
        )

    def words(self) -> list[str]:
        """The best scales, and how much more error the strategies have."""
        least = float(np.min(self.curve.mse))
        text = f"{self.place}: the least MSE of one symmetric scale is {least:.3g}, at {self.curve.least_mse_scale:.3g}"
        if self.curve.predicted_kl is not None:
            text += (
                f"; the least predicted KL {np.min(self.curve.predicted_kl):.3g} nats a token, "
                f"at {self.curve.least_kl_scale:.3g}"
            )
        others = [f"{m.label} {m.mse / least:.3g}" for m in self.marks if least > 0]
        return [text, *([f"MSE over the least: {', '.join(others)}"] if others else [])]

    @frame.styled
    def draw(self, columns: int) -> Figure:
        """MSE above, predicted KL (where it is known) below, the strategies at their scales."""
        kl = self.curve.predicted_kl
        panels = 1 if kl is None else 2
        figure = new_figure(columns, 0.5 + 1.35 * panels + frame.STEP * (len(self.marks) + 1) / 72)
        frame.title(figure, f"{self.place} of {self.model}")
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        look = frame.looks(mark.label for mark in self.marks)
        self._curve(axes[0], self.curve.mse, [mark.mse for mark in self.marks], look)
        axes[0].set_ylabel("mean squared error")
        if kl is not None:
            losses = [np.nan if mark.predicted_kl is None else mark.predicted_kl for mark in self.marks]
            self._curve(axes[1], kl, losses, look)
            axes[1].set_ylabel("predicted KL\n(nats a token)")
        axes[-1].set_xlabel("scale")
        if any(_off_the_curve(mark) for mark in self.marks):
            frame.footnote(figure, "open: with a zero point or two segments")
        logarithmic(axes[0], "x")
        axes[0].set_xlim(self.curve.scales[0], self.curve.scales[-1])
        steps = [frame.Mark(m.scale, m.label, f"{m.scale:.3g}", look[m.label]) for m in self.marks]
        frame.staircase(axes[0], steps, below=list(axes[1:]))
        return figure

    def _curve(self, axes: Axes, losses: Float64, marked: list[float], look: dict[str, frame.Look]) -> None:
        drawn = losses > 0
        axes.plot(self.curve.scales[drawn], losses[drawn], color="0.35")
        for mark, loss in zip(self.marks, marked, strict=True):
            if loss > 0:
                fill = "white" if _off_the_curve(mark) else look[mark.label].color
                axes.plot(mark.scale, loss, marker="o", color=look[mark.label].color, markerfacecolor=fill)
        if drawn.any():
            logarithmic(axes, "y")


def _off_the_curve(mark: Mark) -> bool:
    """The curve is that of one symmetric scale."""
    return mark.needs_decode or mark.zero_point != 0
