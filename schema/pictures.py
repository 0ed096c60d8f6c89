"""Pictures: drawn without a screen in one style, and saved so that equal figures give equal files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from quambase.schema.errors import QuambaseError
from quambase.schema.files import MARK, replacing

STYLE = "quambase.schema.quambase"
"""The style, as `matplotlib.style.use` takes it: ``quambase.mplstyle`` beside this file."""

WIDTHS = {1: 3.35, 2: 6.9}
"""Inches of a picture over one and two columns of a page."""

# No dates. The mark identifies a picture of ours.
_METADATA: dict[str, dict[str, str | None]] = {
    "png": {"Software": MARK},
    "svg": {"Creator": MARK, "Date": None},
    "pdf": {"Creator": MARK, "CreationDate": None},
}


@contextmanager
def picture_style() -> Iterator[None]:
    """Draw in our style, whatever the user's own is. A dollar sign is one: names and tokens are no formulas."""
    with style.context(STYLE, after_reset=True), mpl.rc_context({"text.parse_math": False}):
        yield


def new_figure(columns: int, height: float) -> Figure:
    """An empty figure over ``columns`` of a page, ``height`` inches high; call it in `picture_style`."""
    return Figure(figsize=(WIDTHS[columns], height), layout="constrained")


_DIGITS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def power_text(value: float, _: object = None) -> str:
    """A tick of a logarithmic axis: 0.1, 1, 10, 100, and beyond these powers such as 10⁻³, as plain text."""
    if not (value > 0 and math.isfinite(value)):
        return ""
    exponent = math.floor(math.log10(value) + 1e-9)
    if -2 <= exponent <= 3:
        return f"{value:.4g}"
    leading = round(value / 10.0**exponent, 6)
    power = f"10{str(exponent).translate(_DIGITS)}"
    return power if leading == 1 else f"{leading:g}·{power}"


def logarithmic(axes: Axes, *names: str) -> None:
    """Make the axes x, y of ``names`` logarithmic, with a label at powers of ten, or at 1, 2, 5 where there are few."""
    for name in names:
        axis = getattr(axes, f"{name}axis")
        getattr(axes, f"set_{name}scale")("log")
        low, high = sorted(axis.get_view_interval())
        decades = math.log10(high / low) if 0 < low < high else 0
        subs = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=8 if len(subs) == 1 else 12))
        axis.set_major_formatter(FuncFormatter(power_text))
        axis.set_minor_formatter(NullFormatter())


def check_picture_format(path: Path) -> str:
    """The format that the suffix of ``path`` names. QuambaseError: another than png, svg and pdf."""
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in _METADATA:
        raise QuambaseError(f"a picture cannot be saved as '{path.name}'; expected one of .{', .'.join(_METADATA)}")
    return suffix


def save_picture(figure: Figure, path: Path) -> None:
    """Save the figure, whole or not at all; the suffix of ``path`` chooses the format (png, svg, pdf).

    QuambaseError: another suffix. OSError.
    """
    suffix = check_picture_format(path)
    FigureCanvasAgg(figure)
    # Drawn in memory: on a full disk matplotlib's writer of PDF ends in an AttributeError of its own.
    drawn = BytesIO()
    with picture_style():
        figure.savefig(drawn, format=suffix, metadata=_METADATA[suffix])
    with replacing(path) as temporary:
        temporary.write_bytes(drawn.getvalue())
