"""Scale tables: what `analyze` writes and `apply` reads, a Parquet file that carries its provenance."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from quambase.schema import CHECKED_SINCE, FORMAT_VERSION
from quambase.schema.checksums import ALTERED
from quambase.schema.errors import OutputRefused, ScalesInvalid, UnknownName, first_line
from quambase.schema.files import FORCE_HINT, check_format_version, refuse_foreign_file
from quambase.schema.groups import GRANULARITIES, GROUP, granularity_of, group_numbers, is_scale_group
from quambase.schema.json_files import as_type
from quambase.schema.sites import AFFINE_SITES, OPERATORS, WHOLE
from quambase.schema.stored.manifest import Manifest
from quambase.schema.stored.model_info import ModelInfo
from quambase.schema.tables import SCALES, open_table, with_later_columns, write_table
from quambase.schema.values.number_format import INT8, Affine

METADATA_KEY = b"quambase"
"""Key of the Parquet schema metadata whose value is the provenance, as JSON."""

Scale = float | Affine | tuple[float | Affine, ...] | tuple[tuple[float, ...], ...]
"""One scale for a site, perhaps with a zero point; or one for each scale group, in channel order; or, for a Mamba-2's
state, one for each group and state index."""

SymmetricScale = float | tuple[float, ...] | tuple[tuple[float, ...], ...]
"""A `Scale` without zero points."""

Segments = tuple[tuple[float, ...], ...]
"""Of two-segment codes, (inner, outer) for each scale group, in channel order."""

LATER: dict[str, Any] = {"predicted_kl": None, "zero_point": 0}
"""Columns that tables of earlier versions lack, and their value there."""

QUAMBASE, UPSTREAM = TARGETS = ("quambase", "upstream")
"""Whose INT8 model the selected rows are for."""

EFFECT, MSE = SELECTIONS = ("effect", "mse")
"""What selected rows minimize: predicted KL, or squared error."""

SELECTED = "selected"
"""The label that stands for the selected row of each scale group, whatever its strategy."""

MIXED = "mixed"
"""The label of the selected rows with some operators in 16 bit, of a table made with `analyze --keep` or `--budget`."""

Operator = tuple[int, str]
"""(layer, one of sites.OPERATORS)."""

IN_16_BIT = "kept_16bit"
"""The key of the provenance with the list of operators that `mixed` leaves in 16 bit, each a pair."""


ADOPTED = "adopted"
"""The key of the provenance with the name of the edited file that `quambase.analyzer.adopt` took."""


@dataclass(frozen=True)
class ScaleTable:
    """A valid scale table and where it came from.

    table       rows of tables.SCALES
    provenance  format_version, quambase (its version), granularity, target, perhaps ``kept_16bit``, and ``runs``: run
                id to ``{"model": ..., "identity": ..., "data": ...}`` as in the manifests
    """

    table: pa.Table
    provenance: dict[str, Any]

    @property
    def notes(self) -> list[str]:
        """What a user should know, a line each."""
        adopted = self.provenance.get(ADOPTED)
        return [] if adopted is None else [f"the scale table was edited: adopted from {adopted}"]

    def labels(self) -> list[str]:
        """The strategy labels (``percentile``, ``percentile:0.9999``, ...) in the order of the table."""
        return distinct(self.table, "label")

    def check_label(self, label: str) -> None:
        """UnknownName, with the nearest names, unless ``label`` is a label of the table, "selected" or "mixed".

        ScalesInvalid: "mixed", and the table leaves no operator in 16 bit.
        """
        if label == MIXED and not self.in_16_bit:
            raise ScalesInvalid(
                "the scale table leaves no operator in 16 bit, so it has no strategy mixed; make one that does with "
                "`analyze --keep 16bit=N` or `analyze --budget KL=X`"
            )
        if label not in (SELECTED, MIXED) and label not in self.labels():
            raise UnknownName.of("strategy", label, [*self.labels(), SELECTED])

    @property
    def in_16_bit(self) -> frozenset[Operator]:
        """The operators that `mixed` leaves in 16 bit; empty where the table has no such strategy."""
        return frozenset((int(layer), str(name)) for layer, name in self.provenance.get(IN_16_BIT, ()))

    def in_16_bit_for(self, label: str) -> frozenset[Operator]:
        """The operators that the strategy ``label`` leaves in 16 bit."""
        return self.in_16_bit if label == MIXED else frozenset()

    @property
    def default_label(self) -> str:
        """The strategy to apply where none is named: "mixed" if the table has it, else "selected"."""
        return MIXED if self.in_16_bit else SELECTED

    def runs(self) -> list[str]:
        """The run ids the scales were computed from."""
        return distinct(self.table, "run")

    @cached_property
    def run(self) -> str:
        """The one run of this table; ScalesInvalid if it holds several."""
        runs = self.runs()
        if len(runs) != 1:
            raise ScalesInvalid(
                f"the scale table holds {len(runs)} runs ({', '.join(runs)}), expected one; "
                "analyze one with `analyze --run ID`"
            )
        return runs[0]

    @cached_property
    def model(self) -> ModelInfo:
        """The model of the one run; ScalesInvalid if the provenance does not describe one."""
        raw = ModelInfo.nested(self._origin["model"])
        return as_type(raw, ModelInfo, Path("the scale table"), ScalesInvalid, "run `analyze` again")

    @property
    def weights_sha256(self) -> str | None:
        """The SHA-256 of the weights of the one run's model; None where the provenance has none."""
        found = self._origin["identity"].get("weights_sha256")
        return None if found is None else str(found)

    @property
    def _origin(self) -> dict[str, Any]:
        origin: dict[str, Any] = self.provenance["runs"][self.run]
        return origin

    def granularities(self) -> list[str]:
        """The granularities, coarse to fine, at which this table has scales by group that an INT8 model can read;
        "tensor" is always one.
        """
        names = distinct(self.table, "group_name")
        found = {granularity_of(name) for name in names if name == WHOLE or is_scale_group(name)}
        return [name for name in GRANULARITIES if name in found]

    def group_scales_for(self, label: str, granularity: str = GROUP) -> dict[tuple[int, str], Scale]:
        """Like `scales_for`, with the scales of a site's scale groups (g0, g0h1, g0h1c2) where the table has them.

        They are in the order of SSD group, head group and channel group; a group with component scales has all of them.
        A site that is divided several ways has its finest division up to ``granularity``. UnknownName: no granularity.
        """
        found: dict[tuple[int, str], Scale] = {**self.scales_for(label)}
        for key, rows in _finest(self._rows_of(label, needs_decode=False), granularity).items():
            groups: Any = [
                _with_zero_point(row["scale"], row["zero_point"])
                if row["component_scales"] is None
                else tuple(row["component_scales"])
                for row in rows
            ]
            found[key] = tuple(groups)
        return found

    def needs_decode(self, label: str) -> bool:
        """Whether the codes of ``label`` have two segments. UnknownName: no such label."""
        self.check_label(label)
        return label in self.labels() and self._rows_of(label, needs_decode=True).num_rows > 0

    def segments_for(self, label: str, granularity: str = GROUP) -> dict[tuple[int, str], Segments]:
        """(layer, site) to the scales of a strategy that `needs_decode`, of the groups as in `group_scales_for`."""
        rows = self._rows_of(label, needs_decode=True)
        whole = rows.filter(pc.equal(rows["group_name"], pa.scalar(WHOLE))).to_pylist()
        found = {(row["layer"], row["site"]): [row] for row in whole} | _finest(rows, granularity)
        return {key: tuple(tuple(row["component_scales"]) for row in of_site) for key, of_site in found.items()}

    def scales_for(self, label: str) -> dict[tuple[int, str], float | Affine]:
        """(layer, site) to the scale of strategy ``label``, for sites that have one scale (``all``).

        ``selected`` and ``mixed`` stand for each site's selected row. Rows that need decoding (two segments) are left
        out: their one number is no scale. UnknownName for a label the table does not hold; ScalesInvalid for
        several runs.
        """
        self.check_label(label)
        _ = self.run
        rows = self._rows_of(label, needs_decode=False)
        rows = rows.filter(pc.equal(rows["group_name"], pa.scalar(WHOLE)))
        columns = (rows[name].to_pylist() for name in ("layer", "site", "scale", "zero_point"))
        return {
            (layer, site): _with_zero_point(scale, zero_point)
            for layer, site, scale, zero_point in zip(*columns, strict=True)
        }

    def _rows_of(self, label: str, *, needs_decode: bool) -> pa.Table:
        """The rows of ``label`` whose scale is one INT8 multiplication, or those whose codes need a decoder."""
        chosen = (
            self.table["selected"] if label in (SELECTED, MIXED) else pc.equal(self.table["label"], pa.scalar(label))
        )
        decoded = self.table["needs_decode"]
        return self.table.filter(pc.and_(chosen, decoded if needs_decode else pc.invert(decoded)))


