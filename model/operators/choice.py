"""Chooses the device a model runs on, and its operators."""

from __future__ import annotations

import torch

from quambase.model.cuda.compiler import CompilationFailed
from quambase.model.operators.cuda import CudaOperators
from quambase.model.operators.cuda_differentiable import CudaDifferentiableOperators
from quambase.model.operators.differentiable import DifferentiableOperators, HostDifferentiableOperators
from quambase.model.operators.host import HostOperators
from quambase.model.operators.interface import Operators, OperatorSizes
from quambase.model.operators.torch import TorchOperators
from quambase.schema.errors import DataInvalid, UnknownName
from quambase.schema.progress import remark

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str = "auto") -> torch.device:
    """The device that ``--device`` names; ``auto``: CUDA if there is a device.

    UnknownName: not one of DEVICES; DataInvalid: no CUDA device.
    """
    if name not in DEVICES:
        raise UnknownName.of("device", name, DEVICES)
    available = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise DataInvalid(f"torch {torch.__version__} finds no CUDA device here; leave out --device, or use cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_operators(sizes: OperatorSizes, device: torch.device, dtype: torch.dtype) -> Operators:
    """Compiled kernels for float32 on the CPU and for CUDA, else plain PyTorch. If CUDA's do not compile: plain
    PyTorch, after a warning on stderr.
    """
    if device.type == "cpu" and dtype == torch.float32:
        return HostOperators(sizes.ngroups)
    if device.type == "cuda":
        try:
            return CudaOperators(device, dtype, sizes)
        except CompilationFailed as error:
            remark(f"warning: scans run in plain PyTorch, some hundred times slower: {error}")
    return TorchOperators(dtype, sizes.ngroups, device)


def choose_differentiable_operators(sizes: OperatorSizes, device: torch.device) -> DifferentiableOperators:
    """As `choose_operators`, of operators that PyTorch can differentiate; without a warning, since the forward pass of
    the same run has given it.
    """
    if device.type == "cpu":
        return HostDifferentiableOperators(sizes.ngroups, device)
    if device.type == "cuda":
        try:
            return CudaDifferentiableOperators(sizes, device)
        except CompilationFailed:
            pass
    return DifferentiableOperators(sizes.ngroups, device)
