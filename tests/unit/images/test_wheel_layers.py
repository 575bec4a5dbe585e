"""Foreign device code becomes zeros: all of it, nothing else, and every record says so."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import random
import shutil
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fatbins import entry as code
from tests.support.fatbins import fatbin, library
from tests.support.wheels import Member, write_wheel
from vllm_forge.images import store
from vllm_forge.images.content import wheel_groups
from vllm_forge.images.layer import ZSTD
from vllm_forge.images.record import RecordedLayer, recorded_layers
from vllm_forge.images.store import (
    LEAST,
    StoredLayer,
    may_hold_code,
    ranges_of,
    stored,
    write_layer,
)
from vllm_forge.images.wheel_layers import cut, pieces, update_record, write_slim_layer
from vllm_forge.images.wheels import Entry, site_packages, wheel_entries
from vllm_forge.kernels.coverage.device_code import device_code, runs_on
from vllm_forge.kernels.coverage.library import library_code
from vllm_forge.kernels.errors import UnknownFatbinError
from vllm_forge.project import Project
from vllm_forge.sources.errors import WheelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

EPOCH = 1735689600
PYTHON = "3.13"
SITE = site_packages(PYTHON)
LIBRARY = f"{SITE}/tiny/libtiny.so.1"
RECORD = f"{SITE}/tiny-1.0.dist-info/RECORD"
CAPABILITIES = [(9, 0), (10, 0), (10, 3), (12, 0)]


def payload(mark: int, size: int = 4096) -> bytes:
    return bytes([mark]) * size


# Each payload has a byte of its own, so that what is left can be read off.
TINY = (
    library(
        fatbin(
            code("cubin", "80", payload(1)),
            code("cubin", "90a", payload(2)),
            code("cubin", "100f", payload(3)),
            code("cubin", "103a", payload(4)),
            code("ptx", "120", payload(5)),
        ),
        fatbin(code("cubin", "100", payload(6)), code("ptx", "80", payload(7))),
        fatbin(code("cubin", "120", payload(8))),
    )
    + bytes([0xEE]) * LEAST
)  # so large that it is looked into
STAY = {(9, 0): {2, 7}, (10, 0): {3, 6, 7}, (10, 3): {3, 4, 6, 7}, (12, 0): {5, 7, 8}}


def marks(content: bytes) -> set[int]:
    return {mark for mark in range(1, 9) if payload(mark) in content}


@pytest.fixture
def whole(tmp_path: Path) -> StoredLayer:
    wheel = write_wheel(
        tmp_path / "tiny-1.0-py3-none-any.whl",
        "tiny",
        "1.0",
        (
            Member(path="tiny/__init__.py"),
            Member(path="tiny/libtiny.so.1", content=TINY, mode=0o755),
            Member(path="tiny/libhost.so", content=library() + bytes(LEAST)),
            Member(path="tiny/data.so.bin", content=b"no ELF" + bytes(LEAST)),
        ),
    )
    entries = sorted(wheel_entries(wheel, PYTHON), key=lambda entry: entry.path)
    return write_layer("whole", entries, EPOCH, code_apart=True)


def slim(whole: StoredLayer, capability: tuple[int, int] = (10, 3)) -> StoredLayer:
    return write_slim_layer(f"slim-{capability}", whole, capability, EPOCH)


def unpacked(layer: StoredLayer) -> dict[str, tuple[int, bytes]]:
    plain = zstandard.ZstdDecompressor().decompressobj().decompress(layer.blob.path.read_bytes())
    assert hashlib.sha256(plain).hexdigest() == layer.blob.diff_id
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        return {
            member.name: (member.mode, file.read())
            for member in tar
            if (file := tar.extractfile(member)) is not None
        }


# --- what is cut ---------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_foreign_code_is_zeroed_and_runnable_code_stays(capability: tuple[int, int]) -> None:
    ranges, targets = cut(ranges_of(device_code(TINY)), capability)
    content = b"".join(pieces(TINY, ranges))
    assert len(content) == len(TINY)
    assert marks(content) == STAY[capability]
    removed = sum(size for _, size in ranges)
    assert removed == 4096 * (8 - len(STAY[capability])) == sum(targets.values())
    # Headers are as they were: the driver reads the same list of targets.
    assert device_code(content) == device_code(TINY)
    assert {c.target for c in device_code(content)} == {c.target for c in device_code(TINY)}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_byte_outside_foreign_code_changes(capability: tuple[int, int]) -> None:
    content = b"".join(pieces(TINY, cut(ranges_of(device_code(TINY)), capability)[0]))
    expected = bytearray(TINY)
    for found in device_code(TINY):
        if not runs_on(found.target, found.kind, capability):
            expected[found.offset : found.offset + found.size] = bytes(found.size)
    assert content == bytes(expected)


@given(st.binary(max_size=400), st.lists(st.integers(0, 40), max_size=10))
def test_pieces_are_the_file_with_zeros(content: bytes, steps: list[int]) -> None:
    ranges, at = [], 0
    for gap, size in zip(steps[::2], steps[1::2], strict=False):
        if at + gap + size <= len(content):
            ranges.append((at + gap, size))
            at += gap + size
    expected = bytearray(content)
    for start, size in ranges:
        expected[start : start + size] = bytes(size)
    assert b"".join(pieces(content, ranges)) == bytes(expected)


def test_only_large_shared_libraries_are_looked_into() -> None:
    assert may_hold_code("a/libx.so", LEAST)
    assert may_hold_code("a/libx.so.13.1", LEAST)
    assert not may_hold_code("a/libx.so", LEAST - 1)
    assert not may_hold_code("a.so/libx.a", LEAST)


# --- the group's layer, without the libraries ----------------------------------------------------


def test_each_member_is_inflated_once(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those too that are looked into and have no device code, which were inflated twice."""
    inflated, inflate = [], store._inflated

    def noted(entry: Entry, raw: Iterable[bytes]) -> Iterator[bytes]:
        inflated.append(entry.path)
        return inflate(entry, raw)

    monkeypatch.setattr(store, "_inflated", noted)
    layer: StoredLayer = request.getfixturevalue("whole")
    members = [f"{SITE}/tiny/{name}" for name in ("__init__.py", "libhost.so", "data.so.bin")]
    assert {*members, LIBRARY} <= set(inflated)
    assert len(inflated) == len(set(inflated))
    assert (layer.files / f"{SITE}/tiny/libhost.so").read_bytes() == library() + bytes(LEAST)
    assert not (layer.code / f"{SITE}/tiny/libhost.so").exists()