def distinct(table: pa.Table, column: str) -> list[str]:
    """The different texts of a column, in the order of the table."""
    return [str(text) for text in pc.unique(table[column]).to_pylist()]


def _finest(rows: pa.Table, granularity: str) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """By (layer, site) the rows of the finest division up to ``granularity``, in the order of SSD group, head group and
    channel group. UnknownName: no granularity.
    """
    if granularity not in GRANULARITIES:
        raise UnknownName.of("granularity", granularity, GRANULARITIES)
    finest = GRANULARITIES.index(granularity)
    by_site: dict[tuple[int, str], dict[int, dict[tuple[int, ...], dict[str, Any]]]] = {}
    wanted = ["layer", "site", "group_name", "scale", "zero_point", "component_scales"]
    for row in rows.select(wanted).to_pylist():
        name = row["group_name"]
        level = GRANULARITIES.index(granularity_of(name))
        if is_scale_group(name) and level <= finest:
            by_site.setdefault((row["layer"], row["site"]), {}).setdefault(level, {})[group_numbers(name)] = row
    groups = {key: levels[max(levels)] for key, levels in by_site.items()}
    return {key: [of_site[numbers] for numbers in sorted(of_site)] for key, of_site in groups.items()}


def _with_zero_point(scale: float, zero_point: int | None) -> float | Affine:
    return Affine(scale, zero_point) if zero_point else scale


