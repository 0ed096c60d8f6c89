"""Pictures, drawn without a screen and saved so that equal figures give equal files."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from quambase.schema.errors import QuambaseError
from quambase.schema.files import MARK, replacing

# No dates. The mark identifies a picture of ours.
_METADATA: dict[str, dict[str, str | None]] = {
    "png": {"Software": MARK},
    "svg": {"Creator": MARK, "Date": None},
    "pdf": {"Creator": MARK, "CreationDate": None},
}


def save_picture(figure: Figure, path: Path) -> None:
    """Save the figure, whole or not at all; the suffix of ``path`` chooses the format (png, svg, pdf).

    QuambaseError: another suffix.
    """
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in _METADATA:
        raise QuambaseError(f"a picture cannot be saved as '{path.name}'; expected one of .{', .'.join(_METADATA)}")
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=suffix, dpi=120, metadata=_METADATA[suffix])