def test_libraries_with_code_are_apart(whole: StoredLayer) -> None:
    assert (whole.code / LIBRARY).read_bytes() == TINY
    assert (whole.code / LIBRARY).stat().st_mode & 0o777 == 0o755
    assert not (whole.files / LIBRARY).exists()
    with tarfile.open(whole.blob.path, "r:gz") as tar:
        names = {name.rpartition("/")[2] for name in tar.getnames()}
    assert {"libhost.so", "data.so.bin", "RECORD", "__init__.py"} <= names
    assert "libtiny.so.1" not in names


def test_unknown_fatbin_layout_stops_the_layer(tmp_path: Path) -> None:
    broken = bytearray(TINY)
    at = broken.index(b"\x50\xed\x55\xba")
    broken[at + 16] = 99  # the kind of the first entry
    members = (Member(path="tiny/libtiny.so", content=bytes(broken)),)
    wheel = write_wheel(tmp_path / "tiny-1.0-py3-none-any.whl", "tiny", "1.0", members)
    with pytest.raises(UnknownFatbinError, match="kind 99"):
        write_layer("broken", wheel_entries(wheel, PYTHON), EPOCH, code_apart=True)
    assert stored("broken") is None


def test_layer_without_its_libraries_is_not_taken(whole: StoredLayer) -> None:
    shutil.rmtree(whole.code)
    assert stored("whole") is None


# --- the SKU's layer -----------------------------------------------------------------------------


def test_blob_and_unpacked_copy_hold_the_same(whole: StoredLayer) -> None:
    layer = slim(whole)
    found = unpacked(layer)
    assert set(found) == {LIBRARY, RECORD}
    for name, (mode, content) in found.items():
        assert (layer.files / name).read_bytes() == content
        assert (layer.files / name).stat().st_mode & 0o777 == mode
    assert marks(found[LIBRARY][1]) == STAY[10, 3]
    assert found[LIBRARY][0] == 0o755
    assert layer.blob.media_type == ZSTD
    assert layer.blob.digest == hashlib.sha256(layer.blob.path.read_bytes()).hexdigest()
    assert layer.blob.size == layer.blob.path.stat().st_size


def test_record_rows_are_those_of_the_image(whole: StoredLayer) -> None:
    found = unpacked(slim(whole))
    rows = {row[0]: row for row in csv.reader(io.StringIO(found[RECORD][1].decode()))}
    before = {row[0]: row for row in csv.reader(io.StringIO((whole.files / RECORD).read_text()))}
    digest = base64.urlsafe_b64encode(hashlib.sha256(found[LIBRARY][1]).digest()).decode()
    assert rows["tiny/libtiny.so.1"][1] == f"sha256={digest.rstrip('=')}"
    assert rows["tiny/libtiny.so.1"] != before["tiny/libtiny.so.1"]
    assert {k: v for k, v in rows.items() if k != "tiny/libtiny.so.1"} == {
        k: v for k, v in before.items() if k != "tiny/libtiny.so.1"
    }


def test_removed_code_is_recorded_with_the_layer(whole: StoredLayer) -> None:
    layer = slim(whole)
    assert stored("slim-(10, 3)") == layer
    assert layer.removed[LIBRARY]["bytes"] == 4 * 4096
    assert layer.removed[LIBRARY]["targets"] == {
        "cubin 120": 4096, "cubin 80": 4096, "cubin 90a": 4096, "ptx 120": 4096,
    }  # fmt: skip


def test_same_input_same_bytes(whole: StoredLayer) -> None:
    assert slim(whole).blob.digest == write_slim_layer("other", whole, (10, 3), EPOCH).blob.digest
    assert slim(whole).blob.digest != slim(whole, (10, 0)).blob.digest


