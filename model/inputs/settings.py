"""Reads the JSON files of a model folder and checks their values' types and ranges."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quambase.model.inputs.files import check_file
from quambase.model.inputs.hub import mend
from quambase.model.inputs.tensor_files import QUANTIZED
from quambase.schema.errors import CheckpointInvalid, first_line

LONGEST_JSON = 64 << 20
"""Largest accepted JSON file in bytes; the index of the largest models has a few million."""

LARGEST_SIZE = 2**31 - 1
"""Largest accepted size of a model."""

NORM_EPS = 1e-5
"""Epsilon of the norms if config.json has none: the default of both layouts."""

_BIASES = "config.json asks for projection biases or no conv bias; no INT8 Quamba model has that"
_HYBRID = "config.json describes a hybrid model (attention or MLP layers); expected Mamba layers only"


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. CheckpointInvalid: it holds none."""
    check_file(path, CheckpointInvalid, LONGEST_JSON)
    try:
        raw = json.loads(path.read_bytes().decode("utf-8-sig"))
    # ValueError: not JSON, not UTF-8, or a number of thousands of digits. RecursionError: nested too deep.
    except (ValueError, RecursionError) as error:
        raise CheckpointInvalid(f"{path} is not valid JSON ({first_line(error)}); {mend(path)}") from None
    if not isinstance(raw, dict):
        raise CheckpointInvalid(f"{path} holds no JSON object; {mend(path)}")
    return raw


@dataclass(frozen=True)
class Settings:
    """Values of a JSON object. Every error is a CheckpointInvalid that names file, key, what was found, what is
    expected. An absent key has its default, and is required if there is none. ``null`` is invalid for a number.
    """

    values: Mapping[str, Any]
    file: str = "config.json"
    within: str = ""

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 to LARGEST_SIZE."""
        value: Any = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_SIZE:
            raise self.invalid(key, f"a whole number from 1 to {LARGEST_SIZE}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0, as JSON has it: an int stays an int, so that products of sizes are exact."""
        value: Any = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST_SIZE:
            raise self.invalid(key, "a positive number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """true or false; null is the default."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.invalid(key, "true or false")
        return default if value is None else value

    def word(self, key: str, default: str) -> str:
        """A string; null is the default."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.invalid(key, "a string")
        return default if value is None else value

    def section(self, key: str) -> Settings:
        """The object under a key, empty if the key is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.invalid(key, "an object")
        return Settings(value or {}, self.file, f"{self.within}{key}.")

    def rank(self, key: str, d_model: int) -> int:
        """The rank of dt_proj: a size, or "auto" (the default), which is d_model / 16 rounded up."""
        return math.ceil(d_model / 16) if self.values.get(key, "auto") == "auto" else self.size(key)

    def expanded(self, d_model: int) -> int:
        """``expand`` (default 2) times d_model, which must be a whole number."""
        width = self.positive("expand", 2) * d_model
        if width != int(width) or not 1 <= width <= LARGEST_SIZE:
            raise self.invalid("expand", f"a factor that gives a whole number of channels of {d_model}")
        return int(width)

    def only(self, key: str, *values: object) -> None:
        """CheckpointInvalid unless the key is absent or one of ``values``."""
        if key in self and not any(self.values[key] == v and type(self.values[key]) is type(v) for v in values):
            raise self.invalid(key, " or ".join(json.dumps(value) for value in values))

    def invalid(self, key: str, expected: str) -> CheckpointInvalid:
        """The error for the value of ``key``."""
        name = self.within + key
        found = f"says {name} = {shown(self.values[key])}" if key in self.values else f"has no {name}"
        return CheckpointInvalid(f"{self.file} {found}; expected {expected}")


def check_mamba_ssm(raw: Settings) -> Settings:
    """``ssm_cfg`` of mamba-ssm's config.json; CheckpointInvalid for what no INT8 Quamba model of any family has."""
    ssm = raw.section("ssm_cfg")
    if not raw.flag("rms_norm", True):
        raise CheckpointInvalid("config.json says rms_norm = false; only models with RMSNorm can be folded and rotated")
    if raw.values.get("attn_layer_idx") or raw.values.get("d_intermediate"):
        raise CheckpointInvalid(_HYBRID)
    if ssm.flag("bias", False) or not ssm.flag("conv_bias", True):
        raise CheckpointInvalid(_BIASES)
    raw.only("norm_epsilon", NORM_EPS)  # mamba-ssm itself reads no other from config.json
    _check_quantized(raw)
    return ssm


def check_hugging_face(raw: Settings) -> None:
    """As `check_mamba_ssm`, for transformers' config.json."""
    if raw.flag("use_bias", False) or not raw.flag("use_conv_bias", True):
        raise CheckpointInvalid(_BIASES)
    raw.only("hidden_act", "silu", "swish")
    _check_quantized(raw)


def _check_quantized(raw: Settings) -> None:
    for key in ("quantization_config", "quantization", "compression_config"):
        if key in raw:
            raise CheckpointInvalid(f"config.json has a {key}: {QUANTIZED}")


def padded_vocabulary(raw: Settings) -> int:
    """The embedding's rows: ``vocab_size`` rounded up to ``pad_vocab_size_multiple`` (8)."""
    multiple = raw.size("pad_vocab_size_multiple", 8)
    return -(-raw.size("vocab_size") // multiple) * multiple


def shown(value: object) -> str:
    """A JSON value as part of an error: one line, at most 60 characters."""
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number of more than 60 digits"  # Python refuses to print one of thousands of digits
    text = json.dumps(value) if not isinstance(value, dict | list) else _outline(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _outline(value: dict[str, Any] | list[Any]) -> str:
    """A short list of plain values is written out; anything else is described."""
    if isinstance(value, list) and len(value) <= 4 and not any(isinstance(v, dict | list | int) for v in value):
        return json.dumps(value)
    kind = "an object" if isinstance(value, dict) else "a list"
    return f"{kind} of {len(value)}"
