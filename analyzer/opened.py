"""`quambase.open`: a database in Python, site by site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from quambase.analyzer.scale_groups import ScaleGroup
from quambase.analyzer.site.one_site import chosen_group, one_run, place
from quambase.analyzer.strategies import Scale, parse_label, parse_labels
from quambase.schema.sites import WHOLE
from quambase.schema.sql.answer import Answer, PrintsAsTable, html_table
from quambase.schema.sql.database import StatsDB
from quambase.schema.values.number_format import multipliers, zero_point_of

if TYPE_CHECKING:
    from quambase.analyzer.pictures.plot import Picture

Label = str | Callable[..., Scale]
"""A strategy's label, or a function that is one."""


def open(  # as in `quambase.open`
    path: str | Path = Path("quambase-db"), run: str | None = None, scales: str | Path | None = None
) -> Database:
    """The database in the folder ``path``, read-only: the newest complete run, or ``run`` (its id, or its beginning).

    scales  scale table of the view `scales`; None: ``<path>/scales.parquet``, then ``./scales.parquet``

    DatabaseInvalid: no folder, no complete run, a damaged file. UnknownName: no such run.

    >>> db = quambase.open("quambase-db")
    >>> db.sql("select count(*) as sites from site_stats where group_name = 'all'")
    sites
    -----
       22
    >>> db.site(1, "x_proj:input").quantile(0.5) < db.site(1, "x_proj:input").amax
    True
    """
    return Database(path, run, scales=None if scales is None else Path(scales))


class Database(StatsDB):
    """A `StatsDB` that knows its sites."""

    def site(self, layer: int, site: str, group: str = WHOLE) -> Site:
        """What a run counted at a site; ``group``: ``all``, or a slice of a divided one (x, z; dt, B, C).

        UnknownName: there is no such site or group, or several runs are open.
        """
        one_run(self, "site")
        return Site(self, chosen_group(self, site, layer, group))

    def _repr_html_(self) -> str:
        return self.sql("select * from runs")._repr_html_()


@dataclass(frozen=True, repr=False)
class ScaleError(PrintsAsTable):
    """What a scale does to the values of a site.

    scale          the scale, of two segments the inner one's
    zero_point     added to each code
    clipped_share  share of the values beyond the codes
    mse            mean squared error
    sqnr_db        10 log10 of the values' energy over that of the errors
    predicted_kl   nats a token that the output is predicted to lose; None in a run without sensitivities
    """

    scale: float
    zero_point: int
    clipped_share: float
    mse: float
    sqnr_db: float
    predicted_kl: float | None

    def shown(self) -> pa.Table:
        """One row."""
        return pa.Table.from_pylist([vars(self)])


class Site:
    """The values of one site, or of a slice of it.

    values  a `quambase.analyzer.scale_groups.ScaleGroup`: what a strategy reads

    >>> site = db.site(1, "x_proj:input")
    >>> site.error("mse").mse <= site.error(site.amax / 127).mse
    True
    >>> site.strategies(["absmax", "mse"]).column_names
    ['strategy', 'scale', 'zero_point', 'clipped_share', 'mse', 'sqnr_db', 'predicted_kl']
    """

    def __init__(self, database: Database, values: ScaleGroup) -> None:
        self.values = values
        self._database = database
        self._run = database.runs[0].run

    @property
    def amax(self) -> float:
        """The largest absolute value; NaN without values."""
        return self.values.distribution.amax

    def quantile(self, p: float) -> float:
        """The ``p``-quantile of the absolute value, exact: numpy.quantile's linear rule. NaN without values."""
        return self.values.distribution.quantile(p)

    def scale(self, strategy: Label) -> Scale:
        """A strategy's scale; UnknownName, DataInvalid as `quambase.analyzer.strategies.parse_label` and
        `quambase.analyzer.strategies.Choice.scale`.
        """
        return parse_label(strategy).scale(self.values)

    def error(self, scale: Scale | Label) -> ScaleError:
        """What ``scale``, a number or a strategy's label, does to the values."""
        found = self.scale(scale) if isinstance(scale, str) or callable(scale) else scale
        figures = self.values.figures(found)
        return ScaleError(
            float(multipliers(found)[0]),
            zero_point_of(found),
            figures.clipped_share,
            figures.mse,
            figures.sqnr_db,
            self.values.predicted_kl(found),
        )

    def strategies(self, labels: Sequence[Label] | None = None) -> Answer:
        """A row for each strategy, least error first; None: those that `analyze` computes. Those that need what the run
        does not store of these values are left out.
        """
        choices = [choice for choice in parse_labels(labels) if choice.fits(self.values)]
        if self.values.sensitivity is None:
            choices = [choice for choice in choices if not choice.strategy.needs_sensitivity]
        rows = [{"strategy": choice.label} | vars(self.error(choice.scale(self.values))) for choice in choices]
        return Answer(pa.Table.from_pylist(sorted(rows, key=lambda row: row["mse"])))

    def channels(self) -> Answer:
        """The channels, the largest absolute value first, of the view `channel_stats`."""
        return self._ask("channels_by_reach")

    def tokens(self, limit: int | None = None) -> Answer:
        """The largest values, the tokens that made them and the text around these, of the view `outliers`."""
        return self._ask("largest_tokens", limit=limit)

    def _ask(self, query: str, **more: Any) -> Answer:
        """A query about the whole site: its rows of this slice."""
        key = {"run": self._run, "layer": self.values.layer, "site": self.values.site}
        found = self._database.query(query, key | more).table
        group = self.values.group_name
        return Answer(found if group == WHOLE else found.filter(pc.equal(found["group_name"], group)))

    def plot(self, kind: str = "distribution", **options: Any) -> Picture:
        """A picture of the site as `quambase.plot` makes it: distribution, error, channels or tokens. A notebook shows
        it; ``out=FILE`` saves it.
        """
        from quambase.analyzer.pictures.plot import plot

        values = self.values
        return plot(kind, self._database.path, self._run, values.site, values.layer, values.group_name, **options)

    def __repr__(self) -> str:
        distribution = self.values.distribution
        where = place(self.values.layer, self.values.site, self.values.group_name)
        return (
            f"{where} of {self._run}: {distribution.total:,} values, largest |x| {self.amax:.3g}, "
            f"99.95 % within {self.quantile(0.9995):.3g}"
        )

    def _repr_html_(self) -> str:
        row = {"site": place(self.values.layer, self.values.site, self.values.group_name)}
        return html_table(pa.Table.from_pylist([row | self.values.distribution.summary()]))
