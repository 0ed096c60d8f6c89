"""Chooses scales of a table by strategy, sites and granularity. Imports no torch: a wrong name is reported at once."""

from __future__ import annotations

from collections.abc import Collection

from quambase.schema.errors import ScalesInvalid, UnknownName
from quambase.schema.groups import GRANULARITIES
from quambase.schema.scale_table import Scale, ScaleTable
from quambase.schema.sites import find_site

DEFAULT_OTHERWISE = "quamba"
"""The strategy of the sites that ``at`` does not name: upstream's."""


ALL = "all"
"""In place of labels: every strategy of the table. In place of granularities: every one that it has."""


def choose_scales(
    table: ScaleTable,
    strategy: str,
    at: Collection[str] = (),
    otherwise: str = DEFAULT_OTHERWISE,
    granularity: str | None = None,
) -> dict[tuple[int, str], Scale]:
    """(layer, site) to scale, or to scales per group, at the table's finest granularity up to ``granularity`` (None:
    any): those of ``strategy``; with ``at``, those of ``strategy`` at these sites and of ``otherwise`` elsewhere.

    UnknownName: an unknown label, site or granularity; ScalesInvalid: a granularity that the table lacks, or a strategy
    whose codes have two segments.
    """
    level = check_granularity(table, granularity)
    chosen = _of_codes(table, strategy, level)
    if not at:
        return chosen
    for name in at:
        find_site(name, table.model.family)
    rest = {key: scale for key, scale in _of_codes(table, otherwise, level).items() if key[1] not in at}
    return rest | {key: scale for key, scale in chosen.items() if key[1] in at}


def _of_codes(table: ScaleTable, label: str, level: str) -> dict[tuple[int, str], Scale]:
    """`ScaleTable.group_scales_for`; ScalesInvalid where the codes of ``label`` have two segments."""
    if table.needs_decode(label):
        raise ScalesInvalid(
            f"{label} has codes of two segments, which no integer product reads; name another strategy, or measure it: "
            f"evaluate --strategy {label}"
        )
    return table.group_scales_for(label, level)


def check_granularity(table: ScaleTable, granularity: str | None) -> str:
    """``granularity``, or the table's finest if it is None. UnknownName: not a granularity; ScalesInvalid: the table
    has no scales of it.
    """
    held = table.granularities()
    if granularity is None:
        return held[-1]
    if granularity not in GRANULARITIES:
        raise UnknownName.of("granularity", granularity, GRANULARITIES)
    if granularity not in held:
        raise ScalesInvalid(
            f"the scale table has no scales by {granularity} (it has {', '.join(held)}); "
            "analyze a grouped Mamba-2 run with --granularity group"
        )
    return granularity


def check_choice(table: ScaleTable, labels: Collection[str], granularities: Collection[str] = ()) -> None:
    """Raise what building these strategies at these granularities would raise for a wrong name; ALL is allowed.

    UnknownName: an unknown label or granularity; ScalesInvalid: a granularity that the table lacks.
    """
    for label in labels:
        if label != ALL:
            table.check_label(label)
    for granularity in granularities:
        if granularity != ALL:
            check_granularity(table, granularity)


def describe(
    strategy: str,
    at: Collection[str] = (),
    otherwise: str = DEFAULT_OTHERWISE,
    granularity: str | None = None,
) -> str:
    """A strategy's name in results: ``mse@x_proj:input/quamba`` with ``at``; ``mse (tensor)`` with a granularity."""
    mix = f"{strategy}@{','.join(at)}/{otherwise}" if at else strategy
    return mix if granularity is None else f"{mix} ({granularity})"


def notes_on(table: ScaleTable) -> list[str]:
    """Notes for users of a table's scales: their run, and the table's own notes."""
    return [f"scales of run {table.run}", *table.notes]
