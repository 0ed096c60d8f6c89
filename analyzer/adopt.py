"""`quambase adopt`: takes a scale table that another tool wrote or a person edited, checks it and completes it.

A scale table carries a checksum, its origin, and each scale's error. An edited table lacks the first two, and its
errors belong to the former scales. `adopt` takes the origin from the run in the database, computes every figure again
from the run's counts, and names what is wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from quambase.analyzer.analyze import scale_columns, select_least
from quambase.analyzer.scale_groups import ScaleGroup, default_granularity, scale_groups
from quambase.analyzer.summary import summarize
from quambase.schema.errors import ScalesInvalid, UnknownName, first_line
from quambase.schema.groups import GRANULARITIES, granularity_of
from quambase.schema.scale_table import (
    ADOPTED,
    EFFECT,
    IN_16_BIT,
    METADATA_KEY,
    MSE,
    QUAMBASE,
    provenance_of,
    read_provenance,
    refuse_foreign_table,
    scale_faults,
    write_scales,
)
from quambase.schema.sites import WHOLE
from quambase.schema.sql.answer import PrintsAsTable
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.manifest import Manifest
from quambase.schema.tables import SCALES, open_table
from quambase.schema.values.number_format import Affine

NEEDED = ("layer", "site", "scale")
"""The columns that a table must have."""

DEFAULTS: dict[str, Any] = {
    "run": None,
    "group_name": WHOLE,
    "label": "edited",
    "strategy": None,
    "params": "{}",
    "zero_point": 0,
    "component_scales": None,
    "needs_decode": False,
    "selected": None,
    "mse": None,
}
"""The columns that it may have, and their values where it lacks them. Errors are computed anew."""

SHOWN_FAULTS = 5


@dataclass(frozen=True, repr=False)
class Adopted(PrintsAsTable):
    """What `adopt` made.

    table    rows of tables.SCALES
    path     the file written
    run      the run that the scales are of
    changed  rows whose figures were those of another scale
    notes    what a user should know, a line each
    """

    table: pa.Table
    path: Path
    run: str
    changed: int
    notes: list[str]

    def shown(self) -> pa.Table:
        """Each strategy in one row."""
        return summarize(self.table)


def adopt(
    file: str | Path,
    db: str | Path = Path("quambase-db"),
    run: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
) -> Adopted:
    """Check the scale table ``file``, complete it from its run, and write it with a checksum.

    file   .parquet or .csv with the columns layer, site and scale, perhaps group_name, label, zero_point, and any of
           a scale table's
    run    a run of ``db``; None: the one that the table names, else the newest
    out    None: ``file``, of a .csv the .parquet beside it
    force  replace ``out`` even if it is no scale table

    ScalesInvalid names what is wrong: a scale that is not positive and finite, two rows for one scale, a zero point
    that nothing reads. UnknownName: a run, site or group that is not there. OutputRefused. DatabaseInvalid.
    """
    file = Path(file)
    target = Path(out) if out is not None else file.with_suffix(".parquet")
    if target.resolve() != file.resolve():
        refuse_foreign_table(target, force=force)
    table, provenance = _read(file)
    with StatsDB(db, run or _named_run(file, table)) as database:
        manifest = database.runs[0]
        given = _rows(table, manifest.run)
        # As finely as the table divides a site: which scales the INT8 model reads depends on it.
        level = max((GRANULARITIES.index(granularity_of(row["group_name"])) for row in given), default=0)
        divided = scale_groups(database, manifest.run, GRANULARITIES[level])
        groups = {(group.layer, group.site, group.group_name): group for group in divided}
        notes = list(database.notes)
    _check_places(file, given, groups)
    made = pa.Table.from_pylist([_completed(row, groups[_place(row)]) for row in given], schema=SCALES)
    faults = [*_bad_scales(given), *scale_faults(made)]
    if faults:
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise ScalesInvalid(f"{file}: {'; '.join(faults[:SHOWN_FAULTS])}{more}; mend the table and adopt it again")
    made = _selected(made, given)
    write_scales(target, made, _provenance(manifest, provenance, made, file))
    changed = sum(_differs(row["mse"], now) for row, now in zip(given, made["mse"].to_pylist(), strict=True))
    return Adopted(made, target, manifest.run, changed, [*notes, *_missing(made)])


def _read(file: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The columns of NEEDED and DEFAULTS, each of its type, and the provenance that the file still has."""
    advice = f"expected a .parquet or .csv file with the columns {', '.join(NEEDED)}"
    try:
        if file.suffix.lower() == ".csv":
            table = pyarrow.csv.read_csv(file)
        else:
            table, _ = open_table(file, ScalesInvalid, advice, edited=True)
    except FileNotFoundError:
        raise ScalesInvalid(f"{file} does not exist; {advice}") from None
    except (pa.ArrowException, ValueError) as error:
        raise ScalesInvalid(f"{file} cannot be read ({first_line(error)}); {advice}") from None
    missing = [name for name in NEEDED if name not in table.schema.names]
    if missing:
        raise ScalesInvalid(f"{file} lacks the columns {', '.join(missing)}; {advice}")
    columns = {}
    for name in [name for name in (*NEEDED, *DEFAULTS) if name in table.schema.names]:
        kind = SCALES.field(name).type
        try:
            columns[name] = table[name].cast(kind)
        except (pa.ArrowException, KeyError) as error:  # KeyError: two columns of that name
            raise ScalesInvalid(f"{file} has no column {name} of type {kind} ({first_line(error)}); {advice}") from None
    text = (table.schema.metadata or {}).get(METADATA_KEY)
    try:
        provenance = {} if text is None else read_provenance(file, text)
    except ScalesInvalid:
        provenance = {}
    return pa.table(columns), provenance


