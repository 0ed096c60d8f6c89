"""Arrays in a .npz or .npy file, read only if the file has as many bytes as it claims. Nothing is ever unpickled."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quambase.model.inputs.files import is_packed
from quambase.schema.errors import first_line

Array = npt.NDArray[Any]


def array_of(content: bytes) -> Array:
    """The array whose .npy file has these bytes; a copy. ValueError: damaged, of Python objects, or of another size."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # NumPy parses the header as Python, which raises nearly anything
        raise ValueError(first_line(error)) from None
    held = len(content) - file.tell()
    # Python's integers: a product of damaged sizes does not overflow.
    if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"an array does not have the {held} bytes that are there")
    if not dtype.itemsize:  # NumPy reads no array of empty strings
        raise ValueError("an array of empty values")
    flat = np.frombuffer(content, dtype, offset=file.tell()).copy()
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def read_npz(path: Path) -> dict[str, Array]:
    """Every array of a file that `numpy.savez` wrote, by name. ValueError: it is damaged or compressed. OSError."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if is_packed(path, entries):
                raise ValueError("its entries are compressed, or larger than the file")
            # `read` compares each entry's checksum.
            return {entry.filename.removesuffix(".npy"): array_of(archive.read(entry)) for entry in entries}
    except (OSError, ValueError):
        raise
    except Exception as error:  # BadZipFile, RuntimeError (encrypted), NotImplementedError, EOFError, struct.error
        raise ValueError(first_line(error)) from None
