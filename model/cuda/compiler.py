"""Compiles CUDA kernels on first use, by NVRTC through NVIDIA's cuda-bindings, caches them, and launches them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from quambase.model.cuda.kernel_cache import cached, digest
from quambase.schema.progress import compiling

BUFFER_POINTER, BUFFER_SIZE = 1, 2
"""CU_LAUNCH_PARAM_BUFFER_POINTER and CU_LAUNCH_PARAM_BUFFER_SIZE: keys that announce one buffer with all of a kernel's
parameters.
"""


FREE_SHARED = 48 * 1024
"""Bytes of dynamic shared memory that a kernel may use without being told."""


class CompilationFailed(Exception):
    """The kernels cannot be compiled or loaded here; the text says why, in one line."""


Argument = torch.Tensor | int | float | ctypes.Structure
"""A kernel's argument: a tensor (passed as its address), an int64, a float32, or a struct by value."""


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """What a call of cuda-bindings returned after its status. CompilationFailed: the status is an error."""
    status, *values = result
    if int(status) != 0:
        raise CompilationFailed(f"{what} failed with {getattr(status, 'name', status)}")
    return values[0] if len(values) == 1 else values


def _bindings(part: str) -> Any:
    try:
        return import_module(f"cuda.bindings.{part}")
    except ImportError as error:
        raise CompilationFailed(f"cuda-bindings is not installed ({error}); pip install 'quambase[cuda]'") from None


def headers_of(source: Path) -> list[Path]:
    """The headers that a .cu file may include: those of its own folder and of this one."""
    return sorted({*source.parent.glob("*.cuh"), *Path(__file__).parent.glob("*.cuh")})


@cache
def compile_cubin(source: Path, options: tuple[str, ...]) -> bytes:
    """Machine code of a .cu file. Needs no GPU; takes some seconds unless an earlier process compiled the same.

    CompilationFailed if there is no compiler, or it refuses the source or the architecture.
    """
    nvrtc = _bindings("nvrtc")
    try:
        version = _checked(nvrtc.nvrtcVersion(), "nvrtcVersion")
        files = {path.name.encode(): path.read_bytes() for path in (source, *headers_of(source))}
        flags = [option.encode() for option in options]
        made_of = [str(version).encode(), *flags, *(part for file in files.items() for part in file)]
        return cached(digest(made_of), lambda: _compile(nvrtc, files, flags))
    except RuntimeError as error:  # raised by cuda-bindings if it does not find a library
        raise CompilationFailed(f"NVRTC cannot be used ({str(error).splitlines()[0]})") from None


def _compile(nvrtc: Any, files: Mapping[bytes, bytes], flags: list[bytes]) -> bytes:
    """Machine code of the first of ``files`` (name to text); the others are its headers. CompilationFailed."""
    (name, source), *headers = files.items()
    names, texts = [header for header, _ in headers], [text for _, text in headers]
    program = _checked(nvrtc.nvrtcCreateProgram(source, name, len(headers), texts, names), "nvrtcCreateProgram")
    with compiling():
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    if int(status) != 0:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
        nvrtc.nvrtcGetProgramLog(program, log)
        lines = [line for line in log.decode(errors="replace").splitlines() if "error" in line]
        raise CompilationFailed(f"{name.decode()} does not compile: {lines[0] if lines else status.name}")
    cubin: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


NO_CONTEXT = 201
"""CUDA_ERROR_INVALID_CONTEXT of the driver."""


