"""Scale tables: what `analyze` writes and `apply` reads, a Parquet file that carries its provenance."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from quambase.schema import FORMAT_VERSION
from quambase.schema.errors import ScalesInvalid, UnknownName
from quambase.schema.grouping import GRANULARITIES, GROUP, granularity_of, group_numbers, is_scale_group
from quambase.schema.sites import WHOLE
from quambase.schema.tables import SCALES, write_table

METADATA_KEY = b"quambase"
"""Key of the Parquet schema metadata whose value is the provenance, as JSON."""

Scale = float | tuple[float, ...] | tuple[tuple[float, ...], ...]
"""A site's one scale; one per scale group, in channel order; or, of a Mamba-2's state, one per group and index."""

SELECTED = "selected"
"""The label that stands for each scale group's selected row instead of one strategy."""


@dataclass(frozen=True)
class ScaleTable:
    """A valid scale table and where it came from.

    table       rows of tables.SCALES
    provenance  format_version, quambase (its version), granularity, and ``runs``: run id to
                ``{"model": ..., "identity": ..., "data": ...}`` as in the manifests
    """

    table: pa.Table
    provenance: dict[str, Any]

    def labels(self) -> list[str]:
        """The strategy labels (``percentile``, ``percentile:0.9999``, ...) in the order of the table."""
        return [str(label) for label in pc.unique(self.table["label"]).to_pylist()]

    def runs(self) -> list[str]:
        """The run ids the scales were computed from."""
        return [str(run) for run in pc.unique(self.table["run"]).to_pylist()]

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

    @property
    def model(self) -> dict[str, Any]:
        """The manifest's ``model`` (name, path, family, n_layer, ...) of the one run."""
        model: dict[str, Any] = self.provenance["runs"][self.run]["model"]
        return model

    @property
    def identity(self) -> dict[str, Any]:
        """The manifest's ``identity`` (weights_sha256, ...) of the one run."""
        identity: dict[str, Any] = self.provenance["runs"][self.run]["identity"]
        return identity

    def granularities(self) -> list[str]:
        """The granularities at which this table divides a site that an INT8 model may read by group, coarse to fine;
        "tensor" is always among them.
        """
        names = [str(name) for name in pc.unique(self.table["group_name"]).to_pylist()]
        found = {granularity_of(name) for name in names if name == WHOLE or is_scale_group(name)}
        return [name for name in GRANULARITIES if name in found]

    def group_scales_for(self, label: str, granularity: str = GROUP) -> dict[tuple[int, str], Scale]:
        """Like `scales_for`, but where the table has rows of a site's scale groups (g0, g0h1, g0h1c2), those: one scale
        per group, by SSD group, head group and channel group, or where they have component scales those of each. Of
        several divisions the finest up to ``granularity``. UnknownName for another granularity.
        """
        if granularity not in GRANULARITIES:
            raise UnknownName.of("granularity", granularity, GRANULARITIES)
        found: dict[tuple[int, str], Scale] = {**self.scales_for(label)}
        rows = self._plain_rows(label)
        finest = GRANULARITIES.index(granularity)
        by_site: dict[tuple[int, str], dict[int, dict[tuple[int, ...], Any]]] = {}
        columns = (rows[name].to_pylist() for name in ("layer", "site", "group_name", "scale", "component_scales"))
        for layer, site, name, scale, components in zip(*columns, strict=True):
            level = GRANULARITIES.index(granularity_of(name))
            if is_scale_group(name) and level <= finest:
                of_group = scale if components is None else tuple(components)
                by_site.setdefault((layer, site), {}).setdefault(level, {})[group_numbers(name)] = of_group
        for key, levels in by_site.items():
            groups = levels[max(levels)]
            found[key] = tuple(groups[numbers] for numbers in sorted(groups))
        return found

    def scales_for(self, label: str) -> dict[tuple[int, str], float]:
        """(layer, site) to the scale of strategy ``label``, for sites that have one scale (``all``).

        ``selected`` stands for each site's selected row. Rows that need decoding (two segments) are left out:
        their one number is no scale. UnknownName for a label the table does not hold; ScalesInvalid for
        several runs.
        """
        if label != SELECTED and label not in self.labels():
            raise UnknownName.of("strategy", label, [*self.labels(), SELECTED])
        _ = self.run
        rows = self._plain_rows(label)
        rows = rows.filter(pc.equal(rows["group_name"], pa.scalar(WHOLE)))
        columns = (rows[name].to_pylist() for name in ("layer", "site", "scale"))
        return {(layer, site): scale for layer, site, scale in zip(*columns, strict=True)}

    def _plain_rows(self, label: str) -> pa.Table:
        """The rows of ``label`` whose scale is one INT8 multiplication."""
        chosen = self.table["selected"] if label == SELECTED else pc.equal(self.table["label"], pa.scalar(label))
        return self.table.filter(pc.and_(chosen, pc.invert(self.table["needs_decode"])))


