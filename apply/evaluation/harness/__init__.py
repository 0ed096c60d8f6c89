"""The adapter to EleutherAI's lm-evaluation-harness (extra `eval`): our models run its tasks."""

from __future__ import annotations

from importlib.util import find_spec

from quambase.schema.errors import DataInvalid


def require_lm_eval() -> None:
    """DataInvalid unless lm-eval is installed."""
    if find_spec("lm_eval") is None:
        raise DataInvalid("lm-eval is not installed, and runs these tasks; pip install 'quambase[eval]'")
