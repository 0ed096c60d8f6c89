"""The slow twin of `quambase.collector.tables.block_rows.activations_rows`: site, then group, then row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from quambase.collector.statistics import SiteLayout
from quambase.schema.sites import SiteKey
from quambase.schema.tables import ACTIVATIONS


def activations_twin(
    run: str, layouts: Mapping[SiteKey, SiteLayout], kept: Mapping[SiteKey, list[tuple[tuple[int, int], np.ndarray]]]
) -> pa.Table:
    """A block's rows of `activations`.

    kept  of every site: places, document and position, and the values there: of every channel, or of a state, flat
          (e, n)
    """
    rows = []
    for (layer, site), of_site in sorted(kept.items()):
        layout = layouts[layer, site]
        for g in sorted(range(len(layout.names)), key=lambda g: layout.names[g]):
            span = range(layout.edges[g], layout.edges[g + 1])
            channels = [layout.order[i] for i in span] if layout.order else list(span)
            for (document, position), values in of_site:
                if layout.d_state:
                    mine = values.reshape(-1, layout.d_state)[channels].reshape(-1)
                else:
                    mine = values if layout.state else values[channels]
                rows.append(
                    {"run": run, "layer": layer, "site": site, "group_name": layout.names[g], "document": document,
                     "position": position, "values": mine.tolist()}
                )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=ACTIVATIONS)
