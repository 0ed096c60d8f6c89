"""Picture of the tokens that made the largest values of a site."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pyarrow as pa
from matplotlib.figure import Figure

from quambase.analyzer.pictures import frame
from quambase.analyzer.pictures.asked import Asked
from quambase.analyzer.pictures.numbers.largest_tokens import LargestToken, largest_tokens
from quambase.analyzer.site.one_site import place
from quambase.schema.errors import DatabaseInvalid
from quambase.schema.sites import WHOLE

SIGNS = ("#56B4E9", "#E69F00")
"""Colours of values from 0 on, and of negative ones."""

SHOWN = 16
"""How many are drawn."""

AROUND = 26
"""Characters before and after a token, over two columns."""


@dataclass(frozen=True)
class TokensPicture:
    """The numbers of the picture; ``place``: the site, or a group of it, in words."""

    place: str
    model: str
    tokens: list[LargestToken]
    notes: list[str]

    @classmethod
    def of(cls, asked: Asked) -> TokensPicture:
        """Read it. DatabaseInvalid: the run stores no token there; errors of `Asked`."""
        with asked.open() as database:
            layer, site = asked.chosen_site(database)
            run = database.runs[0]
            every = largest_tokens(database, run.run, layer, site)
            found = [t for t in every if asked.group in (WHOLE, t.group_name)]
            if not found:
                raise DatabaseInvalid(
                    f"run {run.run} stores no tokens of {place(layer, site, asked.group)}; see `outliers` in "
                    "`quambase sql --schema`"
                )
            return cls(place(layer, site, asked.group), run.model.name, found, database.notes)

    def table(self) -> pa.Table:
        """A row for each of the largest values that the run stores."""
        return pa.Table.from_pylist([dataclasses.asdict(token) for token in self.tokens])

    def words(self) -> list[str]:
        """The largest value and its token; how few tokens and channels make the largest values."""
        first = self.tokens[0]
        shown = self.tokens[:SHOWN]
        return [
            f"{self.place}: the largest value, {first.value:.3g}, is made by token {first.token!r} (document "
            f"{first.document}, position {first.position}) in channel {first.channel}",
            f"the {len(shown)} largest are made by {_count({t.token_id for t in shown}, 'token')} in "
            f"{_count({t.channel for t in shown}, 'channel')}",
        ]

    @frame.styled
    def draw(self, columns: int) -> Figure:
        """A bar for each value, its token to the left, where it stands to the right."""
        shown = self.tokens[:SHOWN]
        figure, axes = frame.one_panel(columns, 0.75 + 0.135 * len(shown), f"{self.place} of {self.model}")
        heights = range(len(shown))
        axes.barh(heights, [abs(t.value) for t in shown], color=[SIGNS[t.value < 0] for t in shown], height=0.7)
        axes.set_yticks(heights, [_text(token, columns) for token in shown])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        axes.set_xlim(0, abs(shown[0].value) or 1)
        right = axes.secondary_yaxis("right")
        right.set_yticks(heights, [f"{t.value:.3g}, {t.channel}, {t.document}:{t.position}" for t in shown])
        right.tick_params(axis="y", length=0, labelsize=6)
        right.spines["right"].set_visible(False)
        axes.set_xlabel("|x| (orange: negative)\nright: value, channel, document:position")
        return figure


def _count(different: set[int], name: str) -> str:
    return f"one {name}" if len(different) == 1 else f"{len(different)} different {name}s"


def _text(token: LargestToken, columns: int) -> str:
    """The token in quotes, which show its own spaces; over two columns in brackets in the text around it."""
    shown = frame.shortened(frame.drawable(token.token), 18)
    if columns == 1 or token.before is None or token.after is None:
        return f"'{shown}'"
    backwards = frame.shortened(frame.drawable(token.before)[::-1], AROUND)
    return f"{backwards[::-1]}[{shown}]{frame.shortened(frame.drawable(token.after), AROUND)}"
