"""Stored INT8 models: their config.json, the checksums of their files, and which was applied last.

Imports no torch: `quambase.apply.int8.model_folder` loads the model itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Required, TypedDict

from msgspec import Meta

from quambase.schema import CHECKED_SINCE, FORMAT_VERSION
from quambase.schema.checksums import ALTERED, CHECKSUM, PLACEHOLDER, add_checksum, check_own, file_damage
from quambase.schema.errors import CheckpointInvalid
from quambase.schema.files import read_regular, replacing
from quambase.schema.json_files import Sha256, as_type, read_json

CONFIG, TENSORS, SCALES, TOKENIZER = "config.json", "model.safetensors", "scales.parquet", "tokenizer.json"

LAST = "last.txt"
"""File in the database's ``models`` folder with the path of the last applied model, relative if it is inside that
folder.
"""

UNFINISHED = "unfinished"
"""Key in config.json while the model is being written."""

AGAIN = "run `apply` again"


class _Source(TypedDict):
    name: str
    path: str | None


class _About(TypedDict, total=False):
    """The entries of a finished model's config.json that are read again, besides ``family`` and ``sizes``."""

    source: Required[_Source]
    strategy: Required[str]
    weights_sha256: Required[str]
    tensors_sha256: Required[Sha256]
    quantize_lm_head: Required[bool]
    quantize_embedding: Required[bool]
    compat: str | None
    weight_bits: Literal[4, 8]
    gptq: bool
    kept_16bit: list[tuple[int, str]]
    files: dict[Annotated[str, Meta(pattern=r"^[a-z]{1,40}\.[a-z]{1,40}\Z")], Sha256]


def read_about(folder: Path) -> dict[str, Any]:
    """``folder/config.json``; CheckpointInvalid if it is missing, unfinished, damaged, altered, another program's or of
    a newer format.
    """
    path = folder / CONFIG
    try:
        family = read_json(path, CheckpointInvalid, AGAIN).get("family")
        if not (
            isinstance(family, str) and family.startswith("quamba")
        ):  # another program's, which has no version of ours
            raise CheckpointInvalid(f"{folder} is no INT8 model of quambase; make one with `apply`")
        about = read_json(path, CheckpointInvalid, AGAIN, FORMAT_VERSION, CHECKED_SINCE)
    except FileNotFoundError:
        raise CheckpointInvalid(f"{folder} holds no INT8 model (no {CONFIG}); make one with `apply`") from None
    if UNFINISHED in about:
        raise CheckpointInvalid(f"{folder} is unfinished: `apply` was stopped while it wrote it; {AGAIN}")
    as_type(about, _About, path, CheckpointInvalid, AGAIN)
    return about


def check_files(folder: Path, about: dict[str, Any]) -> None:
    """CheckpointInvalid names the first file of the model that is missing, was cut short or altered."""
    for name, sha256 in {TENSORS: about["tensors_sha256"], **about.get("files", {})}.items():
        if damage := file_damage(folder / name, sha256):
            raise CheckpointInvalid(f"{folder / name} {damage}; {AGAIN}")


def remember(db: Path, folder: Path) -> None:
    """Record ``folder`` as the model applied last in this database."""
    models = (db / "models").resolve()
    absolute = folder.resolve()
    # A relative path stays valid if the database is moved.
    stored = absolute.relative_to(models) if absolute.is_relative_to(models) else absolute
    with replacing(models / LAST) as temporary:
        temporary.write_bytes(os.fsencode(stored) + f"\n{PLACEHOLDER}\n".encode())
        add_checksum(temporary)


def last_applied(db: Path) -> Path:
    """The model applied last; CheckpointInvalid if there is none, or its record is damaged."""
    path = db / "models" / LAST
    otherwise = "run `apply`, name a model folder, or give --scales FILE"
    try:
        content, mark = read_regular(path, CheckpointInvalid, otherwise, 1 << 16), f"\n{CHECKSUM}".encode()
    except FileNotFoundError:
        raise CheckpointInvalid(f"no model was applied in {db} yet; {otherwise}") from None
    own = check_own(content)
    earlier = own == "none" and mark not in content and content.endswith(b"\n")  # a version that wrote the path alone
    if own != "right" and not earlier:
        raise CheckpointInvalid(f"{path} {ALTERED}; {otherwise}")
    name = content.removesuffix(b"\n") if earlier else content.rpartition(mark)[0]
    return path.parent / Path(os.fsdecode(name.replace(b"\0", b"?")))
