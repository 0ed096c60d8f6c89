"""What is read is bounded by the file's size: archives, arrays, tokenizers and texts that claim more are refused."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tiny_model import write_tiny_model

from quambase.model.inputs import text as text_module
from quambase.model.inputs.array_files import array_of, read_npz
from quambase.model.inputs.tensor_files import read_pytorch
from quambase.model.inputs.text import read_documents
from quambase.model.inputs.tokenizer import load_tokenizer
from quambase.schema.errors import CheckpointInvalid, DataInvalid, TensorFileInvalid

DTYPES = st.sampled_from(["<f8", "<f4", ">i4", "|u1", "<U5", "|b1"])


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


@given(st.data(), DTYPES, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), st.booleans())
@settings(max_examples=100, deadline=None)
def test_an_array_is_numpys_own(data: st.DataObject, dtype: str, shape: tuple[int, ...], turned: bool) -> None:
    array = data.draw(arrays.arrays(np.dtype(dtype), shape))
    array = array.T if turned else array
    found, expected = array_of(saved(array)), np.load(io.BytesIO(saved(array)), allow_pickle=False)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", [f"({10**12},)", f"({10**30},)", "(-1,)", "(5,)", "(7,)", "(2, -3)", "(-2, -3)"])
def test_an_array_that_claims_other_bytes_is_refused(shape: str) -> None:
    with pytest.raises(ValueError, match="does not have the 48 bytes that are there"):
        array_of(with_shape(shape))


@pytest.mark.parametrize("shape", ["(10**12,)", "(" * 90 + ")" * 90, "6", "(6, 'x')", "(6,"])
def test_an_array_of_no_shape_is_refused(shape: str) -> None:
    with pytest.raises(ValueError):
        array_of(with_shape(shape))


def with_shape(shape: str) -> bytes:
    """A file of six numbers whose header claims another shape."""
    content = saved(np.arange(6.0))
    old = b"'shape': (6,), }"
    assert old in content
    new = content.replace(old, f"'shape': {shape}, }}".encode())
    return new[:8] + (len(new) - 10 - 48).to_bytes(2, "little") + new[10:]


def test_a_compressed_archive_of_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(9), y=np.array("text"))
    found = read_npz(tmp_path / "a.npz")
    assert found.keys() == {"x", "y"} and found["x"].tolist() == [0.0] * 9 and str(found["y"]) == "text"
    np.savez_compressed(tmp_path / "b.npz", x=np.zeros(1 << 20))
    with pytest.raises(ValueError, match="compressed, or larger"):
        read_npz(tmp_path / "b.npz")


def test_a_pickle_cannot_ask_for_more_values_than_the_file_has(tmp_path: Path) -> None:
    """torch's older format allocates a storage of the size that the pickle names, before it reads it."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(1000), buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    loaded = read_pytorch(path, TensorFileInvalid)
    assert isinstance(loaded, torch.Tensor) and loaded.shape == (1000,)
    size = b"M" + (1000).to_bytes(2, "little")
    assert size in content
    path.write_bytes(content.replace(size, b"\x8a\x06" + (10**12).to_bytes(6, "little"), 1))
    with pytest.raises(TensorFileInvalid, match="claims more values than it has bytes"):
        read_pytorch(path, TensorFileInvalid)


def test_a_pickle_cannot_ask_for_a_text_longer_than_the_file(tmp_path: Path) -> None:
    """Python's pickle takes memory for a text before it reads it."""
    buffer = io.BytesIO()
    torch.save({"name": torch.zeros(3)}, buffer, _use_new_zipfile_serialization=False)
    text = b"X\x04\x00\x00\x00name"
    assert text in buffer.getvalue()
    path = tmp_path / "a.pt"
    path.write_bytes(buffer.getvalue().replace(text, b"X\xf0\xff\xff\xffname"))
    with pytest.raises(TensorFileInvalid, match="claims more bytes than it has"):
        read_pytorch(path, TensorFileInvalid)


