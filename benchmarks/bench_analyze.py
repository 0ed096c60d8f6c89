"""Seconds of `analyze` at the 130m shape: 24 layers, every site, over 10 million count rows, every default strategy."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
from timing import alternate, table

from quambase.analyzer.analyze import analyze
from quambase.analyzer.strategies import DEFAULT_LABELS
from quambase.collector.tables.run_folder import part_file, write_file
from quambase.schema.sites import layer_sites
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.manifest import Manifest
from quambase.schema.stored.model_info import ModelInfo, TextInfo
from quambase.schema.tables import COUNTS
from quambase.schema.values.distribution import Distribution

RUN = "synthetic"
VALUES = 6_000_000


def rows() -> Iterator[pa.Table]:
    """Heavy-tailed values of each group at its own spread, a table for each layer."""
    random = np.random.default_rng(0)
    drawn = random.standard_t(3, VALUES)
    for _, sites in groupby(layer_sites(24), key=lambda place: place[0]):
        tables = []
        for layer, site in sites:
            for group in site.groups:
                counted = Distribution.of_values(drawn * 10.0 ** random.uniform(-2, 1))
                key = {"run": RUN, "layer": layer, "site": site.name, "group_name": group}
                columns = [pa.array([value] * counted.values.size) for value in key.values()]
                tables.append(pa.table([*columns, counted.values, counted.counts], names=COUNTS.names))
        yield pa.concat_tables(tables)


def main() -> None:
    """Print the time of `analyze` beside the target, and of a scan and of a summary query."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "runs" / RUN
        files = {part_file(number): write_file(run, part_file(number), made) for number, made in enumerate(rows())}
        model, text = ModelInfo("synthetic", "mamba1", sizes={"n_layer": 24}), TextInfo("synthetic", 1, 1)
        Manifest(RUN, {"weights_sha256": "none"}, model, text, files, []).save(run)
        size, total = sum((run / file).stat().st_size for file in files), sum(entry.rows for entry in files.values())
        print(f"{total:,} count rows, {size / 1e6:.1f} MB, strategies: {', '.join(DEFAULT_LABELS)}")
        database = StatsDB(Path(folder))
        scan = "SELECT layer, site, group_name, max(abs(value)), sum(count) FROM counts GROUP BY ALL"
        seconds = alternate(
            {
                "analyze": lambda: analyze(Path(folder), out=Path(folder) / "scales.parquet"),
                "scan of counts": lambda: database.sql(scan),
                "quantile(0.9995)": lambda: database.sql("SELECT * FROM quantile(0.9995)"),
            }
        )
    table("reach: analyze 10 s, scan 1 s", "ms", {k: v * 1e3 for k, v in seconds.items()}, "analyze")


if __name__ == "__main__":
    main()
