"""Files: atomic writes, refusals to overwrite the files of others, locks, hard links; format versions."""

from __future__ import annotations

import fcntl
import glob
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quambase.schema.errors import DatabaseInvalid, OutputRefused, QuambaseError, RunBusy, first_line

MARK = "quambase"
"""Our files carry it in their metadata."""

FORCE_HINT = "name another file, or replace it with --force"


def local_folder(folder: str | Path) -> Path:
    """A database's folder. DatabaseInvalid: it is a URL, or its name is not UTF-8, which Arrow cannot open."""
    text = str(folder)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise DatabaseInvalid(f"{text} is an address; expected a database folder on this machine")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DatabaseInvalid(f"{text!a} is not UTF-8; expected a database folder with another name") from None
    return Path(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success the file is flushed to disk and replaces ``path`` atomically.

    Other files that the writer leaves beside it are removed, and so is what killed processes left of earlier attempts
    at ``path``. A link is followed. A device or a pipe is written to, not replaced. OSError.
    """
    # Before links are followed: /dev/stdout is one to a pipe, which has no path.
    if path.exists() and not path.is_file() and not path.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            with temporary.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # not the temporary name
    lock = _locked_folder(Path(folder))  # tells `remove_strays` of other processes that this one is alive
    try:
        temporary = Path(folder) / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes a file that only its owner can read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        remove_strays(path.parent, path.name)
    except OSError as error:
        named = error.filename2 or error.filename
        if error.errno is None or (named is not None and folder not in str(named)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # not the temporary name, or none at all
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_strays(folder: Path, name: str | None = None) -> None:
    """Remove the temporary folders of `replacing` that killed processes left in ``folder``.

    name  only those of the file of this name
    """
    for stray in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.tmp"):
        if stray.is_dir() and (lock := _locked_folder(stray)) is not None:
            shutil.rmtree(stray, ignore_errors=True)
            os.close(lock)


def _locked_folder(folder: Path) -> int | None:
    """An open descriptor that holds the folder's lock; None if another process holds it, or where none can be had."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def refuse_foreign_file(path: Path, ours: Callable[[Path], bool] | None, expected: str, *, force: bool = False) -> None:
    """OutputRefused if ``path`` is a folder, or a file that quambase did not write; called before any work.

    ours      whether the file at a path is of the kind to be written; None: such files cannot be recognized
    expected  what that kind is called in the message
    force     replace any file
    """
    if path.is_dir():
        raise OutputRefused(f"{path} is a folder; expected the name of a file to write {expected} to")
    if force or not path.is_file() or path.stat().st_size == 0:
        return
    if ours is None or not ours(path):
        found = "exists already" if ours is None else f"exists already and is no {expected} that quambase wrote"
        raise OutputRefused(f"{path} {found}; {FORCE_HINT}")


def refuse_foreign_picture(path: Path, *, force: bool = False) -> None:
    """`refuse_foreign_file` of a picture; one of ours names quambase in its metadata, near its beginning or end."""

    def ours(path: Path) -> bool:
        with path.open("rb") as file:
            beginning = file.read(1 << 16)
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            return MARK.encode() in beginning + file.read()

    refuse_foreign_file(path, ours, "picture", force=force)


@contextmanager
def locked(folder: Path, what: str | None = None, *, wait: bool = False) -> Iterator[None]:
    """Hold the folder's lock; RunBusy if another process holds it. The end of the process releases it.

    what  the folder's name in that message
    wait  for the other process instead; only where no process holds the lock for long
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise RunBusy(
                    f"another process is writing {what or f'run {folder.name}'}; wait for it, or stop it and run the "
                    "same command again"
                ) from None
            # The process that held it before may have removed the file between our opening and our locking it.
            if not _lies_at(file.fileno(), path):
                continue
            yield
            path.unlink(missing_ok=True)
            return


def remove_lock(folder: Path) -> None:
    """Remove the lock that a killed process left in the folder; one that is held, or cannot be removed, stays."""
    if (folder / ".lock").exists():
        with suppress(RunBusy, OSError), locked(folder):
            pass  # leaving removes it


def _lies_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def read_regular(path: Path, error: type[QuambaseError], advice: str, most: int) -> bytes:
    """The bytes of a regular file; links are followed. FileNotFoundError.

    ``error``, whose line ends in ``advice``: a folder, a device or a pipe, more than ``most`` bytes, or not readable.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{path} is not a regular file; {advice}")
        if found.st_size > most:
            raise error(f"{path} has {found.st_size:,} bytes; expected at most {most:,}: {advice}")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as wrong:  # ValueError: a NUL in the path
        raise error(f"{path} cannot be read ({first_line(wrong)}); {advice}") from None


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to the file ``source``, or a copy where the file system has no links; an existing
    ``target`` is replaced. OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)


def check_format_version(path: Path, found: object, newest: int, error: type[QuambaseError] = DatabaseInvalid) -> int:
    """``found``, the format version that the file ``path`` names; ``error`` if it is newer than ``newest``, the newest
    that this quambase reads, or no number of a version.
    """
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= newest:
        shown = str(found) if len(str(found)) <= 20 else f"{str(found)[:20]}…"
        raise error(f"{path} has format version {shown}; this quambase reads up to {newest}: upgrade quambase")
    return found
