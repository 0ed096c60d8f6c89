"""The tap of a collection on a device: counts there, and brings to the host, once a block, what its tables need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from quambase.collector.device_statistics import DeviceStatistics
from quambase.collector.plan import PlannedDocument
from quambase.collector.recorder import Positions, Rows, activations_rows, check_seen, documents_rows
from quambase.collector.rows import Key
from quambase.collector.statistics import SUMMARY_COLUMNS, SiteLayout
from quambase.collector.torch_counter import DeviceCounter

Place = tuple[int, int]
"""Document and position."""


@dataclass(frozen=True)
class ObservedBlock:
    """What a block's tables are made of, on its way to the host: ``values`` is complete once ``copied`` has passed."""

    run: str
    documents: Sequence[PlannedDocument]
    layouts: Mapping[Key, SiteLayout]
    values: torch.Tensor
    copied: torch.cuda.Event | None
    kept: Sequence[tuple[Key, Sequence[Place], tuple[int, int]]]

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """The rows of `documents` and of `activations`; waits for the copy."""
        if self.copied:
            self.copied.synchronize()
        values = self.values.numpy()
        summaries: dict[Key, npt.NDArray[np.float32]] = {}
        start = 0
        for key, layout in self.layouts.items():
            shape = (len(self.documents), len(layout.names) + 1, len(SUMMARY_COLUMNS))
            summaries[key] = values[start : start + int(np.prod(shape))].reshape(shape)
            start += summaries[key].size
        kept: dict[Key, Rows] = {}
        for key, places, (count, width) in self.kept:
            rows = values[start : start + count * width].reshape(count, width)
            start += rows.size
            if key in kept:
                places, rows = [*kept[key][0], *places], np.concatenate([kept[key][1], rows])
            kept[key] = places, rows
        return (
            documents_rows(self.run, self.documents, self.layouts, summaries),
            activations_rows(self.run, self.layouts, kept),
        )


