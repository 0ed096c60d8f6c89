"""Compiled kernels are kept between processes, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from quambase.model.cuda import compiler as cuda
from quambase.model.cuda.kernel_cache import cache_folder, cached, digest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "quambase"
    return tmp_path / "quambase"


def refuse() -> bytes:
    raise AssertionError("it was made again")


def test_what_was_made_is_found_again(folder: Path) -> None:
    assert cached("one", lambda: b"machine code") == b"machine code"
    assert cached("one", refuse) == b"machine code"
    assert cached("another", lambda: b"other code") == b"other code"
    assert sorted(path.name for path in folder.iterdir()) == ["another.cubin", "one.cubin"]
    assert folder.stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + b"?", lambda b: b"", lambda b: b[:32]])
def test_a_damaged_file_is_made_again(folder: Path, damage: object) -> None:
    cached("one", lambda: b"machine code")
    path = folder / "one.cubin"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert cached("one", lambda: b"new code") == b"new code"
    assert cached("one", refuse) == b"new code"


def test_where_nothing_can_be_stored_it_is_made_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached("one", lambda: b"first") == b"first"
    assert cached("one", lambda: b"second") == b"second"


def test_without_a_choice_it_is_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "quambase"


def test_parts_are_told_apart_by_their_borders() -> None:
    assert len({digest(parts) for parts in ([b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"ab", b"c", b""])}) == 4


class Compiler:
    """NVRTC, as far as it is called: its machine code says what it was made of."""

    version = 13

    def __init__(self) -> None:
        self.programs: list[tuple[object, ...]] = []

    def nvrtcVersion(self) -> tuple[int, int, int]:
        return 0, self.version, 0

    def nvrtcCreateProgram(self, *program: object) -> tuple[int, int]:
        self.programs.append(program)
        return 0, len(self.programs)

    def nvrtcCompileProgram(self, program: int, count: int, flags: list[bytes]) -> tuple[int]:
        assert count == len(flags)
        return (0,)

    def nvrtcGetCUBINSize(self, program: int) -> tuple[int, int]:
        return 0, 4

    def nvrtcGetCUBIN(self, program: int, into: bytes) -> tuple[int]:
        return (0,)

    def nvrtcDestroyProgram(self, program: int) -> tuple[int]:
        return (0,)


def test_a_source_is_compiled_once_whatever_the_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler()
    monkeypatch.setattr(cuda, "import_module", lambda name: compiler if name.endswith("nvrtc") else SimpleNamespace())
    source, header = tmp_path / "kernels.cu", tmp_path / "part.cuh"
    source.write_text("one")
    header.write_text("part")

    def compiled(*options: str) -> int:
        """In a new process."""
        cuda.compile_cubin.cache_clear()
        cuda.compile_cubin(source, options)
        return len(compiler.programs)

    assert [compiled("-DA=1"), compiled("-DA=1"), compiled("-DA=2"), compiled("-DA=1", "-DB"), compiled("-DA=1")] == [
        *(1, 1, 2, 3, 3)
    ]
    source.write_text("two")
    assert [compiled("-DA=1"), compiled("-DA=1")] == [4, 4]
    header.write_text("another part")
    assert [compiled("-DA=1"), compiled("-DA=1")] == [5, 5]
    compiler.version = 14
    assert [compiled("-DA=1"), compiled("-DA=1")] == [6, 6]
    cuda.compile_cubin.cache_clear()
