"""Downloads through huggingface_hub's cache, and in words why one failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class HubError(Exception):
    """A file is neither in the hub's cache nor to be had; the text is the reason, as part of one line."""


def fetch_snapshot(repository: str, patterns: list[str]) -> Path:
    """The folder of a model repository's files that match ``patterns``; HubError."""

    def download() -> str:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(repository, allow_patterns=patterns))

    return _fetched(download)


def fetch_file(repository: str, name: str, *, dataset: bool = False) -> Path:
    """One file of a model's or data set's repository; HubError."""

    def download() -> str:
        from huggingface_hub import hf_hub_download

        return str(hf_hub_download(repository, name, repo_type="dataset" if dataset else "model"))

    return _fetched(download)


def mend(path: Path, otherwise: str = "download it again") -> str:
    """How to replace a damaged file. In the hub's cache it is a link, fetched again only once its target is gone; what
    a link elsewhere leads to is not ours to delete.
    """
    if path.is_symlink():
        try:
            from huggingface_hub.constants import HF_HUB_CACHE
        except ImportError:
            return otherwise
        target = path.resolve()
        if target.is_relative_to(Path(HF_HUB_CACHE).resolve()):
            return f"delete {target} and repeat the command"
    return otherwise


def _fetched(download: Callable[[], str]) -> Path:
    try:
        return Path(download())
    except ImportError:
        raise HubError("huggingface_hub is not installed; pip install 'quambase[hub]'") from None
    except Exception as error:  # the hub's own errors and its HTTP library's, which share no base
        if isinstance(error, OSError) and error.errno:
            raise  # of this machine: a full disk, a folder that cannot be written
        raise HubError(_reason(error)) from None


def _reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "its authors ask to accept terms first: do so on its page and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub knows no such repository, or it is private: check the name, or set HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        offline = constants.HF_HUB_OFFLINE
        return "HF_HUB_OFFLINE is set: unset it" if offline else f"{constants.ENDPOINT} cannot be reached: try again"
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository has no such file"
    first = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    # A ValueError is a name that cannot be one; the rest befell the connection.
    return first if isinstance(error, ValueError) else f"{first}; repeat the command, files that came whole are kept"