def write_scales(path: Path, table: pa.Table, provenance: dict[str, Any]) -> None:
    """Write ``table`` (tables.SCALES) with its provenance, atomically; equal input gives equal bytes."""
    text = json.dumps(provenance, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    schema = SCALES.with_metadata({METADATA_KEY: text.encode()})
    write_table(path, "scales", table.replace_schema_metadata(schema.metadata), schema)


def provenance_of(manifests: Iterable[Manifest], granularity: str, target: str, select: str) -> dict[str, Any]:
    """The provenance of a table of these runs; ``target`` says for whose INT8 model rows are selected, and ``select``
    by what.
    """
    return {
        "format_version": FORMAT_VERSION,
        "quambase": version("quambase"),
        "granularity": granularity,
        "target": target,
        "select": select,
        "runs": {
            m.run: {"model": m.model.to_json(), "identity": m.identity, "data": m.data.to_json()} for m in manifests
        },
    }


def refuse_foreign_table(path: Path, *, force: bool = False) -> None:
    """OutputRefused if a new table at ``path`` would replace anything but a scale table that quambase wrote."""
    refuse_foreign_file(path, is_scale_table, "scale table", force=force)


def is_scale_table(path: Path) -> bool:
    """Whether quambase wrote the scale table at ``path``, perhaps edited since."""
    try:
        return METADATA_KEY in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        return False


def refuse_fewer_labels(path: Path, labels: Sequence[str]) -> None:
    """OutputRefused if ``path`` is a scale table with strategies that are not in ``labels``: they would be lost."""
    try:
        held = distinct(pq.read_table(path, columns=["label"]), "label")
    except (pa.ArrowException, OSError):  # none there, or a damaged one
        return
    lost = [label for label in held if label not in labels]
    if lost:
        raise OutputRefused(
            f"{path} holds {len(held)} strategies, of which the new table would lack {', '.join(lost)}; {FORCE_HINT}"
        )


def read_scales(path: Path) -> ScaleTable:
    """Read and check a scale table that quambase wrote.

    ScalesInvalid: no such file, not a scale table, written or changed by another tool (`quambase.analyzer.adopt` takes
    those), a newer format, missing columns, two rows for one scale, or a scale that is not positive and finite.
    """
    advice = "run `analyze` again"
    edited = f"if you edited it, `quambase adopt {shlex.quote(str(path))}` checks it and takes it, else {advice}"
    try:
        table, own = open_table(path, ScalesInvalid, edited)
    except FileNotFoundError:
        raise ScalesInvalid(f"{path} does not exist; run `analyze` to make a scale table") from None
    origin = (table.schema.metadata or {}).get(METADATA_KEY)
    if origin is not None:
        table = with_later_columns(table, SCALES, LATER)
    if missing := [name for name in SCALES.names if name not in table.schema.names]:
        what = "is not a scale table: it lacks" if origin is None else "lacks"
        raise ScalesInvalid(f"{path} {what} the columns {', '.join(missing)}; {edited}")
    if origin is None:
        raise ScalesInvalid(f"{path} names no origin, as if another tool had written it; {edited}")
    provenance = read_provenance(path, origin)
    if own == "none" and provenance["format_version"] >= CHECKED_SINCE:
        raise ScalesInvalid(f"{path} {ALTERED}; {edited}")
    try:
        table = table.select(SCALES.names).cast(SCALES)
    except (pa.ArrowException, ValueError) as error:
        raise ScalesInvalid(f"{path} holds columns of other types ({first_line(error)}); {edited}") from None
    if faults := scale_faults(table):
        others = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise ScalesInvalid(f"{path}: {faults[0]}{others}; {advice}")
    scales = ScaleTable(table, provenance)
    strangers = set(scales.runs()) - set(provenance["runs"])
    if strangers:
        raise ScalesInvalid(f"{path} has rows of run {min(strangers)}, unknown to its provenance; {advice}")
    return scales


class _Origin(TypedDict, total=False):
    model: Required[dict[str, Any]]
    identity: Required[dict[str, Any]]
    data: dict[str, Any]


class _Provenance(TypedDict, total=False):
    """The entries of a provenance that are read again."""

    format_version: Required[int]
    granularity: str
    target: str
    select: str
    runs: Required[dict[str, _Origin]]
    kept_16bit: list[tuple[int, str]]
    adopted: str


def read_provenance(path: Path, text: bytes) -> dict[str, Any]:
    """The provenance that the scale table ``path`` carries. ScalesInvalid: damaged, or a newer format."""
    advice = "run `analyze` again"
    try:
        found: dict[str, Any] = json.loads(text)
        as_type(found, _Provenance, path, ScalesInvalid, advice)
        if strange := [name for _, name in found.get(IN_16_BIT, ()) if name not in OPERATORS]:
            raise ValueError(f"no operator is called {strange[0]}")
    except (ValueError, RecursionError, ScalesInvalid):
        raise ScalesInvalid(f"the provenance of {path} is damaged; {advice}") from None
    check_format_version(path, found["format_version"], FORMAT_VERSION, ScalesInvalid)
    return found


def scale_faults(table: pa.Table) -> list[str]:
    """What is wrong with rows of tables.SCALES, a line each: two rows for one scale, a zero point that is no code or
    stands where nothing reads one, a scale that is not positive and finite.
    """
    return [*_not_positive(table), *_zero_points(table), *_doubled(table)]


def _doubled(table: pa.Table) -> Iterator[str]:
    group = ["run", "layer", "site", "group_name"]
    for rows, keys in ((table, [*group, "label"]), (table.filter(table["selected"]), group)):
        counted = rows.group_by(keys).aggregate([([], "count_all")])
        for row in counted.filter(pc.greater(counted["count_all"], 1)).to_pylist():
            what = f"rows of {row['label']}" if "label" in row else "selected rows"
            yield (
                f"it has {row['count_all']} {what} for one scale, that of layer {row['layer']} {row['site']} "
                f"({row['group_name']}), keep one"
            )


def _zero_points(table: pa.Table) -> Iterator[str]:
    found = table.filter(pc.not_equal(pc.fill_null(table["zero_point"], 0), 0))
    for row in found.select(["layer", "site", "zero_point", "label"]).to_pylist():
        readable = row["site"] in AFFINE_SITES
        if not readable or not INT8.qmin <= row["zero_point"] <= INT8.qmax:
            expected = f"{INT8.qmin} to {INT8.qmax}" if readable else "0, since no INT8 model reads one there"
            where = f"layer {row['layer']} {row['site']} ({row['label']})"
            yield f"zero point {row['zero_point']} at {where}, expected {expected}"


def _not_positive(table: pa.Table) -> Iterator[str]:
    scales = np.asarray(table["scale"].to_numpy(zero_copy_only=False), np.float64)  # null becomes NaN
    with np.errstate(invalid="ignore"):
        bad = np.flatnonzero(~(np.isfinite(scales) & (scales > 0)))
    components = [
        i
        for i, parts in enumerate(table["component_scales"].to_pylist())
        if parts is not None and not (parts and all(p is not None and math.isfinite(p) and p > 0 for p in parts))
    ]
    for i in sorted({*bad.tolist(), *components}):
        row = table.slice(i, 1).to_pylist()[0]
        what = f"scale {row['scale']}" if i in set(bad.tolist()) else f"component scales {row['component_scales']}"
        yield (
            f"{what} at layer {row['layer']} {row['site']} ({row['group_name']}, {row['label']}) is not positive and "
            "finite"
        )
