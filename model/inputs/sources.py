"""Finds a model's files, its tokenizer and texts on this machine, or downloads them before anything slow starts.

Imports no torch. All missing files are reported together, so that one download on another machine is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quambase.model.inputs.hub import HubError, Unreachable, cache_name, fetch_file, fetch_snapshot
from quambase.model.inputs.names import BUNDLED, NEOX, PYTHON_DOCS, bundled_models, hub_data, hub_model
from quambase.schema.errors import CheckpointInvalid, DataInvalid, ModelNotFound

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PYTORCH, PYTORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Missing:
    """A file that is not on this machine and could not be fetched: ``what`` it is, the ``option`` that names a local
    one, and why.
    """

    what: str
    option: str
    error: HubError


@dataclass(frozen=True)
class Sources:
    """A model's folder and its tokenizer.json."""

    folder: Path
    tokenizer: Path


def is_bundled(model: str) -> bool:
    """Whether a model ships with the package. A folder of that name in the working directory takes precedence."""
    return Path(model).absolute().parent == BUNDLED if Path(model).is_dir() else model in bundled_models()


def default_data(model: str) -> str:
    """The default calibration text of a model: the bundled sample, or the Pile's validation part."""
    return "sample:calibration" if is_bundled(model) else "pile-val"


def find_sources(model: str, tokenizer: str | None = None, texts: Sequence[str] = ()) -> Sources:
    """The folder and tokenizer of ``model``. ``texts`` that are not local are downloaded to the hub's cache.

    ``tokenizer`` is a tokenizer.json, a folder holding one, or a hub id; by default the one beside the weights.
    ModelNotFound or DataInvalid: an unknown name, or one line about everything that is missing. CheckpointInvalid: a
    folder without config.json.
    """
    repository = hub_model(model)
    for text in texts:
        hub_data(text)
    missing: list[Missing] = []

    def tried(what: str, option: str, fetch: Callable[[], Path]) -> Path | None:
        try:
            return fetch()
        except HubError as error:
            missing.append(Missing(what, option, error))
            return None

    folder: Path | None = Path(model) if Path(model).is_dir() else BUNDLED / model
    if repository is not None:
        folder = tried(
            f"the model {repository}", "--model FOLDER, with its config.json and weights", lambda: _snapshot(repository)
        )
    if folder is not None and not (folder / "config.json").exists():
        raise CheckpointInvalid(
            f"{folder / 'config.json'} is missing; expected a model folder with config.json and weights"
        )
    name = tokenizer
    found: Path | None = None
    if name is not None and Path(name).exists():
        found = Path(name) / TOKENIZER if Path(name).is_dir() else Path(name)
    elif name is None and folder is not None and (folder / TOKENIZER).exists():
        found = folder / TOKENIZER
    else:
        if name is None and repository is not None and repository.startswith("state-spaces/"):
            name = NEOX
        if name is not None:
            origin = name
            found = tried(f"{TOKENIZER} of {origin}", "--tokenizer FILE", lambda: fetch_file(origin, TOKENIZER))
        elif folder is not None:
            raise ModelNotFound(f"{folder} holds no {TOKENIZER}; name one with --tokenizer FILE (or a hub id)")
    no_text = [gap for gap in map(_text, texts) if isinstance(gap, Missing)]
    if missing or no_text:
        kind = ModelNotFound if missing else DataInvalid
        raise kind(described([*missing, *no_text], model=bool(missing)))
    assert folder is not None and found is not None  # else something is missing
    return Sources(folder, found)


def find_given(model: str | None, texts: Sequence[str]) -> None:
    """As `find_sources` without its result; ``model`` may be None."""
    if model is not None:
        find_sources(model, None, texts)
    elif gaps := [gap for gap in map(_text, texts) if isinstance(gap, Missing)]:
        raise DataInvalid(described(gaps, model=False))


def find_text(data: str) -> Path | None:
    """The downloaded file of a text on the hub; None for a local text. DataInvalid: it could not be fetched."""
    found = _text(data)
    if isinstance(found, Missing):
        raise DataInvalid(described([found], model=False))
    return found


def _text(data: str) -> Path | Missing | None:
    source = hub_data(data)
    if source is None:
        return None
    repository, _, name = source.removeprefix("hf:").partition(":")
    if not repository or not name:
        raise DataInvalid(f"'{source}' is not of the form hf:REPOSITORY:FILE")
    try:
        return fetch_file(repository, name, dataset=True)
    except HubError as error:
        return Missing(source, "--data FILE", error)


def described(missing: list[Missing], *, model: bool) -> str:
    """One line: what is missing, why, how else to pass it, and what works without; ``model``: a model's files are
    missing, not only texts.
    """
    reasons = list(dict.fromkeys(str(gap.error) for gap in missing))
    where = f"not in the local hub cache{cache_name()} and could not be fetched"
    pass_each = "or download them on a machine with a network and pass each by its option"
    if len(missing) == 1:
        (gap,) = missing
        download = "or download it on a machine with a network and pass it"
        line = f"{gap.what} is {where} ({gap.error}); {download}: {gap.option}"
    elif len(reasons) == 1:
        listed = ", ".join(f"{gap.what} ({gap.option})" for gap in missing)
        line = f"{len(missing)} things are {where} ({reasons[0]}): {listed}; {pass_each}"
    else:
        listed = ", ".join(f"{gap.what} ({gap.error}; {gap.option})" for gap in missing)
        line = f"{len(missing)} things are {where}: {listed}; {pass_each}"
    if not any(isinstance(gap.error, Unreachable) for gap in missing):
        return line
    instead = [f"--model {bundled_models()[0]}"] if model else []
    if any(gap.option.startswith("--data") for gap in missing):
        instead.append(f"--data {PYTHON_DOCS[0]}")
    return f"{line}. What works without a network: {', '.join(instead)}"


def _snapshot(repository: str) -> Path:
    """The folder in the hub's cache; PyTorch's files are fetched only if there are no safetensors. HubError."""
    folder = fetch_snapshot(repository, ["config.json", TOKENIZER, "*.safetensors", SAFETENSORS_INDEX])
    if not any(folder.glob("*.safetensors")):
        folder = fetch_snapshot(repository, [PYTORCH, PYTORCH_INDEX, "pytorch_model-*.bin"])
    return folder