def test_an_archive_over_several_disks_is_one_line(tmp_path: Path) -> None:
    """Python's own test for an archive raises for it."""
    path = tmp_path / "a.pt"
    torch.save(torch.zeros(3), path)
    content = bytearray(path.read_bytes())
    if b"PK\x06\x07" not in content:
        end = bytes(content[-22:])
        content = content[:-22] + b"PK\x06\x07" + bytes(12) + (2).to_bytes(4, "little") + end
    else:
        place = content.index(b"PK\x06\x07")
        content[place + 16 : place + 20] = (2).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(zipfile.BadZipFile):
        zipfile.is_zipfile(path)
    with pytest.raises(TensorFileInvalid, match="span multiple disks"):
        read_pytorch(path, TensorFileInvalid)


def replace(pattern: dict[str, str], content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    ("steps", "accepted"),
    [
        ([replace({"String": " "}, "▁")], True),
        ([replace({"Regex": " {2,}"}, " "), replace({"String": "``"}, '"'), replace({"String": " "}, "▁")], True),
        ([replace({"String": "w"}, "ww")] * 6, True),
        ([replace({"String": "w"}, "ww")] * 7, False),
        ([replace({"String": "w"}, "w" * 65)], False),
        ([replace({"Regex": "w"}, "w" * 64)], False),
        ([replace({"String": ""}, "w" * 64)], False),
        ([{"type": "Sequence", "normalizers": [replace({"String": "w"}, "w" * 20)]}] * 2, False),
    ],
)
def test_a_tokenizer_lengthens_a_text_within_bounds(tmp_path: Path, steps: list[object], accepted: bool) -> None:
    path = write_tiny_model(tmp_path / "m") / "tokenizer.json"
    for key, name in (("normalizer", "normalizers"), ("decoder", "decoders")):
        raw = json.loads(path.read_text())
        if key == "decoder" and "Sequence" in str(steps):
            continue  # a decoder's sequence has other names inside
        raw[key] = {"type": "Sequence", name: steps}
        changed = tmp_path / "tokenizer.json"
        changed.write_text(json.dumps(raw))
        if accepted:
            load_tokenizer(changed).encode("w1 w2")
        else:
            with pytest.raises(CheckpointInvalid, match="more than 64 times as long"):
                load_tokenizer(changed)


def test_a_text_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "LONGEST", 1 << 20)
    one = tmp_path / "one.parquet"
    pq.write_table(pa.table({"text": ["a" * (4 << 20)]}), one, compression="zstd", write_statistics=False)
    with pytest.raises(DataInvalid, match="unpacks to more"):  # by its footer, before anything is unpacked
        text_module._check_row_groups(one, pq.read_metadata(one))
    many = tmp_path / "many.parquet"
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 50, pa.int32()), pa.array(["a" * 1_000_000]))
    pq.write_table(pa.table({"text": texts}), many, compression="zstd", write_statistics=False)
    packed = tmp_path / "many.txt.zst"
    packed.write_bytes(pa.compress(b"\n\n".join([b"a" * 1_000_000] * 50), "zstd", asbytes=True))
    for path in (one, many, packed):
        with pytest.raises(DataInvalid, match="unpacks to more than 1,000 times its size"):
            list(read_documents(str(path)))
    assert len(next(read_documents(str(packed))).text) == 1_000_000  # what is asked for, and no more, is unpacked


def test_a_text_packed_well_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is for the whole file only above the largest text, and real texts are packed far less closely."""
    monkeypatch.setattr(text_module, "LONGEST", 1 << 20)
    path = tmp_path / "t.parquet"
    texts = [f"{i} {i * i} words of text" * 40 for i in range(5000)]
    pq.write_table(pa.table({"text": texts}), path, compression="zstd")
    assert [document.text for document in read_documents(str(path))] == texts


@pytest.mark.parametrize("place", ["normalizer", "sequence"])
def test_a_precompiled_map_cannot_ask_for_more_than_it_holds(tmp_path: Path, place: str) -> None:
    """The library asked for 8 GB at four bytes of 255 and ended the process."""
    write_tiny_model(tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "tokenizer.json").read_text())
    step = {"type": "Precompiled", "precompiled_charsmap": "/////wAAAA=="}
    raw["normalizer"] = step if place == "normalizer" else {"type": "Sequence", "normalizers": [step]}
    (tmp_path / "t.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointInvalid, match="a precompiled_charsmap states a table larger than itself"):
        load_tokenizer(tmp_path / "t.json")