def test_next_sku_does_not_search_for_device_code(
    whole: StoredLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = slim(whole, (10, 0)).blob.digest

    def search(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(store, "device_code", search)
    assert write_slim_layer("next", whole, (10, 0), EPOCH).blob.digest == digest
    (whole.code / LIBRARY).write_bytes(TINY + b"x")
    with pytest.raises(AssertionError):
        write_slim_layer("changed", whole, (10, 0), EPOCH)


def test_zeros_cost_nothing(whole: StoredLayer) -> None:
    for size in (1 << 20, 8 << 20):
        noise = random.Random(0).randbytes(size)  # noqa: S311 - only must not compress
        (whole.code / LIBRARY).write_bytes(library(fatbin(code("cubin", "75", noise))))
        layer = write_slim_layer(f"noise-{size}", whole, (9, 0), EPOCH)
        assert layer.blob.size < size // 100
        assert (layer.files / LIBRARY).stat().st_blocks * 512 < size // 2


def recorded(layer: StoredLayer, **changes: Any) -> RecordedLayer:
    libraries = {name: row["sha256"] for name, row in layer.removed.items()}
    fields = {"digest": layer.blob.digest, "diff_id": layer.blob.diff_id, "libraries": libraries}
    return RecordedLayer.model_validate(fields | changes)


def test_layer_of_a_record_is_the_same(whole: StoredLayer) -> None:
    before = slim(whole)
    after = write_slim_layer("again", whole, (10, 3), EPOCH, recorded(before))
    assert replace(after.blob, path=before.blob.path) == before.blob
    assert (after.removed, after.unpacked) == (before.removed, before.unpacked)
    # No plain byte is hashed: the digest proves what the record says of them.
    known = recorded(before, diff_id="0" * 64)
    assert write_slim_layer("known", whole, (10, 3), EPOCH, known).blob.diff_id == "0" * 64


@pytest.mark.parametrize("wrong", [{"digest": "0" * 64}, {"libraries": {LIBRARY: "x" * 43}}])
def test_layer_that_differs_from_its_record_is_hashed(
    wrong: dict[str, Any], whole: StoredLayer, capsys: pytest.CaptureFixture[str]
) -> None:
    before = slim(whole)
    row = recorded(before, **{"diff_id": "0" * 64} | wrong)
    after = write_slim_layer("again", whole, (10, 3), EPOCH, row)
    assert replace(after.blob, path=before.blob.path) == before.blob
    assert (after.removed, after.unpacked) == (before.removed, before.unpacked)
    assert "written again: layer again differs from its record" in capsys.readouterr().err


def test_layer_that_differs_from_its_record_is_compared_with_its_wheels(tmp_path: Path) -> None:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    entries = wheel_entries(write_wheel(path, "tiny", "1.0", (Member(path="t.py"),)), PYTHON)
    row = recorded(write_layer("right", entries, EPOCH), digest="0" * 64)
    wrong = [replace(entry, recorded="sha256=" + "0" * 43) for entry in entries]
    with pytest.raises(WheelError, match=r"t\.py has sha256="):
        write_layer("wrong", wrong, EPOCH, recorded=row)
    assert stored("wrong") is None


def test_committed_records_are_of_current_layers(root: Path) -> None:
    project = Project(root)
    for line, row in project.matrix.line.items():
        cells = [project.cell(sku, line) for sku in row.skus]
        groups = [group for cell in cells for group in wheel_groups(cell, project.lock(line))]
        stale = recorded_layers(project, line).keys() - {key for g in groups for key in g.keys}
        assert not stale, f"run: nox -s forge -- wheels record --line {line}"


def test_group_without_code_gives_an_empty_layer(tmp_path: Path) -> None:
    wheel = write_wheel(
        tmp_path / "tiny-1.0-py3-none-any.whl", "tiny", "1.0", (Member(path="tiny.py"),)
    )
    whole = write_layer("pure", wheel_entries(wheel, PYTHON), EPOCH, code_apart=True)
    assert slim(whole).empty
    assert not whole.empty


def test_record_of_untouched_libraries_stays_byte_for_byte() -> None:
    content = b"tiny/a.so,sha256=x,1\r\ntiny-1.0.dist-info/RECORD,,\r\n"
    known: dict[str, Any] = {f"{SITE}/tiny/a.so": {"bytes": 0, "sha256": "y"}}
    assert update_record(content, RECORD, known) == content
    known[f"{SITE}/tiny/a.so"]["bytes"] = 1
    assert update_record(content, RECORD, known).startswith(b"tiny/a.so,sha256=y,1\n")


def test_slim_library_lists_only_kept_code(whole: StoredLayer) -> None:
    """Headers of foreign code are still there; they do not count as code."""
    layer = slim(whole)
    assert set(library_code(layer.files / LIBRARY).code) == {
        "cubin 100", "cubin 100f", "cubin 103a", "ptx 80",
    }  # fmt: skip
    assert len(library_code(whole.code / LIBRARY).code) == 8
