"""`quambase plot`: one picture, its numbers, and what it says in words."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
from matplotlib.figure import Figure

from quambase.analyzer.pictures.asked import Asked, Summarized
from quambase.analyzer.pictures.channels import ChannelsPicture
from quambase.analyzer.pictures.convergence import ConvergencePicture
from quambase.analyzer.pictures.decoding import DecodingPicture
from quambase.analyzer.pictures.distribution import DistributionPicture
from quambase.analyzer.pictures.error import ErrorPicture
from quambase.analyzer.pictures.evaluation import EvaluationPicture
from quambase.analyzer.pictures.groups import GroupsPicture
from quambase.analyzer.pictures.heatmap import HeatmapPicture
from quambase.analyzer.pictures.numbers.site_grid import OUTLIER_RATIO
from quambase.analyzer.pictures.positions import PositionsPicture
from quambase.analyzer.pictures.strategies import StrategiesPicture
from quambase.analyzer.pictures.tokens import TokensPicture
from quambase.schema.errors import DataInvalid, UnknownName
from quambase.schema.files import refuse_foreign_picture
from quambase.schema.pictures import WIDTHS, check_picture_format, picture_style, save_picture
from quambase.schema.progress import Progress, Shown
from quambase.schema.sites import WHOLE
from quambase.schema.sql.answer import PrintsAsTable


class Numbers(Protocol):
    """One picture's numbers."""

    @property
    def notes(self) -> list[str]:
        """What a user should know, a line each."""

    def table(self) -> pa.Table:
        """What is drawn, in rows."""

    def words(self) -> list[str]:
        """What the picture shows, in one or two sentences."""

    def draw(self, columns: int) -> Figure:
        """The picture, over ``columns`` of a page."""


class Kind(Protocol):
    """A class of `Numbers`."""

    def of(self, asked: Asked) -> Numbers:
        """The numbers of what is asked for."""


KINDS: dict[str, Kind] = {
    "distribution": DistributionPicture,
    "error": ErrorPicture,
    "heatmap": HeatmapPicture,
    "channels": ChannelsPicture,
    "positions": PositionsPicture,
    "tokens": TokensPicture,
    "strategies": StrategiesPicture,
    "convergence": ConvergencePicture,
    "evaluation": EvaluationPicture,
    "decoding": DecodingPicture,
    "groups": GroupsPicture,
}


SCREEN_DPI = 150
"""Of a picture in a notebook."""


@dataclass(frozen=True, repr=False)
class Picture(PrintsAsTable):
    """What `plot` made.

    numbers  a dataclass of what is drawn, such as `quambase.analyzer.pictures.distribution.DistributionPicture`
    table    the same in rows
    figure   a `matplotlib.figure.Figure`, to be changed or saved otherwise; a notebook shows it
    summary  what the picture shows, in one or two sentences
    path     the file saved, None if none was
    notes    which run it is, and what else a user should know
    """

    kind: str
    numbers: Numbers
    table: pa.Table
    figure: Figure
    summary: list[str]
    path: Path | None
    notes: list[str]

    def shown(self) -> pa.Table:
        """The numbers."""
        return self.table

    def _repr_html_(self) -> str:
        """The picture and what it shows, for a notebook."""
        stream = io.BytesIO()
        with picture_style():
            self.figure.savefig(stream, format="png", dpi=SCREEN_DPI)
        image = base64.b64encode(stream.getvalue()).decode()
        words = html.escape(" ".join(self.summary))
        return f'<img src="data:image/png;base64,{image}" alt="{words}"><p>{words}</p>'


def plot(
    kind: str,
    db: str | Path = Path("quambase-db"),
    run: str | None = None,
    site: str | None = None,
    layer: int | None = None,
    group: str = WHOLE,
    strategies: Sequence[str] | None = None,
    scales: str | Path | None = None,
    evaluation: Summarized | None = None,
    quantity: str = OUTLIER_RATIO,
    columns: int = 1,
    out: str | Path | None = None,
    progress: Shown = False,
    force: bool = False,
) -> Picture:
    """Draw one of KINDS, for print, in the style `quambase.schema.pictures.STYLE`.

    distribution  a histogram of |x| at one scale group, and where each of ``strategies`` clips
    error         MSE and predicted KL there against the scale
    heatmap       ``quantity`` of every layer and site: outlier_ratio; clipped_share, sqnr_db or predicted_kl of one
                  strategy of the scale table (None: of what is selected)
    channels      the channels of a site by their largest |x|
    tokens        the tokens that made the largest values of a site
    strategies    the strategies of the scale table over all sites
    convergence   `quambase.analyzer.converge.converge` at the default resamples; it may take minutes
    evaluation    what each strategy loses on each text: ``evaluation`` is what `evaluate` returned, or a stored one
                  (`quambase.apply.evaluation.stored.find_evaluation`)
    groups        what sorting did to the scale groups of a Mamba-2

    site, layer  None: the one with the largest outlier ratio among those that remain; of convergence: all
    group        ``all``, or a slice of a divided site (x, z; dt, B, C)
    strategies   labels; None: a few well-known ones and the selected one, or all that the table or evaluation has
    scales       scale table; None: ``<db>/scales.parquet``, then ``./scales.parquet``
    columns      1 or 2 of a page: 3.35 or 6.9 inches wide
    out          file to save to (png, svg, pdf by its suffix); None saves none
    progress     shown on stderr; or, of convergence, a function that is called with (scales done, scales in all)
    force        replace ``out`` even if it is no picture of quambase's

    Errors: UnknownName, DataInvalid (``columns``, no ``evaluation``), DatabaseInvalid, ScalesInvalid (there is no scale
    table), OutputRefused, QuambaseError (another suffix).
    """
    if kind not in KINDS:
        raise UnknownName.of("picture", kind, KINDS)
    if columns not in WIDTHS:
        raise DataInvalid(f"columns is {columns}; expected {' or '.join(map(str, WIDTHS))}")
    path = None if out is None else Path(out)
    if path is not None:
        check_picture_format(path)
        refuse_foreign_picture(path, force=force)
    labels, table = tuple(strategies or ()), None if scales is None else Path(scales)
    asked = Asked(Path(db), run, site, layer, group, labels, table, evaluation, quantity, progress)
    with Progress(progress if kind != "convergence" else False) as shown:  # which shows its own
        shown.say("reading the distributions")
        numbers = KINDS[kind].of(asked)
    figure = numbers.draw(columns)
    if path is not None:
        save_picture(figure, path)
    return Picture(kind, numbers, numbers.table(), figure, numbers.words(), path, numbers.notes)
