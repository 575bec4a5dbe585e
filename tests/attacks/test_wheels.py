"""Boundary: wheels and source archives. An index serves them; a lock says which, not how good.

One that no installer should take ends in an error with its name, also out of a worker process.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest

from tests.support.wheels import Member, write_wheel
from vllm_forge.images import store
from vllm_forge.images.store import write_layer
from vllm_forge.images.wheels import PUBLISHED_WRONG, merge, wheel_entries
from vllm_forge.sources import SourceRepo, sdist
from vllm_forge.sources.errors import SdistError, WheelError
from vllm_forge.sources.wheel_format import record_row

PYTHON = "3.13"


def wheel(folder: Path, *members: Member, entry_points: str = "") -> Path:
    path = folder / "tiny-1.0-py3-none-any.whl"
    return write_wheel(
        path, "tiny", "1.0", (Member(path="tiny.py"), *members), entry_points=entry_points
    )


def rewritten(folder: Path, change: dict[str, bytes | None]) -> Path:
    """A wheel with other bytes for some members; None leaves one out."""
    good = wheel(folder)
    with zipfile.ZipFile(good) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(good, "w") as archive:
        for name, content in (contents | change).items():
            if content is not None:
                archive.writestr(name, content)
    return good


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "../outside.py", "tiny/../../outside.py", "tiny/a\nb.py", "tiny/a\x1b[2J.py",
        "tiny\\b.py", "other-1.0.dist-info/METADATA", "tiny-1.0.data/scripts/../../x",
        "tiny-1.0.data/unknown/x.py", "tiny/\u202egnp.py", f"{'x' * 256}.py", "x/" * 600 + "x.py",
    ],
    ids=lambda name: repr(name[:30]),
)  # fmt: skip
def test_member_name_is_refused(name: str, tmp_path: Path) -> None:
    refuse(wheel(tmp_path, Member(path=name, content=b"x")))


def test_file_below_another_file_is_refused(tmp_path: Path) -> None:
    """Of one wheel, or of two."""
    path = wheel(tmp_path, Member(path="tiny.py/a/x.py", content=b"x"))
    with pytest.raises(WheelError, match=r"tiny\.py/a/x\.py is below another file"):
        merge([wheel_entries(path, PYTHON)])


@pytest.mark.parametrize(
    "text",
    [
        "[console_scripts]\nx = a:b;c\n", "[console_scripts]\nx = a\n", "[console_scripts]\nx =\n",
        "no section\n", "[console_scripts]\nx = a:b\nx = a:c\n", "[console_scripts]\n../x = a:b\n",
        "[console_scripts]\n/bin/sh = a:b\n",
    ],
)  # fmt: skip
def test_entry_point_is_refused(text: str, tmp_path: Path) -> None:
    refuse(wheel(tmp_path, entry_points=text))


@pytest.mark.parametrize(
    "change",
    [
        {"tiny-1.0.dist-info/RECORD": None}, {"tiny-1.0.dist-info/WHEEL": None},
        {"tiny-1.0.dist-info/RECORD": b"tiny.py,sha256\n"},
        {"tiny-1.0.dist-info/RECORD": b"\xff\xfe"}, {"tiny-1.0.dist-info/WHEEL": b"\xff"},
        {"tiny-1.0.dist-info/WHEEL": b"Wheel-Version: 9.0\nRoot-Is-Purelib: true\n"},
        {"tiny-1.0.dist-info/WHEEL": b"nothing"},
    ],
    ids=repr,
)  # fmt: skip
def test_metadata_is_refused(change: dict[str, bytes | None], tmp_path: Path) -> None:
    refuse(rewritten(tmp_path, change))


def test_duplicate_member_is_refused(tmp_path: Path) -> None:
    path = wheel(tmp_path)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("tiny.py", b"other")
    refuse(path)
    with pytest.raises(WheelError, match=r"duplicate in the archive: tiny\.py"):
        wheel_entries(path, PYTHON)


ROW = b"tiny.py,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0\n"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (ROW, b"", "tiny.py is not mentioned in RECORD"),
        (ROW, ROW + ROW, "duplicate in RECORD: tiny.py"),
        (ROW, ROW + b"gone.py,sha256=x,1\n", "in RECORD but not in the archive: gone.py"),
        (ROW, b"tiny.py,,\n", "hash / size of tiny.py is not included in RECORD"),
    ],
)
def test_record_of_other_files_is_refused(
    old: bytes, new: bytes, words: str, tmp_path: Path
) -> None:
    name = "tiny-1.0.dist-info/RECORD"
    with zipfile.ZipFile(wheel(tmp_path)) as archive:
        record = archive.read(name)
    assert old in record
    path = rewritten(tmp_path, {name: record.replace(old, new)})
    with pytest.raises(WheelError) as refused:
        wheel_entries(path, PYTHON)
    assert words in refused.value.what


SCRIPT = "tiny-1.0.data/scripts/tool"


@pytest.mark.parametrize("name", ["tiny.py", SCRIPT])
@pytest.mark.parametrize("recorded", [f"sha256={'A' * 43}", "md5=1B2M2Y8AsgTpgAmY7PhCfg"])
def test_file_with_another_hash_than_its_record_is_refused(
    name: str, recorded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image's RECORD would say so of a file that is as the wheel's author wants it."""
    path = wheel(tmp_path, Member(path=SCRIPT, content=b"#!python\n"))
    rows = "tiny-1.0.dist-info/RECORD"
    with zipfile.ZipFile(path) as archive:
        record, content = archive.read(rows), archive.read(name)
    good = record_row(content)[0].encode()
    assert good in record
    write_layer("good", wheel_entries(path, PYTHON), 0)
    with zipfile.ZipFile(path) as archive:
        contents = {item: archive.read(item) for item in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for item, old in contents.items():
            archive.writestr(item, record.replace(good, recorded.encode()) if item == rows else old)
    with pytest.raises(WheelError) as refused:
        write_layer("bad", wheel_entries(path, PYTHON), 0)
    assert refused.value.where == str(path)
    assert name in refused.value.what
    assert store.stored("bad") is None
    monkeypatch.setitem(PUBLISHED_WRONG, recorded, good.decode())
    if name != SCRIPT:
        write_layer("excepted", wheel_entries(path, PYTHON), 0)


def test_file_that_is_not_a_wheel_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    for content in (b"", b"PK", b"x" * 100):
        path.write_bytes(content)
        refuse(path)


def refuse(path: Path) -> None:
    with pytest.raises(WheelError) as refused:
        wheel_entries(path, PYTHON)
    assert refused.value.where == str(path)
    # As a worker process sends it.
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)  # noqa: S301


def archive_of(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)) if member.isfile() else None)
    return path


def member(name: str, size: int = 1, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


@pytest.mark.parametrize(
    "bad",
    [
        member("/etc/passwd"), member("top/../../x"), member("other/x"), member("top/\udcff.py"),
        member("top/fifo", 0, tarfile.FIFOTYPE), member("top/sda", 0, tarfile.BLKTYPE),
        member("top/hard", 0, tarfile.LNKTYPE), member("top/bomb", 3000),
    ],
    ids=lambda info: repr(info.name),
)  # fmt: skip
def test_source_archive_is_refused(
    bad: tarfile.TarInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdist, "MOST", 2000)
    repo = SourceRepo(tmp_path / "sources.git")
    path = archive_of(tmp_path / "x.tar.gz", member("top/good"), bad)
    with pytest.raises(SdistError) as refused:
        repo.import_archive("1.0", path)
    assert refused.value.where == str(path)
    assert repo.tree("1.0") is None
