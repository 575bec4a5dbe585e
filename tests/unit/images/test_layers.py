"""A layer is what pip would install, a valid gzip'd tar, and a function of its wheels alone."""

from __future__ import annotations

import base64
import csv
import dataclasses
import gzip
import hashlib
import importlib.util
import io
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.wheels import COMPRESSIBLE, Member, write_vllm_wheel, write_wheel
from vllm_forge.errors import ForgeError
from vllm_forge.host.errors import CacheError
from vllm_forge.images import store
from vllm_forge.images.layer import LayerWriter, file_header
from vllm_forge.images.store import StoredLayer, require_stored, stored, write_layer
from vllm_forge.images.wheels import VENV, Entry, merge, site_packages, wheel_entries
from vllm_forge.sources.errors import HashMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EPOCH = 1735689600
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
SITE = site_packages(PYTHON)
ENTRY_POINTS = """\
[console_scripts]
tiny = tiny.main:run
[gui_scripts]
tiny-gui = tiny.main:run
"""
LONG_NAME = "n" * 150 + ".py"
DEEP = "/".join(["deep" * 10] * 8) + "/leaf.py"
MEMBERS = (
    Member(path="tiny/__init__.py"),
    Member(path="tiny/main.py", content=b"def run() -> None:\n    print('ran')\n"),
    Member(path="tiny/native.so", content=b"\x7fELF" + COMPRESSIBLE, mode=0o755),
    Member(path="tiny/noise.bin", content=hashlib.sha256(b"").digest() * 40, stored=True),
    Member(path="tiny/stored-empty", stored=True),
    Member(path="tiny/block.bin", content=b"x" * 512),
    Member(path="tiny/large.bin", content=bytes(range(256)) * 1000),
    Member(path="tiny/large-stored.bin", content=bytes(range(256)) * 600, stored=True),
    Member(path="tiny/world-writable.py", content=b"pass\n", mode=0o666),
    Member(path="tiny/secret.py", content=b"pass\n", mode=0o600),
    Member(path="tiny/group-executable", content=b"pass\n", mode=0o654),
    Member(path="tiny/caf\u00e9/\u540d\u524d.py", content=b"pass\n"),
    Member(path="tiny/with space, comma.py", content=b"pass\n"),
    Member(path="tiny.py", content=b"sorts between tiny and tiny/\n"),
    Member(path="tiny-extra/x.py", content=b"pass\n"),
    Member(path=f"tiny/{LONG_NAME}", content=b"pass\n"),
    Member(path=f"tiny/{DEEP}", content=b"pass\n"),
    Member(path="tiny-1.0.data/scripts/tiny-tool", content=b"#!python\nprint('t')\n", mode=0o755),
    Member(path="tiny-1.0.data/scripts/tiny-sh", content=b"#!/bin/sh\necho sh\n", mode=0o755),
    Member(path="tiny-1.0.data/data/share/tiny/note.txt", content=b"a note\n"),
    Member(path="tiny-1.0.data/data/etc/tiny.conf", content=b"a = 1\n"),
    Member(path="tiny-1.0.data/purelib/tiny_pure.py", content=b"pass\n"),
    Member(path="tiny-1.0.data/platlib/tiny_plat.py", content=b"pass\n"),
)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "wheels" / "tiny-1.0-py3-none-any.whl"
    return write_wheel(path, "tiny", "1.0", MEMBERS, entry_points=ENTRY_POINTS)


def entries_of(*paths: Path) -> list[Entry]:
    return merge(wheel_entries(path, PYTHON) for path in paths)


@pytest.fixture
def layer(wheel: Path) -> StoredLayer:
    return write_layer("key", entries_of(wheel), EPOCH)


def members(layer: StoredLayer) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(layer.blob.path, "r:gz") as tar:
        found = tar.getmembers()
    assert len({member.name for member in found}) == len(found)
    return {member.name: member for member in found}


