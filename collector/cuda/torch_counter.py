"""Counting on any device in plain PyTorch: the fallback if the kernels do not compile. Exact, and slow."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from quambase.collector.host.kernels import PATTERNS, SIGN
from quambase.collector.statistics import (
    PROBABILITIES,
    Encoding,
    SiteStatistics,
    merged_top,
    states_by_channel,
)
from quambase.schema.values.arrays import Int64


class TorchCounter:
    """A `Counter` in plain PyTorch."""

    def __init__(self, encoding: Encoding, most: int, device: torch.device) -> None:
        self.encoding, self.most = encoding, most
        self._magnitudes = torch.from_numpy(encoding.values()[:SIGN]).to(device)
        self._probabilities = torch.from_numpy(PROBABILITIES).to(device)

    def add(self, into: SiteStatistics, x: torch.Tensor, offsets: Int64, first: int, summaries: torch.Tensor) -> None:
        """As `Counter.add`."""
        layout = into.layout
        bits = x.to(self.encoding.torch_dtype).contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
        members = [torch.from_numpy(layout.members(g)).to(x.device) for g in range(len(layout.names))]
        groups = [bits[:, mine] for mine in members]
        for document, (start, stop) in enumerate(pairwise(offsets.tolist())):
            tables = torch.stack([torch.bincount(part[start:stop].flatten(), minlength=PATTERNS) for part in groups])
            into.counts += tables
            for g in range(len(groups)):
                summaries[document, g] = self._summary(tables[g])
            summaries[document, len(groups)] = self._summary(tables.sum(0))
        top = torch.stack([self._largest(part, offsets, first) for part in groups])
        into.top.copy_(merged_top(into.top, top) if into.calls else top)
        into.calls += 1
        wide = x.float()
        if layout.d_state:
            states = states_by_channel(wide, layout.d_state)
            for g, mine in enumerate(members):
                span = (g * layout.d_state, (g + 1) * layout.d_state)
                rows = states[:, mine].reshape(-1, layout.d_state)
                self._add_moments(rows, np.arange(len(offsets)) * len(mine), into, *span)
        else:
            self._add_moments(wide, offsets, into, 0, layout.moments)

    def flush(self, *, partly: bool = False) -> None:
        """As `Counter.flush`; nothing is pending."""

    def _summary(self, table: torch.Tensor) -> torch.Tensor:
        """(1 + q,): amax and quantiles of one table (PATTERNS,), by torch.quantile's rule (float32 rank and lerp)."""
        counts = (table[:SIGN] + table[SIGN:])[: self.encoding.infinity]
        upto = counts.cumsum(0)
        total = upto[-1]
        last = (total - 1).clamp(min=0)
        position = self._probabilities * last.float()
        below = position.long()
        above = torch.minimum(position.ceil().long(), last)
        ranks = torch.cat([last[None], below, above])
        found = self._magnitudes[torch.searchsorted(upto, ranks, right=True).clamp(max=self.encoding.infinity - 1)]
        amax, low, high = found[:1], found[1 : 1 + len(below)], found[1 + len(below) :]
        weight = position - below.float()
        step = (high - low).double()
        near = (low.double() + weight.double() * step).float()
        far = (high.double() + (weight - 1).double() * step).float()
        summary = torch.cat([amax, torch.where(weight < 0.5, near, far)])
        return torch.where(total > 0, summary, torch.nan)

    def _largest(self, bits: torch.Tensor, offsets: Int64, first: int) -> torch.Tensor:
        """(most, 5) of one group's patterns (rows, width): a stable sort leaves ties in the order of their places."""
        magnitudes = (bits & (SIGN - 1)).flatten()
        magnitudes = torch.where(magnitudes < self.encoding.infinity, magnitudes, -1)
        order = torch.argsort(magnitudes, descending=True, stable=True)[: self.most]
        order = order[magnitudes[order] >= 0]
        rows, places = order // max(bits.shape[1], 1), order % max(bits.shape[1], 1)
        borders = torch.from_numpy(offsets).to(bits.device)
        documents = torch.searchsorted(borders, rows, right=True) - 1
        columns = (magnitudes[order], bits.flatten()[order], first + documents, rows - borders[documents], places)
        top = torch.full((self.most, len(columns)), -1, dtype=torch.int64, device=bits.device)
        top[: len(order)] = torch.stack([column.long() for column in columns], dim=1)
        return top

    def _add_moments(self, x: torch.Tensor, offsets: Int64, into: SiteStatistics, low: int, high: int) -> None:
        """Add the documents of x (rows, channels) float32 to the block's moments low:high, one after the other."""
        moments = into.moments.part(low, high)
        limit = float(self.encoding.limit)
        for start, stop in pairwise(offsets.tolist()):
            if start == stop:
                continue
            part = x[start:stop]
            finite = part.isfinite()
            used = finite.sum(0)
            wide = torch.where(finite, part, 0).double()
            overflow = (finite & (part.abs() >= limit)).sum(0)
            moments.integers += torch.stack([used, (stop - start) - used, overflow])
            lowest = torch.where(finite, part, torch.inf).amin(0)
            highest = torch.where(finite, part, -torch.inf).amax(0)
            moments.extrema[0] = torch.minimum(moments.extrema[0], lowest)
            moments.extrema[1] = torch.maximum(moments.extrema[1], highest)
            moments.sums[:2] += torch.stack([wide.sum(0), (wide * wide).sum(0)])
            means = wide.abs().sum(0) / used.clamp(min=1)
            moments.sums[2] = torch.maximum(moments.sums[2], means)
