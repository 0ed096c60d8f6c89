# mypy: disable-error-code="call-overload"
"""`quambase import`: which saved tensors are counted, and the one line for every other file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stored_runs import stored_table

from quambase.collector.import_tensor import import_tensor, read_tensor
from quambase.schema.errors import QuambaseError, TensorFileInvalid
from quambase.schema.values.distribution import Distribution

X = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
SUFFIXES = [".pt", ".pth", ".npy", ".safetensors"]


def save(path: Path, x: torch.Tensor) -> Path:
    if path.suffix == ".npy":
        np.save(path, x.numpy())
    elif path.suffix == ".safetensors":
        save_file({"x": x}, path)
    else:
        torch.save(x, path)
    return path


def refusal(path: Path, tensor: str | None = None) -> str:
    with pytest.raises(TensorFileInvalid) as error:
        read_tensor(path, tensor)
    message = str(error.value)
    assert message.isprintable() and path.name in message, message
    return message


@pytest.mark.parametrize(
    "change",
    [lambda x: x.requires_grad_(), torch.nn.Parameter, lambda x: (x * torch.nn.Parameter(torch.ones(1))).detach_(),
     lambda x: torch._neg_view(-x), lambda x: x.transpose(0, 2).contiguous().transpose(0, 2)],
)  # fmt: skip
def test_what_a_hook_saves_is_counted(tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch.save(change(X.clone()), tmp_path / "hooked.pt")
    run = import_tensor(tmp_path / "hooked.pt", "mine", db=tmp_path)
    found, expected = stored_table(run.folder, "counts"), Distribution.of_values(X.half().numpy())
    assert found["value"].to_numpy().tolist() == expected.values.tolist()
    assert found["count"].to_pylist() == expected.counts.tolist()


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">f2", ">f8", "f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_any_byte_order(tmp_path: Path, dtype: str, order: str) -> None:
    array = np.array(X.numpy(), dtype=dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    found = read_tensor(tmp_path / "a.npy").numpy()
    assert np.array_equal(found, array) and found.dtype.isnative


def test_tensors_by_number(tmp_path: Path) -> None:
    torch.save({0: X, 1: X + 1, ("a", 2): X + 2}, tmp_path / "layers.pt")
    assert torch.equal(read_tensor(tmp_path / "layers.pt", "1"), X + 1)
    assert torch.equal(read_tensor(tmp_path / "layers.pt", "('a', 2)"), X + 2)
    assert "holds the tensors 0, 1, ('a', 2); name one with --tensor" in refusal(tmp_path / "layers.pt")
    assert "holds the tensors 0, 1, " in refusal(tmp_path / "layers.pt", "2")
    torch.save({7: X}, tmp_path / "one.pt")
    assert torch.equal(read_tensor(tmp_path / "one.pt"), X)
    assert torch.equal(read_tensor(tmp_path / "one.pt", "7"), X)
    assert "holds the tensors 7; name one" in refusal(tmp_path / "one.pt", "8")
    torch.save({1: X, "1": X + 1}, tmp_path / "twice.pt")
    assert "holds the tensors 1; name one" in refusal(tmp_path / "twice.pt", "1")
    torch.save({}, tmp_path / "none.pt")
    assert "holds the tensors none" in refusal(tmp_path / "none.pt")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".npy"])
def test_a_name_for_a_tensor_without_one_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", X)
    assert "holds no tensors with names; import it without --tensor" in refusal(path, "NOPE")


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (X.to_sparse(), "a sparse tensor"),
        (X.to("meta"), "a tensor without values"),
        (X.to(torch.complex64), "torch.complex64"),
        (X.to(torch.int8), "torch.int8"),
        (X > 0, "torch.bool"),
        (X.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.ones(1).expand(10**12), "an expanded tensor"),
    ],
)
def test_other_kinds_of_tensors_are_named(tmp_path: Path, tensor: torch.Tensor, kind: str) -> None:
    torch.save(tensor, tmp_path / "a.pt")
    assert f"a.pt holds {kind}" in refusal(tmp_path / "a.pt")
    torch.save({"x": tensor, "y": X}, tmp_path / "b.pt")
    assert f"b.pt holds {kind}" in refusal(tmp_path / "b.pt", "x")


@pytest.mark.filterwarnings("ignore")  # torch's, that its nested tensors are a prototype
def test_nested_tensors_are_named(tmp_path: Path) -> None:
    torch.save(torch.nested.nested_tensor([X[0], X[1][:2]]), tmp_path / "a.pt")
    assert "nested" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("dtype", ["c8", "i4", "U3", "?", "M8[s]", "f4,f4", "longdouble"])
def test_arrays_that_are_no_floats_are_refused(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3, dtype))
    assert "expected a plain tensor" in refusal(tmp_path / "a.npy") or "cannot be read as a tensor" in refusal(
        tmp_path / "a.npy"
    )


def header(shape: str, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "shape",
    ["(10**12,)", "(1000000000000,)", "(-1,)", "(0,)", "()", "(3,", "'x'", "(2, 99999999999999999999)", "[" * 3000],
)
def test_an_array_of_impossible_size_asks_for_no_memory(tmp_path: Path, shape: str) -> None:
    (tmp_path / "a.npy").write_bytes(header(shape) + b"\0" * (0 if shape == "()" else 16))
    refusal(tmp_path / "a.npy")


@pytest.mark.parametrize("suffix", SUFFIXES)
class TestFiles:
    def test_an_empty_file(self, tmp_path: Path, suffix: str) -> None:
        (tmp_path / f"a{suffix}").write_bytes(b"")
        assert f"a{suffix} is empty" in refusal(tmp_path / f"a{suffix}")

    def test_a_pointer_of_git_lfs(self, tmp_path: Path, suffix: str) -> None:
        (tmp_path / f"a{suffix}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        assert "is a Git LFS pointer, not the file itself" in refusal(tmp_path / f"a{suffix}")

    @pytest.mark.parametrize("other", ["device", "pipe", "folder"])
    def test_what_is_no_regular_file(self, tmp_path: Path, suffix: str, other: str) -> None:
        path = tmp_path / f"a{suffix}"
        if other == "device":
            path.symlink_to("/dev/zero")
        elif other == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
        assert "is not a regular file" in refusal(path)

    @settings(max_examples=120, deadline=None)
    @given(st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=2), st.integers(0, 3)), max_size=4), st.floats(0, 1))
    def test_any_damage_is_values_or_one_line(
        self, tmp_path_factory: pytest.TempPathFactory, suffix: str, changes: list[tuple[float, bytes, int]], end: float
    ) -> None:
        path = save(tmp_path_factory.mktemp("damage") / f"a{suffix}", X)
        content = path.read_bytes()[: None if end > 0.3 else int(end * 2000)]
        for where, inserted, removed in changes:
            place = int(where * len(content))
            content = content[:place] + inserted + content[place + removed :]
        path.write_bytes(content)
        try:
            assert read_tensor(path).numel() > 0
        except QuambaseError as error:
            assert str(error).isprintable()

    @settings(max_examples=60, deadline=None)
    @given(content=st.binary(max_size=60), pickled=st.booleans())
    def test_any_bytes_are_one_line(
        self, tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes, pickled: bool
    ) -> None:
        path = tmp_path_factory.mktemp("bytes") / f"a{suffix}"
        path.write_bytes(b"\x80\x02" + content + b"." if pickled else content)
        refusal(path)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save(torch.zeros(1 << 20), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as archive, zipfile.ZipFile(tmp_path / "a.pt", "w", 8) as packed:
        for entry in archive.namelist():
            packed.writestr(entry, archive.read(entry))
    assert "is a compressed archive" in refusal(tmp_path / "a.pt")
