"""CUDA sources compiled for the host by g++ and run thread by thread: kernels' arithmetic and indexing without a GPU.

What only a device has stays out: tensor cores (apply/int8/operators/gemm.cu), threads beside each other, and speed.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from quambase.model.cuda.compiler import Argument, headers_of, parameter_format, parameter_value

HERE = Path(__file__).with_name("cuda_on_host")
COMPILER = shutil.which("g++")


@functools.cache
def compile_for_host(source: Path, names: tuple[str, ...], defines: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """A library whose ``launch_NAME`` runs a kernel: (blocks across, down, threads, its parameters)."""

    def adapted(path: Path) -> str:
        # Shared memory of a size that the launch chooses is an array of cuda.hpp; of a fixed one, a static one.
        return path.read_text().replace("extern __shared__", "extern")

    lines = ['#include "cuda.hpp"', *(f"#define {name} {value}" for name, value in defines), adapted(source)]
    for name in names:
        lines.append(
            f'extern "C" VISIBLE void launch_{name}(unsigned x, unsigned y, unsigned threads, const char* buffer) {{\n'
            f"    run_blocks([](const char* b) {{ call({name}, b); }}, x, y, threads, buffer);\n}}"
        )
    with tempfile.TemporaryDirectory() as folder:
        written, library = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        for header in headers_of(source):
            if header.name != "ptx.cuh":  # which cuda_on_host has in C++
                (Path(folder) / header.name).write_text(adapted(header))
        written.write_text("\n".join(lines))
        options = [
            "-std=c++20",
            "-O2",
            "-mfma",
            "-ffp-contract=off",
            "-fPIC",
            "-shared",
            "-U_FORTIFY_SOURCE",
            "-w",
            f"-I{HERE}",
        ]
        # Or every library of the process would have the first one's shared memory, of that one's sizes.
        options += ["-fvisibility=hidden", "-fno-gnu-unique"]
        subprocess.run([str(COMPILER), *options, str(written), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


class HostKernels:
    """`quambase.model.cuda.compiler.Kernels` for tensors on the host."""

    def __init__(
        self,
        source: Path,
        names: Iterable[str],
        defines: Mapping[str, int],
        device: torch.device,
        flags: tuple[str, ...] = (),
    ) -> None:
        self._source, self._names, self._defines = source, tuple(names), tuple(defines.items())

    def allow_shared(self, name: str, size: int) -> None:
        """There is enough."""

    def launch(
        self, name: str, grid: tuple[int, int], threads: int, arguments: Sequence[Argument], *_: int | None
    ) -> None:
        """Run a kernel to its end."""
        library: Any = compile_for_host(self._source, self._names, self._defines)
        layout = struct.Struct("@" + "".join(map(parameter_format, arguments)))
        values = [parameter_value(argument) for argument in arguments]
        getattr(library, f"launch_{name}")(grid[0], grid[1], threads, layout.pack(*values))


def cuda_or_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> torch.device:
    """The device ``request.param`` names: "cuda", or "host", where ``module``'s operators then launch their kernels.

    Skips without a CUDA device, or without g++.
    """
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return torch.device("cuda", torch.cuda.current_device())
    if COMPILER is None:
        pytest.skip("needs g++")
    monkeypatch.setattr(module, "Kernels", HostKernels)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return torch.device("cpu")
