"""exp that is the same in every process."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import torch

from quambase.model.exponential import exp

ROOT = Path(__file__).parents[2]


def test_it_is_rounded_once() -> None:
    x = torch.cat([torch.linspace(-110, 88, 100_001), torch.tensor([0.0, -0.0, float("-inf"), 89.0, float("nan")])])
    with np.errstate(over="ignore"):
        expected = np.exp(x.numpy().astype(np.float64)).astype(np.float32)
        found = exp(x.reshape(2, -1)).numpy().ravel()
    assert found.dtype == np.float32 and np.array_equal(found, expected, equal_nan=True)
    # Of the next representable numbers one on either side is the nearest to the true value, or it is this one.
    wide = np.exp(x[:-4].numpy().astype(np.longdouble))
    below, above = (np.nextafter(expected[:-4], np.float32(end)) for end in (0, np.inf))
    assert (np.abs(expected[:-4] - wide) <= np.minimum(np.abs(below - wide), np.abs(above - wide))).all()


def classes_without_torch_exp() -> set[str]:
    """The classes in differentiable.py that do not call torch.exp."""
    tree = ast.parse((ROOT / "model" / "operators" / "differentiable.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef) and "torch.exp(" not in ast.unparse(node)}


def test_the_models_on_the_cpu_call_no_other() -> None:
    """torch.exp is left to what runs on a device, to plain torch's operators there, and to random weights of tests."""
    operators = {f"model/operators/{name}.py" for name in ("torch", "differentiable", "sampled_states")}
    allowed = {"model/mamba1.py", "model/mamba2.py"} | operators
    assert {"HostDifferentiableOperators", "_HostSsdScan"} <= classes_without_torch_exp()
    for folder in ("model", "collector", "apply"):
        for path in (ROOT / folder).rglob("*.py"):
            calls = [
                node
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Attribute) and node.attr == "exp" and ast.unparse(node.value) == "torch"
            ]
            assert not calls or str(path.relative_to(ROOT)) in allowed, path