def write_scales(path: Path, table: pa.Table, provenance: dict[str, Any]) -> None:
    """Write ``table`` (tables.SCALES) with its provenance, atomically; equal input gives equal bytes."""
    text = json.dumps(provenance, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    schema = SCALES.with_metadata({METADATA_KEY: text.encode()})
    write_table(path, "scales", table.replace_schema_metadata(schema.metadata), schema)


def read_scales(path: Path) -> ScaleTable:
    """Read and check a scale table.

    ScalesInvalid: no such file, not a scale table, a newer format, missing columns, or a scale that is not
    positive and finite.
    """
    try:
        table = pq.read_table(path, partitioning=None)
    except FileNotFoundError:
        raise ScalesInvalid(f"{path} does not exist; run `analyze` to make a scale table") from None
    except (pa.ArrowInvalid, OSError) as error:
        first = str(error).splitlines()[0]
        raise ScalesInvalid(f"{path} is not a readable Parquet file ({first}); run `analyze` again") from None
    provenance = _provenance(path, table.schema.metadata or {})
    missing = [name for name in SCALES.names if name not in table.schema.names]
    if missing:
        raise ScalesInvalid(f"{path} lacks the columns {', '.join(missing)}; run `analyze` again")
    try:
        table = table.select(SCALES.names).cast(SCALES)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ScalesInvalid(f"{path} holds columns of other types ({first}); run `analyze` again") from None
    _check_positive(path, table)
    scales = ScaleTable(table, provenance)
    strangers = set(scales.runs()) - set(provenance["runs"])
    if strangers:
        raise ScalesInvalid(f"{path} has rows of run {min(strangers)}, unknown to its provenance; run `analyze` again")
    return scales


def _provenance(path: Path, metadata: dict[bytes, bytes]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        raise ScalesInvalid(f"{path} is not a scale table (it names no origin); make one with `analyze`")
    try:
        provenance = json.loads(metadata[METADATA_KEY])
        version = provenance["format_version"]
        ready = isinstance(version, int) and isinstance(provenance["runs"], dict)
    except (ValueError, TypeError, KeyError):
        ready = False
    if not ready:
        raise ScalesInvalid(f"the provenance of {path} is damaged; run `analyze` again")
    if version > FORMAT_VERSION:
        raise ScalesInvalid(
            f"{path} has format version {version}; this quambase reads up to {FORMAT_VERSION}: upgrade quambase"
        )
    found: dict[str, Any] = provenance
    return found


def _check_positive(path: Path, table: pa.Table) -> None:
    scales = np.asarray(table["scale"].to_numpy(zero_copy_only=False), np.float64)  # null becomes NaN
    with np.errstate(invalid="ignore"):
        bad = np.flatnonzero(~(np.isfinite(scales) & (scales > 0)))
    if bad.size:
        row = table.slice(int(bad[0]), 1).to_pylist()[0]
        others = f", nor are {bad.size - 1} others" if bad.size > 1 else ""
        where = f"layer {row['layer']} {row['site']} ({row['group_name']}, {row['label']})"
        raise ScalesInvalid(
            f"{path}: scale {row['scale']} at {where} is not positive and finite{others}; run `analyze` again"
        )
