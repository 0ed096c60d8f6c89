"""Files of tensors: .safetensors, and what torch.save wrote. Nothing but tensors is ever unpickled."""

from __future__ import annotations

import contextlib
import mmap
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import torch
from safetensors import safe_open

from quambase.model.inputs.files import check_file, is_packed
from quambase.model.inputs.hub import mend
from quambase.schema.errors import QuambaseError, first_line

QUANTIZED = "the checkpoint is quantized already; give the original in float16, bfloat16 or float32"

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_safetensors(path: Path, invalid: type[QuambaseError]) -> dict[str, torch.Tensor]:
    """Every tensor of a .safetensors file; ``invalid`` if it is damaged."""
    check_file(path, invalid)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors' own, torch's (an unknown dtype), or the system's
        raise _unreadable(path, error, invalid) from None


def read_pytorch(path: Path, invalid: type[QuambaseError]) -> object:
    """What torch.save wrote, tensors on the CPU; ``invalid`` if it is damaged or holds more than tensors."""
    check_file(path, invalid)
    _check_archive(path, invalid)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error) and "allowlisted" not in str(error):
            raise _unreadable(path, "it is not a PyTorch file", invalid) from None
        raise invalid(f"{path} holds more than tensors; it is not loaded, since a pickle can run code") from None
    except Exception as error:  # for a damaged pickle torch.load raises anything: IndexError, KeyError
        raise _unreadable(path, error, invalid) from None


def plain_tensor(tensor: torch.Tensor, name: str, invalid: type[QuambaseError]) -> torch.Tensor:
    """The values of a float tensor, detached; ``invalid`` for any other kind, called ``name`` in the error."""
    kind = _kind(tensor)
    if kind is None:
        return tensor.detach().resolve_neg()
    raise invalid(f"{name} holds {kind}; expected a plain tensor of float16, bfloat16, float32 or float64")


def _kind(tensor: torch.Tensor) -> str | None:
    """Why a tensor is not a plain float tensor; None if it is one."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"a sparse tensor ({tensor.layout})"
    if tensor.is_meta:
        return "a tensor without values (of the meta device)"
    if tensor.dtype in FLOATS and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "an expanded tensor, which is larger than what was saved (call contiguous() on it)"
    return None if tensor.dtype in FLOATS else str(tensor.dtype)


def _check_archive(path: Path, invalid: type[QuambaseError]) -> None:
    """Refuse compressed archives, and damaged pickles of the older format."""
    try:
        if not zipfile.is_zipfile(path):
            _check_numbers(path)
            return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # BadZipFile, or whatever a damaged directory causes
        raise _unreadable(path, error, invalid) from None
    if is_packed(path, entries):
        raise invalid(f"{path} is a compressed archive; expected what torch.save writes: save it again")


def _check_numbers(path: Path) -> None:
    """ValueError: a pickle of torch.save's older format has a number far beyond the file's size, or a text longer than
    what is left of it. torch asks for memory for as many values before it reads one.
    """
    most = max(path.stat().st_size, 1 << 20)
    with (
        path.open("rb") as opened,
        # Reads what is there; an open file would first take memory for all that is asked for.
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file,
        contextlib.suppress(_NoPickle),
    ):
        for _ in range(5):  # torch's mark, its version, the system, the tensors, their order; then their values
            for number in _numbers(file):
                if abs(number) > most and number != _MARK:
                    raise ValueError("it claims more values than it has bytes")


_MARK = 0x1950A86A20F9469CFC6C
"""The first value of a file in the older format of torch.save."""


class _NoPickle(Exception):
    """What is read is no pickle."""


def _numbers(file: mmap.mmap) -> Iterator[int]:
    """The integers that the pickle at the file's position holds. ValueError: a text in it is longer than the file."""
    try:
        for _, argument, _ in pickletools.genops(cast(IO[bytes], file)):
            if isinstance(argument, int):
                yield argument
    except Exception as error:  # a damaged pickle raises ValueError, UnicodeDecodeError, struct.error and others
        if str(error).endswith("remain"):
            raise ValueError("it claims more bytes than it has") from None
        raise _NoPickle from None


def _unreadable(path: Path, error: BaseException | str, invalid: type[QuambaseError]) -> QuambaseError:
    reason = error if isinstance(error, str) else first_line(error)
    return invalid(f"{path} cannot be read ({reason}); it may be cut short: {mend(path)}")
