"""Headers: what safetensors' own library writes is read; what is broken is refused; data is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from tests.support.layouts import layout
from vllm_forge.checkpoints.checkpoint import Checkpoint, CheckpointSource, Folder
from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.checkpoints.inspect.checks_tensors import read_scalars
from vllm_forge.checkpoints.inspect.profile import Profile
from vllm_forge.checkpoints.tensors import FIRST_READ, read_header

NAME = "model.safetensors"


class Memory(CheckpointSource):
    """Files in memory; counts what is read."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.sizes = {name: len(data) for name, data in files.items()}
        self.bytes_read = 0

    def __str__(self) -> str:
        return "memory"

    def read(self, name: str, begin: int, end: int) -> bytearray:
        self.bytes_read += end - begin
        return bytearray(self.files[name][begin:end])


def _file(header: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _text(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def _row(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DTYPES = {"F32": np.float32, "I64": np.int64, "U8": np.uint8, "F16": np.float16}


@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=9),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_what_the_library_writes_is_read(rows: dict[str, tuple[str, list[int]]]) -> None:
    arrays = {name: np.zeros(shape, DTYPES[dtype]) for name, (dtype, shape) in rows.items()}
    data = save(arrays)
    found = read_header(Memory({NAME: data}), NAME)
    assert {e.name: (e.dtype, list(e.shape)) for e in found} == rows
    assert {e.name: e.size for e in found} == {n: array.nbytes for n, array in arrays.items()}


BROKEN = {
    "empty": b"",
    "no-header": (4).to_bytes(8, "little"),
    "header-of-nothing": (0).to_bytes(8, "little") + b"{}",
    "header-longer-than-the-file": _file({}, length=1000),
    "huge-header": _file({}, length=1 << 40),
    "not-json": (4).to_bytes(8, "little") + b"{{{{",
    "a-list": (2).to_bytes(8, "little") + b"[]",
    "cut-off": _file({"a": _row("F32", [2], 0, 8)}, b"1234"),
    "too-long": _file({"a": _row("F32", [2], 0, 8)}, b"123456789"),
    "gap": _file({"a": _row("U8", [1], 0, 1), "b": _row("U8", [1], 2, 3)}, b"123"),
    "overlap": _file({"a": _row("U8", [2], 0, 2), "b": _row("U8", [2], 1, 3)}, b"123"),
    "wrong-size": _file({"a": _row("F32", [2], 0, 4)}, b"1234"),
    "unknown-dtype": _file({"a": _row("F3", [1], 0, 1)}, b"1"),
    "no-shape": _file({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"1"),
    "no-offsets": _file({"a": {"dtype": "U8", "shape": [1]}}, b"1"),
    "null": _file({"a": None}),
    # What safetensors' own library refuses, and Python's json does not.
    "utf-16": _text('{"a": null}'.encode("utf-16")),
    "byte-order-mark": _text(b"\xef\xbb\xbf{}"),
    "metadata-of-numbers": _file({"__metadata__": {"format": 1}}),
    "metadata-list": _file({"__metadata__": ["pt"]}),
    "half-a-character": _file({"\ud800": _row("U8", [1], 0, 1)}, b"1"),
    "a-name-for-a-terminal": _file({"a\x1b[31m\nb": _row("U8", [1], 0, 1)}, b"1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused(name: str) -> None:
    data = BROKEN[name]
    with pytest.raises(CheckpointUnreadableError, match=NAME):
        read_header(Memory({NAME: data}), NAME)


def test_a_long_header_is_read_in_two() -> None:
    rows = {f"layer.{n}.{'x' * 60}": np.zeros(1, np.uint8) for n in range(12_000)}
    data = save(rows)
    assert int.from_bytes(data[:8], "little") > FIRST_READ
    place = Memory({NAME: data})
    assert len(read_header(place, NAME)) == len(rows)
    assert place.bytes_read <= len(data)


def test_no_tensor_data_is_read_but_single_scales(tmp_path: Path) -> None:
    folder = layout(tmp_path, "card")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    place = Memory(files)
    profile = Profile.open(place)
    headers = sum(
        min(FIRST_READ, len(data)) for name, data in files.items() if name.endswith(".safetensors")
    )
    read = {"config.json", "model.safetensors.index.json"}
    others = sum(len(data) for name, data in files.items() if name in read)
    assert place.bytes_read == headers + others
    place.bytes_read = 0
    scalars = read_scalars(profile)
    assert len(scalars) == 3 * 8 * 3 * 2
    assert set(scalars.values()) == {1.0}
    # They lie side by side: little more than their own bytes.
    assert place.bytes_read < 8 * 4 * len(scalars)


def test_a_file_that_shrinks_is_reported(tmp_path: Path) -> None:
    folder = layout(tmp_path, "card")
    place = Folder(folder)
    first = next(name for name in place.sizes if name.endswith(".safetensors"))
    size = place.sizes[first]
    with pytest.raises(CheckpointUnreadableError, match="ends before byte"):
        place.read(first, size - 1, size + 1)


class TestLook:
    def _folder(self, tmp_path: Path, **files: bytes) -> Folder:
        for name, data in files.items():
            (tmp_path / name.replace("__", ".")).write_bytes(data)
        return Folder(tmp_path)

    @pytest.mark.parametrize(
        ("files", "words"),
        [
            ({"model__safetensors": _file({})}, "missing config.json"),
            ({"config__json": b"{}"}, "no model.safetensors.index.json and no"),
            ({"config__json": b"{"}, "config.json is not JSON"),
            ({"config__json": b"[]"}, "not a JSON object"),
            ({"config__json": b"\xff"}, "not JSON: .utf-8"),
        ],
    )
    def test_says_what_is_wrong(self, tmp_path: Path, files: dict[str, bytes], words: str) -> None:
        with pytest.raises(CheckpointUnreadableError, match=words):
            Checkpoint.open(self._folder(tmp_path, **files))

    @pytest.mark.parametrize("index", [b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}'])
    def test_an_index_without_a_map_is_reported(self, tmp_path: Path, index: bytes) -> None:
        (tmp_path / "model.safetensors.index.json").write_bytes(index)
        with pytest.raises(CheckpointUnreadableError, match="no weight_map"):
            Checkpoint.open(self._folder(tmp_path, config__json=b"{}"))

    def test_a_tensor_in_two_shards_is_reported(self, tmp_path: Path) -> None:
        data = save({"model.norm.a": np.zeros(1)}), save({"norm.a": np.zeros(1)})
        (tmp_path / "one.safetensors").write_bytes(data[0])
        (tmp_path / "two.safetensors").write_bytes(data[1])
        with pytest.raises(CheckpointUnreadableError, match=r"norm\.a is in"):
            Checkpoint.open(self._folder(tmp_path, config__json=b"{}"))
