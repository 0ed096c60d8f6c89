"""What the drawings share: a strategy's colour, labels that do not overlap, axes of orders of magnitude."""

from __future__ import annotations

import functools
import itertools
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, ParamSpec

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from quambase.analyzer.strategies import DEFAULT_LABELS
from quambase.schema.pictures import new_figure, picture_style

Given = ParamSpec("Given")


def styled(draw: Callable[Given, Figure]) -> Callable[Given, Figure]:
    """``draw`` in `picture_style`."""

    @functools.wraps(draw)
    def drawn(*args: Given.args, **kwargs: Given.kwargs) -> Figure:
        with picture_style():
            return draw(*args, **kwargs)

    return drawn


class Look(NamedTuple):
    """How one strategy is drawn."""

    color: str
    linestyle: str
    marker: str


_LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
"""The colours are used again with another line and marker."""

_FIRST = ("quamba", "mse", "effect", "absmax", "effect_affine", "percentile", "mse_affine")
"""Strategies that get a colour of their own; the others of `DEFAULT_LABELS` follow."""


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """The look of each of ``labels``: a default strategy looks alike in every picture, others take what is left."""
    colors = ("#D55E00", "#0072B2", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")
    known = dict.fromkeys([*_FIRST, *DEFAULT_LABELS])
    order = [*known, *(label for label in dict.fromkeys(labels) if label not in known)]
    found = {}
    for place, label in enumerate(order):
        line, marker = _LINES[place // len(colors) % len(_LINES)]
        found[label] = Look(colors[place % len(colors)], line, marker)
    return found


def title(figure: Figure, text: str) -> None:
    """Write ``text`` over the picture from its left edge on, in as many lines as it needs."""
    per_inch = 16  # characters of 8 points
    lines = textwrap.wrap(drawable(text), max(20, int(per_inch * figure.get_figwidth())), break_on_hyphens=False)
    figure.suptitle("\n".join(lines), x=0.01, ha="left")


def one_panel(columns: int, height: float, heading: str) -> tuple[Figure, Axes]:
    """A `new_figure` with a `title` and one pair of axes."""
    figure = new_figure(columns, height)
    title(figure, heading)
    return figure, figure.subplots()


def footnote(figure: Figure, text: str) -> None:
    """Write ``text`` under the picture."""
    figure.supxlabel(text, fontsize=6, x=0.01, ha="left")


class Mark(NamedTuple):
    """A strategy's place on the x axis, and what is said of it there."""

    x: float
    label: str
    about: str
    look: Look


STEP = 8.0
"""Points from one label of a staircase to the next."""


def staircase(axes: Axes, marks: Sequence[Mark], *, below: Sequence[Axes] = ()) -> None:
    """A vertical line for each mark, also in the axes ``below``, and its label above the axes to the left of the line:
    the farther right, the higher, so that no label meets another label or a line. Marks at one place share a line.
    """
    for step, (_, members) in enumerate(itertools.groupby(sorted(marks, key=lambda m: m.x), key=lambda m: m.x)):
        mark, *others = members
        height = STEP * (step + 0.7)
        look: dict[str, Any] = {"color": mark.look.color, "linewidth": 0.8}
        for each in (axes, *below):
            each.axvline(mark.x, linestyle=mark.look.linestyle, **look)
        place: dict[str, Any] = {"xy": (mark.x, 1.0), "xycoords": ("data", "axes fraction")}
        place |= {"textcoords": "offset points", "annotation_clip": False}
        arrow: dict[str, Any] = {"arrowstyle": "-", "shrinkA": 0, "shrinkB": 0, **look}
        axes.annotate("", xytext=(0, height + 2), arrowprops=arrow, **place)
        text: dict[str, Any] = {"ha": "right", "va": "center", "color": mark.look.color, "fontsize": 6.5}
        names = ", ".join([mark.label, *(other.label for other in others)])
        axes.annotate(f"{names} {mark.about}", xytext=(-2.5, height), **text, **place)


@functools.cache
def _glyphs() -> frozenset[int]:
    """The characters that the style's font can draw."""
    with picture_style():
        return frozenset(get_font(findfont(FontProperties())).get_charmap())


def drawable(text: str) -> str:
    """``text`` with escapes for what is not printable or not in the font: a token may be anything."""

    def shown(c: str) -> str:
        return c if c.isprintable() and ord(c) in _glyphs() else c.encode("unicode_escape").decode()

    return "".join(map(shown, text))


def shortened(text: str, most: int) -> str:
    """``text``, cut to ``most`` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def legend_outside(figure: Figure, axes: Axes, columns: int, **more: Any) -> None:
    """The legend of ``axes``: right of the data, or over one column below it, two labels a line where they fit."""
    handles, labels = axes.get_legend_handles_labels()
    if columns > 1:
        figure.legend(handles, labels, loc="outside right upper", **more)
        return
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=2, **more)
    figure.draw_without_rendering()
    if legend.get_window_extent().width > figure.bbox.width:
        legend.remove()
        figure.legend(handles, labels, loc="outside lower center", ncols=1, **more)