def content(layer: StoredLayer, name: str) -> bytes:
    with tarfile.open(layer.blob.path, "r:gz") as tar:
        file = tar.extractfile(name)
        assert file is not None
        return file.read()


# --- the blob ------------------------------------------------------------------------------------


def test_blob_is_gzip_and_its_names_are_right(layer: StoredLayer) -> None:
    blob = layer.blob.path.read_bytes()
    tar = gzip.decompress(blob)
    assert layer.blob.digest == hashlib.sha256(blob).hexdigest()
    assert layer.blob.diff_id == hashlib.sha256(tar).hexdigest()
    assert layer.blob.size == len(blob)
    assert len(tar) % 512 == 0
    assert tar.endswith(bytes(1024))
    # Nothing of the host in any of the gzip headers: no time, no name.
    assert blob[:10] == b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"


@pytest.mark.parametrize("tool", ["gzip", "pigz", "tar"])
def test_other_readers_take_it(tool: str, layer: StoredLayer) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    test = ["-tzf"] if tool == "tar" else ["-t"]
    done = subprocess.run(
        [tool, *test, str(layer.blob.path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_damaged_blob_is_not_taken(layer: StoredLayer) -> None:
    """The readers above do look at the content."""
    blob = bytearray(layer.blob.path.read_bytes())
    blob[len(blob) // 2] ^= 1
    with pytest.raises((OSError, EOFError, zlib.error)):
        gzip.decompress(bytes(blob))


def test_deflated_members_are_not_compressed_again(layer: StoredLayer, wheel: Path) -> None:
    blob = layer.blob.path.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        info = archive.getinfo("tiny/native.so")
    raw = wheel.read_bytes()
    start = info.header_offset + 30 + len(info.filename)
    assert blob.count(raw[start : start + info.compress_size]) == 1


def test_every_entry_is_roots_and_of_the_epoch(layer: StoredLayer) -> None:
    for member in members(layer).values():
        assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
        assert member.mtime == EPOCH
        assert not member.name.startswith(("/", "./"))


def test_folders_come_before_what_they_hold(layer: StoredLayer) -> None:
    seen: set[str] = set()
    for name, member in members(layer).items():
        parent = str(Path(name).parent)
        assert parent == "." or parent in seen
        if member.isdir():
            assert member.mode == 0o755
            seen.add(name)


def test_content_of_every_kind_of_member(layer: StoredLayer) -> None:
    for member in MEMBERS:
        if ".data/" not in member.path:
            assert content(layer, f"{SITE}/{member.path}") == member.content
    assert content(layer, f"{VENV}/share/tiny/note.txt") == b"a note\n"


def test_unpacked_copy_is_the_layer(layer: StoredLayer) -> None:
    inside = members(layer)
    on_disk = {path.relative_to(layer.files).as_posix() for path in layer.files.rglob("*")}
    assert on_disk == set(inside)
    for name, member in inside.items():
        path = layer.files / name
        assert stat.S_IMODE(path.lstat().st_mode) == member.mode
        if member.isfile():
            assert path.read_bytes() == content(layer, name)


def test_links() -> None:
    entries = [
        Entry(path="a/file", content=b"x"),
        Entry(path="a/link", mode=0o777, link="file"),
        Entry(path="b", mode=0o777, link="a"),
    ]
    layer = write_layer("links", entries, EPOCH)
    assert members(layer)["a/link"].linkname == "file"
    assert members(layer)["b"].issym()
    assert (layer.files / "b" / "link").read_bytes() == b"x"


def test_layer_writer_alone(tmp_path: Path) -> None:
    """Folder, link, stored data above one block: as tarfile reads them."""
    (tmp_path / "files" / "d").mkdir(parents=True)
    writer = LayerWriter(tmp_path, EPOCH)
    big = os.urandom(200_000)
    writer.directory("d", 0o750)
    writer.data("d/big", big, 0o640)
    writer.data("d/empty", b"")
    writer.symlink("d/sym", "big")
    blob = writer.close()
    assert blob.digest == hashlib.sha256(blob.path.read_bytes()).hexdigest()
    with tarfile.open(blob.path, "r:gz") as tar:
        assert tar.getnames() == ["d", "d/big", "d/empty", "d/sym"]
        assert [member.mode for member in tar][:2] == [0o750, 0o640]
        file = tar.extractfile("d/big")
        assert file is not None
        assert file.read() == big == (tmp_path / "files" / "d" / "sym").read_bytes()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A write that passes it is done in part, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_file_that_is_written_in_part_is_refused(tmp_path: Path) -> None:
    big = Member(path="tiny/big.bin", content=bytes(1 << 20))
    wheel = write_wheel(tmp_path / "tiny-1.0-py3-none-any.whl", "tiny", "1.0", (big,))
    with largest_file(100_000), pytest.raises(OSError, match="too large"):
        write_layer("key", entries_of(wheel), EPOCH)
    assert stored("key") is None
    (tmp_path / "files").mkdir()
    with largest_file(100_000), LayerWriter(tmp_path, EPOCH) as writer:  # noqa: SIM117
        with pytest.raises(OSError, match="too large"):
            writer.data("big", bytes(1 << 20))


def test_empty_layer() -> None:
    layer = write_layer("empty", [], EPOCH)
    assert members(layer) == {}
    assert gzip.decompress(layer.blob.path.read_bytes()) == bytes(1024)


# --- a function of the wheels --------------------------------------------------------------------


def other_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(folder))


def test_same_bytes_twice(
    layer: StoredLayer, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_cache(monkeypatch, tmp_path / "other")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    copy = tmp_path / "elsewhere" / wheel.name
    copy.parent.mkdir()
    shutil.copyfile(wheel, copy)
    again = write_layer("another-key", entries_of(copy), EPOCH)
    assert again.blob.path != layer.blob.path
    assert again.blob.path.read_bytes() == layer.blob.path.read_bytes()


@pytest.mark.parametrize("size", [0, 7, 512, 8**11 - 1, 8**11])
@pytest.mark.parametrize("mode", [0o644, 0o755])
@pytest.mark.parametrize("path", ["a", "a/b.py", "a" * 100, "a" * 101, "a/é.py", "dir/" * 60 + "a"])
def test_header_of_a_file_is_as_tarfile_writes_it(path: str, mode: int, size: int) -> None:
    info = tarfile.TarInfo(path)
    info.mode, info.size, info.mtime = mode, size, EPOCH
    expected = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
    assert file_header(path, size, mode, EPOCH) == expected


def test_same_bytes_whatever_is_read_at_a_time(
    layer: StoredLayer, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_cache(monkeypatch, tmp_path / "other")
    monkeypatch.setattr(store, "CHUNK", 777)
    again = write_layer("key", entries_of(wheel), EPOCH)
    assert again.blob.digest == layer.blob.digest
    assert again.blob.diff_id == layer.blob.diff_id


@pytest.mark.parametrize("umask", [0o000, 0o027, 0o077])
def test_umask_changes_neither_blob_nor_files(
    umask: int, layer: StoredLayer, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks run as another user on the unpacked files: they must be able to read them."""
    other_cache(monkeypatch, tmp_path / "other")
    old = os.umask(umask)
    try:
        again = write_layer("key", entries_of(wheel), EPOCH)
    finally:
        os.umask(old)
    assert again.blob.digest == layer.blob.digest
    for path in (again.files, *again.files.rglob("*")):
        reference = layer.files / path.relative_to(again.files)
        assert stat.S_IMODE(path.lstat().st_mode) == stat.S_IMODE(reference.lstat().st_mode)


def test_other_epoch_other_layer(layer: StoredLayer, wheel: Path) -> None:
    assert write_layer("later", entries_of(wheel), EPOCH + 1).blob.digest != layer.blob.digest


def test_a_stored_layer_is_not_written_again(layer: StoredLayer, wheel: Path) -> None:
    before = layer.blob.path.stat()
    wheel.unlink()
    assert write_layer("key", [], 0) == layer
    assert stored("key") == layer
    assert layer.blob.path.stat().st_mtime_ns == before.st_mtime_ns


# --- as pip installs it --------------------------------------------------------------------------


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """The wheel in a virtual environment, by pip."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not in this environment")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    empty = {path.relative_to(venv) for path in venv.rglob("*")}
    old = os.umask(0o022)
    try:
        subprocess.run(
            [
                sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install",
                "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel),
            ],
            check=True,
        )  # fmt: skip
    finally:
        os.umask(old)
    for path in sorted(empty, reverse=True):  # leave what the wheel has put there
        inner = venv / path
        if inner.is_symlink() or inner.is_file():
            inner.unlink()
        elif not any(inner.iterdir()):
            inner.rmdir()
    return venv


def test_layer_is_what_pip_installs(layer: StoredLayer, installed: Path) -> None:
    info = f"lib/python{PYTHON}/site-packages/tiny-1.0.dist-info"
    # How a wheel came here: pip's notes about the command line, not about the wheel.
    notes = {f"{info}/REQUESTED", f"{info}/direct_url.json"}
    by_pip = {
        path.relative_to(installed).as_posix(): path
        for path in installed.rglob("*")
        if path.is_file()
    }
    inside = {
        name.removeprefix(f"{VENV}/"): member
        for name, member in members(layer).items()
        if member.isfile()
    }
    assert set(inside) == set(by_pip) - notes
    generated = {"bin/tiny", "bin/tiny-gui"}  # pip and installer word them differently
    for name, member in inside.items():
        path = by_pip[name]
        assert bool(member.mode & 0o111) == bool(path.stat().st_mode & 0o111)
        assert member.mode & 0o022 == 0
        if name in generated | {f"{info}/RECORD", f"{info}/INSTALLER"}:
            continue
        expected = path.read_bytes().replace(
            f"#!{installed}/bin/python".encode(), f"#!/{VENV}/bin/python".encode()
        )
        assert content(layer, f"{VENV}/{name}") == expected
    for name in generated:
        text = content(layer, f"{VENV}/{name}").decode()
        assert text.startswith(f"#!/{VENV}/bin/python\n")
        compile(text, name, "exec")
        assert "from tiny.main import run" in text
    assert content(layer, f"{VENV}/{info}/INSTALLER") == b"vllm-forge\n"


def test_record_lists_every_file_with_its_hash(layer: StoredLayer) -> None:
    record = f"{SITE}/tiny-1.0.dist-info/RECORD"
    rows = list(csv.reader(io.StringIO(content(layer, record).decode())))
    listed = {}
    for path, digest, size in rows:
        listed[os.path.normpath(f"{SITE}/{path}")] = (digest, size)
    files = {name for name, member in members(layer).items() if member.isfile()}
    assert set(listed) == files
    assert listed.pop(record) == ("", "")
    for name, (digest, size) in listed.items():
        data = content(layer, name)
        value = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        assert (digest, size) == (f"sha256={value}", str(len(data)))


def test_vllm_like_wheel(tmp_path: Path) -> None:
    wheel = write_vllm_wheel(tmp_path, {"vllm/main.py": b"def main(): ...\n"})
    paths = {entry.path: entry for entry in wheel_entries(wheel, "3.13")}
    site = site_packages("3.13")
    assert site == "opt/venv/lib/python3.13/site-packages"
    assert paths["opt/venv/bin/vllm"].mode == 0o755
    assert paths["opt/venv/bin/vllm-tool"].mode == 0o755
    assert paths["opt/venv/bin/vllm-tool"].content == b"#!/opt/venv/bin/python\nprint('tool')\n"
    assert paths["opt/venv/share/vllm/note.txt"].mode == 0o644
    assert paths[f"{site}/vllm/_C.abi3.so"].mode == 0o755


def test_script_is_executable_even_if_the_zip_forgot(tmp_path: Path) -> None:
    """As the wheel format asks for; pip leaves such a script as it is."""
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    script = Member(path="tiny-1.0.data/scripts/tool", content=b"#!python\n", mode=0o644)
    write_wheel(path, "tiny", "1.0", [script])
    modes = {entry.path: entry.mode for entry in wheel_entries(path, PYTHON)}
    assert modes[f"{VENV}/bin/tool"] == 0o755


ESCAPES = {
    "a module": "../../../../../etc/evil.py",
    "data": "tiny-1.0.data/data/../../../etc/evil",
    "a script": "tiny-1.0.data/scripts/../../../etc/evil",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_wheel_that_leaves_the_environment_is_rejected(
    name: str, tmp_path: Path, cache: Path
) -> None:
    """pip refuses such a wheel; nothing may be written outside of ``files`` either."""
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    write_wheel(path, "tiny", "1.0", [Member(path=ESCAPES[name], content=b"evil\n")])
    before = {item for item in tmp_path.rglob("*") if "locks" not in item.parts}
    with pytest.raises(ForgeError) as refused:
        write_layer("evil", entries_of(path), EPOCH)
    assert "evil" in str(refused.value)
    after = {item for item in tmp_path.rglob("*") if "locks" not in item.parts}
    assert {item for item in after - before if item.is_file()} == set()


# --- several wheels ------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[bytes, bytes], list[list[Entry]]]:
    """Two wheels that both have ``shared/x.py``."""

    def write(one: bytes, two: bytes) -> list[list[Entry]]:
        made = []
        for name, data in (("first", one), ("second", two)):
            path = tmp_path / f"{name}-1.0-py3-none-any.whl"
            own = Member(path=f"{name}.py", content=b"pass\n")
            write_wheel(path, name, "1.0", [Member(path="shared/x.py", content=data), own])
            made.append(wheel_entries(path, PYTHON))
        return made

    return write


def test_equal_duplicates_merge(pair: Callable[[bytes, bytes], list[list[Entry]]]) -> None:
    groups = pair(b"same\n", b"same\n")
    merged = merge(groups)
    assert len(merged) == sum(map(len, groups)) - 1
    assert [entry.path for entry in merged] == sorted(entry.path for entry in merged)


@pytest.mark.parametrize("order", [1, -1])
def test_later_wheel_wins_a_conflict(
    order: int, pair: Callable[[bytes, bytes], list[list[Entry]]]
) -> None:
    groups = pair(b"one\n", b"two\n")[::order]
    merged = merge(groups)
    layer = write_layer("merged", merged, EPOCH)
    expected = b"two\n" if order == 1 else b"one\n"
    assert content(layer, f"{SITE}/shared/x.py") == expected


# --- broken wheels, killed writers, damaged stores -----------------------------------------------


def wrong_crc(entry: Entry) -> Entry:
    assert entry.member is not None
    info = zipfile.ZipInfo.from_file(__file__, entry.member.filename)
    for field in zipfile.ZipInfo.__slots__:
        if hasattr(entry.member, field):
            setattr(info, field, getattr(entry.member, field))
    info.CRC ^= 1
    return dataclasses.replace(entry, member=info)


def span(wheel: Path, name: str) -> tuple[int, int]:
    with zipfile.ZipFile(wheel) as archive:
        info = archive.getinfo(name)
    start = info.header_offset + 30 + len(info.filename.encode())
    return start, start + info.compress_size


def flip(wheel: Path, name: str, where: float) -> None:
    start, end = span(wheel, name)
    blob = bytearray(wheel.read_bytes())
    blob[int(start + (end - 1 - start) * where)] ^= 0x10
    wheel.write_bytes(blob)


def assert_nothing_of(key: str, cache: Path) -> None:
    assert stored(key) is None
    assert list((cache / "layers").iterdir()) == []


@pytest.mark.parametrize("name", ["tiny/native.so", "tiny/noise.bin"])
def test_wrong_crc_in_the_directory_is_rejected(name: str, wheel: Path, cache: Path) -> None:
    entries = [
        wrong_crc(entry) if entry.path == f"{SITE}/{name}" else entry for entry in entries_of(wheel)
    ]
    with pytest.raises(HashMismatchError, match=name):
        write_layer("key", entries, EPOCH)
    assert_nothing_of("key", cache)


@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", ["tiny/native.so", "tiny/noise.bin"])
def test_wheel_changed_after_verification_is_rejected(
    name: str, where: float, wheel: Path, cache: Path
) -> None:
    entries = entries_of(wheel)
    flip(wheel, name, where)
    with pytest.raises(HashMismatchError) as refused:
        write_layer("key", entries, EPOCH)
    assert str(wheel) in str(refused.value)
    assert_nothing_of("key", cache)


def test_truncated_wheel_is_rejected(wheel: Path, cache: Path) -> None:
    entries = entries_of(wheel)
    wheel.write_bytes(wheel.read_bytes()[: span(wheel, "tiny/large.bin")[0] + 10])
    with pytest.raises(HashMismatchError):
        write_layer("key", entries, EPOCH)
    assert_nothing_of("key", cache)


def test_bytes_behind_the_deflate_stream_are_rejected(wheel: Path, cache: Path) -> None:
    """In the layer, a gzip reader would take them for the start of a member."""
    (entry,) = [item for item in entries_of(wheel) if item.path == f"{SITE}/tiny/native.so"]
    assert entry.member is not None
    entry.member.compress_size += 3
    with pytest.raises(HashMismatchError):
        write_layer("key", [entry], EPOCH)
    assert_nothing_of("key", cache)


KILLED = """
import sys, pathlib
from vllm_forge.images import store
from vllm_forge.images.wheels import merge, wheel_entries
real = store._add

def slow(layer, entry, *args, **kwargs):
    real(layer, entry, *args, **kwargs)
    if entry.path.endswith("tiny/native.so"):
        print("half", flush=True)
        sys.stdin.read()

store._add = slow
entries = merge([wheel_entries(pathlib.Path(sys.argv[1]), sys.argv[2])])
store.write_layer("key", entries, int(sys.argv[3]))
"""


def test_killed_writer_leaves_no_layer(
    wheel: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(wheel), PYTHON, str(EPOCH)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == "half\n"
        (aside,) = (cache / "layers").iterdir()
        assert aside.name.startswith(".tmp-key-")
        assert stored("key") is None
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert stored("key") is None
    after = write_layer("key", entries_of(wheel), EPOCH)
    assert [path.name for path in (cache / "layers").iterdir()] == ["key"]
    other_cache(monkeypatch, tmp_path / "other")
    assert write_layer("key", entries_of(wheel), EPOCH).blob.digest == after.blob.digest


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no blob": lambda folder: (folder / "layer.tar.gz").unlink(),
    "blob of another size": lambda folder: (folder / "layer.tar.gz").write_bytes(b"x"),
    "no record": lambda folder: (folder / "layer.json").unlink(),
    "record that is not JSON": lambda folder: (folder / "layer.json").write_text("{"),
    "record without a field": lambda folder: (folder / "layer.json").write_text("{}"),
    "record with another field": lambda folder: (folder / "layer.json").write_text(
        json.dumps(json.loads((folder / "layer.json").read_text()) | {"more": 1})
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_layer_is_written_again(name: str, layer: StoredLayer, wheel: Path) -> None:
    DAMAGE[name](layer.blob.path.parent)
    assert stored("key") is None
    with pytest.raises(CacheError, match="not in the cache, or is damaged"):
        require_stored("key")
    assert write_layer("key", entries_of(wheel), EPOCH) == layer
