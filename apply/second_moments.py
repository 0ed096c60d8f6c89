"""The second moments of a scale table's run, by which GPTQ rounds weights to 4 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from quambase.apply.int8.weights import SecondMoments
from quambase.schema.errors import DatabaseInvalid
from quambase.schema.scale_table import ScaleTable
from quambase.schema.sites import FAMILIES, PRODUCT_SITES, SiteKey
from quambase.schema.stored.manifest import MANIFEST, Manifest
from quambase.schema.tables import SECOND_MOMENTS, read_table

WANTED = "weights of 4 bits by GPTQ need the second moments of the scales' run"


def second_moments_of(db: Path, table: ScaleTable) -> SecondMoments:
    """The function that reads a layer's second moments from the run of ``table`` in ``db``.

    DatabaseInvalid: the run is not there, is of other weights than the table's, has no second moments, or is damaged.
    """
    folder = db / "runs" / table.run
    if not (folder / MANIFEST).exists():
        raise DatabaseInvalid(f"{WANTED}, and {db} does not have run {table.run}; name its database with --db")
    manifest = Manifest.load(folder)
    files, layers = manifest.files_of("second_moments"), manifest.model.n_layer
    if "second_moments" not in manifest.identity:
        raise DatabaseInvalid(
            f"{WANTED}, and run {table.run} has none; collect it with --second-moments, and analyze it again"
        )
    if manifest.identity.get("weights_sha256") != table.weights_sha256:
        raise DatabaseInvalid(f"run {table.run} in {db} is of other weights than the scale table; analyze it again")
    sites = [site.name for site in FAMILIES[manifest.model.family] if site.name in PRODUCT_SITES]
    manifest.verify(folder, files)
    advice = f"delete {folder} and collect it again"
    if len(files) != layers:
        raise DatabaseInvalid(f"{folder} has second moments of {len(files)} layers; expected {layers}: {advice}")

    def of_layer(layer: int) -> dict[str, torch.Tensor]:
        return {site: _matrix(folder / files[layer], (layer, site), advice) for site in sites}

    return of_layer


def _matrix(path: Path, key: SiteKey, advice: str) -> torch.Tensor:
    """The matrix (n, n) float32 of the site ``key``, whose lower triangle the rows of a table's part are.
    DatabaseInvalid: it is no whole triangle.
    """
    rows = read_table(path, SECOND_MOMENTS, {})
    here = (np.asarray(rows["layer"]) == key[0]) & (np.asarray(rows["site"]) == key[1])
    rows = rows.filter(here).combine_chunks()
    sizes = [len(values) for values in rows["values"]]
    if not sizes or sizes != list(range(1, len(sizes) + 1)) or rows["channel"].to_pylist() != list(range(len(sizes))):
        raise DatabaseInvalid(f"{path} does not have the second moments of layer {key[0]} {key[1]}; {advice}")
    found = np.zeros((len(sizes), len(sizes)), np.float32)
    found[np.tri(len(sizes), dtype=bool)] = rows["values"].combine_chunks().flatten()
    return torch.from_numpy(np.tril(found) + np.tril(found, -1).T)