class Kernels:
    """The kernels of one source file, compiled for one device with ``defines`` (-D) and further ``flags`` of NVRTC.

    CompilationFailed as `compile_cubin`.
    """

    def __init__(
        self,
        source: Path,
        names: Iterable[str],
        defines: Mapping[str, int],
        device: torch.device,
        flags: tuple[str, ...] = (),
    ) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        own = "a" if (major, minor) == (9, 0) else ""  # sm_90a has Hopper's warpgroup matrix instructions
        options = (f"--gpu-architecture=sm_{major}{minor}{own}", "--std=c++17", *flags)
        cubin = compile_cubin(source, (*options, *(f"-D{name}={value}" for name, value in defines.items())))
        driver = _bindings("driver")
        self._launch, self._status = _launcher(), driver.CUresult
        self._most_shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._set_attribute = driver.cuFuncSetAttribute
        self._parameters: dict[str, _Parameters] = {}
        self.device = device
        self._index = torch.cuda.current_device() if device.index is None else device.index
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes torch's context the current one
            self._module = _checked(driver.cuModuleLoadData(cubin), "cuModuleLoadData")
            self._functions = {
                name: _checked(driver.cuModuleGetFunction(self._module, name.encode()), f"finding {name}")
                for name in names
            }
        self._addresses = {name: int(function) for name, function in self._functions.items()}

    def allow_shared(self, name: str, size: int) -> None:
        """Let a kernel use ``size`` bytes of dynamic shared memory."""
        if size > FREE_SHARED:
            _checked(self._set_attribute(self._functions[name], self._most_shared, size), f"shared memory of {name}")

    def launch(
        self,
        name: str,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Argument],
        shared: int = 0,
        stream: int | None = None,
    ) -> None:
        """Queue a kernel on ``stream``, a cudaStream_t, or on torch's current stream. Its tensors must stay allocated
        until it has run; torch's allocator ensures that on the stream where they were allocated.

        Not thread-safe: all launches of a kernel share one parameter buffer, which the driver has copied when this
        returns.
        """
        parameters = self._parameters.get(name)
        if parameters is None:
            parameters = self._parameters[name] = _Parameters(arguments)
        parameters.write(arguments)
        if stream is None:  # what torch.cuda.current_stream wraps
            stream = torch._C._cuda_getCurrentRawStream(self._index)
        function = self._addresses[name]
        options = function, grid[0], grid[1], 1, threads, 1, 1, shared, stream, None, parameters.address
        status = self._launch(*options)
        if status == NO_CONTEXT:  # of a thread that PyTorch has not used yet, as of a backward pass
            with torch.cuda.device(self._index):
                torch.cuda.current_stream().synchronize()  # makes torch's context the current one
            status = self._launch(*options)
        if status != 0:
            raise RuntimeError(f"the kernel {name} could not be launched: {self._status(status).name}")


@cache
def _launcher() -> Any:
    """The driver's cuLaunchKernel, called directly: cuda-bindings would convert every status to an enum and release the
    GIL, and waiting for the GIL again can take longer than a launch.

    CompilationFailed without the driver.
    """
    try:
        launch = ctypes.PyDLL("libcuda.so.1").cuLaunchKernel
    except OSError as error:
        raise CompilationFailed(f"no CUDA driver is installed ({error})") from None
    pointer, unsigned = ctypes.c_void_p, ctypes.c_uint
    launch.argtypes = (pointer, *[unsigned] * 7, pointer, pointer, pointer)
    launch.restype = ctypes.c_int
    return launch


class _Parameters:
    """A kernel's parameter buffer and the launch options that point to it. Allocated once per kernel, since a run
    launches tens of thousands of them. A struct that is the only argument serves as the buffer.
    """

    def __init__(self, arguments: Sequence[Argument]) -> None:
        self.layout = struct.Struct("@" + "".join(map(parameter_format, arguments)))
        self.buffer = ctypes.create_string_buffer(self.layout.size)
        self._size = ctypes.c_size_t(self.layout.size)
        self._extra = (ctypes.c_void_p * 5)(
            BUFFER_POINTER, ctypes.addressof(self.buffer), BUFFER_SIZE, ctypes.addressof(self._size), None
        )
        self.address = ctypes.addressof(self._extra)

    def write(self, arguments: Sequence[Argument]) -> None:
        """Write a launch's arguments, of the same types as the first launch's."""
        if len(arguments) == 1 and isinstance(arguments[0], ctypes.Structure):
            self._extra[1] = ctypes.addressof(arguments[0])
        else:
            self.layout.pack_into(self.buffer, 0, *map(parameter_value, arguments))


def parameter_format(argument: Argument) -> str:
    """The `struct` format of an argument. A struct by value must consist of words of 8 bytes."""
    if isinstance(argument, ctypes.Structure):
        assert ctypes.sizeof(argument) % 8 == 0 == ctypes.alignment(argument) % 8
        return f"0q{ctypes.sizeof(argument)}s"
    return "f" if isinstance(argument, float) else "q"


def parameter_value(argument: Argument) -> int | float | bytes:
    """The value that `struct` packs for an argument."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return bytes(argument) if isinstance(argument, ctypes.Structure) else argument


@cache
def multiprocessors(device: torch.device) -> int:
    """The device's number of multiprocessors."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use; CompilationFailed without cuda-bindings."""
    driver = _bindings("driver")
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    ordinal = _checked(driver.cuDeviceGet(device.index or 0), "cuDeviceGet")
    return int(_checked(driver.cuDeviceGetAttribute(attribute, ordinal), "asking for the shared memory"))