def _named_run(file: Path, table: pa.Table) -> str | None:
    """The run that a table names; None if it names none. ScalesInvalid: several."""
    named = sorted(set(table["run"].drop_null().to_pylist())) if "run" in table.schema.names else []
    if len(named) > 1:
        raise ScalesInvalid(f"{file} has scales of {len(named)} runs ({', '.join(named[:4])}); expected one run's")
    return named[0] if named else None


def _rows(table: pa.Table, run: str) -> list[dict[str, Any]]:
    """The rows with the default of each column that is not there, of the one run."""
    rows = []
    for row in table.to_pylist():
        whole = DEFAULTS | {name: value for name, value in row.items() if value is not None}
        whole["strategy"] = whole["strategy"] or whole["label"].partition(":")[0]
        rows.append(whole | {"run": run, "scale": row["scale"], "layer": row["layer"], "site": row["site"]})
    return rows


def _place(row: dict[str, Any]) -> tuple[int, str, str]:
    return row["layer"], row["site"], row["group_name"]


def _check_places(file: Path, rows: list[dict[str, Any]], groups: dict[tuple[int, str, str], ScaleGroup]) -> None:
    """UnknownName for the first row of a layer, site or group that the run does not have."""
    for row in rows:
        if _place(row) in groups:
            continue
        layer, site, name = _place(row)
        layers, sites = {key[0] for key in groups}, {key[1] for key in groups if key[0] == layer}
        names = {key[2] for key in groups if key[:2] == (layer, site)}
        if layer not in layers:
            raise UnknownName.of("layer", str(layer), map(str, layers), where=str(file))
        if site not in sites:
            raise UnknownName.of("site", str(site), sites, where=f"layer {layer} of {file}")
        raise UnknownName.of("group", str(name), names, where=f"layer {layer} {site} of {file}")


def _bad_scales(rows: list[dict[str, Any]]) -> Iterable[str]:
    """A line for each row whose errors cannot be computed."""
    for row in rows:
        if row["needs_decode"] and len(row["component_scales"] or ()) != 2:
            yield f"layer {row['layer']} {row['site']} ({row['label']}) needs two component scales"


def _completed(row: dict[str, Any], group: ScaleGroup) -> dict[str, Any]:
    """A row of tables.SCALES with every figure of its scale; without figures where the scale is not valid."""
    key = {name: row[name] for name in ("run", "layer", "site", "group_name", "strategy", "params", "label")}
    fixed = {
        "granularity": granularity_of(group.group_name),
        "count": group.distribution.total,
        "consumed": group.consumed,
        "decode_only": group.point.decode_only,
        "needs_decode": row["needs_decode"],
        "selected": bool(row["selected"]),
    }
    scale, components = row["scale"], row["component_scales"]
    if not _is_scale(scale) or any(not _is_scale(part) for part in components or ()):
        blank = {"scale": scale, "zero_point": row["zero_point"], "component_scales": components}
        return {name: None for name in SCALES.names} | key | fixed | blank
    step: Any = Affine(scale, row["zero_point"]) if row["zero_point"] else scale
    if row["needs_decode"] and len(components or ()) == 2:
        step, components = tuple(components), None
    return key | fixed | scale_columns(group, step, group.point.saturates, components)


def _is_scale(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _differs(before: float | None, now: float | None) -> bool:
    """Whether a stored error is not that of the scale; equal figures can differ in their last digits."""
    if before is None or now is None or (math.isnan(before) and math.isnan(now)):
        return False
    return not math.isclose(before, now, rel_tol=1e-6)


def _selected(made: pa.Table, given: list[dict[str, Any]]) -> pa.Table:
    """``made`` with one selected row in each scale group: the given one, else the one of least loss."""
    rows = made.to_pylist()
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_place(row), []).append(row)
    for mine in groups.values():
        if not any(row["selected"] for row in mine):
            select_least(mine)
    return pa.Table.from_pylist(rows, schema=SCALES)


def _provenance(manifest: Manifest, before: dict[str, Any], made: pa.Table, file: Path) -> dict[str, Any]:
    granularity = before.get("granularity", default_granularity(manifest.model.family))
    by = EFFECT if made["predicted_kl"].null_count < made.num_rows else MSE
    found = provenance_of([manifest], granularity, before.get("target", QUAMBASE), before.get("select", by))
    kept = {IN_16_BIT: before[IN_16_BIT]} if IN_16_BIT in before else {}
    return found | kept | {ADOPTED: file.name}


def _missing(made: pa.Table) -> list[str]:
    """A line for each strategy that lacks scales which another strategy of the table has."""
    consumed = [row for row in made.to_pylist() if row["consumed"]]
    every = {_place(row) for row in consumed}
    held = Counter(row["label"] for row in consumed)
    return [
        f"{label} has {held[label]} of {len(every)} scales that the INT8 model reads and the table has"
        for label in dict.fromkeys(row["label"] for row in consumed)
        if held[label] < len(every)
    ]
