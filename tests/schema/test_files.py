"""Outputs: whole or not at all, never in the place of what quambase did not write, nothing left of killed processes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from quambase.schema.checksums import file_damage, file_sha256
from quambase.schema.errors import OutputRefused
from quambase.schema.files import (
    link_or_copy,
    refuse_foreign_file,
    refuse_foreign_picture,
    remove_strays,
    replacing,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "a[1]*.txt"  # a name that is also a pattern
    with replacing(path) as temporary:
        temporary.write_text("one")
        (temporary.parent / "beside").write_text("what a library leaves")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("two")
        raise RuntimeError
    assert path.read_text() == "one" and names(tmp_path) == [path.name]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_its_mode_follows_the_umask_whatever_the_writer_does(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a") as temporary:
            temporary.unlink()
            temporary.write_text("another file")
            temporary.chmod(0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == "new"
    assert names(tmp_path / "there") == ["file"]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    with replacing(path) as temporary:
        temporary.write_bytes(b"all of it")
    reader.join(10)
    assert read == [b"all of it"] and stat.S_ISFIFO(path.stat().st_mode)


def test_a_pipe_of_the_process_is_written_to(tmp_path: Path) -> None:
    """As /dev/stdout and the shell's ``>(command)`` are: links to what has no path."""
    reading, writing = os.pipe()
    with replacing(Path(f"/dev/fd/{writing}")) as temporary:
        temporary.write_bytes(b"all of it")
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        assert file.read() == b"all of it"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can make a device")
def test_a_device_stays_a_device(tmp_path: Path) -> None:
    path = tmp_path / "null"
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    with replacing(path) as temporary:
        temporary.write_bytes(b"x")
    assert stat.S_ISCHR(path.stat().st_mode) and names(tmp_path) == ["null"]


def test_a_disk_error_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as met, replacing(tmp_path / "a") as temporary:
        raise OSError(28, "No space left on device", str(tmp_path / "source"), None, str(temporary))
    assert met.value.errno == 28 and met.value.filename == str(tmp_path / "a") and met.value.filename2 is None
    with pytest.raises(OSError, match="No space") as met, replacing(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert met.value.filename == str(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="source"), replacing(tmp_path / "a"):
        (tmp_path / "source").read_bytes()  # that of another file keeps its name
    assert names(tmp_path) == []


def test_what_a_killed_process_left_goes_with_the_next_success(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, pathlib\n"
        "from quambase.schema.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    (temporary.parent / 'beside').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=False)
    assert len(names(tmp_path)) == 2 and all(name.endswith(".tmp") for name in names(tmp_path))
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("a")
    assert len(names(tmp_path)) == 2 and "a" in names(tmp_path), "another file's stays until its own next success"
    with replacing(tmp_path / "c"), replacing(tmp_path / "d"):
        remove_strays(tmp_path)
        assert len([name for name in names(tmp_path) if name.endswith(".tmp")]) == 2, (
            "those that are being written stay"
        )
    assert names(tmp_path) == ["a", "c", "d"]


def test_what_is_not_ours_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(OutputRefused, match=r"notes.txt exists already; name another file, or replace it with --force"):
        refuse_foreign_file(path, None, "a table")
    with pytest.raises(OutputRefused, match=r"is no scale table that quambase wrote"):
        refuse_foreign_file(path, lambda path: False, "scale table")
    with pytest.raises(OutputRefused, match="is a folder; expected the name of a file"):
        refuse_foreign_file(tmp_path, lambda path: True, "scale table", force=True)
    with pytest.raises(OutputRefused, match="is no picture that quambase wrote"):
        refuse_foreign_picture(path)
    assert path.read_text() == "mine"
    refuse_foreign_file(path, lambda path: True, "scale table")
    refuse_foreign_file(path, None, "a table", force=True)
    refuse_foreign_file(tmp_path / "new", None, "a table")
    path.write_text("")
    refuse_foreign_file(path, None, "a table")  # as mktemp leaves one


def refuse(*_: object) -> None:
    raise OSError("this file system has no links")


@pytest.mark.parametrize("links", [True, False])
def test_a_file_gets_a_second_name_or_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "there" / "target"
    source.write_text("content")
    source.chmod(0o400)
    (tmp_path / "name").symlink_to(source)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for _ in range(2):  # the second replaces what is there
        link_or_copy(tmp_path / "name", target)
        assert target.read_text() == "content" and not target.is_symlink() and target.samefile(source) == links
    assert names(target.parent) == ["target"] and stat.S_IMODE(source.stat().st_mode) == 0o400


def test_damage_is_said(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert file_damage(path, "") == "is missing"
    path.write_text("content")
    assert file_damage(path, file_sha256(path)) is None
    assert file_damage(path, "0") == "was altered or cut short since it was written (its checksum differs)"
