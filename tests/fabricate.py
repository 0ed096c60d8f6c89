"""A run folder made by hand from random activations, by slow code that shares nothing with the collector."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from quambase.schema import RUN_FORMAT_VERSION
from quambase.schema.checksums import file_sha256
from quambase.schema.sites import STATE_BY_CHANNEL, STATE_SITES, WHOLE, Site, layer_sites
from quambase.schema.stored.manifest import Manifest, TableFile
from quambase.schema.stored.model_info import ModelInfo, TextInfo
from quambase.schema.tables import DOCUMENT_QUANTILES, RUN_TABLES, write_table
from quambase.schema.values.distribution import Distribution

Activations = dict[tuple[int, str], dict[str, list[npt.NDArray[np.float32]]]]
"""(layer, site) to group to one (tokens, channels) array per document with a token."""

TOKENS = (5, 1, 9, 14, 3)
"""Tokens of documents 0, 2, 3, 4, 5; document 1 is empty."""

NUMBERS = (0, 2, 3, 4, 5)


def random_activations(seed: int = 0, n_layer: int = 2, channels: int = 6) -> Activations:
    """Heavy-tailed activations of every site; layer 0 dt_proj:input is dead (all zeros)."""
    random = np.random.default_rng(seed)
    found: Activations = {}
    for layer, site in layer_sites(n_layer):
        spread = 10.0 ** random.uniform(-1, 1)
        documents: dict[str, list[npt.NDArray[np.float32]]] = {}
        for group in site.groups:
            rows = [1 if site.name in STATE_SITES else tokens for tokens in TOKENS]
            drawn = [(spread * random.standard_t(3, (n, channels))).astype(np.float32) for n in rows]
            if (layer, site.name) == (0, "dt_proj:input"):
                drawn = [np.zeros_like(a) for a in drawn]
            documents[group] = drawn
        found[layer, site.name] = documents
    return found


def half(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rounded to float16, as a run counts them."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def tally(arrays: list[npt.NDArray[np.float32]]) -> tuple[list[float], list[int]]:
    """Sorted distinct float16 values and their counts, one by one; NaN last."""
    counter: Counter[float] = Counter()
    nans = 0
    for array in arrays:
        for value in half(array).ravel().tolist():
            if value != value:
                nans += 1
            else:
                counter[value + 0.0] += 1
    ordered = sorted(counter)
    counts = [counter[v] for v in ordered]
    return ordered + [float("nan")] * (nans > 0), counts + [nans] * (nans > 0)


def quantile_float32(values: npt.NDArray[np.float32], p: float) -> float:
    """torch.quantile's rule on the CPU, from the sorted list."""
    ordered = np.sort(np.abs(values).ravel())
    rank = np.float32(p) * np.float32(ordered.size - 1)
    low, high = ordered[int(np.floor(rank))], ordered[int(np.ceil(rank))]
    weight = np.float64(rank) - np.floor(rank)
    return float(np.float32(float(low) + (float(high) - float(low)) * weight))