class DeviceRecorder:
    """A `quambase.model.backbone.Tap` for the documents of one block, as `quambase.collector.recorder.BlockRecorder`.

    Nothing here waits for the device, unless every activation is kept.
    """

    def __init__(
        self,
        run: str,
        documents: Sequence[PlannedDocument],
        statistics: DeviceStatistics,
        counter: DeviceCounter,
        positions: Positions | None,
        states: set[int] | None,
    ) -> None:
        self.run, self.documents, self.statistics, self.counter = run, documents, statistics, counter
        self.positions, self.states = positions, states
        layouts = statistics.layouts
        shapes = [(len(documents), len(layout.names) + 1, len(SUMMARY_COLUMNS)) for layout in layouts.values()]
        sizes = [a * b * c for a, b, c in shapes]
        self._flat = torch.empty(sum(sizes), device=statistics.device)
        parts = torch.split(self._flat, sizes)
        self.summaries = {k: p.view(s) for k, p, s in zip(layouts, parts, shapes, strict=True)}
        self._seen = dict.fromkeys(layouts, 0)
        self._last: tuple[Key, torch.Tensor] | None = None
        self._identities: list[tuple[Key, Key]] = []
        self._layer: int | None = None
        self._kept: list[tuple[Key, Sequence[Place], torch.Tensor]] = []
        self._borders: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
        self._wanted: dict[tuple[int, int], tuple[list[Place], torch.Tensor]] = {}

    def __call__(self, layer: int, site: str, values: torch.Tensor, documents: slice) -> None:
        """Count one site's activations; see `quambase.model.backbone.Tap` for the shapes."""
        key = (layer, site)
        layout = self.statistics.layouts.get(key)
        if layout is None:
            return
        if layer != self._layer:  # layers are alike, and so are batches of whole layers: one is prepared for all
            self.counter.flush(partly=True)
            self._layer = layer
        here = self.documents[documents]
        lengths: list[int] | None
        if layout.d_state:
            rows = values.transpose(1, 2).reshape(-1, values.shape[1])  # (documents n, e)
            lengths = [layout.d_state] * len(here)
        elif layout.state:
            rows = values.reshape(-1, values.shape[-1])  # (documents e, n)
            lengths = [values.shape[1]] * len(here)
        else:
            rows = values
            lengths = None
        offsets = self._offsets(documents) if lengths is None else np.cumsum([0, *lengths], dtype=np.int64)
        if not self._identity(key, values, len(here)):
            into = self.statistics.sites[key]
            self.counter.add(into, rows, offsets, documents.start, self.summaries[key][documents])
        self._seen[key] += len(here)
        self._last = key, values
        self._keep(key, layout, values, offsets, documents)

    def _offsets(self, documents: slice) -> npt.NDArray[np.int64]:
        """The borders of some documents' rows."""
        span = documents.start, documents.stop
        if span not in self._borders:
            lengths = [document.tokens.size for document in self.documents[documents]]
            self._borders[span] = np.cumsum([0, *lengths], dtype=np.int64)
        return self._borders[span]

    def _identity(self, key: Key, values: torch.Tensor, documents: int) -> bool:
        """As `BlockRecorder`: whether the call before brought this very tensor, whose statistics `finish` copies."""
        if self._last is None or self._last[1] is not values or documents != len(self.documents):
            return False
        source = self._last[0]
        if self.statistics.layouts[source] != self.statistics.layouts[key]:
            return False
        self._identities.append((source, key))
        return True

    def _keep(
        self, key: Key, layout: SiteLayout, values: torch.Tensor, offsets: npt.NDArray[np.int64], documents: slice
    ) -> None:
        here = self.documents[documents]
        if layout.state:
            chosen = [i for i, d in enumerate(here) if self.states is None or d.index in self.states]
            places = [(here[i].index, here[i].tokens.size - 1) for i in chosen]
            everything = self.states is None
            picked = values if everything or not places else values[chosen]
        else:
            span = (documents.start, documents.stop)
            if span not in self._wanted:
                self._wanted[span] = self._sampled(here, offsets, values.device)
            places, index = self._wanted[span]
            everything = self.positions is None
            picked = values if everything or not places else values.index_select(0, index)
        if places:
            # Every activation of a block fits in no device: these are not held until the block ends.
            held = picked.to("cpu", torch.float32, copy=True) if everything else picked
            self._kept.append((key, places, held.reshape(len(places), -1)))

    def _sampled(
        self, documents: Sequence[PlannedDocument], offsets: npt.NDArray[np.int64], device: torch.device
    ) -> tuple[list[Place], torch.Tensor]:
        """The sampled tokens of some documents and their rows."""
        places: list[Place] = []
        rows: list[int] = []
        for start, document in zip(offsets.tolist(), documents, strict=False):
            if self.positions is None:
                wanted = range(document.tokens.size)
            else:
                wanted = self.positions.get(document.index, np.empty(0, np.int64)).tolist()
            places += [(document.index, position) for position in wanted]
            rows += [start + position for position in wanted]
        return places, torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)

    def finish(self) -> ObservedBlock:
        """Fold the block into the run's statistics and send its tables' content to the host.

        TapNeverFired if a site was not reached for every document.
        """
        self._last = None
        check_seen(self._seen, len(self.documents))
        self.counter.flush()
        for source, key in self._identities:
            self.statistics.sites[key].copy_from(self.statistics.sites[source])
            self.summaries[key].copy_(self.summaries[source])
        self.statistics.fold(np.array([document.index for document in self.documents], np.int64))
        device = self.statistics.device
        # float16 becomes float32 as it is joined.
        there = [self._flat, *(values.reshape(-1) for _, _, values in self._kept if values.device == device)]
        flat = torch.cat(there)
        values, copied = flat, None
        if device.type == "cuda":
            values = torch.empty(flat.shape, pin_memory=True)
            values.copy_(flat, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
            if any(kept.device != device for _, _, kept in self._kept):
                copied.synchronize()
                values = self._interleaved(values)
        kept = [(key, places, (len(places), values.numel() // len(places))) for key, places, values in self._kept]
        return ObservedBlock(self.run, self.documents, self.statistics.layouts, values, copied, kept)

    def _interleaved(self, copied: torch.Tensor) -> torch.Tensor:
        """All on the host, in the order of ``_kept``: summaries, then what was kept, wherever it was."""
        parts = [copied[: self._flat.numel()]]
        start = self._flat.numel()
        for _, _, values in self._kept:
            if values.device.type == "cuda":
                parts.append(copied[start : start + values.numel()])
                start += values.numel()
            else:
                parts.append(values.reshape(-1))
        return torch.cat(parts)
