"""The tap of a collection: sees every site of one block and keeps what the tables need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from quambase.collector.plan import PlannedDocument
from quambase.collector.rows import Key, keyed_rows, ordered_groups
from quambase.collector.statistics import SUMMARY_COLUMNS, Counter, SiteLayout, SiteStatistics
from quambase.schema.errors import TapNeverFired
from quambase.schema.sites import WHOLE
from quambase.schema.tables import ACTIVATIONS, DOCUMENTS

Positions = Mapping[int, npt.NDArray[np.int64]]


@dataclass
class BlockRecorder:
    """A `quambase.model.backbone.Tap` for the documents of one block; sites without a layout are not looked at.

    ``positions``: document number to the positions whose activations are kept (None: every one);
    ``states``: the documents whose final state is kept (None: all).
    """

    run: str
    documents: Sequence[PlannedDocument]
    layouts: Mapping[Key, SiteLayout]
    counter: Counter
    positions: Positions | None
    states: set[int] | None
    statistics: dict[Key, SiteStatistics] = field(init=False)
    summaries: dict[Key, npt.NDArray[np.float32]] = field(init=False)

    def __post_init__(self) -> None:
        shapes = {key: (len(self.documents), len(layout.names) + 1) for key, layout in self.layouts.items()}
        self.statistics = {k: SiteStatistics.empty(layout, self.counter.most) for k, layout in self.layouts.items()}
        self.summaries = {k: np.empty((*shape, len(SUMMARY_COLUMNS)), np.float32) for k, shape in shapes.items()}
        self._seen = dict.fromkeys(self.layouts, 0)
        self._last: tuple[Key, torch.Tensor] | None = None
        self._kept: dict[Key, list[tuple[int, int, npt.NDArray[np.float32]]]] = {key: [] for key in self.layouts}

    def __call__(self, layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        """Count one site's activations; see `quambase.model.backbone.Tap` for the shapes."""
        key = (layer, site)
        layout = self.layouts.get(key)
        if layout is None:
            return
        here = self.documents[documents]
        if layout.d_state:
            rows = values.transpose(1, 2).reshape(-1, values.shape[1])  # (documents n, e)
            lengths = [layout.d_state] * len(here)
        elif layout.state:
            rows = values.reshape(-1, values.shape[-1])  # (documents e, n)
            lengths = [values.shape[1]] * len(here)
        else:
            rows = values
            lengths = [document.tokens.size for document in here]
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        if not self._copied(key, values, len(here)):
            summaries = self.summaries[key][documents]
            self.counter.add(self.statistics[key], rows, offsets, documents.start, summaries)
        self._seen[key] += len(here)
        self._last = key, values
        self._keep(key, layout, values, offsets, here)

    def _copied(self, key: Key, values: torch.Tensor, documents: int) -> bool:
        """Take over the statistics of the call before if it brought this very tensor for every document: an identity's
        output is its input, and counting is what a collection costs.
        """
        if self._last is None or self._last[1] is not values or documents != len(self.documents):
            return False
        source = self._last[0]
        if self.layouts[source] != self.layouts[key]:
            return False
        self.statistics[key] = deepcopy(self.statistics[source])
        self.summaries[key] = self.summaries[source].copy()
        return True

    def _keep(
        self,
        key: Key,
        layout: SiteLayout,
        values: torch.Tensor,
        offsets: npt.NDArray[np.int64],
        documents: Sequence[PlannedDocument],
    ) -> None:
        kept = self._kept[key]
        for place, document in enumerate(documents):
            if layout.state:
                if self.states is None or document.index in self.states:
                    state = values[place].numpy().reshape(-1).copy()
                    kept.append((document.index, document.tokens.size - 1, state))
                continue
            if self.positions is None:
                wanted = np.arange(document.tokens.size)
            elif document.index in self.positions:
                wanted = self.positions[document.index]
            else:
                continue
            picked = values[torch.from_numpy(offsets[place] + wanted)].numpy()
            kept.extend((document.index, int(position), row) for position, row in zip(wanted, picked, strict=True))

    def finish(self) -> dict[Key, SiteStatistics]:
        """The block's statistics, documents numbered as in the file.

        TapNeverFired if a site was not reached for every document.
        """
        self._last = None
        for (layer, site), seen in self._seen.items():
            if seen != len(self.documents):
                raise TapNeverFired(
                    f"the tap {site} of layer {layer} saw {seen} of {len(self.documents)} documents: the forward"
                    " pass does not reach it; leave the site out with --sites, or report the model"
                )
        numbers = np.array([document.index for document in self.documents], np.int64)
        for stats in self.statistics.values():
            for top in stats.top:
                top[:, 2] = numbers[top[:, 2]]
        return self.statistics

    def documents_table(self) -> pa.Table:
        """The block's rows of `documents`."""
        numbers = [document.index for document in self.documents]
        tokens = [document.tokens.size for document in self.documents]
        hashes = pa.array([document.sha256 for document in self.documents])
        pieces = []
        for key in sorted(self.layouts):
            layout = self.layouts[key]
            groups = ordered_groups(layout)
            if layout.names != (WHOLE,):
                groups = sorted([*groups, (WHOLE, len(layout.names))])
            for name, g in groups:
                columns: dict[str, object] = {"document": numbers, "tokens": tokens, "sha256": hashes}
                columns |= {c: self.summaries[key][:, g, i] for i, c in enumerate(SUMMARY_COLUMNS)}
                pieces.append(keyed_rows(self.run, key, name, len(numbers), columns, DOCUMENTS))
        return pa.concat_tables(pieces)

    def activations_table(self) -> pa.Table:
        """The block's rows of `activations`: raw float32 values, a row per sampled token and group."""
        pieces = [ACTIVATIONS.empty_table()]
        for key in sorted(self.layouts):
            layout, kept = self.layouts[key], self._kept[key]
            if not kept:
                continue
            documents, positions, values = zip(*kept, strict=True)
            matrix = np.stack(values)
            for name, g in ordered_groups(layout):
                if layout.d_state:
                    states = matrix.reshape(len(kept), -1, layout.d_state)
                    part = states[:, layout.members(g)].reshape(len(kept), -1)
                else:
                    # The flat (e, n) state of an undivided site has no channel slices; every other row has.
                    part = matrix if layout.state else matrix[:, layout.members(g)]
                ends = np.arange(len(kept) + 1, dtype=np.int32) * part.shape[1]
                columns: dict[str, object] = {
                    "document": documents,
                    "position": positions,
                    "values": pa.ListArray.from_arrays(ends, np.ascontiguousarray(part).reshape(-1)),
                }
                pieces.append(keyed_rows(self.run, key, name, len(kept), columns, ACTIVATIONS))
        return pa.concat_tables(pieces)
