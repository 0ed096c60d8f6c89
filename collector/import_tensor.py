"""`quambase import`: makes a run of one site from a saved tensor."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from quambase.collector.collect import OUTLIERS, CollectedRun, existing_run
from quambase.collector.documents import run_id
from quambase.collector.host.counter import HostCounter
from quambase.collector.statistics import (
    ENCODINGS,
    SUMMARY_COLUMNS,
    BlockStatistics,
    Encoding,
    RunStatistics,
    SiteLayout,
)
from quambase.collector.tables.run_folder import BlockFiles, every_table, finish_run, versions, write_statistics
from quambase.collector.tables.table_rows import Places, many_keyed_rows
from quambase.model.inputs.files import check_file
from quambase.model.inputs.tensor_files import plain_tensor, read_pytorch, read_safetensors
from quambase.schema import RUN_FORMAT_VERSION
from quambase.schema.checksums import file_sha256
from quambase.schema.errors import TensorFileInvalid, first_line
from quambase.schema.files import local_folder, locked
from quambase.schema.sites import WHOLE, SiteKey
from quambase.schema.stored.manifest import MANIFEST, Manifest
from quambase.schema.stored.model_info import ModelInfo, TextInfo
from quambase.schema.tables import ACTIVATIONS, DOCUMENTS
from quambase.schema.values.arrays import Float32, Int64

KINDS = (".pt", ".pth", ".npy", ".safetensors")


def read_tensor(path: Path, tensor: str | None = None) -> torch.Tensor:
    """The float tensor in a .pt, .npy or .safetensors file; ``tensor`` names one of several.

    Never unpickles anything but tensors. TensorFileInvalid: the file is missing, of another kind or empty, has no
    tensor of that name, or no plain float tensor.
    """
    if not path.exists():
        raise TensorFileInvalid(f"{path} does not exist; expected a {', '.join(KINDS)} file")
    if path.suffix not in KINDS:
        raise TensorFileInvalid(f"{path.name} is of unknown kind; expected {', '.join(KINDS)}")
    found: object
    if path.suffix == ".npy":
        found = _read_npy(path)
    elif path.suffix == ".safetensors":
        found = read_safetensors(path, TensorFileInvalid)
    else:
        found = read_pytorch(path, TensorFileInvalid)
    if isinstance(found, dict):
        found = _choose(path, found, tensor)
    elif tensor is not None:
        raise TensorFileInvalid(f"{path} holds no tensors with names; import it without --tensor")
    if not isinstance(found, torch.Tensor):
        kind = type(found).__name__
        raise TensorFileInvalid(f"{path} holds {kind}; expected a tensor of float16, bfloat16, float32 or float64")
    values = plain_tensor(found, str(path), TensorFileInvalid)
    if values.numel() == 0:
        raise TensorFileInvalid(f"{path} holds an empty tensor of shape {tuple(values.shape)}; expected values")
    return values


def _read_npy(path: Path) -> torch.Tensor:
    """The array of a .npy file, in this machine's byte order. TensorFileInvalid: damaged, or of a dtype that torch
    lacks.
    """
    check_file(path, TensorFileInvalid)
    try:
        # Memory-mapped, so that a header that claims more than the file has allocates nothing.
        mapped = np.lib.format.open_memmap(path, mode="r")
        return torch.from_numpy(mapped.astype(mapped.dtype.newbyteorder("=")))
    except Exception as error:  # NumPy may raise nearly anything for a damaged header
        raise TensorFileInvalid(
            f"{path} cannot be read as a tensor ({first_line(error)}); save a plain array of floats again"
        ) from None


def _choose(path: Path, tensors: dict[object, object], name: str | None) -> object:
    """The tensor called ``name``, or without a name the only one; keys may be numbers, such as layers."""
    names = {str(key): key for key in tensors}
    if name is None and len(tensors) == 1:
        return next(iter(tensors.values()))
    if name not in names or len(names) < len(tensors):
        shown = "".join(c if c.isprintable() else "?" for c in ", ".join(list(names)[:12]))[:200]
        raise TensorFileInvalid(f"{path} holds the tensors {shown or 'none'}; name one with --tensor")
    return tensors[names[name]]


def import_tensor(
    path: str | Path, site: str, *, layer: int = 0, tensor: str | None = None, db: str | Path = Path("quambase-db")
) -> CollectedRun:
    """Count a saved tensor as site ``site`` of layer ``layer`` and write a run of that one site.

    The last dimension is channels; with three dimensions or more the first is documents. float16 and bfloat16 are
    counted as they are, wider types rounded to float16. Importing the same file again returns its run. Errors:
    TensorFileInvalid, DatabaseInvalid, RunBusy.
    """
    path, db = Path(path), local_folder(db)
    if not site.strip():
        raise TensorFileInvalid("the site's name is empty; expected one such as x_proj:input")
    values = read_tensor(path, tensor)
    shape = tuple(values.shape)
    documents = shape[0] if values.ndim >= 3 else 1
    rows = values.reshape(-1, shape[-1] if values.ndim >= 2 else 1)
    length = rows.shape[0] // documents
    encoding = ENCODINGS["bfloat16" if values.dtype == torch.bfloat16 else "float16"]
    digest = file_sha256(path)
    identity = {
        "format_version": RUN_FORMAT_VERSION,
        "file": digest,
        "tensor": tensor,
        "sites": [site],
        "layer": layer,
        "activation_dtype": encoding.name,
        "outliers": OUTLIERS,
    }
    run = run_id(path.stem, identity)
    folder = db / "runs" / run
    if (folder / MANIFEST).exists():
        return existing_run(folder)
    key: SiteKey = (layer, site)
    statistics, summaries = _counted(key, rows, documents, encoding)
    columns: dict[str, object] = {
        "document": np.arange(documents),
        "tokens": np.full(documents, length),
        "sha256": [hashlib.sha256(f"{digest}:{i}".encode()).hexdigest() for i in range(documents)],
        **{column: summaries[:, i] for i, column in enumerate(SUMMARY_COLUMNS)},
    }
    with locked(folder):
        with BlockFiles(folder) as blocks:
            rows = many_keyed_rows(run, [(key, WHOLE)], [documents], columns, DOCUMENTS)
            blocks.add(0, rows, ACTIVATIONS.empty_table())
            made = write_statistics(folder, run, statistics, encoding, _locate)
            tables = every_table(folder, blocks.written() | made)
        manifest = Manifest(
            run=run,
            identity=identity,
            model=ModelInfo(path.name, "tensor", path.name, shape=tuple(shape)),
            data=TextInfo(path.name, documents, documents * length, read=documents),
            tables=tables,
            sites=[key],
            created=versions(),
        )
        manifest = finish_run(folder, manifest)
    return CollectedRun(folder, manifest, existed=False)


def _counted(key: SiteKey, rows: torch.Tensor, documents: int, encoding: Encoding) -> tuple[RunStatistics, Float32]:
    """The statistics of one undivided site, and each document's summary (documents, 1 + q: SUMMARY_COLUMNS).

    rows (t, channels): equally many of each document.
    """
    statistics = RunStatistics.empty({key: SiteLayout((WHOLE,), (0, rows.shape[1]))}, OUTLIERS)
    block = BlockStatistics(statistics)
    _, summaries = block.summaries(documents)
    offsets = np.arange(documents + 1, dtype=np.int64) * (len(rows) // documents)
    # Wider types are converted to float32, and the moments are those of the converted values.
    wide = rows if rows.dtype in (torch.float16, torch.bfloat16) else rows.to(torch.float32)
    HostCounter(encoding, OUTLIERS, 1).add(block.sites[key], wide, offsets, 0, summaries[key])
    block.fold(np.arange(documents))
    return statistics, summaries[key][:, 0].numpy()


def _locate(layout: SiteLayout, documents: Int64, rows: Int64, channels: Int64) -> Places:
    """A `Locate` for tensors, which have no tokens."""
    nothing = [None] * rows.size
    return Places(rows, nothing, nothing, nothing, nothing, channels)