def make_run(
    database: Path,
    run: str = "run-a",
    activations: Activations | None = None,
    number: int = 1,
    format_version: int = RUN_FORMAT_VERSION,
    sensitive: bool = False,
    by_position: bool = False,
    **model: Any,
) -> Path:
    """Write ``database/runs/<run>`` of ``activations`` (default `random_activations`); return the folder. It is
    the database's run number ``number``. In ``format_version`` 1 each table is one file. ``sensitive``: every value
    that is finite has a random sum of squared gradients, the state's as that of the state along documents.
    ``by_position``: `position_stats` has rows.
    """
    random = np.random.default_rng(5)
    activations = random_activations() if activations is None else activations
    folder = database / "runs" / run
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in RUN_TABLES}
    for (layer, site), groups in activations.items():
        start = 0
        for group, documents in groups.items():
            key = {"run": run, "layer": layer, "site": site, "group_name": group}
            values, counts = tally(documents)
            rows["counts"] += [{**key, "value": v, "count": c} for v, c in zip(values, counts, strict=True)]
            if sensitive:
                read = {"site": STATE_BY_CHANNEL} if site == "ssm_state_act:input" else {}
                rows["sensitivities"] += [
                    {**key, **read, "value": v, "count": c, "gradient_sq": c * random.random()}
                    for v, c in zip(values, counts, strict=True)
                    if np.isfinite(v)
                ]
            rows["site_stats"].append(key | _summary(documents))
            rows["position_stats"] += _positions(key, documents) if by_position else []
            width = documents[0].shape[1]
            rows["groups"].append({**key, "channels": list(range(start, start + width))})
            rows["channels"] += [key | _channel(documents, c) | {"channel": start + c} for c in range(width)]
            rows["documents"] += _documents(key, documents)
            start += width
        if len(groups) > 1:
            whole = {"run": run, "layer": layer, "site": site, "group_name": WHOLE}
            joined = [np.concatenate(parts, axis=1) for parts in zip(*groups.values(), strict=True)]
            rows["site_stats"].append(whole | _summary(joined))
            rows["position_stats"] += _positions(whole, joined) if by_position else []
            rows["documents"] += _documents(whole, joined)
    tables = {}
    for name, schema in RUN_TABLES.items():
        for file, mine in pieces(name, rows[name]) if format_version > 1 else [(f"{name}.parquet", rows[name])]:
            write_table(folder / file, name, pa.Table.from_pylist(mine, schema=schema), schema)
            tables[file] = TableFile(len(mine), file_sha256(folder / file))
    layers = 1 + max(layer for layer, _ in activations)
    shape = {"name": "fabricated", "path": "fabricated", "family": "mamba1", "n_layer": layers, "d_model": 6}
    data = {"name": "random", "path": None, "documents": 6, "empty": 1, "truncated": 0, "tokens": sum(TOKENS)}
    Manifest(
        run=run,
        identity={"weights_sha256": hashlib.sha256(run.encode()).hexdigest(), "samples": 6}
        | ({"sensitivity": {"documents": 6, "tokens": sum(TOKENS)}} if sensitive else {}),
        model=msgspec.convert(ModelInfo.nested(shape | model), ModelInfo),
        data=msgspec.convert(data, TextInfo),
        tables=tables,
        sites=list(activations),
        created={"host": "elsewhere", "number": number},
        format_version=format_version,
    ).save(folder)
    return folder


def pieces(name: str, rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The files of a table: `counts` in three parts, `documents` in blocks of three documents."""
    if name == "counts":
        borders = [0, len(rows) // 3, len(rows) // 2, len(rows)]
        return [(f"counts/part-{i:03d}.parquet", rows[a:b]) for i, (a, b) in enumerate(pairwise(borders))]
    if name == "documents":
        blocks = {row["document"] // 3 for row in rows}
        return [
            (f"documents/block-{block:05d}.parquet", [row for row in rows if row["document"] // 3 == block])
            for block in sorted(blocks)
        ]
    return [("activations/block-00000.parquet" if name == "activations" else f"{name}.parquet", rows)]


def _summary(documents: list[npt.NDArray[np.float32]]) -> dict[str, Any]:
    values = np.concatenate([d.ravel() for d in documents])
    overflow = int((np.isfinite(values) & ~np.isfinite(half(values))).sum())
    return {**Distribution.of_values(values).summary(), "overflow": overflow}


def _positions(key: dict[str, Any], documents: list[npt.NDArray[np.float32]]) -> list[dict[str, Any]]:
    rows, low, high = [], 1, 8
    while any(len(d) >= low for d in documents):
        here = [d[low - 1 : high] for d in documents]
        rows.append(key | {"tokens_from": low, "tokens_to": high} | _summary(here))
        low, high = high + 1, 2 * high
    return rows


def _channel(documents: list[npt.NDArray[np.float32]], channel: int) -> dict[str, Any]:
    columns = [d[:, channel] for d in documents]
    values = np.concatenate(columns)
    values = values[np.isfinite(values)].astype(np.float64)
    return {
        "count": values.size,
        "min": float(values.min(initial=np.inf)),
        "max": float(values.max(initial=-np.inf)),
        "sum": float(values.sum()),
        "sum_sq": float((values**2).sum()),
        "mean_abs_max": max(float(np.abs(c).mean()) for c in columns),
        "nonfinite": sum(int((~np.isfinite(c)).sum()) for c in columns),
        "overflow": sum(int((np.isfinite(c) & ~np.isfinite(half(c))).sum()) for c in columns),
    }


def _documents(key: dict[str, Any], documents: list[npt.NDArray[np.float32]]) -> list[dict[str, Any]]:
    rows = []
    for number, tokens, values in zip(NUMBERS, TOKENS, documents, strict=True):
        finite = values[np.isfinite(values)]
        quantiles = {name: quantile_float32(half(finite), p) for name, p in DOCUMENT_QUANTILES.items()}
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        amax = float(np.abs(finite).max())
        rows.append({**key, "document": number, "tokens": tokens, "sha256": digest, "amax": amax, **quantiles})
    return rows


SITES: dict[str, Site] = {site.name: site for _, site in layer_sites(1)}
