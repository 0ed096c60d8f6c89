"""Downloads through huggingface_hub's cache, and the reasons why one failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from threading import Thread

REACH_SECONDS = 5.0
"""Time limit of the hub's first answer. Without it, its client retries for half a minute."""


class HubError(Exception):
    """A file is not in the hub's cache and cannot be downloaded; the text is the reason, as part of one line."""


class Unreachable(HubError):
    """The hub cannot be reached."""


def fetch_snapshot(repository: str, patterns: list[str]) -> Path:
    """The folder of a model repository's files that match ``patterns``; HubError."""

    def download(here: bool) -> str:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(repository, allow_patterns=patterns, local_files_only=here))

    return _fetched((repository, *patterns), download)


def fetch_file(repository: str, name: str, *, dataset: bool = False) -> Path:
    """One file of a model's or data set's repository; HubError."""
    kind = "dataset" if dataset else "model"

    def download(here: bool) -> str:
        from huggingface_hub import hf_hub_download

        return str(hf_hub_download(repository, name, repo_type=kind, local_files_only=here))

    return _fetched((kind, repository, name), download)


def cache_name() -> str:
    """The folder of the hub's cache, after a space; empty if the hub's client is not installed."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return ""
    return f" {HF_HUB_CACHE}"


def mend(path: Path, otherwise: str = "download it again") -> str:
    """How to replace a damaged file. In the hub's cache it is a link, and downloaded again only after its target was
    deleted. The target of any other link is the user's own file.
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


_found: dict[tuple[str, ...], Path] = {}
"""What this process has fetched already."""


def _fetched(key: tuple[str, ...], download: Callable[[bool], str]) -> Path:
    """The path that ``download`` fetches or, called with True, finds in the cache. Called once per key in a process."""
    if key in _found and _found[key].exists():
        return _found[key]
    try:
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # no messages about retries
        with nullcontext() if _reachable() else _no_requests():
            _found[key] = Path(download(not _reachable()))
        return _found[key]
    except ImportError:
        raise HubError("huggingface_hub is not installed; pip install 'quambase[hub]'") from None
    except Exception as error:  # the hub's own errors and its HTTP library's have no common base
        if isinstance(error, OSError) and error.errno:
            raise  # a local problem: a full disk, a folder that cannot be written
        raise _hub_error(error) from None


@contextmanager
def _no_requests() -> Iterator[None]:
    """Set HF_HUB_OFFLINE: even for cached files the client sends other requests."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable() -> bool:
    """Whether the hub answers; asked once a minute."""
    return _answers(int(time.monotonic() // 60))


@lru_cache(1)
def _answers(_: int) -> bool:
    """Whether the hub answers within a short time, through a proxy if there is one."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[int] = []

    def ask() -> None:
        with suppress(Exception):  # any error means that there is no answer
            answers.append(get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS).status_code)

    # In a thread, since the timeout does not cover the DNS look-up.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS + 1)
    return bool(answers) and answers[0] < 500


def _hub_error(error: Exception) -> HubError:
    from huggingface_hub import constants, errors

    if not _reachable() and isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        offline = constants.HF_HUB_OFFLINE
        return Unreachable("HF_HUB_OFFLINE is set: unset it" if offline else f"{constants.ENDPOINT} cannot be reached")
    return HubError(_reason(error))


def _reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "its authors ask to accept terms first: do so on its page and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub knows no such repository, or it is private: check the name, or set HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{constants.ENDPOINT} cannot be reached: try again"
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository has no such file"
    first = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    # A ValueError means an impossible name, anything else a failed connection.
    return first if isinstance(error, ValueError) else f"{first}; repeat the command: complete files are reused"
