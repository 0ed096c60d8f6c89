"""Names of models and texts, and what they stand for. Imports no torch, so that a wrong name is reported at once."""

from __future__ import annotations

from pathlib import Path

from quambase.schema.errors import DataInvalid, ModelNotFound, UnknownName

BUNDLED = Path(__file__).parent.with_name("bundled")
"""Folder of the models and the text that ship with the package."""

NEOX = "EleutherAI/gpt-neox-20b"

SHORT_NAMES: dict[str, str] = {
    **{f"mamba-{size}": f"state-spaces/mamba-{size}" for size in ("130m", "370m", "790m", "1.4b", "2.8b")},
    **{f"mamba2-{size}": f"state-spaces/mamba2-{size}" for size in ("130m", "370m", "780m", "1.3b", "2.7b")},
}
"""Short name to hub id; their tokenizer is GPT-NeoX-20B's."""

SAMPLE = BUNDLED / "sample"
"""Folder of the bundled sample text."""

BUNDLED_DATA: dict[str, str] = {
    "sample:calibration": "calibration.jsonl",
    "sample:evaluation": "evaluation.jsonl",
    "sample:last-word": "last_word.jsonl",
}
"""Names of the bundled texts, written by SAMPLE_AUTHORS (`quambase generate`)."""

SAMPLE_AUTHORS = ("mamba-5m", "mamba2-8m")
"""The bundled models that wrote the bundled texts, a document each in turn."""

PYTHON_DOCS = ("python-docs:calibration", "python-docs:evaluation")
"""Real English on every machine: Python's language reference (`pydoc_data.topics`), every other topic, in passages."""

HUB_DATA: dict[str, str] = {
    "pile-val": "hf:monology/pile-uncopyrighted:val.jsonl.zst",
    "wikitext2": "hf:Salesforce/wikitext:wikitext-2-raw-v1/test-00000-of-00001.parquet",
    "lambada": "hf:EleutherAI/lambada_openai:data/lambada_test_en.jsonl",
}
"""Short names of data sets on the hub, as ``hf:REPOSITORY:FILE``."""


def bundled_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(folder.parent.name for folder in BUNDLED.glob("*/config.json"))


def hub_model(name: str) -> str | None:
    """The hub id that a model's name stands for; None for a folder or a bundled model. ModelNotFound: no such name."""
    if Path(name).is_dir() or name in bundled_models():
        return None
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return name
    hint = UnknownName.of("model", name, [*bundled_models(), *SHORT_NAMES])
    raise ModelNotFound(
        f"{hint}; or give a folder with config.json and weights, or a hub id such as state-spaces/mamba-130m"
    )


def hub_data(data: str) -> str | None:
    """``hf:REPOSITORY:FILE`` that a text's name stands for; None for a local file or a bundled text. DataInvalid: an
    unknown name.
    """
    if data in PYTHON_DOCS or data in BUNDLED_DATA or Path(data).exists():
        return None
    source = HUB_DATA.get(data, data)
    if source.startswith("hf:"):
        return source
    hint = UnknownName.of("data", data, [*BUNDLED_DATA, *PYTHON_DOCS, *HUB_DATA])
    raise DataInvalid(f"no file {data} here, and it is no known name ({hint})")


def data_name(data: str | Path) -> tuple[str, str | None]:
    """The name of a text and its absolute path: for a file its own name, however the path was typed; for a known name
    that name, and None.
    """
    name = str(data)
    known = name in BUNDLED_DATA or name in PYTHON_DOCS or not Path(name).exists()
    return (name, None) if known else (Path(name).resolve().name, str(Path(name).resolve()))
